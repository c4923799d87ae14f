#pragma once

#include <torch/csrc/jit/api/module.h>

#include <lora/adapters.hpp>
#include <lora/model/script/plain_execution.hpp>
#include <lora/model/script/module.hpp>
#include <lora/peft/checkpoint.hpp>
#include <lora/version.hpp>

#include <filesystem>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// A model that TorchScript runs. `Adapters(std::make_shared<ScriptModel>(module))` has no adapters yet, e.g. for
/// `Adapters::load`. Errors: c10::Error when the module was frozen.
class ScriptModel final : public Model {
 public:
  explicit ScriptModel(torch::jit::Module model) : model_(std::move(model)) {
    TORCH_CHECK(
        model_.parameters().size() > 0, "lora::attach: this TorchScript module has no parameters; freezing it (",
        "torch.jit.freeze, torch.jit.optimize_for_inference) made constants of them. Attach to the module as it ",
        "was before, merge, and freeze the merged one");
  }

  std::vector<ModelPart> parts() const override {
    std::vector<ModelPart> parts;
    std::set<const void*> seen;
    for (const auto& item : model_.named_modules()) {
      if (item.name.empty() || !seen.insert(item.value._ivalue().get()).second) continue;
      const detail::ScriptModule module(model_, item.name, item.value);
      parts.push_back({item.name, module.type(), module.is_linear(), module.targets()});
    }
    return parts;
  }

  std::vector<NamedParameter> parameters() const override {
    std::vector<NamedParameter> parameters;
    std::set<const c10::TensorImpl*> seen;
    for (const auto& item : model_.named_parameters()) {
      if (seen.insert(item.value.unsafeGetTensorImpl()).second) parameters.push_back({item.name, item.value});
    }
    return parameters;
  }

  std::vector<ModelTensor> tensors() const override {
    std::vector<ModelTensor> tensors;
    for (const auto& item : model_.named_modules()) {
      const auto prefix = item.name.empty() ? "" : item.name + ".";
      const detail::ScriptModule module(model_, item.name, item.value);
      for (const auto& parameter : item.value.named_parameters(/*recurse=*/false))
        tensors.push_back({prefix + parameter.name, module.slot(parameter.name, module.use()), module.use()});
      for (const auto& buffer : item.value.named_buffers(/*recurse=*/false))
        tensors.push_back({prefix + buffer.name, module.slot(buffer.name, detail::Use::kAny), detail::Use::kAny, true});
    }
    return tensors;
  }

  Target parameter_target(const std::string& name) const override {
    const auto owner = detail::owner_of(name);
    for (const auto& item : model_.named_modules()) {
      if (item.name != owner) continue;
      const auto attribute = name.substr(owner.empty() ? 0 : owner.size() + 1);
      const auto view = layers::parameter_view(name, item.value.attr(attribute).toTensor());
      return detail::ScriptModule(model_, owner, item.value).parameter(attribute, name, view, detail::Use::kAny);
    }
    TORCH_CHECK(false, "lora::attach: no module has the parameter \"", name, "\"");
  }

  bool is_gone() const override { return false; }  // it shares the ownership
  bool is_script() const override { return true; }
  std::shared_ptr<const void> while_adapted() const override {
    return std::make_shared<detail::PlainExecution>(model_);
  }

 private:
  torch::jit::Module model_;
};

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
