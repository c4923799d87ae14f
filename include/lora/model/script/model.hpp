#pragma once

#include <torch/csrc/jit/api/module.h>

#include <lora/layers/parameter.hpp>
#include <lora/model/model.hpp>
#include <lora/model/script/module.hpp>
#include <lora/model/script/plain_execution.hpp>
#include <lora/selection/text.hpp>
#include <lora/version.hpp>

#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// A model that TorchScript runs. `Adapters(std::make_shared<ScriptModel>(module))` has no adapters yet, e.g. for
/// `Adapters::load`. Errors: c10::Error when the module was frozen, or all of its weights are quantized.
class ScriptModel final : public Model {
 public:
  explicit ScriptModel(torch::jit::Module model) : model_(std::move(model)) {
    bool is_quantized = false;
    for (const auto& module : model_.modules())
      is_quantized = is_quantized || detail::ScriptModule::is_quantized(module);
    const bool has_parameters = model_.parameters().size() > 0;
    TORCH_CHECK(has_parameters || !is_quantized, "lora::attach: the weights of this TorchScript module are quantized, ",
                "and packed where no adapter can act on them. Attach to the module as it was before it was quantized");
    TORCH_CHECK(
        has_parameters, "lora::attach: this TorchScript module has no parameters; freezing it (",
        "torch.jit.freeze, torch.jit.optimize_for_inference) made constants of them. Attach to the module as it ",
        "was before, merge, and freeze the merged one");
  }

  std::vector<ModelPart> parts() const override {
    std::vector<ModelPart> parts;
    std::set<const void*> seen;
    for (const auto& item : model_.named_modules()) {
      if (item.name.empty() || !seen.insert(item.value._ivalue().get()).second) continue;
      const detail::ScriptModule module(model_, item.name, item.value);
      parts.push_back({item.name, module.type(), module.is_linear(), module.weights(), {}});
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

  LayerWeights tensors() const override {
    LayerWeights tensors;
    for (const auto& item : model_.named_modules()) {
      const auto prefix = item.name.empty() ? "" : item.name + ".";
      const detail::ScriptModule module(model_, item.name, item.value);
      const auto take = [&](const std::string& name, Use use, bool is_buffer) {
        tensors.push_back(module.parameter(name, prefix + name, use));
        tensors.back().form = LayerWeight::Form::kNone;
        tensors.back().place.kind.clear();
        tensors.back().is_buffer = is_buffer;
      };
      for (const auto& parameter : item.value.named_parameters(/*recurse=*/false))
        take(parameter.name, module.use(), false);
      for (const auto& buffer : item.value.named_buffers(/*recurse=*/false)) take(buffer.name, Use::kAny, true);
    }
    return tensors;
  }

  std::vector<Place> running_means() const override {
    std::vector<Place> means;
    for (const auto& item : model_.named_modules()) {
      for (const auto& buffer : item.value.named_buffers(/*recurse=*/false)) {
        if (buffer.name != detail::kRunningMean) continue;
        const detail::ScriptModule module(model_, item.name, item.value);
        means.push_back(module.parameter(buffer.name, detail::joined(item.name, buffer.name), Use::kAny).place);
      }
    }
    return means;
  }

  LayerWeight parameter(const std::string& name) const override {
    const auto owner = detail::owner_of(name);
    for (const auto& item : model_.named_modules()) {
      if (item.name != owner) continue;
      const auto attribute = name.substr(owner.empty() ? 0 : owner.size() + 1);
      layers::check_parameter(name, item.value.attr(attribute).toTensor());
      return detail::ScriptModule(model_, owner, item.value).parameter(attribute, name, Use::kAny);
    }
    C10_THROW_ERROR(Error, "lora::attach: no module has the parameter \"" + name + "\"");
  }

  bool is_gone() const override { return false; }  // it shares the ownership
  bool needs_plain_scripts() const override {
    const auto plain = plain_.lock();
    return plain && plain->leaves_forks();
  }
  std::shared_ptr<const void> while_adapted() const override {
    const auto plain = std::make_shared<detail::PlainExecution>(model_);
    plain_ = plain;
    return plain;
  }

 private:
  torch::jit::Module model_;
  mutable std::weak_ptr<const detail::PlainExecution> plain_;
};

}  // namespace LORA_ABI
}  // namespace lora
