// The mask of dropout that is computed from a seed: that it is one of independent elements of the right probability.
#include "support/testing.hpp"

#include <lora/dropout.hpp>

#include <cmath>

namespace {

using lora::detail::DropoutMask;
using torch::Tensor;

/// 1 where the mask keeps, else 0.
Tensor kept(const DropoutMask& mask, at::IntArrayRef sizes) {
  return mask.of(torch::ones(sizes, testing::on_device(torch::kDouble)));
}

/// The correlation of two sets of elements that are kept with probability q, in standard deviations of chance.
double correlation(const Tensor& a, const Tensor& b, double q) {
  const auto size = static_cast<double>(a.numel());
  return ((a - q) * (b - q)).sum().item<double>() / (q * (1 - q) * std::sqrt(size));
}

}  // namespace

TEST_CASE("A mask keeps what is expected, in every type, and scales it so that the mean stays") {
  const auto p = GENERATE(0.001, 0.05, 0.1, 0.5, 0.9, 0.999);
  const auto type = GENERATE(torch::kDouble, torch::kFloat, torch::kBFloat16, torch::kHalf);
  const DropoutMask mask(p);
  const int64_t size = 1000003;  // no multiple of the elements of a hash
  const auto x = torch::ones({size}, testing::on_device(type));
  const auto dropped = mask.of(x, mask.scale());
  CHECK(dropped.scalar_type() == type);
  const auto wide = dropped.to(torch::kDouble);
  const auto share = wide.ne(0).to(torch::kDouble).mean().item<double>();
  const auto deviation = std::sqrt(p * (1 - p) / static_cast<double>(size));
  CHECK(std::abs(share - (1 - p)) < 5 * deviation + 1e-5);
  CHECK(std::abs(wide.max().item<double>() * (1 - p) - 1) < (type == torch::kDouble || p < 0.9 ? 0.01 : 0.02));
  if (type == torch::kDouble) CHECK(std::abs(wide.mean().item<double>() - 1) < 5 * deviation / (1 - p));
  CHECK(torch::equal(mask.of(x), dropped.ne(0).to(type)));
  auto sum = torch::ones({size}, testing::on_device(type));
  mask.add(x, sum);
  CHECK(torch::equal(sum, x + mask.of(x)));
  mask.add(torch::full({size}, 0.5, testing::on_device(torch::kFloat)), sum);  // of another type
  CHECK(torch::equal(sum, x + mask.of(x) + mask.of(x) / 2));
}

TEST_CASE("A mask keeps the same elements of all types, up to the last one, and writes nothing behind it") {
  const DropoutMask mask(GENERATE(0.1, 0.7));
  const auto type = GENERATE(torch::kFloat, torch::kBFloat16, torch::kHalf);
  torch::manual_seed(0);
  for (const int64_t size : {0, 1, 15, 16, 17, 31, 33, 255, 256, 257, 300, 70000}) {
    INFO(type << " " << size);
    const auto x = torch::randn({size}, testing::on_device(torch::kFloat)).to(type);
    if (x.is_cpu()) {  // other devices have a generator of their own
      const auto wide = x.to(torch::kDouble);
      CHECK(torch::equal(mask.of(x), mask.of(wide).to(type)));
      const auto before = torch::randn({size + 40}, torch::kFloat).to(type);
      auto sum = before.clone();
      mask.add(x, sum.narrow(0, 0, size), 0.5);
      const auto exact = before.narrow(0, 0, size).to(torch::kDouble) + mask.of(wide, 0.5);
      const double rounding = type == torch::kFloat ? 1e-6 : type == torch::kHalf ? 2e-3 : 2e-2;
      if (size > 0)
        CHECK((sum.narrow(0, 0, size).to(torch::kDouble) - exact).abs().max().item<double>() < 4 * rounding);
      CHECK(torch::equal(sum.narrow(0, size, 40), before.narrow(0, size, 40)));
    }
  }
}

TEST_CASE("A mask keeps something, however little that is") {
  const DropoutMask mask(0.9999999);
  CHECK(mask.scale() == 65536);
  const auto share = kept(mask, {1 << 20}).mean().item<double>();
  CHECK(share > 0);
  CHECK(share < 1e-4);
}

TEST_CASE("Elements of a mask are independent of each other, and of those of other masks") {
  const auto p = GENERATE(0.1, 0.5, 0.8);
  const double q = std::round((1 - p) * 65536) / 65536;
  const DropoutMask mask(p), next(p);
  const auto all = kept(mask, {1 << 20});
  for (const int64_t lag : {1, 2, 3, 4, 5, 8, 63, 64, 768, 4096}) {
    INFO("lag " << lag);
    CHECK(std::abs(correlation(all.narrow(0, 0, all.numel() - lag), all.narrow(0, lag, all.numel() - lag), q)) < 5);
  }
  CHECK(std::abs(correlation(all, kept(next, {1 << 20}), q)) < 5);
  const auto rows = kept(mask, {1024, 1024});  // sums over rows and over columns scatter as those of coins do
  for (const int64_t dim : {0, 1}) {
    const auto sums = (rows.sum(dim) - 1024 * q) / std::sqrt(1024 * q * (1 - q));
    CHECK(std::abs(sums.pow(2).mean().item<double>() - 1) < 5 * std::sqrt(2.0 / 1024));
  }
}

TEST_CASE("Masks follow the seed, and do not repeat") {
  torch::manual_seed(3);
  const DropoutMask first(0.5), second(0.5);
  torch::manual_seed(3);
  const DropoutMask again(0.5);
  CHECK(torch::equal(kept(first, {999}), kept(again, {999})));
  CHECK_FALSE(torch::equal(kept(first, {999}), kept(second, {999})));
  CHECK(torch::equal(kept(first, {999}), kept(first, {37, 27}).flatten()));
}

TEST_CASE("Gradients pass through the same mask, twice, too") {
  const auto x = torch::randn({7, 5}, testing::on_device(torch::kDouble)).requires_grad_();
  const DropoutMask mask(0.4);
  const auto keeps = kept(mask, {7, 5});
  const auto masked = [&] { return lora::detail::kept_of(x, mask); };
  CHECK(lora::detail::kept_of(x.t(), mask).is_contiguous());
  CHECK(testing::distance(masked(), x * keeps) < 1e-15);
  const auto slope = torch::autograd::grad({masked().pow(3).sum()}, {x}, {}, {}, true)[0];
  CHECK(testing::distance(slope, 3 * x.pow(2) * keeps) < 1e-12);
  const auto second = torch::autograd::grad({slope.sum()}, {x})[0];
  CHECK(testing::distance(second, 6 * x * keeps) < 1e-12);
}

TEST_CASE("Dropout scales what its mask keeps, and its gradient") {
  const auto x = torch::randn({7, 5}, testing::on_device(torch::kDouble)).requires_grad_();
  torch::manual_seed(8);
  const DropoutMask mask(0.4);
  torch::manual_seed(8);
  const auto y = lora::detail::dropout(x, 0.4);
  CHECK(testing::distance(y, x * kept(mask, {7, 5}) / 0.6) < 1e-4);  // 0.6 is rounded
  CHECK(testing::distance(torch::autograd::grad({y.sum()}, {x})[0], mask.scale() * kept(mask, {7, 5})) < 1e-15);
}
