// One adapted layer: y = x W^T + b + (alpha / rank) x A^T B^T, with W and b frozen.
//
// A frozen layer is to imitate another one whose weight differs from its own by a matrix of rank 2. An adapter of rank
// 2 can do that exactly; it trains 2 (64 + 32) = 192 numbers instead of 2080.
#include <torch/torch.h>

#include <fmt/format.h>
#include <lora/lora.hpp>

int main() {
  torch::manual_seed(0);
  torch::nn::Linear base(64, 32);
  auto difference = torch::randn({32, 2}).mm(torch::randn({2, 64})) / 8;  // rank 2
  auto teacher = [&](const torch::Tensor& x) { return base->forward(x) + x.mm(difference.t()); };

  lora::LoRALinear layer(base, lora::LoRAOptions(/*rank=*/2).alpha(4));
  std::cout << layer << "\n";

  torch::optim::AdamW optimizer(lora::trainable_parameters(*layer), torch::optim::AdamWOptions(0.02).weight_decay(0));
  for (int step = 0; step <= 300; ++step) {
    auto x = torch::randn({128, 64});
    auto loss = torch::mse_loss(layer->forward(x), teacher(x).detach());
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    if (step % 100 == 0) fmt::print("step {:3}   loss {:.1e}\n", step, loss.item<double>());
  }

  torch::NoGradGuard no_grad;
  auto x = torch::randn({8, 64});
  auto adapted = layer->forward(x);
  auto learned = layer->delta();
  const auto error = ((learned - difference).norm() / difference.norm()).item<double>();
  fmt::print("|learned - true difference| / |true difference| = {:.1e}\n", error);
  layer->merge();
  const auto distance = (layer->forward(x) - adapted).abs().max().item<double>();
  fmt::print("largest |merged - unmerged| = {:.1e}\n", distance);
  return error < 1e-2 && distance < 1e-4 ? 0 : 1;
}
