#include "support/methods.hpp"
#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/method/dora.hpp>

using lora::DoRA;
using lora::LoRAOptions;

namespace {

/// A DoRA adapter on W (out, in) in float64 whose tensors all have values of their own.
struct Fixture {
  Fixture(int64_t out, int64_t in, const LoRAOptions& options)
      : any(testing::make_method<DoRA>(options, out, in, torch::kDouble)) {
    torch::manual_seed(0);
    const auto type = testing::on_device(torch::kDouble);
    weight = torch::randn({out, in}, type);
    bias = torch::randn({out}, type);
    any.initialize(lora::WeightBase(weight));
    method.lora_B.normal_();
    method.lora_magnitude_vector.uniform_(0.5, 2);
    x = torch::randn({2, 3, in}, type);
  }

  torch::Tensor by_hand() const {
    auto moved = weight + method.scaling * method.lora_B.mm(method.lora_A);
    return method.lora_magnitude_vector.unsqueeze(1) * moved / moved.norm(2, 1, true);
  }

  torch::Tensor forward(bool training = false) const { return testing::linear_with(any, x, weight, bias, training); }

  lora::MethodOf<DoRA> any;
  DoRA& method = any.value;
  torch::Tensor weight, bias, x;
};

}  // namespace

TEST_CASE("DoRA gives each output its magnitude, by hand") {
  auto any = testing::make_method<DoRA>(LoRAOptions(1).alpha(2), 1, 2);
  auto& method = any.value;
  const lora::WeightBase base(torch::tensor({{1.0F, 0.0F}}).to(testing::device()));
  any.initialize(base);
  CHECK(method.lora_magnitude_vector.item<double>() == 1);
  method.lora_A.copy_(torch::tensor({{1.0, 2.0}}));
  method.lora_B.fill_(1);  // W + 2 B A = (3, 4), its norm 5
  method.lora_magnitude_vector.fill_(10);
  CHECK(testing::distance(any.delta(base), torch::tensor({{5.0, 8.0}})) < 1e-6);  // (6, 8) - (1, 0)
}

TEST_CASE("DoRA starts as the frozen layer") {
  torch::manual_seed(0);
  auto method = testing::make_method<DoRA>(LoRAOptions(2).alpha(6), 4, 5);
  auto weight = torch::randn({4, 5}, testing::device());
  method.initialize(lora::WeightBase(weight));
  CHECK(testing::distance(method.value.lora_magnitude_vector, weight.norm(2, 1)) < 1e-6);
  CHECK(testing::distance(method.delta(lora::WeightBase(weight)), torch::zeros({4, 5})) < 1e-6);
}

TEST_CASE("DoRA's forward is x W'^T + b, with the bias not scaled") {
  Fixture f(4, 5, LoRAOptions(2).alpha(6));
  CHECK(testing::distance(f.forward(), f.x.matmul(f.by_hand().t()) + f.bias) < 1e-12);
  CHECK(testing::distance(f.weight + f.any.delta(lora::WeightBase(f.weight)), f.by_hand()) < 1e-12);
}

TEST_CASE("No gradient of DoRA passes through the norm") {
  Fixture f(4, 5, LoRAOptions(2).alpha(6));
  std::vector<torch::Tensor> tensors{f.method.lora_A, f.method.lora_B, f.method.lora_magnitude_vector};
  for (auto& tensor : tensors) tensor.requires_grad_(true);
  auto gradients = torch::autograd::grad({f.forward().sin().sum()}, tensors);
  auto norm = (f.weight + f.method.scaling * f.method.lora_B.mm(f.method.lora_A)).norm(2, 1).detach();
  auto with_constant_norm = [&] {
    auto moved = f.weight + f.method.scaling * f.method.lora_B.mm(f.method.lora_A);
    auto merged = (f.method.lora_magnitude_vector / norm).unsqueeze(1) * moved;
    return (f.x.matmul(merged.t()) + f.bias).sin().sum();
  };
  auto expected = torch::autograd::grad({with_constant_norm()}, tensors);
  for (size_t i = 0; i < tensors.size(); ++i) CHECK(testing::distance(gradients[i], expected[i]) < 1e-10);
  CHECK(testing::gradient_error(with_constant_norm, tensors) < 1e-6);
}

TEST_CASE("With dropout both terms of DoRA's difference see the same input") {
  Fixture f(4, 5, LoRAOptions(2).alpha(6).dropout(0.5));
  torch::manual_seed(3);
  auto output = f.forward(/*training=*/true);
  torch::manual_seed(3);
  auto dropped = lora::detail::dropout(f.x, 0.5);
  auto expected = f.x.matmul(f.weight.t()) + f.bias + dropped.matmul(f.by_hand().t()) - dropped.matmul(f.weight.t());
  CHECK(testing::distance(output, expected) < 1e-12);
  CHECK(testing::distance(f.forward(false), f.x.matmul(f.by_hand().t()) + f.bias) < 1e-12);
}

TEST_CASE("The gain of a linear layer has the derivatives of what it is written out as, the second ones, too") {
  const bool has_bias = GENERATE(true, false), trains_magnitude = GENERATE(true, false);
  const auto doubles = testing::on_device(torch::kDouble);
  torch::nn::Linear layer(torch::nn::LinearOptions(5, 4).bias(has_bias));
  layer->to(testing::device(), torch::kDouble);
  torch::nn::Sequential model(layer);
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).alpha(6).method(lora::DoRA()).target_modules({"0"}));
  testing::randomize(adapters.parameters());
  const auto named = adapters.named_parameters();
  const auto A = named["0.lora_A"], B = named["0.lora_B"], m = named["0.lora_magnitude_vector"];
  m.set_requires_grad(trains_magnitude);
  const auto x = torch::randn({2, 3, 5}, doubles).requires_grad_();
  const auto weight = layer->weight, bias = layer->bias;
  const auto by_hand = [&] {
    const auto moved = weight + 3 * B.mm(A);
    const auto norm = moved.norm(2, 1).detach();
    const auto y = x.matmul(moved.t()) * (m / norm);
    return has_bias ? y + bias : y;
  };
  const auto by_library = [&] {
    auto active = adapters.activate();
    return model->forward(x);
  };
  std::vector<torch::Tensor> wanted{x, A, B};
  if (trains_magnitude) wanted.push_back(m);
  const auto derivatives = [&](const std::function<torch::Tensor()>& forward) {
    const auto y = forward();
    auto all = torch::autograd::grad({y.sigmoid().pow(2).sum()}, wanted, {}, true, /*create_graph=*/true);
    auto penalty = torch::zeros({}, doubles);
    for (const auto& gradient : all) penalty = penalty + gradient.pow(2).sum();
    for (const auto& second : torch::autograd::grad({penalty}, wanted)) all.push_back(second);
    all.push_back(y);
    return all;
  };
  const auto found = derivatives(by_library), expected = derivatives(by_hand);
  for (size_t i = 0; i < expected.size(); ++i) CHECK(testing::distance(found[i], expected[i]) < 1e-10);
  by_library().mul_(2).sum().backward();  // what it returns may be written to
  const auto gradient = x.grad().clone();
  x.mutable_grad() = torch::Tensor();
  by_hand().mul(2).sum().backward();
  CHECK(testing::distance(gradient, x.grad()) < 1e-12);
}
