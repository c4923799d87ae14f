#pragma once

#include <torch/nn/modules/linear.h>

#include <lora/layers/target.hpp>
#include <lora/version.hpp>

#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace layers {

/// The weight of a torch::nn::Linear, whoever calls it: y = x W^T + b, W (out_features, in_features).
inline std::vector<Target> find_linear(const std::string& name, const std::shared_ptr<torch::nn::Module>& module) {
  auto* layer = module->as<torch::nn::LinearImpl>();
  if (layer == nullptr) return {};
  return only(member_target(name, "Linear", module, layer->weight, "weight", MatrixView::plain(layer->weight.sizes())));
}

/// The weight of a torch::nn::Bilinear: y_k = x1^T W_k x2 + b_k, W (out, in1, in2), adapted as a matrix (out, in1 *
/// in2).
inline std::vector<Target> find_bilinear(const std::string& name, const std::shared_ptr<torch::nn::Module>& module) {
  auto* layer = module->as<torch::nn::BilinearImpl>();
  if (layer == nullptr) return {};
  return only(
      member_target(name, "Bilinear", module, layer->weight, "weight", MatrixView::rows(layer->weight.sizes())));
}

}  // namespace layers
}  // namespace LORA_ABI
}  // namespace lora
