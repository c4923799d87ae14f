// What does the adapter of a linear layer cost beside the frozen layer, and beside the same adapter written out as PEFT
// computes it? And what do those of layers with a common input, as the queries, keys and values of an attention? For
// each case all are measured in turns, many times; printed are the medians of the ratios to LibTorch's frozen layer of
// the same round. In a scope the frozen layer may be faster than LibTorch's.
//
//   layer [ROUNDS [DEVICE [ONLY]]]      200, cpu (one thread of it), all cases; or those whose name contains ONLY
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

struct Case {
  int64_t rows, in, out, rank;
  bool is_step;  // forward and backward, or forward alone without gradients
  double dropout = 0;
  bool is_dora = false;
  torch::ScalarType type = torch::kFloat;  // of the layer; adapters are in float
  int layers = 1;                          // that have one input
};

std::string name_of(const Case& one) {
  const auto dropout = one.dropout > 0 ? fmt::format(", dropout {}", one.dropout) : one.is_dora ? ", DoRA" : "";
  const auto several = one.layers > 1 ? fmt::format(", {} layers", one.layers) : "";
  return fmt::format("{}, {} rows, {} -> {}, r={}{}{}{}", one.is_step ? "step" : "forward", one.rows, one.in, one.out,
                     one.rank, dropout, one.type == torch::kFloat ? "" : ", bfloat16", several);
}

/// Of the second of two calls: the first one finds caches as others left them.
double warm_microseconds(const std::function<void()>& work) {
  work();
  return microseconds(work);
}

/// A frozen layer and an adapter for it.
struct WrittenOut {
  Tensor weight, bias, A, B, magnitude;
  double scale;

  WrittenOut(const Case& one, const torch::TensorOptions& options) : scale(16.0 / static_cast<double>(one.rank)) {
    const torch::nn::Linear layer(one.in, one.out);
    weight = layer->weight.detach().to(options.dtype(one.type));
    bias = layer->bias.detach().to(options.dtype(one.type));
    A = torch::randn({one.rank, one.in}, options).mul_(0.02).requires_grad_();
    B = torch::randn({one.out, one.rank}, options).mul_(0.02).requires_grad_();
    magnitude = weight.norm(2, 1).detach().requires_grad_();
  }

  /// As PEFT computes it.
  Tensor forward(const Tensor& x, const Case& one) const {
    const auto y = torch::linear(x, weight, bias);
    if (one.is_dora) {
      const auto gain = magnitude / (weight + scale * B.mm(A)).norm(2, 1).detach();
      return y + (gain - 1) * (y - bias) + gain * torch::linear(torch::linear(x, A), B) * scale;
    }
    const auto wide = x.to(torch::kFloat), dropped = one.dropout > 0 ? torch::dropout(wide, one.dropout, true) : wide;
    return (y + torch::linear(torch::linear(dropped, A), B) * scale).to(one.type);
  }
};

void measure(const Case& one, int rounds, torch::Device device) {
  torch::manual_seed(0);
  const auto options = torch::TensorOptions(device), typed = options.dtype(one.type);
  torch::nn::ModuleList model;
  std::vector<WrittenOut> plain;
  for (int i = 0; i < one.layers; ++i) {
    model->push_back(torch::nn::Linear(one.in, one.out));
    plain.emplace_back(one, options);
  }
  model->to(device, one.type);
  auto config = lora::LoRAConfig(one.rank).alpha(16).dropout(one.dropout).target_modules(lora::all_linear);
  if (one.is_dora) config.method(lora::DoRA());
  auto adapters = lora::attach(*model, config);
  for (auto& tensor : adapters.parameters()) tensor.detach().normal_(0, 0.02);

  const auto x = torch::randn({one.rows, one.in}, typed).requires_grad_(one.is_step);
  std::vector<Tensor> gradients;
  for (int i = 0; i < one.layers; ++i) gradients.push_back(torch::randn({one.rows, one.out}, typed));
  const torch::AutoGradMode mode(one.is_step);
  const auto step = [&](const std::function<Tensor(size_t)>& forward) {
    std::vector<Tensor> outputs;
    for (size_t i = 0; i < gradients.size(); ++i) outputs.push_back(forward(i));
    if (one.is_step) torch::autograd::backward(outputs, gradients);
    for (const auto& tensor : adapters.parameters()) tensor.mutable_grad() = Tensor();
    for (const auto& layer : plain) {
      for (const auto* tensor : {&layer.A, &layer.B, &layer.magnitude}) tensor->mutable_grad() = Tensor();
    }
    x.mutable_grad() = Tensor();
    if (device.is_cuda()) torch::cuda::synchronize();
  };
  const auto frozen = [&] { step([&](size_t i) { return torch::linear(x, plain[i].weight, plain[i].bias); }); };
  const auto by_hand = [&] { step([&](size_t i) { return plain[i].forward(x, one); }); };
  const auto adapted = [&] { step([&](size_t i) { return model->at<torch::nn::LinearImpl>(i).forward(x); }); };

  std::vector<double> base, ours, theirs, in_scope;
  for (int round = -10; round < rounds; ++round) {
    const auto time = warm_microseconds(frozen), written_out = warm_microseconds(by_hand);
    auto active = adapters.activate();
    double here = 0, frozen_here = 0;
    // Each is as often as the other the one that finds the caches as LibTorch's products left them.
    for (const bool is_frozen : {round % 2 != 0, round % 2 == 0})
      (is_frozen ? frozen_here : here) = is_frozen ? warm_microseconds(frozen) : warm_microseconds(adapted);
    if (round < 0) continue;
    base.push_back(time);
    ours.push_back(here / time);
    in_scope.push_back(frozen_here / time);
    theirs.push_back(written_out / time);
  }
  fmt::print("| {} | {:.1f} | {:.3f} | {:.3f} | {:.3f} |\n", name_of(one), median(base), median(ours), median(in_scope),
             median(theirs));
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::stoi(arguments[1]) : 200;
  const torch::Device device(count > 2 ? arguments[2] : "cpu");
  const std::string only = count > 3 ? arguments[3] : "";
  torch::set_num_threads(1);
  fmt::print("| case | frozen, us | ours | frozen in a scope | written out |\n|---|---|---|---|---|\n");
  std::vector<Case> cases{{64, 768, 768, 8, true},
                          {512, 768, 768, 8, true},
                          {2048, 768, 768, 8, true},
                          {512, 768, 768, 8, true, 0.1},
                          {512, 768, 768, 8, true, 0, true},
                          {1, 768, 768, 8, true, 0, true},
                          {512, 768, 3072, 8, true},
                          {64, 64, 64, 4, true},
                          {1, 768, 768, 8, true},
                          {512, 768, 768, 8, false},
                          {1, 768, 768, 8, false},
                          {512, 768, 768, 8, true, 0, false, torch::kBFloat16},
                          {2048, 768, 768, 8, true, 0, false, torch::kBFloat16},
                          {512, 768, 768, 8, true, 0, false, torch::kFloat, 3}};
  if (!device.is_cpu()) {  // as large as those of language models
    for (const double dropout : {0.0, 0.1}) {
      cases.push_back({8192, 4096, 4096, 16, true, dropout});
      cases.push_back({8192, 4096, 4096, 16, true, dropout, false, torch::kBFloat16});
    }
    cases.push_back({8192, 4096, 4096, 16, false, 0, false, torch::kBFloat16});
  }
  for (const auto& one : cases) {
    if (name_of(one).find(only) != std::string::npos) measure(one, rounds, device);
  }
}
