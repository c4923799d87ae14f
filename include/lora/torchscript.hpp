#pragma once

#include <torch/csrc/jit/api/module.h>

#include <lora/adapters.hpp>
#include <lora/model/script/model.hpp>
#include <lora/peft/checkpoint.hpp>
#include <lora/quantize.hpp>
#include <lora/version.hpp>

#include <filesystem>
#include <memory>
#include <utility>

namespace lora {
inline namespace LORA_ABI {

/// Adapts a TorchScript module, as torch.jit.script or torch.jit.trace exported it, by the names of its modules (or, by
/// `target_parameters`, of its parameters). Training, merging and files are those of any other model; a merged module
/// is saved with `save` and needs nothing of this library.
///
/// While there are adapters, also outside of scopes, the module is run by TorchScript's plain executor: the optimizing
/// one derives gradients of its own, which know nothing of the adapters. So adapt the module that is called, not a part
/// of it, and let no other thread run it during `attach` and `detach`. Fused attention, which has no derivative,
/// is computed in single operators where gradients are needed.
///
/// Errors: c10::Error when an entry of the configuration matches nothing, or when the module was frozen.
inline Adapters attach(torch::jit::Module& model, const LoRAConfig& config) {
  Adapters adapters(std::make_shared<ScriptModel>(model));
  adapters.add("default", config);
  return adapters;
}

/// `quantize` and `dequantize` for a TorchScript module.
inline QuantizeReport quantize(torch::jit::Module& model, const Quantization& scheme,
                               const QuantizeOptions& options = {}) {
  return quantize(ScriptModel(model), scheme, options);
}
inline void dequantize(torch::jit::Module& model) { dequantize(ScriptModel(model)); }

/// `load_adapter` for a TorchScript module.
inline Adapters load_adapter(torch::jit::Module& model, const std::filesystem::path& directory,
                             const LoadOptions& options = {}, LoadReport* report = nullptr) {
  Adapters adapters(std::make_shared<ScriptModel>(model));
  auto found = adapters.load("default", directory, options);
  if (report != nullptr) *report = std::move(found);
  return adapters;
}

/// `load_adapters` for a TorchScript module.
inline Adapters load_adapters(torch::jit::Module& model, const std::filesystem::path& directory,
                              const LoadOptions& options = {}) {
  return detail::load_all(Adapters(std::make_shared<ScriptModel>(model)), directory, options);
}

}  // namespace LORA_ABI
}  // namespace lora
