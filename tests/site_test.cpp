#include "support/methods.hpp"

#include <lora/adapter/merge.hpp>
#include <lora/method/full_delta.hpp>
#include <lora/method/low_rank.hpp>

#include <torch/nn/modules/linear.h>

#include <array>
#include <functional>
#include <limits>

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

TEST_CASE("A weight has the same bits whether updates are added in its memory or beside it") {
  const auto type = GENERATE(torch::kFloat, torch::kDouble);
  torch::manual_seed(0);
  const auto options = torch::TensorOptions(testing::device()).dtype(type);
  for (const auto& [out, in, rank] : {std::array<int64_t, 3>{5, 3, 2}, {64, 48, 8}, {192, 576, 8}, {33, 1, 4}}) {
    INFO(type << " " << out << " " << in << " " << rank);
    torch::nn::Linear member(torch::nn::LinearOptions(in, out).bias(false));
    member->to(testing::device(), type);
    lora::Place place{"here", "here", "Linear",
                      std::make_shared<lora::detail::MemberSlot>(*member, member->weight, "weight", false)};
    auto site = std::make_shared<lora::Site>(std::move(place), lora::MatrixView::plain({out, in}));
    std::vector<lora::MergedMethod> methods;
    for (const double alpha : {3.0, -16.0})
      methods.push_back({"a", low_rank(torch::randn({rank, in}), torch::randn({out, rank}), alpha), 0.75});
    for (auto& [name, method, weight] : methods) {
      for (const auto& parameter : method->tensors()) parameter.tensor->set_data(parameter.tensor->to(options));
    }
    const auto beside = site->merged(member->weight.detach(), methods);
    CHECK(site->prepared(methods).adds_in_place);
    lora::detail::merge({{site, methods}});
    CHECK(torch::equal(member->weight, beside));
    CHECK(testing::distance(beside, site->pristine()) > 0.1);
    site->unmerge();

    // So large that only W' tells whether it fits, which it does.
    member->weight.detach().fill_(type == torch::kFloat ? 3e38 : 1.7e308);
    const auto large = member->weight.detach().clone();
    CHECK_FALSE(site->prepared(methods).adds_in_place);
    lora::detail::merge({{site, methods}});
    CHECK(torch::equal(site->pristine(), large));
    site->unmerge();
    CHECK(torch::equal(member->weight, large));
  }
}

TEST_CASE("An update that overflows is refused with what is the matter, and nothing is merged") {
  Fixture f, other;
  const auto infinity = std::numeric_limits<float>::infinity();
  const auto [value, weight, text] = GENERATE_REF(table<float, float, const char*>({
      {infinity, 0.0F, "the update of adapter \"b\" is not finite"},
      {2e37F, 0.0F, "the update of adapter \"b\" is not finite"},  // thirty times that is not
      {1e37F, 3e38F, "the merged weight does not fit into its type"},
      {1.0F, infinity, "or the weight itself is not finite"},
  }));
  f.layer->weight.detach()[1][1] = weight;
  f.before = f.layer->weight.detach().clone();
  f.b.method->tensors().front().tensor->detach().copy_(torch::tensor({{0.0F, value}}));
  const auto error = testing::error_of([&] { lora::detail::merge({{other.site, {other.a}}, {f.site, {f.a, f.b}}}); });
  CHECK_THAT(error, testing::contains(text));
  CHECK(torch::equal(f.layer->weight, f.before));
  CHECK(torch::equal(other.layer->weight, other.before));
  CHECK_FALSE(f.site->is_merged());
  CHECK_FALSE(other.site->is_merged());
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
