#include "support/methods.hpp"

#include <lora/method/low_rank.hpp>

using lora::LoRAOptions;
using lora::LowRank;

namespace {

auto make(const LoRAOptions& options, int64_t out, int64_t in) {
  return testing::make_method<LowRank>(options, out, in);
}

const lora::WeightBase kNoBase(torch::zeros({1, 1}));

}  // namespace

TEST_CASE("LowRank adds s B A, by hand") {
  auto method = make(LoRAOptions(1).alpha(3), 2, 2);  // s = 3
  method.value.lora_A.copy_(torch::tensor({{1.0, 2.0}}));
  method.value.lora_B.copy_(torch::tensor({{1.0}, {-1.0}}));
  auto w = torch::zeros({2, 2}, testing::device()), b = torch::full({2}, 0.5, testing::device());
  CHECK(testing::distance(method.delta(lora::WeightBase(w)), torch::tensor({{3.0, 6.0}, {-3.0, -6.0}})) == 0);
  // x = (1, 1): A x = 3, s B A x = (9, -9); b = (0.5, 0.5)
  auto x = torch::ones({2, 1, 2}, testing::device());
  auto y = testing::linear_with(method, x, w, b);
  CHECK(testing::distance(y, torch::tensor({9.5, -8.5}).expand({2, 1, 2})) == 0);
}

TEST_CASE("A starts Gaussian with standard deviation 1 / rank, or as asked, and B at zero") {
  torch::manual_seed(0);
  const auto [options, deviation] = GENERATE(table<LoRAOptions, double>({
      {LoRAOptions(4), 0.25},
      {LoRAOptions(16), 1.0 / 16},
      {LoRAOptions(4).init_std(0.02), 0.02},
  }));
  auto method = make(options, 3, 20000);
  method.initialize(kNoBase);
  CHECK(method.value.lora_A.std().item<double>() == testing::Approx(deviation).epsilon(0.02));
  CHECK(std::abs(method.value.lora_A.mean().item<double>()) < 0.02 * deviation);
  // A normal distribution has kurtosis 3, a uniform one 1.8.
  auto normalized = method.value.lora_A / method.value.lora_A.std();
  CHECK(normalized.pow(4).mean().item<double>() == testing::Approx(3).margin(0.15));
  CHECK(torch::equal(method.value.lora_B, torch::zeros_like(method.value.lora_B)));
}

TEST_CASE("The Kaiming start is PEFT's: uniform in +-1 / sqrt(in_features)") {
  torch::manual_seed(0);
  auto method = make(LoRAOptions(4).init(lora::Init::kKaiming), 3, 10000);
  method.initialize(kNoBase);
  CHECK(method.value.lora_A.abs().max().item<double>() == testing::Approx(0.01).epsilon(0.01));
  CHECK(method.value.lora_A.std().item<double>() == testing::Approx(0.01 / std::sqrt(3)).epsilon(0.02));
}

TEST_CASE("Dropout acts on the input of A, in training mode only, and keeps the mean") {
  torch::manual_seed(0);
  auto method = make(LoRAOptions(1).alpha(2).dropout(0.25), 1, 4);
  method.value.lora_A.fill_(1);
  method.value.lora_B.fill_(1);
  auto x = torch::ones({20000, 4}, testing::device());
  auto w = torch::zeros({1, 4}, testing::device());
  CHECK(testing::distance(testing::linear_with(method, x, w), torch::full({20000, 1}, 8.0)) == 0);
  auto dropped = testing::linear_with(method, x, w, {}, /*training=*/true);
  CHECK(dropped.mean().item<double>() == testing::Approx(8).epsilon(0.02));
  // Each element is one of the five sums of kept inputs, 2 * k / 0.75.
  auto kept = dropped * 0.75 / 2;
  CHECK(testing::distance(kept, kept.round()) < 1e-5);
  CHECK((kept == 0).sum().item<int64_t>() < 400);  // 0.25^4 of 20000 is 78
}

TEST_CASE("An adapter in float serves a layer in half precision and returns its type") {
  torch::manual_seed(0);
  auto method = make(LoRAOptions(2).alpha(6), 3, 5);
  method.initialize(kNoBase);
  method.value.lora_B.normal_();
  auto x = torch::randn({4, 5}, testing::device()).to(torch::kBFloat16);
  auto w = torch::randn({3, 5}, testing::device()).to(torch::kBFloat16);
  auto y = torch::linear(x, w);
  auto expected = y.to(torch::kFloat) + 3 * x.to(torch::kFloat).mm(method.value.lora_A.t()).mm(method.value.lora_B.t());
  auto output = testing::linear_with(method, x, w);
  CHECK(output.scalar_type() == torch::kBFloat16);
  CHECK(testing::distance(output, expected.to(torch::kBFloat16)) <= 0.0625);  // one rounding at |y| < 16
}
