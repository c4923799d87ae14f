// What does an adapted layer cost whose weight is held in few bits, beside the same layer in float? Both are measured
// in turns, many times; printed are the medians of the ratios of one round. And how fast are weights quantized?
//
//   quantized [ROUNDS]      200
#include <torch/torch.h>

#include <lora/lora.hpp>

#include <fmt/format.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "timing.hpp"

namespace {

struct Case {
  int64_t rows, in, out;
  bool is_step;  // forward and backward, or forward alone without gradients
  torch::ScalarType type = torch::kFloat;
};

struct Layer {
  Layer(const Case& one, const std::optional<lora::Quantization>& scheme)
      : model(torch::nn::Linear(one.in, one.out)), x(torch::randn({one.rows, one.in}).to(one.type)) {
    model->to(torch::kBFloat16);  // so that every scheme can hold them
    model->to(one.type);
    auto config = lora::LoRAConfig(8).alpha(16).target_modules({"0"});
    adapters.emplace(lora::attach(*model, config.quantize(scheme)));
    for (auto& tensor : adapters->parameters()) tensor.detach().normal_(0, 0.02);
    x.requires_grad_(one.is_step);
  }

  void run(const torch::Tensor& gradient, bool is_step) {
    auto active = adapters->activate();
    const auto y = model->forward(x);
    if (!is_step) return;
    y.backward(gradient);
    for (const auto& tensor : adapters->parameters()) tensor.mutable_grad() = torch::Tensor();
    x.mutable_grad() = torch::Tensor();
  }

  torch::nn::Sequential model;
  torch::Tensor x;
  std::optional<lora::Adapters> adapters;
};

void measure(const Case& one, const char* name, const lora::Quantization& scheme, int rounds) {
  torch::manual_seed(0);
  const torch::AutoGradMode mode(one.is_step);
  Layer plain(one, std::nullopt), held(one, scheme);
  const auto gradient = torch::randn({one.rows, one.out}).to(one.type);
  std::vector<double> base, ratios;
  for (int round = -10; round < rounds; ++round) {
    const auto time = microseconds([&] { plain.run(gradient, one.is_step); });
    const auto ratio = microseconds([&] { held.run(gradient, one.is_step); }) / time;
    if (round < 0) continue;
    base.push_back(time);
    ratios.push_back(ratio);
  }
  fmt::print("| {}, {}, {} rows, {} -> {}{} | {:.1f} | {:.3f} |\n", name, one.is_step ? "step" : "forward", one.rows,
             one.in, one.out, one.type == torch::kBFloat16 ? ", bfloat16" : "", median(base), median(ratios));
}

void measure_quantizing(const char* name, const lora::Quantization& scheme) {
  const auto weight = torch::randn({4096, 4096}).to(torch::kBFloat16).to(torch::kFloat);
  std::vector<double> times;
  for (int round = 0; round < 9; ++round) times.push_back(milliseconds([&] { scheme.pack(weight); }));
  fmt::print("| {} | {:.0f} |\n", name, static_cast<double>(weight.nbytes()) / 1e6 / (median(times) / 1e3));
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::stoi(arguments[1]) : 200;
  torch::set_num_threads(1);
  const std::vector<std::pair<const char*, lora::Quantization>> schemes{
      {"NF4", lora::NF4()},
      {"NF4, scales in float", lora::NF4().double_quantization(false)},
      {"int8", lora::Int8()},
      {"lossless", lora::Lossless()}};
  fmt::print("| case | float, us | in few bits |\n|---|---|---|\n");
  for (const auto& [name, scheme] : schemes) {
    for (const auto& one : {Case{1, 768, 768, true},
                            {8, 768, 768, true},
                            {64, 768, 768, true},
                            {512, 768, 768, true},
                            {2048, 768, 768, true},
                            {512, 768, 3072, true},
                            Case{512, 768, 768, true, torch::kBFloat16},
                            {1, 768, 768, false},
                            {4, 768, 768, false},
                            {512, 768, 768, false}})
      measure(one, name, scheme, rounds);
  }
  fmt::print("\n| quantizing 4096 x 4096 numbers | MB of float a second |\n|---|---|\n");
  for (const auto& [name, scheme] : schemes) measure_quantizing(name, scheme);
}
