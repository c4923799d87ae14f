// Skinny products of floats with halves, and those of one row, against the same in double. Other ones of one type are
// in dense_product_test.cpp.
#include "support/testing.hpp"

#include <lora/weight/thin_product.hpp>

namespace {

using torch::Tensor;

struct Sizes {
  int64_t rank, rows, features;
};

/// Some of no block's size; one so large that it is multiplied as halves, where LibTorch can do that.
std::vector<Sizes> all_sizes() { return {{1, 1, 1}, {3, 70, 5}, {5, 700, 1031}, {4, 40, 20000}, {8, 4100, 1024}}; }

Tensor random(at::IntArrayRef sizes, torch::ScalarType type) {
  return torch::randn(sizes, testing::on_device(torch::kFloat)).to(type);
}

/// The largest difference, as a share of the largest number.
double error(const Tensor& found, const Tensor& exact) {
  return testing::distance(found, exact) / exact.abs().max().item<double>();
}

}  // namespace

TEST_CASE("Products of floats with halves are those of floats, and are added to halves with one rounding") {
  const auto half = GENERATE(torch::kBFloat16, torch::kHalf);
  const double rounding = half == torch::kHalf ? std::pow(2.0, -11) : std::pow(2.0, -8);
  torch::manual_seed(0);
  for (const auto& [rank, rows, features] : all_sizes()) {
    INFO(half << " " << rank << " " << rows << " " << features);
    const auto wide = [](const Tensor& tensor) { return tensor.to(torch::kDouble); };
    const bool rounds_twice = testing::device().is_cuda() && half == torch::kBFloat16 && rows * features >= 1 << 22;
    const auto A = random({rank, features}, torch::kFloat), S = random({rank, rows}, torch::kFloat);
    for (const auto& x : {random({rows, features}, half), random({features, rows}, half).t(),
                          random({rows, 2 * features}, half).narrow(1, 0, features)}) {
      const auto projected = lora::detail::thin_mm(A, x.t());
      CHECK(projected.scalar_type() == torch::kFloat);
      CHECK(error(projected, wide(A).mm(wide(x).t())) < 1e-5);
      const auto gradient = lora::detail::thin_mm_like(A, S, x, -1.5);
      CHECK(gradient.scalar_type() == torch::kFloat);
      CHECK(error(gradient, wide(S).mm(wide(x)) * -1.5) < 1e-5);

      const auto added = 0.75 * wide(S).t().mm(wide(A)), exact = wide(x) + added;
      const auto bound = 1.01 * rounding * (rounds_twice ? exact.abs() + added.abs() : exact.abs());
      auto sum = x.clone();
      lora::detail::add_thin_mm(sum, S.t(), A, 0.75);
      CHECK(sum.scalar_type() == half);
      CHECK(((wide(sum) - exact).abs() - bound).max().item<double>() < 1e-4);
      auto part = torch::cat({x, x}, 1);
      lora::detail::add_thin_mm(sum = part.narrow(1, 0, features), S.t(), A, 0.75);
      CHECK(((wide(part.narrow(1, 0, features)) - exact).abs() - bound).max().item<double>() < 1e-4);
      CHECK(torch::equal(part.narrow(1, features, features), x));
    }
  }
}

TEST_CASE("Products of one row, with factors as they lie in memory") {
  torch::manual_seed(0);
  for (const int64_t rank : {1, 3, 4, 10, 64}) {
    for (const int64_t features : {1, 5, 48, 131, 3000}) {
      for (const bool is_by_rank : {true, false}) {
        INFO(rank << " " << features << (is_by_rank ? " by rank" : " by feature"));
        const auto M =
            is_by_rank ? random({rank, features}, torch::kFloat) : random({features, rank}, torch::kFloat).t();
        const auto x = random({1, features}, torch::kFloat), c = random({rank, 1}, torch::kFloat);
        const auto wide = [](const Tensor& tensor) { return tensor.to(torch::kDouble); };
        const bool is_here = testing::device().is_cpu() && rank * features <= 1 << 17;
        CHECK(lora::detail::is_for_one_row(M, x.t()) == is_here);
        CHECK(error(lora::detail::thin_mm(M, x.t()), wide(M).mm(wide(x).t())) < 1e-5);
        const auto gradient = lora::detail::thin_mm_like(M, c, x, -1.5);
        CHECK(error(gradient, -1.5 * wide(c).mm(wide(x))) < 1e-6);
        auto both = torch::cat({x, x}), sum = both.narrow(0, 1, 1);
        lora::detail::add_thin_mm_(sum, c.t(), M, 0.75);
        CHECK(error(both[1], (wide(x) + 0.75 * wide(c).t().mm(wide(M)))[0]) < 1e-5);
        CHECK(torch::equal(both[0], x[0]));
      }
    }
  }
}

TEST_CASE("One row of another size is refused, and a negative view is what it stands for") {
  const auto A = random({4, 48}, torch::kFloat), B_t = random({48, 4}, torch::kFloat).t();
  for (const int64_t features : {47, 49}) {
    const auto x = random({1, features}, torch::kFloat);
    CHECK_THROWS(lora::detail::thin_mm(A, x.t()));
    CHECK_THROWS(lora::detail::add_thin_mm_(x, random({1, 4}, torch::kFloat), B_t, 1));
  }
  auto sum = random({1, 48}, torch::kFloat);
  CHECK_THROWS(lora::detail::add_thin_mm_(sum, random({1, 5}, torch::kFloat), B_t, 1));
  if (!testing::device().is_cpu()) return;  // others need not have such views
  const auto x = random({1, 48}, torch::kFloat);
  CHECK(error(lora::detail::thin_mm(A, at::_neg_view(x).t()), A.mm(x.t()) * -1) < 1e-6);
}

TEST_CASE("A product with no rows, or of no features, is empty or zero") {
  for (const auto& [rows, features] : std::vector<std::pair<int64_t, int64_t>>{{0, 4}, {3, 0}}) {
    const auto x = random({rows, features}, torch::kBFloat16);
    const auto A = random({2, features}, torch::kFloat), S = random({2, rows}, torch::kFloat);
    CHECK(testing::distance(lora::detail::thin_mm(A, x.t()), torch::zeros({2, rows})) == 0);
    CHECK(testing::distance(lora::detail::thin_mm_like(A, S, x, 2), torch::zeros({2, features})) == 0);
    auto sum = x;
    lora::detail::add_thin_mm(sum, S.t(), A, 2);
    CHECK(torch::equal(sum, x));
  }
}
