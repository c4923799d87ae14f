// What each shared library does: adapts a layer, and looks whether it computes with the adapter.
#include <lora/attach.hpp>

#include <ATen/ops/linear.h>
#include <ATen/ops/randn.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>

#include <cstdio>

namespace {

/// The largest difference between what the adapted layer computes and x (W + s B A)^T + b.
double error_of_forward() {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(5, 4));
  model->to(at::kDouble);  // in float, rounding alone can exceed any limit that would find a small fault
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).alpha(5).target_modules({"0"}));
  for (auto& tensor : adapters.parameters()) tensor.detach().normal_();
  const auto named = adapters.named_parameters();
  const auto& layer = *model->ptr(0)->as<torch::nn::Linear>();
  const auto merged = layer.weight + 2.5 * named["0.lora_B"].mm(named["0.lora_A"]);
  const auto x = at::randn({2, 3, 5}, at::kDouble);
  const auto expected = at::linear(x, merged, layer.bias);
  auto active = adapters.activate();
  return (model->forward(x) - expected).abs().max().item<double>();
}

}  // namespace

/// 0 when the output is right, 1 when it is wrong, 2 when an error says why there is none; `text` tells more.
extern "C" __attribute__((visibility("default"))) int run(char* text, size_t size) {
  try {
    const auto error = error_of_forward();
    std::snprintf(text, size, "the output is wrong by %g", error);
    return error < 1e-12 ? 0 : 1;
  } catch (const c10::Error& error) {
    std::snprintf(text, size, "%s", error.what_without_backtrace());
    return 2;
  }
}
