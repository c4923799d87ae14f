#pragma once

#include <torch/nn/modules/activation.h>

#include <lora/layers/linear.hpp>

namespace lora::layers {

/// The packed query/key/value projection (3 E, E) and the output projection (E, E) of a torch::nn::MultiheadAttention
/// of width E whose keys and values have that width too. As in PEFT the two are adapted together, and the files name
/// the second one "<name>.base_layer.out_proj".
inline std::vector<Target> find_attention(const std::string& name, const std::shared_ptr<torch::nn::Module>& module) {
  auto* layer = module->as<torch::nn::MultiheadAttentionImpl>();
  if (layer == nullptr || !layer->in_proj_weight.defined()) return {};
  auto site = std::make_shared<Site>(layer->in_proj_weight.size(0), layer->in_proj_weight.size(1));
  detail::WeightSlot slot(*layer, layer->in_proj_weight, "in_proj_weight");
  Target in_proj{name, name, "MultiheadAttention", module, slot, std::move(site)};
  return {std::move(in_proj),
          linear_target(name + ".out_proj", name + ".base_layer.out_proj", layer->out_proj.ptr(), *layer->out_proj)};
}

}  // namespace lora::layers
