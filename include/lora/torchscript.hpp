#pragma once

#include <torch/csrc/jit/api/module.h>

#include <lora/adapters.hpp>
#include <lora/linkage.hpp>
#include <lora/peft/load_options.hpp>
#include <lora/quantize.hpp>
#include <lora/version.hpp>

#include <filesystem>

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
LORA_INLINE Adapters attach(torch::jit::Module& model, const LoRAConfig& config);

/// `quantize` and `dequantize` for a TorchScript module.
LORA_INLINE QuantizeReport quantize(torch::jit::Module& model, const Quantization& scheme,
                                    const QuantizeOptions& options = {});
LORA_INLINE void dequantize(torch::jit::Module& model);

/// `load_adapter` for a TorchScript module.
LORA_INLINE Adapters load_adapter(torch::jit::Module& model, const std::filesystem::path& directory,
                                  const LoadOptions& options = {}, LoadReport* report = nullptr);

/// `load_adapters` for a TorchScript module.
LORA_INLINE Adapters load_adapters(torch::jit::Module& model, const std::filesystem::path& directory,
                                   const LoadOptions& options = {});

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <lora/model/script/model.hpp>
#include <lora/peft/checkpoint.hpp>

#include <memory>
#include <utility>

namespace lora {
inline namespace LORA_ABI {

LORA_INLINE Adapters attach(torch::jit::Module& model, const LoRAConfig& config) {
  Adapters adapters(std::make_shared<ScriptModel>(model));
  adapters.add("default", config);
  return adapters;
}

LORA_INLINE QuantizeReport quantize(torch::jit::Module& model, const Quantization& scheme,
                                    const QuantizeOptions& options) {
  return quantize(ScriptModel(model), scheme, options);
}

LORA_INLINE void dequantize(torch::jit::Module& model) { dequantize(ScriptModel(model)); }

LORA_INLINE Adapters load_adapter(torch::jit::Module& model, const std::filesystem::path& directory,
                                  const LoadOptions& options, LoadReport* report) {
  Adapters adapters(std::make_shared<ScriptModel>(model));
  auto found = adapters.load("default", directory, options);
  if (report != nullptr) *report = std::move(found);
  return adapters;
}

LORA_INLINE Adapters load_adapters(torch::jit::Module& model, const std::filesystem::path& directory,
                                   const LoadOptions& options) {
  return detail::load_all(Adapters(std::make_shared<ScriptModel>(model)), directory, options);
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
