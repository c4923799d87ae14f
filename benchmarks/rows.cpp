// What does a batch cost in which each row has an adapter of its own, beside the frozen layer alone? For each case both
// are measured in turns, many times; printed are the medians of the ratios of a round. Rows are sorted by their
// adapters or take turns.
//
//   rows [ROUNDS [ONLY]]      300, all cases; or those whose name contains ONLY
#include <torch/torch.h>

#include <lora/lora.hpp>

#include <fmt/format.h>

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "timing.hpp"

namespace {

using torch::Tensor;
using Names = std::vector<std::string>;

constexpr int64_t kWidth = 768, kRank = 8;

/// A batch of so many rows, with so many entries each, of so many adapters.
struct Case {
  int64_t rows, positions, adapters;
  bool is_sorted = true;
  bool is_step = false;
};

std::string name_of(const Case& one) {
  return fmt::format("{}, {} rows of {}, {} adapters, {}", one.is_step ? "step" : "forward", one.rows, one.positions,
                     one.adapters, one.is_sorted ? "sorted" : "in turns");
}

Names names_of(const Case& one) {
  Names names;
  for (int64_t row = 0; row < one.rows; ++row) {
    const auto adapter = one.is_sorted ? row * one.adapters / one.rows : row % one.adapters;
    names.push_back("adapter " + std::to_string(adapter));
  }
  return names;
}

void measure(const Case& one, int rounds) {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(kWidth, kWidth));
  const auto layer = model->ptr(0)->as<torch::nn::Linear>();
  lora::Adapters adapters(*model);
  for (int64_t i = 0; i < one.adapters; ++i) {
    const auto name = "adapter " + std::to_string(i);
    adapters.add(name, lora::LoRAConfig(kRank).alpha(16).target_modules({"0"}));
    for (auto& tensor : adapters.parameters(name)) tensor.detach().normal_(0, 0.02);
  }
  const auto x = torch::randn({one.rows, one.positions, kWidth}).requires_grad_(one.is_step);
  const auto gradient = torch::randn_like(x).set_requires_grad(false);
  const torch::AutoGradMode mode(one.is_step);
  const auto step = [&] {
    const auto y = layer->forward(x);
    if (!one.is_step) return;
    y.backward(gradient);
    for (const auto& tensor : adapters.parameters()) tensor.mutable_grad() = Tensor();
    x.mutable_grad() = Tensor();
  };
  const auto names = names_of(one);
  std::vector<double> base, ratios, activations;
  for (int round = -10; round < rounds; ++round) {
    const auto time = microseconds(step);
    double adapted = 0;
    const auto whole = microseconds([&] {
      auto active = one.adapters == 1 ? adapters.activate("adapter 0") : adapters.activate(names);
      adapted = microseconds(step);
    });
    if (round < 0) continue;
    base.push_back(time);
    ratios.push_back(adapted / time);
    activations.push_back(whole - adapted);
  }
  fmt::print("| {} | {:.0f} | {:.3f} | {:.1f} |\n", name_of(one), median(base), median(ratios), median(activations));
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::stoi(arguments[1]) : 300;
  const std::string only = count > 2 ? arguments[2] : "";
  torch::set_num_threads(1);
  fmt::print("| case | frozen, us | over the frozen layer | activation, us |\n|---|---|---|---|\n");
  for (const auto& one : {Case{512, 1, 1},
                          {512, 1, 8},
                          {512, 1, 8, false},
                          {512, 1, 32},
                          {512, 1, 32, false},
                          {32, 16, 32},
                          {32, 1, 32},
                          {32, 1, 8, false},
                          {16, 32, 16, true, true},
                          {16, 1, 16, true, true}}) {
    if (name_of(one).find(only) != std::string::npos) measure(one, rounds);
  }
}
