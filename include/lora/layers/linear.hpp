#pragma once

#include <torch/nn/modules/linear.h>

#include <lora/layers/target.hpp>

#include <vector>

namespace lora::layers {

/// A linear layer, whoever calls it: y = x W^T + b, W (out_features, in_features).
inline Target linear_target(std::string name, std::string file_name, const std::shared_ptr<torch::nn::Module>& module,
                            torch::nn::LinearImpl& layer) {
  auto site = std::make_shared<Site>(layer.weight.size(0), layer.weight.size(1));
  detail::WeightSlot slot(layer, layer.weight, "weight");
  return {std::move(name), std::move(file_name), "Linear", module, slot, std::move(site)};
}

/// The weight of a torch::nn::Linear.
inline std::vector<Target> find_linear(const std::string& name, const std::shared_ptr<torch::nn::Module>& module) {
  auto* layer = module->as<torch::nn::LinearImpl>();
  if (layer == nullptr) return {};
  return {linear_target(name, name, module, *layer)};
}

}  // namespace lora::layers
