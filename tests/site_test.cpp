#include "support/methods.hpp"

#include <lora/adapter/merge.hpp>
#include <lora/method/full_delta.hpp>
#include <lora/method/low_rank.hpp>

#include <torch/nn/modules/linear.h>

#include <functional>

namespace {

std::shared_ptr<lora::AnyMethod> low_rank(const torch::Tensor& a, const torch::Tensor& b, double alpha) {
  auto method = std::make_shared<lora::MethodOf<lora::LowRank>>(
      testing::make_method<lora::LowRank>(lora::LoRAOptions(a.size(0)).alpha(alpha), b.size(0), a.size(1)));
  method->value.lora_A.copy_(a);
  method->value.lora_B.copy_(b);
  return method;
}

/// A layer (2, 2) and a site of its weight.
struct Fixture {
  explicit Fixture(bool is_shared = false, torch::ScalarType type = torch::kFloat) {
    torch::manual_seed(0);
    layer->to(testing::device(), type);
    lora::Place place{"here", "here", "Linear",
                      std::make_shared<lora::detail::MemberSlot>(*layer, layer->weight, "weight", is_shared)};
    site = std::make_shared<lora::Site>(std::move(place), lora::MatrixView::plain({2, 2}));
    before = layer->weight.detach().clone();
  }

  void merge(const std::vector<lora::MergedMethod>& methods) { lora::detail::merge({{site, methods}}); }

  torch::nn::Linear layer{torch::nn::LinearOptions(2, 2).bias(false)};
  std::shared_ptr<lora::Site> site;
  torch::Tensor before;
  // x0 * 2 to y0, and x1 * 30 to y1
  lora::MergedMethod a{"a", low_rank(torch::tensor({{1.0, 0.0}}), torch::tensor({{1.0}, {0.0}}), 2)};
  lora::MergedMethod b{"b", low_rank(torch::tensor({{0.0, 1.0}}), torch::tensor({{0.0}, {10.0}}), 3)};
};

}  // namespace

TEST_CASE("The updates that are merged add up, each with its weight") {
  Fixture f;
  auto half = f.b;
  half.weight = 0.5;
  const auto [methods, first, second] = GENERATE_REF(table<std::vector<lora::MergedMethod>, double, double>({
      {{}, 0.0, 0.0},
      {{f.a}, 2.0, 0.0},
      {{f.b}, 0.0, 30.0},
      {{f.a, half}, 2.0, 15.0},
  }));
  f.merge(methods);
  CHECK(testing::distance(f.layer->weight, f.before.cpu() + torch::tensor({{first, 0.0}, {0.0, second}})) < 1e-5);
  for (const auto& method : methods) CHECK(f.site->is_in(method.method.get()));
  CHECK(torch::equal(f.site->pristine(), f.before));
  f.site->unmerge();
  CHECK(torch::equal(f.layer->weight, f.before));
}

TEST_CASE("Merging writes into the tensor that everybody holds; only one that is shared is told apart") {
  const bool is_shared = GENERATE(false, true);
  Fixture f(is_shared);
  const auto held = f.layer->weight, registered = f.layer->named_parameters()["weight"];
  f.merge({f.a});
  CHECK(f.layer->weight.is_same(held) != is_shared);
  CHECK(f.layer->named_parameters()["weight"].is_same(registered) != is_shared);
  CHECK(torch::equal(held, f.before) == is_shared);
  CHECK_FALSE(torch::equal(f.layer->weight, f.before));
  f.site->unmerge();
  CHECK(f.layer->weight.is_same(held));
  CHECK(f.layer->named_parameters()["weight"].is_same(registered));
  CHECK(torch::equal(held, f.before));
}

TEST_CASE("A weight that someone wrote to since it was merged is not overwritten") {
  Fixture f;
  f.merge({f.a});
  const auto [change, is_refused] = GENERATE_REF(table<std::function<void()>, bool>({
      {[&] { f.layer->weight.detach().add_(1); }, true},
      {[&] { f.layer->weight.detach().add_(1).sub_(1).add_(1); }, true},
      {[&] { f.layer->weight = f.layer->weight.detach().clone(); }, true},
      {[&] { f.layer->weight.detach().mul_(1); }, false},  // the same bits
      {[&] { f.layer->to(torch::kDouble); }, false},       // follows
      {[] {}, false},
  }));
  change();
  const auto error = testing::error_of([&] { lora::detail::unmerge({f.site}); });
  if (is_refused) {
    CHECK_THAT(error, testing::contains("here was replaced or written after it was merged"));
  } else {
    CHECK(error.empty());
    CHECK(torch::equal(f.layer->weight, f.before.to(f.layer->weight.scalar_type())));
  }
}

TEST_CASE("What was trained in full stands in for a tensor as it is") {
  Fixture f(false, torch::kBFloat16);
  const auto value = torch::full({2, 2}, 1.0 / 3, testing::on_device(torch::kBFloat16));
  auto full = std::make_shared<lora::MethodOf<lora::FullDelta>>(lora::FullDelta(value));
  f.merge({{"full", full}});
  CHECK(torch::equal(f.layer->weight, value));
  value.fill_(2);  // trained on
  CHECK_FALSE(torch::equal(f.layer->weight, value));
  f.site->unmerge();
  CHECK(torch::equal(f.layer->weight, f.before));
}

TEST_CASE("A weight is merged once") {
  Fixture f;
  f.merge({f.a});
  CHECK_THROWS_WITH(f.merge({f.b}), testing::contains("here has an adapter merged into it already"));
}
