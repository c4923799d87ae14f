// An existing training program with six lines added: those that end in "// lora". The model is not changed.
//
// A small classifier was trained to tell on which side of a line a point lies. The line turns by 60 degrees; instead of
// all its weights, adapters of rank 2 on its stock layers are trained to follow.
#include <torch/torch.h>

#include <c10/util/MathConstants.h>

#include <fmt/format.h>
#include <lora/lora.hpp>  // lora

struct ClassifierImpl : torch::nn::Module {
  torch::nn::Linear in = register_module("in", torch::nn::Linear(2, 64));
  torch::nn::Linear hidden = register_module("hidden", torch::nn::Linear(64, 64));
  torch::nn::Linear out = register_module("out", torch::nn::Linear(64, 2));
  torch::Tensor forward(const torch::Tensor& x) { return out(torch::relu(hidden(torch::relu(in(x))))); }
};
TORCH_MODULE(Classifier);

/// Which side of the line through the origin with this angle each point is on: 0 or 1.
torch::Tensor side(const torch::Tensor& points, double angle) {
  return (points.select(1, 0) * std::sin(angle) - points.select(1, 1) * std::cos(angle) > 0).to(torch::kLong);
}

void train(Classifier& model, torch::optim::Optimizer& optimizer, double angle, int steps) {
  for (int step = 0; step < steps; ++step) {
    auto points = torch::randn({256, 2});
    auto loss = torch::nn::functional::cross_entropy(model->forward(points), side(points, angle));
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
  }
}

double accuracy(Classifier& model, double angle) {
  torch::NoGradGuard no_grad;
  auto points = torch::randn({10000, 2});
  return (model->forward(points).argmax(1) == side(points, angle)).to(torch::kDouble).mean().item<double>();
}

int main() {
  torch::manual_seed(0);
  const double before = 0, after = c10::pi<double> / 3;
  Classifier model;
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(1e-2));
  train(model, optimizer, before, 200);
  fmt::print("base model:            {:5.1f} % on the old line, {:5.1f} % on the new one\n",
             100 * accuracy(model, before), 100 * accuracy(model, after));

  auto adapters = lora::attach(*model, lora::LoRAConfig(2).alpha(4).target_modules(lora::all_linear));  // lora
  torch::optim::AdamW adapter_optimizer(adapters.parameters(), torch::optim::AdamWOptions(1e-2));       // lora
  {
    auto active = adapters.activate();  // lora
    train(model, adapter_optimizer, after, 200);
    fmt::print("inside the scope:      {:5.1f} % on the old line, {:5.1f} % on the new one\n",
               100 * accuracy(model, before), 100 * accuracy(model, after));
  }
  fmt::print("outside, base again:   {:5.1f} % on the old line, {:5.1f} % on the new one\n",
             100 * accuracy(model, before), 100 * accuracy(model, after));
  std::cout << adapters.report() << "\n";  // lora
  adapters.merge_and_unload();             // lora
  fmt::print("merged, a plain model: {:5.1f} % on the old line, {:5.1f} % on the new one\n",
             100 * accuracy(model, before), 100 * accuracy(model, after));
  return accuracy(model, after) > 0.97 ? 0 : 1;
}
