#pragma once

#include <lora/adapters.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// Adapts an existing model that is not changed at all: every layer that `config` selects gets an adapter named
/// "default", and all parameters of the model are frozen. Layers may sit anywhere: typed members, Sequential,
/// ModuleList, inside LibTorch's own layers. Forward passes use the adapters inside a scope of `Adapters::activate`;
/// outside of one nothing requires gradients, and backward says that element 0 of tensors does not require grad. What
/// an optimizer is to train are `adapters.parameters()`: one of `model->parameters()` moves nothing, since these are
/// frozen. A clone of the model has no adapters.
///
/// Errors: c10::Error when an entry of the configuration matches nothing; the model is unchanged then.
inline Adapters attach(torch::nn::Module& model, const LoRAConfig& config) {
  Adapters adapters(model);
  adapters.add("default", config);
  return adapters;
}

/// The parameters of a module that require gradients, for an optimizer.
inline std::vector<at::Tensor> trainable_parameters(const torch::nn::Module& module) {
  auto parameters = module.parameters();
  parameters.erase(std::remove_if(parameters.begin(), parameters.end(), [](auto& p) { return !p.requires_grad(); }),
                   parameters.end());
  return parameters;
}

}  // namespace LORA_ABI
}  // namespace lora
