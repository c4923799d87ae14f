// Whether all numbers of a tensor are finite: for each type, wherever the one is that is not.
#include "support/testing.hpp"

#include <lora/weight/finite.hpp>

#include <limits>

TEST_CASE("One number that is not finite is found, wherever it is and however the tensor lies") {
  const auto type = GENERATE(torch::kFloat, torch::kDouble, torch::kBFloat16, torch::kHalf);
  const double infinity = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  torch::manual_seed(0);
  for (const int64_t rows : {1, 7, 70}) {
    for (const int64_t columns : {1, 33, 1000}) {
      INFO(type << " " << rows << " " << columns);
      const auto numbers = torch::randn({rows, columns}, testing::on_device(torch::kFloat)).to(type);
      CHECK(lora::detail::is_finite(numbers));
      for (const double value : {nan, infinity, -infinity}) {
        for (const auto& [row, column] :
             {std::pair<int64_t, int64_t>{0, 0}, {rows / 2, columns / 2}, {rows - 1, columns - 1}}) {
          auto changed = numbers.clone();
          changed[row][column] = value;
          CHECK_FALSE(lora::detail::is_finite(changed));
          CHECK_FALSE(lora::detail::is_finite(changed.t()));
          CHECK_FALSE(lora::detail::is_finite(changed.clone().set_requires_grad(true)));
          if (column > 0) CHECK(lora::detail::is_finite(changed.narrow(1, 0, column)));
        }
      }
    }
  }
}

TEST_CASE("The largest numbers are finite, and so are none and whole ones") {
  for (const auto type : {torch::kFloat, torch::kDouble, torch::kBFloat16, torch::kHalf}) {
    const double largest = type == torch::kHalf ? 65504 : type == torch::kDouble ? 1.7e308 : 3e38;
    CHECK(lora::detail::is_finite(torch::tensor({largest, -largest}, torch::kDouble).to(testing::device(), type)));
    CHECK(lora::detail::is_finite(torch::empty({0, 3}, testing::on_device(type))));
  }
  CHECK(lora::detail::is_finite(torch::tensor({1, 2}, testing::on_device(torch::kLong))));
  CHECK(lora::detail::is_finite(torch::tensor({true, false}, testing::on_device(torch::kBool))));
}
