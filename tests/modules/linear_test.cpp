#include "support/halves.hpp"
#include "support/testing.hpp"

#include <lora/attach.hpp>
#include <lora/modules/linear.hpp>
#include <lora/quantize.hpp>

using lora::LoRALinear;
using lora::LoRALinearOptions;
using lora::LoRAOptions;

namespace {

/// alpha / rank = 3, B filled, a bias.
LoRALinear<> make_layer() {
  torch::manual_seed(0);
  LoRALinear<> layer(LoRALinearOptions(4, 3, LoRAOptions(2).alpha(6)));
  layer->to(testing::device());
  torch::NoGradGuard no_grad;
  layer->lora_B().normal_();
  return layer;
}

struct NetImpl : torch::nn::Cloneable<NetImpl> {
  NetImpl() { reset(); }
  void reset() override { fc = register_module("fc", LoRALinear<>(LoRALinearOptions(4, 3, LoRAOptions(2).alpha(6)))); }
  LoRALinear<> fc = nullptr;
};
TORCH_MODULE(Net);

}  // namespace

TEST_CASE("A wrapped Linear shares its tensors, freezes them and starts unchanged") {
  torch::manual_seed(0);
  torch::nn::Linear base(4, 3);
  base->to(testing::device());
  auto x = torch::randn({2, 5, 4}, testing::device());
  auto before = base->forward(x);
  LoRALinear layer(base, LoRAOptions(2).alpha(6));
  CHECK(layer->weight.is_same(base->weight));
  CHECK(layer->bias.is_same(base->bias));
  CHECK_FALSE(base->weight.requires_grad());
  CHECK(torch::equal(layer->forward(x), before));
  CHECK(lora::trainable_parameters(*layer).size() == 2);
}

TEST_CASE("The gradients of A and B agree with finite differences") {
  auto layer = make_layer();
  layer->to(torch::kDouble);
  auto x = torch::randn({2, 5, 4}, testing::on_device(torch::kDouble));
  auto loss = [&] { return layer->forward(x).sin().sum(); };
  CHECK(testing::gradient_error(loss, {layer->lora_A(), layer->lora_B()}) < 1e-8);
}

TEST_CASE("A layer built from sizes has the parameter names of torch::nn::Linear, with or without a bias") {
  const bool bias = GENERATE(true, false);
  LoRALinear<> layer(LoRALinearOptions(4, 3, LoRAOptions(2)).bias(bias));
  auto names = layer->named_parameters().keys();
  CHECK(names == (bias ? std::vector<std::string>{"weight", "bias", "lora_A", "lora_B"}
                       : std::vector<std::string>{"weight", "lora_A", "lora_B"}));
  CHECK(layer->weight.abs().max().item<double>() <= 0.5);  // uniform in +-1 / sqrt(4)
  CHECK(layer->weight.abs().max().item<double>() > 0.1);
}

TEST_CASE("A copy is frozen, independent and gives the same output, merged or not, alone or inside a model") {
  const bool merged = GENERATE(false, true), inside = GENERATE(false, true);
  Net net;
  net->to(testing::device());
  auto layer = net->fc;
  layer->lora_B().detach().normal_();
  auto pristine = layer->weight.clone();
  auto x = torch::randn({2, 5, 4}, testing::device());
  if (merged) layer->merge();
  auto expected = layer->forward(x);
  auto copy = inside ? std::dynamic_pointer_cast<NetImpl>(net->clone())->fc
                     : LoRALinear<>(std::dynamic_pointer_cast<lora::LoRALinearImpl<>>(layer->clone()));
  layer->lora_A().detach().zero_();
  CHECK(copy->is_merged() == merged);
  CHECK(torch::equal(copy->forward(x), expected));
  CHECK(lora::trainable_parameters(*copy).size() == 2);
  CHECK(copy->weight.data_ptr() != layer->weight.data_ptr());
  CHECK(copy->lora_B().is_same(copy->named_parameters()["lora_B"]));
  if (merged) copy->unmerge();
  CHECK(torch::equal(copy->weight, pristine));
  const std::weak_ptr<torch::nn::Module> alive = copy.ptr();
  copy = nullptr;
  CHECK(alive.expired());  // nothing in it holds it
}

TEST_CASE("A layer that another one is assigned to is merged by itself, also when the other one is gone") {
  auto layer = make_layer();
  auto other = std::make_unique<lora::LoRALinearImpl<>>(*make_layer());
  other->lora_B().detach().normal_();
  other->merge();
  *layer = *other;
  const auto x = torch::randn({2, 4}, testing::device());
  const auto merged = other->forward(x);
  other.reset();
  CHECK(layer->is_merged());
  CHECK(torch::equal(layer->forward(x), merged));
  layer->unmerge();
  CHECK_FALSE(layer->is_merged());
  CHECK(testing::distance(layer->forward(x), merged) < 1e-5);
  layer->merge();
  CHECK(torch::equal(layer->forward(x), merged));
}

TEST_CASE("Saving and loading keeps the layer frozen and its output the same") {
  testing::TemporaryFolder folder;
  auto layer = make_layer();
  auto x = torch::randn({2, 5, 4}, testing::device());
  torch::save(layer, (folder / "layer.pt").string());
  LoRALinear<> loaded(LoRALinearOptions(4, 3, LoRAOptions(2).alpha(6)));
  loaded->to(testing::device());
  torch::load(loaded, (folder / "layer.pt").string());
  CHECK(torch::equal(loaded->forward(x), layer->forward(x)));
  CHECK(lora::trainable_parameters(*loaded).size() == 2);
}

TEST_CASE("A merged layer is not saved, for its update would be added again on loading") {
  testing::TemporaryFolder folder;
  auto layer = make_layer();
  torch::save(layer, (folder / "layer.pt").string());
  layer->merge();
  CHECK_THROWS_WITH(torch::save(layer, (folder / "merged.pt").string()), testing::contains("unmerge it first"));
  CHECK_THROWS_WITH(torch::load(layer, (folder / "layer.pt").string()), testing::contains("unmerge it first"));
}

TEST_CASE("A layer moved to another type computes in it, also between merge and unmerge") {
  auto layer = make_layer();
  auto x = torch::randn({2, 5, 4}, testing::device());
  auto before = layer->forward(x);
  layer->merge();
  layer->to(torch::kDouble);
  CHECK(testing::distance(layer->forward(x.to(torch::kDouble)), before) < 1e-5);
  layer->unmerge();
  CHECK(layer->weight.scalar_type() == torch::kDouble);
  CHECK(testing::distance(layer->forward(x.to(torch::kDouble)), before) < 1e-5);
}

TEST_CASE("LoRALinear says what it needed and what it got") {
  auto layer = make_layer();
  torch::nn::Linear base(4, 3);
  CHECK_THROWS_WITH(LoRALinear(base, LoRAOptions(0)), testing::contains("rank has to be at least 1, but got 0"));
  CHECK(base->weight.requires_grad());  // nothing was frozen
  CHECK_THROWS_WITH(LoRALinear<>(LoRALinearOptions(0, 3, LoRAOptions(2))), testing::contains("but got 0 and 3"));
  CHECK_THROWS_WITH(layer->forward(torch::ones({2, 5}, testing::device())),
                    testing::contains("has to be 4") && testing::contains("[2, 5]"));
  CHECK_THROWS_WITH(layer->unmerge(), testing::contains("not merged"));
  layer->merge();
  CHECK_THROWS_WITH(layer->merge(), testing::contains("merged already"));
}

TEST_CASE("LoRALinear prints what it is") {
  LoRALinear<> layer(LoRALinearOptions(4, 3, LoRAOptions(2).alpha(6)).bias(false));
  CHECK(c10::str(layer) == "lora::LoRALinear<LowRank>(in_features=4, out_features=3, bias=false, rank=2, alpha=6)");
}

TEST_CASE("A copy of a layer whose weight is held in few bits holds it so") {
  torch::nn::Sequential model(lora::LoRALinear<>(torch::nn::Linear(6, 5), lora::LoRAOptions(2).alpha(3)));
  model->to(testing::device());
  lora::quantize(*model, testing::Halves(), lora::QuantizeOptions().target_modules({"0"}));
  auto& layer = *model[0]->as<lora::LoRALinear<>>();
  layer.lora_B().detach().normal_();
  lora::LoRALinear<> copy(std::dynamic_pointer_cast<lora::LoRALinearImpl<>>(layer.clone()));
  CHECK(lora::detail::is_quantized(copy->weight));
  const auto x = torch::randn({3, 6}, testing::device());
  CHECK(torch::equal(copy(x), layer.forward(x)));
}
