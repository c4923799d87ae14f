// What holds for every method of the list, present and future: the sum of the parts is the layer, gradients are right,
// merging is exact.
#include "support/models.hpp"

#include <lora/attach.hpp>

#include <ATen/autocast_mode.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <set>

namespace {

/// A Linear (5 -> 4) with a bias in a Sequential, alpha / rank = 2.5, and values in every trainable tensor.
struct Fixture {
  Fixture(const lora::MethodKind& method, torch::ScalarType type) {
    torch::manual_seed(0);
    model->push_back("fc", torch::nn::Linear(5, 4));
    model->to(testing::device(), type);
    adapters = std::make_unique<lora::Adapters>(
        lora::attach(*model, lora::LoRAConfig(2).alpha(5).method(method).target_modules({"fc"})));
    testing::randomize(adapters->parameters(), 0.3);
    x = torch::randn({2, 3, 5}, testing::on_device(type));
  }

  torch::nn::LinearImpl& layer() { return *model->ptr(0)->as<torch::nn::Linear>(); }

  torch::Tensor forward() {
    auto active = adapters->activate();
    return model->forward(x);
  }

  /// b', for methods that change the bias, too.
  torch::Tensor changed_bias() {
    auto bias = layer().bias.to(torch::kDouble);
    return adapters->adapter("default")->part("fc.bias") ? bias + adapters->delta("default", "fc.bias") : bias;
  }

  torch::nn::Sequential model;
  std::unique_ptr<lora::Adapters> adapters;
  torch::Tensor x;
};

lora::MethodKind any_method() { return GENERATE(from_range(lora::all_methods())); }

}  // namespace

TEST_CASE("The list of methods names each once, LowRank first") {
  std::set<std::string_view> names;
  for (const auto& method : lora::all_methods()) CHECK(names.insert(method.info().name).second);
  CHECK(lora::all_methods().front().info().name == "LowRank");
}

TEST_CASE("Every method: forward is x (W + delta)^T + b") {
  const auto method = any_method();
  const auto [type, precision] = GENERATE(table<torch::ScalarType, double>({
      {torch::kDouble, 1e-13}, {torch::kFloat, 1e-6}, {torch::kBFloat16, 0.015},  // a few roundings
  }));
  const bool training = GENERATE(true, false);
  INFO(method.info().name << " " << type);
  Fixture f(method, type);
  f.model->train(training);
  testing::randomize(f.adapters->parameters(), 1);
  const auto moved = f.x.to(torch::kDouble).matmul(f.adapters->delta("default", "fc").to(torch::kDouble).t());
  const auto expected =
      f.x.to(torch::kDouble).matmul(f.layer().weight.to(torch::kDouble).t()) + moved + f.changed_bias();
  const auto tolerance = precision * (1 + expected.abs().max().item<double>());
  CHECK(moved.abs().max().item<double>() > 4 * tolerance);
  auto output = f.forward();
  CHECK(output.scalar_type() == type);
  CHECK(testing::distance(output, expected) < tolerance);
  f.x = f.x[0][0];  // no batch dimension
  CHECK(testing::distance(f.forward(), expected[0][0]) < tolerance);
}

TEST_CASE("Every method: merged equals unmerged, rounded once, and unmerging is bit-exact") {
  const auto method = any_method();
  const auto [type, tolerance] = GENERATE(table<torch::ScalarType, double>({
      {torch::kDouble, 1e-12},
      {torch::kFloat, 1e-5},
      {torch::kHalf, 0.02},
      {torch::kBFloat16, 0.15},
  }));
  INFO(method.info().name << " " << type);
  Fixture f(method, type);
  auto adapted = f.forward();
  auto pristine = f.layer().weight.clone();
  auto delta = f.adapters->delta("default", "fc").detach();
  f.adapters->merge();
  CHECK(testing::distance(f.model->forward(f.x), adapted) < tolerance);
  CHECK(torch::equal(f.layer().weight, (pristine.to(delta.scalar_type()) + delta).to(type)));
  f.adapters->unmerge();
  CHECK(torch::equal(f.layer().weight, pristine));
}

TEST_CASE("Every method: the gradient of the input is right, every tensor gets one, and the base gets none") {
  Fixture f(any_method(), torch::kDouble);
  f.x.requires_grad_();
  CHECK(testing::gradient_error([&] { return f.forward().sin().sum(); }, {f.x}) < 1e-8);
  f.forward().sin().sum().backward();
  for (const auto& parameter : f.model->parameters()) CHECK_FALSE(parameter.grad().defined());
  for (const auto& item : f.adapters->named_parameters()) {
    INFO(item.key());
    REQUIRE(item.value().grad().defined());
    CHECK(item.value().grad().abs().min().item<double>() > 0);
  }
}

TEST_CASE("Every method that drops does so in training mode, and only there") {
  const auto method = any_method();
  if (method.info().dropout_name.empty()) return;
  Fixture f(method, torch::kFloat);
  lora::Adapters dropping(*f.model);
  auto config = f.adapters->config("default");
  dropping.add("dropping", config.dropout(0.5));
  testing::randomize(dropping.parameters(), 0.3);
  auto active = dropping.activate();
  CHECK_FALSE(torch::equal(f.model->forward(f.x), f.model->forward(f.x)));
  f.model->eval();
  CHECK(torch::equal(f.model->forward(f.x), f.model->forward(f.x)));
}

TEST_CASE("Every method: merging under autocast is computed in float all the same") {
  Fixture f(any_method(), torch::kFloat);
  auto expected = f.layer().weight + f.adapters->delta("default", "fc");
  at::autocast::set_autocast_enabled(testing::device().type(), true);
  f.adapters->merge();
  at::autocast::set_autocast_enabled(testing::device().type(), false);
  CHECK(torch::equal(f.layer().weight, expected));
}

TEST_CASE("Every method: a forward pass under autocast is that without it, rounded") {
  Fixture f(any_method(), torch::kFloat);
  const torch::NoGradGuard no_grad;
  const auto expected = f.forward();
  const auto device = testing::device().type();
  at::autocast::set_autocast_enabled(device, true);
  at::autocast::set_autocast_dtype(device, torch::kBFloat16);
  const auto rounded = f.forward();
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(device, false);
  CHECK(rounded.scalar_type() == torch::kBFloat16);
  CHECK(testing::distance(rounded, expected) < 0.03 * (1 + expected.abs().max().item<double>()));
}

TEST_CASE("Every method: what is traced in a scope computes the same of other inputs") {
  const auto method = any_method();
  INFO(method.info().name);
  Fixture f(method, torch::kFloat);
  const torch::NoGradGuard no_grad;
  for (auto& parameter : f.model->parameters()) parameter.requires_grad_(false);  // which no constant may
  for (auto& parameter : f.adapters->parameters()) parameter.requires_grad_(false);
  const auto run = [&](torch::jit::Stack stack) {
    f.x = stack.front().toTensor();
    return torch::jit::Stack{f.forward()};
  };
  const auto traced = torch::jit::tracer::trace({f.x}, run, [](const auto&) { return ""; }).first;
  torch::jit::GraphFunction function("forward", traced->graph, nullptr);
  f.x = torch::randn({4, 3, f.x.size(-1)}, f.x.options());
  torch::jit::Stack stack{f.x};
  function.run(stack);
  CHECK(testing::distance(stack.front().toTensor(), f.forward()) < 1e-5);
}

TEST_CASE("Every method: a row of zeros in the weight does no harm") {
  Fixture f(any_method(), torch::kFloat);
  f.layer().weight.detach()[1].zero_();
  lora::Adapters fresh(*f.model);
  fresh.add("fresh", f.adapters->config("default"));
  auto base = f.model->forward(f.x);
  auto active = fresh.activate();
  CHECK(testing::distance(f.model->forward(f.x), base) < 1e-5);
}

TEST_CASE("Every method: added while another adapter is merged, it starts from the weight without that one") {
  Fixture f(any_method(), torch::kFloat);
  auto base = f.model->forward(f.x);
  f.adapters->merge();
  f.adapters->add("late", f.adapters->config("default"));
  CHECK_THROWS_WITH(f.adapters->activate("late"), testing::contains("\"default\" is merged"));
  f.adapters->unmerge();
  auto active = f.adapters->activate("late");
  CHECK(testing::distance(f.model->forward(f.x), base) < 1e-5);
}

TEST_CASE("Every method starts as the frozen layer") {
  Fixture f(any_method(), torch::kFloat);
  lora::Adapters fresh(*f.model);
  fresh.add("fresh", f.adapters->config("default"));
  auto base = f.model->forward(f.x);
  auto active = fresh.activate();
  CHECK(testing::distance(f.model->forward(f.x), base) < 1e-5);
  CHECK(testing::distance(fresh.delta("fresh", "fc"), torch::zeros({4, 5})) < 1e-6);
}
