#include "support/methods.hpp"
#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/modules/linear.hpp>

using lora::IA3;
using lora::LoRAConfig;
using lora::LoRAOptions;

namespace {

/// Two layers of which the second scales its inputs, in float64, with values in l.
struct Fixture {
  Fixture() {
    torch::manual_seed(0);
    model->push_back("up", torch::nn::Linear(5, 4));
    model->push_back("down", torch::nn::Linear(4, 3));
    model->to(testing::device(), torch::kDouble);
    adapters.emplace(
        lora::attach(*model, LoRAConfig(1).method(IA3().feedforward_modules({"down"})).target_modules({"up", "down"})));
    testing::randomize(adapters->parameters(), 0.5);
    x = torch::randn({2, 3, 5}, testing::on_device(torch::kDouble));
  }

  torch::Tensor by_hand(const torch::Tensor& x) {
    auto named = adapters->named_parameters();
    auto up = *model->ptr(0)->as<torch::nn::Linear>(), down = *model->ptr(1)->as<torch::nn::Linear>();
    const auto hidden = named["up.ia3_l"].flatten() * (x.matmul(up.weight.t()) + up.bias);
    return (hidden * named["down.ia3_l"].flatten()).matmul(down.weight.t()) + down.bias;
  }

  torch::Tensor adapted() {
    auto active = adapters->activate();
    return model->forward(x);
  }

  torch::nn::Sequential model;
  std::optional<lora::Adapters> adapters;
  torch::Tensor x;
};

}  // namespace

TEST_CASE("IA3 scales outputs with their bias, and the inputs of feed-forward modules") {
  Fixture f;
  CHECK(f.adapters->named_parameters()["up.ia3_l"].sizes() == torch::IntArrayRef({4, 1}));
  CHECK(f.adapters->named_parameters()["down.ia3_l"].sizes() == torch::IntArrayRef({1, 4}));
  for (const auto& sizes : std::vector<std::vector<int64_t>>{{5}, {3, 5}, {2, 3, 5}}) {
    f.x = torch::randn(sizes, f.x.options());
    CHECK(testing::distance(f.adapted(), f.by_hand(f.x)) < 1e-12);
  }
  CHECK(testing::gradient_error([&] { return f.adapted().sin().sum(); }, f.adapters->parameters()) < 1e-7);
}

TEST_CASE("IA3 is merged into weights and biases, and taken out again bit by bit") {
  Fixture f;
  const auto adapted = f.adapted(), base = f.model->forward(f.x);
  const auto bias = f.model->ptr(0)->as<torch::nn::Linear>()->bias.clone();
  f.adapters->merge();
  CHECK(testing::distance(f.model->forward(f.x), adapted) < 1e-12);
  CHECK(testing::distance(f.adapted(), adapted) < 1e-12);
  CHECK(testing::distance(f.model->ptr(0)->as<torch::nn::Linear>()->bias,
                          bias * f.adapters->named_parameters()["up.ia3_l"].flatten()) < 1e-12);
  f.adapters->unmerge();
  CHECK(torch::equal(f.model->forward(f.x), base));
  f.adapters->merge_and_unload();
  CHECK(testing::distance(f.model->forward(f.x), adapted) < 1e-12);
}

TEST_CASE("IA3 trains as many numbers as it has, without a rank") {
  Fixture f;
  const auto report = f.adapters->report();
  CHECK(report.trainable == 4 + 4);
  CHECK(report.layers[0].rank == 0);
  CHECK(report.layers[0].scaling == 1);
}

TEST_CASE("A module scales its outputs and its bias, merged or not, and so does its copy") {
  torch::manual_seed(0);
  lora::LoRALinear<IA3> layer(lora::LoRALinearOptions(5, 4, LoRAOptions(1)));
  layer->to(testing::device(), torch::kDouble);
  auto x = torch::randn({3, 5}, testing::on_device(torch::kDouble));
  CHECK(torch::equal(layer->forward(x), torch::linear(x, layer->weight, layer->bias)));
  testing::randomize(lora::trainable_parameters(*layer), 0.5);
  const auto l = layer->named_parameters()["ia3_l"].flatten();
  const auto expected = l * torch::linear(x, layer->weight, layer->bias);
  CHECK(testing::distance(layer->forward(x), expected) < 1e-12);
  const auto bias = layer->bias.clone();
  layer->merge();
  CHECK(testing::distance(layer->forward(x), expected) < 1e-12);
  auto copy = std::dynamic_pointer_cast<lora::LoRALinearImpl<IA3>>(layer->clone());
  CHECK(torch::equal(copy->forward(x), layer->forward(x)));
  copy->unmerge();
  CHECK(torch::equal(copy->bias, bias));
  CHECK(testing::distance(copy->forward(x), expected) < 1e-12);
  layer->unmerge();
  CHECK(torch::equal(layer->bias, bias));
}

TEST_CASE("The inputs of an embedding cannot be scaled") {
  torch::nn::Sequential model(torch::nn::Embedding(7, 4));
  CHECK_THROWS_WITH(lora::attach(*model, LoRAConfig(1).method(IA3().feedforward_modules({"0"})).target_modules({"0"})),
                    testing::contains("lora::IA3: the inputs of an embedding are numbers of entries"));
  CHECK(model->parameters()[0].requires_grad());
}

TEST_CASE("A bias that is trained in full and scaled is merged once, and comes back bit by bit") {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(5, 4));
  model->to(testing::device(), torch::kDouble);
  const auto bias = model->parameters()[1].clone();
  auto adapters =
      lora::attach(*model, LoRAConfig(1).method(IA3()).bias(lora::Bias::kAdaptedOnly).target_modules({"0"}));
  testing::randomize(adapters.parameters(), 0.5);
  auto named = adapters.named_parameters();
  auto x = torch::randn({3, 5}, testing::on_device(torch::kDouble));
  const auto l = named["0.ia3_l"].flatten();
  // the sum of both changes: b + (v - b) + (l b - b)
  const auto expected = l * x.matmul(model->parameters()[0].t()) + named["0.bias"] + (l - 1) * bias;
  const auto base = model->forward(x);
  {
    auto active = adapters.activate();
    CHECK(testing::distance(model->forward(x), expected) < 1e-12);
  }
  adapters.merge();
  CHECK(testing::distance(model->forward(x), expected) < 1e-12);
  adapters.unmerge();
  CHECK(torch::equal(model->forward(x), base));
  CHECK(torch::equal(model->parameters()[1], bias));
}
