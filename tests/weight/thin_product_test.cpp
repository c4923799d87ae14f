// Skinny products of floats with floats or halves, and those of one row, against the same in double. Those by oneDNN
// are in dense_product_test.cpp.
#include "support/testing.hpp"

#include <lora/weight/thin_product.hpp>

namespace {

using torch::Tensor;
using Tensors = std::vector<Tensor>;

struct Sizes {
  int64_t rank, rows, features;
};

/// Some of no block's size; one so large that it is multiplied as halves, where LibTorch can do that; one of a rank
/// that is too large for kernels of ours.
std::vector<Sizes> all_sizes() {
  return {{1, 1, 1},      {3, 70, 5},     {6, 2, 16},  {5, 700, 1031},
          {17, 133, 100}, {4, 40, 20000}, {65, 9, 40}, {8, 4100, 1024}};
}

/// Decides for a test whether kernels of ours compute.
struct ThinKernels {
  explicit ThinKernels(bool taken) : are_there(lora::detail::take_thin_kernels(taken)) {}
  ~ThinKernels() { lora::detail::take_thin_kernels(true); }
  ThinKernels(const ThinKernels&) = delete;
  ThinKernels& operator=(const ThinKernels&) = delete;

  const bool are_there;
};

Tensor random(at::IntArrayRef sizes, torch::ScalarType type) {
  return torch::randn(sizes, testing::on_device(torch::kFloat)).to(type);
}

/// The largest difference, as a share of the largest number.
double error(const Tensor& found, const Tensor& exact) {
  return testing::distance(found, exact) / exact.abs().max().item<double>();
}

}  // namespace

TEST_CASE("Products of floats with floats or halves are those of floats, and are added to them with one rounding") {
  const auto type = GENERATE(torch::kBFloat16, torch::kHalf, torch::kFloat);
  const ThinKernels kernels(GENERATE(true, false));
  const double rounding = std::pow(2.0, type == torch::kHalf ? -11 : type == torch::kFloat ? -21 : -8);
  torch::manual_seed(0);
  for (const auto& [rank, rows, features] : all_sizes()) {
    INFO(type << " " << rank << " " << rows << " " << features);
    const auto wide = [](const Tensor& tensor) { return tensor.to(torch::kDouble); };
    const bool rounds_twice = testing::device().is_cuda() && type == torch::kBFloat16 && rows * features >= 1 << 22;
    const auto A = random({rank, features}, torch::kFloat), S = random({rank, rows}, torch::kFloat);
    const auto B_t = random({features, rank}, torch::kFloat).t(), S_t = random({rows, rank}, torch::kFloat).t();
    for (const auto& x : {random({rows, features}, type), random({features, rows}, type).t(),
                          random({rows, 2 * features}, type).narrow(1, 0, features)}) {
      const bool is_large = rows * features > 1 << 19;  // once is enough of these
      for (const auto& factor : is_large ? Tensors{A} : Tensors{A, B_t}) {
        const auto projected = lora::detail::thin_mm(factor, x);
        CHECK(projected.scalar_type() == torch::kFloat);
        CHECK(error(projected, wide(factor).mm(wide(x).t())) < 1e-5);
        for (const auto& c : is_large ? Tensors{S} : Tensors{S, S_t}) {
          const auto gradient = lora::detail::thin_mm_like(factor, c, x, -1.5);
          CHECK(gradient.scalar_type() == torch::kFloat);
          CHECK(error(gradient, wide(c).mm(wide(x)) * -1.5) < 1e-5);
          const auto transposed = lora::detail::thin_mm_like_t(factor.t(), c, x, -1.5);
          CHECK(error(transposed, wide(x).t().mm(wide(c).t()) * -1.5) < 1e-5);
          // As a parameter lies, so that autograd keeps it as its gradient, without a copy.
          if (lora::detail::is_for_thin_kernels(factor, x)) CHECK(transposed.is_contiguous());

          const auto added = 0.75 * wide(c).t().mm(wide(factor)), exact = wide(x) + added;
          const auto bound = 1.01 * rounding * (rounds_twice ? exact.abs() + added.abs() : exact.abs());
          auto sum = x.clone();
          lora::detail::add_thin_mm(sum, c, factor, 0.75);
          CHECK(sum.scalar_type() == type);
          CHECK(((wide(sum) - exact).abs() - bound).max().item<double>() < 1e-4);
          auto part = torch::cat({x, x}, 1);
          lora::detail::add_thin_mm(sum = part.narrow(1, 0, features), c, factor, 0.75);
          CHECK(((wide(part.narrow(1, 0, features)) - exact).abs() - bound).max().item<double>() < 1e-4);
          CHECK(torch::equal(part.narrow(1, features, features), x));
        }
      }
    }
  }
}

TEST_CASE("Kernels of ours compute thin products as they lie in memory, and nothing else") {
  const ThinKernels kernels(true);
  const bool are_here = kernels.are_there && testing::device().is_cpu();
  const auto A = random({8, 48}, torch::kFloat), x = random({20, 48}, torch::kFloat);
  const auto is_for = [](const Tensor& factor, const Tensor& rows) {
    return lora::detail::is_for_thin_kernels(factor, rows);
  };
  CHECK(is_for(A, x) == are_here);
  CHECK(is_for(A, x.to(torch::kBFloat16)) == are_here);
  CHECK(is_for(random({48, 8}, torch::kFloat).t(), random({20, 90}, torch::kFloat).narrow(1, 3, 48)) == are_here);
  CHECK_FALSE(is_for(A, x.to(torch::kHalf)));
  CHECK_FALSE(is_for(A, x.to(torch::kDouble)));
  CHECK_FALSE(is_for(A.to(torch::kBFloat16), x));
  CHECK_FALSE(is_for(A, x.narrow(0, 0, 1)));
  CHECK_FALSE(is_for(A, x.narrow(0, 0, 0)));
  CHECK_FALSE(is_for(A, x.narrow(1, 0, 47)));
  CHECK_FALSE(is_for(A, x.view({2, 10, 48})));
  CHECK_FALSE(is_for(A, random({48, 20}, torch::kFloat).t()));
  CHECK_FALSE(is_for(random({65, 48}, torch::kFloat), x));
  CHECK_FALSE(is_for(A.narrow(0, 0, 0), x));
  CHECK_FALSE(is_for(A, at::_nested_tensor_from_tensor_list({x, x})));
  if (!testing::device().is_cpu()) return;  // others need not have such views
  CHECK_FALSE(is_for(A, at::_neg_view(x)));
  CHECK_FALSE(is_for(at::_neg_view(A), x));
  CHECK_FALSE(is_for(A, torch::empty({20, 48}, torch::kMeta)));
}

TEST_CASE("A row of a thin product does not depend on the other rows") {
  torch::manual_seed(0);
  const auto type = GENERATE(torch::kBFloat16, torch::kFloat);
  const auto A = random({6, 300}, torch::kFloat), x = random({37, 300}, type), S = random({6, 37}, torch::kFloat);
  if (!lora::detail::is_for_thin_kernels(A, x)) return;
  const auto projected = lora::detail::thin_mm(A, x);
  auto sum = x.clone();
  lora::detail::add_thin_mm(sum, S, A, 0.75);
  for (const int64_t first : {0, 1, 5}) {
    for (const int64_t count : {2, 9, 32}) {
      INFO(first << " " << count);
      const auto some = x.narrow(0, first, count);
      CHECK(torch::equal(lora::detail::thin_mm(A, some), projected.narrow(1, first, count)));
      auto of_these = some.clone();
      lora::detail::add_thin_mm(of_these, S.narrow(1, first, count), A, 0.75);
      CHECK(torch::equal(of_these, sum.narrow(0, first, count)));
    }
  }
}

TEST_CASE("Sums in bfloat16 keep infinities, nothing at all, and what is no number") {
  const auto infinity = std::numeric_limits<float>::infinity();
  const auto x = torch::tensor({{infinity, -infinity, 0.0F, 1e-40F, 3e38F}, {1.0F, -0.0F, 1e-3F, -1e-40F, -3e38F}},
                               testing::on_device(torch::kFloat))
                     .to(torch::kBFloat16);
  const auto S = random({1, 2}, torch::kFloat).fill_(1), A = random({1, 5}, torch::kFloat).fill_(0);
  auto sum = x.clone();
  lora::detail::add_thin_mm(sum, S, A, 1);
  CHECK(torch::equal(sum, x));
  A.fill_(1e38F);
  lora::detail::add_thin_mm(sum, S, A, 1);
  CHECK(torch::equal(sum, (x.to(torch::kFloat) + 1e38F).to(torch::kBFloat16)));
  A.fill_(std::numeric_limits<float>::quiet_NaN());
  lora::detail::add_thin_mm(sum, S, A, 1);
  CHECK(sum.isnan().all().item<bool>());
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
        CHECK(lora::detail::is_for_one_row(M, x) == is_here);
        CHECK(error(lora::detail::thin_mm(M, x), wide(M).mm(wide(x).t())) < 1e-5);
        const auto gradient = lora::detail::thin_mm_like(M, c, x, -1.5);
        CHECK(error(gradient, -1.5 * wide(c).mm(wide(x))) < 1e-6);
        CHECK(error(lora::detail::thin_mm_like_t(M.t(), c, x, -1.5).t(), gradient) < 1e-6);
        auto both = torch::cat({x, x}), sum = both.narrow(0, 1, 1);
        lora::detail::add_thin_mm_(sum, c, M, 0.75);
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
    CHECK_THROWS(lora::detail::thin_mm(A, x));
    CHECK_THROWS(lora::detail::add_thin_mm_(x, random({4, 1}, torch::kFloat), B_t, 1));
    const auto c = random({4, 1}, torch::kFloat);
    CHECK_THROWS(lora::detail::thin_mm_like(A, c, x, 1));
    CHECK_THROWS(lora::detail::thin_mm_like_t(A.t(), c, x, 1));
  }
  auto sum = random({1, 48}, torch::kFloat);
  CHECK_THROWS(lora::detail::add_thin_mm_(sum, random({5, 1}, torch::kFloat), B_t, 1));
  if (!testing::device().is_cpu()) return;  // others need not have such views
  const auto x = random({1, 48}, torch::kFloat);
  CHECK(error(lora::detail::thin_mm(A, at::_neg_view(x)), A.mm(x.t()) * -1) < 1e-6);
}

TEST_CASE("A product with no rows, or of no features, is empty or zero") {
  for (const auto& [rows, features] : std::vector<std::pair<int64_t, int64_t>>{{0, 4}, {3, 0}}) {
    const auto x = random({rows, features}, torch::kBFloat16);
    const auto A = random({2, features}, torch::kFloat), S = random({2, rows}, torch::kFloat);
    CHECK(testing::distance(lora::detail::thin_mm(A, x), torch::zeros({2, rows})) == 0);
    CHECK(testing::distance(lora::detail::thin_mm_like(A, S, x, 2), torch::zeros({2, features})) == 0);
    auto sum = x;
    lora::detail::add_thin_mm(sum, S, A, 2);
    CHECK(torch::equal(sum, x));
  }
}
