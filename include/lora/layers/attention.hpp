#pragma once

#include <torch/nn/modules/activation.h>

#include <lora/layers/linear.hpp>
#include <lora/version.hpp>

#include <memory>
#include <string>
#include <utility>

namespace lora {
inline namespace LORA_ABI {
namespace layers {

/// The projections of a torch::nn::MultiheadAttention of width E: the packed one of query, key and value (3 E, E), or
/// those of keys and values that have a width of their own, and the output projection (E, E). As in PEFT they are
/// adapted together, with one rank and alpha, and the files name the last one "<name>.base_layer.out_proj".
/// PEFT up to 0.21.2 adds the update of the output projection twice when it runs or merges such an adapter.
inline LayerWeights find_attention(const std::string& name, torch::nn::Module& module) {
  auto* layer = module.as<torch::nn::MultiheadAttentionImpl>();
  if (layer == nullptr) return {};
  LayerWeights found;
  const auto take = [&](const std::string& suffix, at::Tensor& weight, const char* parameter) {
    found.push_back(member_weight(name + suffix, "MultiheadAttention", module, weight, parameter));
    found.back().place.row_axis = 1;  // (length, batch, width)
  };
  if (layer->in_proj_weight.defined()) {
    take("", layer->in_proj_weight, "in_proj_weight");
    if (layer->in_proj_bias.defined())
      found.back().place.bias = std::make_shared<detail::MemberSlot>(module, layer->in_proj_bias, "in_proj_bias");
  } else {
    take(".q_proj_weight", layer->q_proj_weight, "q_proj_weight");
    take(".k_proj_weight", layer->k_proj_weight, "k_proj_weight");
    take(".v_proj_weight", layer->v_proj_weight, "v_proj_weight");
  }
  auto out_proj = find_linear(name + ".out_proj", *layer->out_proj).front();
  out_proj.place.file_name = name + ".base_layer.out_proj";
  out_proj.place.row_axis = 1;
  found.push_back(std::move(out_proj));
  return found;
}

}  // namespace layers
}  // namespace LORA_ABI
}  // namespace lora
