#include "support/testing.hpp"

#include <lora/weight/row_kernels.hpp>

namespace {

using torch::Tensor;

/// Rows that lie further apart than they are long.
struct Rows {
  Rows(int64_t count, int64_t features)
      : whole(torch::randn({count, features + 3})), numbers(whole.narrow(1, 0, features)) {}
  lora::detail::RowsInMemory in_memory() const {
    return {whole.const_data_ptr<float>(), whole.stride(0), whole.size(0)};
  }
  Tensor whole, numbers;
};

double error(const Tensor& found, const Tensor& exact) { return testing::distance(found, exact.to(torch::kFloat)); }

}  // namespace

TEST_CASE("Products of a row and rows in memory, of whatever a processor has") {
  torch::manual_seed(0);
  const auto kernels = lora::detail::runnable_row_kernels();
  REQUIRE(kernels.back().name == std::string("plain"));
  for (const auto& [name, add_dots, add_rows, dots_and_squares] : kernels) {
    for (const int64_t count : {0, 1, 3, 4, 5, 8, 11}) {
      for (const int64_t features : {0, 1, 4, 7, 16, 33, 64, 100, 129}) {
        INFO(name << ", " << count << " rows of " << features);
        const Rows w(count, features);
        const auto wide = w.numbers.to(torch::kDouble);
        const auto x = torch::randn({2, features}), before = torch::randn({2, count}), sum = torch::randn({features});
        const auto products = x.to(torch::kDouble).mm(wide.t());
        auto out = before.clone();
        for (int64_t i = 0; i < 2; ++i)
          add_dots(w.in_memory(), x[i].const_data_ptr<float>(), 0.75F, features, out[i].mutable_data_ptr<float>());
        CHECK(error(out, before + 0.75 * products) < 1e-5);

        for (const int64_t rows : {1, 2, 5}) {
          const Rows more(rows, features);
          out = torch::full({rows, count}, std::nanf(""));
          auto squares = torch::full({rows}, std::nanf(""));
          dots_and_squares(w.in_memory(), more.in_memory(), features, out.mutable_data_ptr<float>(),
                           squares.mutable_data_ptr<float>());
          CHECK(error(out, more.numbers.to(torch::kDouble).mm(wide.t())) < 1e-5);
          CHECK(error(squares, more.numbers.to(torch::kDouble).pow(2).sum(1)) < 1e-4);
        }

        auto y = sum.clone();
        const auto c = torch::randn({count});
        add_rows(w.in_memory(), c.const_data_ptr<float>(), -1.5F, features, y.mutable_data_ptr<float>());
        CHECK(error(y, sum - 1.5 * c.to(torch::kDouble).unsqueeze(0).mm(wide)[0]) < 1e-5);
      }
    }
  }
}
