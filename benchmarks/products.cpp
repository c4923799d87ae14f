// What do the products with frozen weights of a step of fine-tuning take alone, forward and for the inputs' gradients?
// Each weight has memory of its own, as in a model. Printed is the median of all of them together, in seconds: those of
// LibTorch's at::linear and at::mm, and those that the library computes in a scope.
//
//   products ROWS THREADS ROUNDS OUTxIN:COUNT...
//   products 512 2 5 576x576:60 192x576:60 1536x576:60 576x1536:30 49152x576:1      a step of SmolLM2-135M
#include <torch/torch.h>

#include <lora/lora.hpp>

#include <fmt/format.h>

#include <cstdio>
#include <optional>
#include <string>
#include <vector>

#include "timing.hpp"

int main(int count, char** arguments) {
  if (count < 5) {
    fmt::print(stderr, "products ROWS THREADS ROUNDS OUTxIN:COUNT...\n");
    return 2;
  }
  const int64_t rows = std::stoll(arguments[1]);
  torch::set_num_threads(std::stoi(arguments[2]));
  const int rounds = std::stoi(arguments[3]);
  const torch::NoGradGuard no_gradient;
  torch::manual_seed(0);
  std::vector<torch::Tensor> weights;
  for (int i = 4; i < count; ++i) {
    long long out = 0, in = 0, some = 0;
    if (std::sscanf(arguments[i], "%lldx%lld:%lld", &out, &in, &some) != 3 || out < 1 || in < 1) {
      fmt::print(stderr, "\"{}\" is no OUTxIN:COUNT\n", arguments[i]);
      return 2;
    }
    for (; some > 0; --some) weights.push_back(torch::randn({out, in}));
  }
  const auto numbers = torch::randn({rows, 1 << 16});  // of which each product takes as many columns as it needs
  const auto step = [&] {
    double time = 0;
    for (const auto& weight : weights) {
      const auto x = numbers.narrow(1, 0, weight.size(1)).contiguous();
      const auto gradient = numbers.narrow(1, 0, weight.size(0)).contiguous();
      time += microseconds([&] {
        const auto y = torch::linear(x, weight);
        const auto dx = gradient.mm(weight);
      });
    }
    return time * 1e-6;
  };
  std::vector<double> plain, in_scope;
  for (int round = -1; round < rounds; ++round) {
    for (const bool is_plain : {true, false}) {
      const auto fast = is_plain ? std::nullopt : std::optional(lora::fast_products());
      const auto time = step();
      if (round >= 0) (is_plain ? plain : in_scope).push_back(time);
    }
  }
  fmt::print("LibTorch's {:.4f} s, in a scope {:.4f} s\n", median(plain), median(in_scope));
}
