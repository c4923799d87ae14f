// train_step [DEVICE]: what does a step of training cost on a device, in full and with an adapter, and what does a
// forward pass cost with and without it? A stack of linear layers as wide as those of a small language model; prints
// the fastest of some, between two synchronizations. Needs nothing but LibTorch, for machines that have nothing else
// (tests/cuda.sh).
#include <torch/torch.h>

#include <lora/lora.hpp>
#include <lora/train/optimizer.hpp>

#include <algorithm>
#include <functional>
#include <iostream>
#include <vector>

#include <fmt/format.h>

#include "timing.hpp"

namespace {

constexpr int64_t kWidth = 576, kHidden = 1536, kBlocks = 8, kBatch = 4,
                  kLength = 128;  // as SmolLM2-135M, fewer blocks

torch::nn::Sequential make_model(torch::Device device) {
  torch::nn::Sequential model;
  for (int64_t block = 0; block < kBlocks; ++block) {
    model->push_back(torch::nn::LayerNorm(torch::nn::LayerNormOptions({kWidth})));
    model->push_back(torch::nn::Linear(kWidth, kHidden));
    model->push_back(torch::nn::SiLU());
    model->push_back(torch::nn::Linear(kHidden, kWidth));
  }
  model->to(device);
  return model;
}

/// Milliseconds of one call: the fastest of some, after as many that are not counted.
double time_of(torch::Device device, const std::function<void()>& call) {
  const size_t calls = device.is_cuda() ? 15 : 3;
  const auto wait = [&] {
    if (device.is_cuda()) torch::cuda::synchronize();
  };
  std::vector<double> times;
  for (size_t i = 0; i < 2 * calls; ++i) {
    wait();
    const auto time = milliseconds([&] {
      call();
      wait();
    });
    if (i >= calls) times.push_back(time);
  }
  return *std::min_element(times.begin(), times.end());
}

}  // namespace

int main(int argc, char** argv) {
  const torch::Device device(argc > 1 ? argv[1] : torch::cuda::is_available() ? "cuda" : "cpu");
  torch::manual_seed(0);
  auto model = make_model(device);
  const auto x = torch::randn({kBatch, kLength, kWidth}, device), target = torch::randn_like(x);
  const auto train = [&](auto& optimizer) {
    optimizer.zero_grad();
    torch::mse_loss(model->forward(x), target).backward();
    optimizer.step();
  };
  const auto forward = [&] {
    const torch::NoGradGuard no_grad;
    model->forward(x);
  };
  const auto print = [](const char* what, double time, double base) {
    std::cout << fmt::format("{:<34} {:8.3f} ms {:8.2f}\n", what, time, time / base) << std::flush;
  };

  std::cout << fmt::format(
      "{} linear layers on {}, {} threads; beside the times their ratio to the first of the kind\n", kBlocks * 2,
      device.str(), torch::get_num_threads());
  torch::optim::AdamW everything(model->parameters(), 1e-4);
  const auto full = time_of(device, [&] { train(everything); });
  const auto base = time_of(device, forward);
  auto adapters = lora::attach(*model, lora::LoRAConfig(8).target_modules(lora::all_linear));
  torch::optim::AdamW few(adapters.parameters(), 1e-4);
  lora::AdamW flat(adapters, lora::AdamWOptions(1e-4));
  const auto scoped = [&](const std::function<void()>& call) {
    return time_of(device, [&] {
      auto active = adapters.activate();
      call();
    });
  };
  print("a step, everything trained", full, full);
  print("a step, an adapter of rank 8", scoped([&] { train(few); }), full);
  print("the same with lora::AdamW", scoped([&] { train(flat); }), full);
  print("a forward pass, no adapter", base, base);
  print("a forward pass, attached, no scope", time_of(device, forward), base);
  print("a forward pass in a scope", scoped(forward), base);
  adapters.merge_and_unload();
  print("a forward pass, merged", time_of(device, forward), base);
}
