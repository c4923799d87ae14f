#pragma once

#include <torch/nn/modules/conv.h>

#include <lora/layers/layer_weight.hpp>
#include <lora/version.hpp>

#include <string>

namespace lora {
inline namespace LORA_ABI {
namespace layers {

/// Appends the kernel of `module` where it is a `Layer`.
template <class Layer>
bool take_kernel(const std::string& name, const char* kind, torch::nn::Module& module, LayerWeights& found) {
  auto* layer = module.as<Layer>();
  if (layer == nullptr) return false;
  found.push_back(member_weight(name, kind, module, layer->weight, "weight", layer->bias, "bias"));
  found.back().groups = layer->options.groups();
  found.back().form = layer->options.transposed() ? LayerWeight::Form::kTransposedKernel : LayerWeight::Form::kKernel;
  return true;
}

/// The kernel of a convolution or transposed convolution of one to three dimensions: (out, in / groups, k...) or
/// (in, out / groups, k...), adapted as a matrix (out, in * k) for each group. The rank is divided among the groups.
inline LayerWeights find_convolution(const std::string& name, torch::nn::Module& module) {
  LayerWeights found;
  (void)(take_kernel<torch::nn::Conv1dImpl>(name, "Conv1d", module, found) ||
         take_kernel<torch::nn::Conv2dImpl>(name, "Conv2d", module, found) ||
         take_kernel<torch::nn::Conv3dImpl>(name, "Conv3d", module, found) ||
         take_kernel<torch::nn::ConvTranspose1dImpl>(name, "ConvTranspose1d", module, found) ||
         take_kernel<torch::nn::ConvTranspose2dImpl>(name, "ConvTranspose2d", module, found) ||
         take_kernel<torch::nn::ConvTranspose3dImpl>(name, "ConvTranspose3d", module, found));
  return found;
}

}  // namespace layers
}  // namespace LORA_ABI
}  // namespace lora
