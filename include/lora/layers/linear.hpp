#pragma once

#include <torch/nn/modules/linear.h>

#include <lora/layers/layer_weight.hpp>
#include <lora/version.hpp>

#include <string>

namespace lora {
inline namespace LORA_ABI {
namespace layers {

/// The weight of a torch::nn::Linear, whoever calls it: y = x W^T + b, W (out_features, in_features).
inline LayerWeights find_linear(const std::string& name, torch::nn::Module& module) {
  auto* layer = module.as<torch::nn::LinearImpl>();
  if (layer == nullptr) return {};
  return only(member_weight(name, "Linear", module, layer->weight, "weight", layer->bias, "bias"));
}

/// The weight of a torch::nn::Bilinear: y_k = x1^T W_k x2 + b_k, W (out, in1, in2), adapted as a matrix (out, in1 *
/// in2).
inline LayerWeights find_bilinear(const std::string& name, torch::nn::Module& module) {
  auto* layer = module.as<torch::nn::BilinearImpl>();
  if (layer == nullptr) return {};
  auto weight = member_weight(name, "Bilinear", module, layer->weight, "weight", layer->bias, "bias");
  weight.form = LayerWeight::Form::kRows;
  return only(std::move(weight));
}

}  // namespace layers
}  // namespace LORA_ABI
}  // namespace lora
