// What do the parts of a training step cost that are no layers? Beside LibTorch's own: the cross entropy of a head
// (time, and the memory at its height), the step of the optimizer for many small tensors, and a checkpoint. Each pair
// is measured in turns; printed are medians of times, and of the ratios of the same round.
//
//   training [ROUNDS [CHUNK_ROWS...]]      9
#include <torch/torch.h>

#include <lora/train/checkpointing.hpp>
#include <lora/train/cross_entropy.hpp>
#include <lora/train/optimizer.hpp>

#include <fmt/format.h>

#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "timing.hpp"

namespace {

using torch::Tensor;
namespace F = torch::nn::functional;

/// The highest amount of memory of the process while `work` runs, above that before, in MB. Linux only.
double peak_megabytes(const std::function<void()>& work) {
  const auto status = [](const std::string& name) {
    std::ifstream file("/proc/self/status");
    for (std::string line; std::getline(file, line);) {
      if (line.rfind(name, 0) == 0) return std::stod(line.substr(name.size() + 1)) / 1024;
    }
    return 0.0;
  };
  std::ofstream("/proc/self/clear_refs") << "5";
  const auto before = status("VmRSS");
  work();
  return status("VmHWM") - before;
}

void compare(const std::string& name, int rounds, const std::function<void()>& plain,
             const std::function<void()>& ours) {
  const auto plain_memory = peak_megabytes(plain), memory = peak_megabytes(ours);
  std::vector<double> of_plain, of_ours, ratios;
  for (int round = 0; round < rounds; ++round) {
    of_plain.push_back(milliseconds(plain));
    of_ours.push_back(milliseconds(ours));
    ratios.push_back(of_ours.back() / of_plain.back());
  }
  fmt::print("| {} | {:.2f} | {:.2f} | {:.2f} | {:.0f} | {:.0f} |\n", name, median(of_plain), median(of_ours),
             median(ratios), plain_memory, memory);
}

void measure_cross_entropy(int rounds, const std::vector<int64_t>& chunks, bool head_learns) {
  const int64_t rows = 512, features = 576, classes = 49152;
  const auto weight = torch::randn({classes, features}).mul_(0.02).requires_grad_(head_learns);
  const auto hidden = torch::randn({rows, features}).requires_grad_();
  const auto targets = torch::randint(classes, {rows}, torch::kLong);
  const auto finish = [&](const Tensor& loss) {
    loss.backward();
    hidden.mutable_grad() = Tensor();
    weight.mutable_grad() = Tensor();
  };
  const auto logits_gradient = torch::randn({rows, classes}).mul_(1e-3);
  compare(
      "the cross entropy beside its products alone", rounds,
      [&] {
        torch::NoGradGuard no_grad;
        hidden.mm(weight.t());
        logits_gradient.mm(weight);
        if (head_learns) logits_gradient.t().mm(hidden);
      },
      [&] { finish(lora::linear_cross_entropy(hidden, weight, targets)); });
  for (const auto chunk : chunks) {
    const auto name = fmt::format("cross entropy of a {} head, chunks of {}", head_learns ? "learning" : "frozen",
                                  chunk == 0 ? "the default" : std::to_string(chunk));
    compare(
        name, rounds, [&] { finish(F::cross_entropy(torch::linear(hidden, weight), targets)); },
        [&] {
          finish(lora::linear_cross_entropy(hidden, weight, targets, lora::CrossEntropyOptions().chunk_rows(chunk)));
        });
  }
}

void measure_optimizer(int rounds) {
  std::vector<Tensor> parameters, others;
  for (int i = 0; i < 60; ++i) {
    for (auto* all : {&parameters, &others}) {
      all->push_back(torch::randn({8, 576}).requires_grad_());
      all->push_back(torch::randn({576, 8}).requires_grad_());
    }
  }
  lora::AdamW ours(parameters, lora::AdamWOptions(1e-3));
  torch::optim::AdamW plain(others, torch::optim::AdamWOptions(1e-3));
  for (auto* all : {&parameters, &others}) {
    for (const auto& parameter : *all) parameter.mul(0.1).sum().backward();
  }
  const auto step = [](auto& optimizer) {
    return [&optimizer] {
      for (int i = 0; i < 20; ++i) optimizer.step();
    };
  };
  compare("20 steps of AdamW, 120 tensors of 4608", rounds, step(plain), step(ours));
  compare(
      "20 times the norm clipped", rounds,
      [&] {
        for (int i = 0; i < 20; ++i) torch::nn::utils::clip_grad_norm_(others, 1.0);
      },
      [&] {
        for (int i = 0; i < 20; ++i) lora::clip_grad_norm(ours, 1.0);
      });
}

void measure_checkpoint(int rounds) {
  torch::nn::Sequential block;
  for (int i = 0; i < 4; ++i) {
    block->push_back(torch::nn::Linear(512, 512));
    block->push_back(torch::nn::GELU());
  }
  const auto x = torch::randn({1024, 512}).requires_grad_();
  const auto pass = [&](bool recompute) {
    auto y = x;
    const auto run = [&](const Tensor& in) { return block->forward(in); };
    for (int i = 0; i < 8; ++i) y = recompute ? lora::checkpoint(run, y) : run(y);
    y.sum().backward();
  };
  compare(
      "8 blocks of 4 layers, 1024 x 512, with checkpoints", rounds, [&] { pass(false); }, [&] { pass(true); });
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::stoi(arguments[1]) : 9;
  std::vector<int64_t> chunks;
  for (int i = 2; i < count; ++i) chunks.push_back(std::stoll(arguments[i]));
  if (chunks.empty()) chunks.push_back(0);
  torch::manual_seed(0);
  fmt::print("threads: {}\n\n| | LibTorch ms | here ms | ratio | LibTorch MB | here MB |\n|---|---|---|---|---|---|\n",
             at::get_num_threads());
  measure_cross_entropy(rounds, chunks, /*head_learns=*/false);
  measure_cross_entropy(rounds, {0}, /*head_learns=*/true);
  measure_optimizer(rounds);
  measure_checkpoint(rounds);
}
