#pragma once

#include <torch/nn/modules/activation.h>

#include <lora/layers/linear.hpp>
#include <lora/version.hpp>

namespace lora {
inline namespace LORA_ABI {
namespace layers {

/// The projections of a torch::nn::MultiheadAttention of width E: the packed one of query, key and value (3 E, E), or
/// those of keys and values that have a width of their own, and the output projection (E, E). As in PEFT they are
/// adapted together, with one rank and alpha, and the files name the last one "<name>.base_layer.out_proj".
/// PEFT up to 0.21.2 adds the update of the output projection twice when it runs or merges such an adapter.
inline std::vector<Target> find_attention(const std::string& name, const std::shared_ptr<torch::nn::Module>& module) {
  auto* layer = module->as<torch::nn::MultiheadAttentionImpl>();
  if (layer == nullptr) return {};
  const auto target = [&](const std::string& suffix, at::Tensor& weight, const char* parameter) {
    return member_target(name + suffix, "MultiheadAttention", module, weight, parameter,
                         MatrixView::plain(weight.sizes()));
  };
  std::vector<Target> targets;
  if (layer->in_proj_weight.defined()) {
    targets.push_back(target("", layer->in_proj_weight, "in_proj_weight"));
  } else {
    targets.push_back(target(".q_proj_weight", layer->q_proj_weight, "q_proj_weight"));
    targets.push_back(target(".k_proj_weight", layer->k_proj_weight, "k_proj_weight"));
    targets.push_back(target(".v_proj_weight", layer->v_proj_weight, "v_proj_weight"));
  }
  auto out_proj = find_linear(name + ".out_proj", layer->out_proj.ptr()).front();
  out_proj.file_name = name + ".base_layer.out_proj";
  targets.push_back(std::move(out_proj));
  return targets;
}

}  // namespace layers
}  // namespace LORA_ABI
}  // namespace lora
