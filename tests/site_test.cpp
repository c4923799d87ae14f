#include "support/testing.hpp"

#include <lora/method/all.hpp>
#include <lora/site.hpp>

#include <torch/nn/modules/linear.h>

namespace {

std::shared_ptr<lora::AnyMethod> low_rank(const torch::Tensor& a, const torch::Tensor& b, double alpha) {
  auto method = std::make_shared<lora::MethodOf<lora::LowRank>>(
      lora::LoRAOptions(a.size(0)).alpha(alpha), lora::MatrixShape{{}, b.size(0), a.size(1)}, testing::device());
  method->value.lora_A.detach().copy_(a);
  method->value.lora_B.detach().copy_(b);
  return method;
}

}  // namespace

TEST_CASE("The updates of a site's adapters add up, and those that are not on it change nothing") {
  lora::Site site(lora::MatrixView::plain({2, 2}));
  site.add("a", low_rank(torch::tensor({{1.0, 0.0}}), torch::tensor({{1.0}, {0.0}}), 2));   // x0 * 2 to y0
  site.add("b", low_rank(torch::tensor({{0.0, 1.0}}), torch::tensor({{0.0}, {10.0}}), 3));  // x1 * 30 to y1
  auto x = torch::tensor({1.0F, 2.0F}, testing::device()).expand({3, 1, 2});
  auto y = torch::zeros({3, 1, 2}, testing::device());
  const auto [adapters, first, second] = GENERATE(table<std::vector<std::string>, float, float>({
      {{}, 0.0F, 0.0F},
      {{"a"}, 2.0F, 0.0F},
      {{"b", "elsewhere"}, 0.0F, 60.0F},
      {{"a", "b"}, 2.0F, 60.0F},
  }));
  auto output = site.forward({x, y, torch::eye(2, testing::device()), {}, false}, adapters);
  CHECK(torch::equal(output, torch::tensor({first, second}, testing::device()).expand_as(y)));
}

TEST_CASE("Merging swaps the tensor in the layer and in its registry, and brings back the very same one") {
  torch::nn::Linear layer(torch::nn::LinearOptions(2, 2).bias(false));
  layer->to(testing::device());
  lora::detail::MemberSlot slot(*layer, layer->weight, "weight");
  lora::Site site(lora::MatrixView::plain({2, 2}));
  site.add("a", low_rank(torch::tensor({{1.0, 0.0}}), torch::tensor({{1.0}, {0.0}}), 2));
  auto pristine = layer->weight;
  auto merged = site.merged_weight(slot.read(), {"a"}, "here");
  CHECK(testing::distance(merged, pristine + torch::tensor({{2.0, 0.0}, {0.0, 0.0}}, testing::device())) < 1e-6);
  CHECK(layer->weight.is_same(pristine));
  site.merge(slot, merged, {"a"});
  CHECK(layer->weight.is_same(merged));
  CHECK(layer->named_parameters()["weight"].is_same(merged));
  CHECK(site.pristine(slot).is_same(pristine));
  site.unmerge(slot);
  CHECK(layer->weight.is_same(pristine));
  CHECK(layer->named_parameters()["weight"].is_same(pristine));
}
