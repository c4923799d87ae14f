#pragma once

#include <torch/nn/module.h>

#include <lora/selection/text.hpp>
#include <lora/layers/all.hpp>
#include <lora/layers/parameter.hpp>
#include <lora/version.hpp>

#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// One module of a model, as the rules of selection see it.
struct ModelPart {
  std::string name;
  std::string type;             ///< for errors: "torch::nn::LinearImpl"
  bool is_linear = false;       ///< whether `all_linear` means it
  std::vector<Target> targets;  ///< its weights that can be adapted
};

/// A parameter as `named_parameters` has it.
struct NamedParameter {
  std::string name;
  at::Tensor tensor;
};

/// A parameter or buffer of a model together with the place where forward passes find it.
struct ModelTensor {
  std::string name;
  std::shared_ptr<detail::WeightSlot> slot;
  detail::Use use = detail::Use::kAny;  ///< which uses of it are those of its module
  bool is_buffer = false;
  std::shared_ptr<const void> owner = nullptr;  ///< keeps the module alive that has it, where something can
};

/// What `Adapters` have to know of a model, whatever it is written with.
class Model {
 public:
  virtual ~Model() = default;
  /// Every module below the model itself, each once, under its first name.
  virtual std::vector<ModelPart> parts() const = 0;
  /// Every parameter, each once, under its first name.
  virtual std::vector<NamedParameter> parameters() const = 0;
  /// Every parameter and buffer of every module.
  virtual std::vector<ModelTensor> tensors() const = 0;
  /// The parameter of that name as something that can be adapted whatever it is used for.
  virtual Target parameter_target(const std::string& name) const = 0;
  /// Whether the model was destroyed, as far as that can be known.
  virtual bool is_gone() const = 0;
  /// Whether TorchScript runs it, whose optimizer has to be kept from replacing autograd.
  virtual bool is_script() const { return false; }
  /// What is to live as long as the model has adapters, if anything is.
  virtual std::shared_ptr<const void> while_adapted() const { return nullptr; }
};

/// A model of torch::nn modules.
class ModuleModel final : public Model {
 public:
  explicit ModuleModel(torch::nn::Module& model) : model_(&model), alive_(model.weak_from_this()) {
    is_held_ = alive_.lock() != nullptr;
  }

  std::vector<ModelPart> parts() const override {
    std::vector<ModelPart> parts;
    std::set<const torch::nn::Module*> seen;
    for (const auto& [name, module] : modules()) {
      if (module == model_ || !seen.insert(module).second) continue;
      auto targets = adaptable_weights(name, module->shared_from_this());
      const bool is_linear = targets.size() == 1 && targets.front().kind == "Linear";
      parts.push_back({name, module->name(), is_linear, std::move(targets)});
    }
    return parts;
  }

  std::vector<NamedParameter> parameters() const override {
    std::vector<NamedParameter> parameters;
    std::set<const c10::TensorImpl*> seen;
    for (const auto& item : model_->named_parameters()) {
      if (seen.insert(item.value().unsafeGetTensorImpl()).second) parameters.push_back({item.key(), item.value()});
    }
    return parameters;
  }

  std::vector<ModelTensor> tensors() const override {
    std::vector<ModelTensor> tensors;
    for (const auto& [name, owner] : modules()) {
      auto& module = *owner;
      const auto prefix = name.empty() ? "" : name + ".";
      const auto known = owner == model_ ? std::vector<Target>() : adaptable_weights(name, owner->shared_from_this());
      for (const auto& parameter : module.named_parameters(/*recurse=*/false)) {
        ModelTensor tensor{prefix + parameter.key(), std::make_shared<detail::ParameterSlot>(module, parameter.key())};
        tensor.owner = module.weak_from_this().lock();
        for (const auto& target : known) {
          if (!target.slot->handles().registered.is_same(parameter.value())) continue;
          tensor.slot = target.slot;
          tensor.use = target.use;
        }
        tensors.push_back(std::move(tensor));
      }
      for (const auto& buffer : module.named_buffers(/*recurse=*/false)) {
        auto slot = std::make_shared<detail::TensorSlot>(buffer.value());
        tensors.push_back({prefix + buffer.key(), std::move(slot), detail::Use::kAny, /*is_buffer=*/true});
      }
    }
    return tensors;
  }

  Target parameter_target(const std::string& name) const override {
    const auto owner = detail::owner_of(name);
    for (const auto& [module_name, module] : modules()) {
      if (module_name == owner) return parameter_of(*module, name, name.substr(owner.empty() ? 0 : owner.size() + 1));
    }
    TORCH_CHECK(false, "lora::attach: no module has the parameter \"", name, "\"");
  }

  bool is_gone() const override { return is_held_ && alive_.expired(); }

 private:
  /// Every module by name, the model itself first; that one may be held by no shared_ptr.
  std::vector<std::pair<std::string, torch::nn::Module*>> modules() const {
    std::vector<std::pair<std::string, torch::nn::Module*>> modules;
    model_->apply([&](const std::string& name, torch::nn::Module& module) { modules.emplace_back(name, &module); });
    return modules;
  }

  /// In whatever layer it is used: all that are tied to it get its merged values.
  Target parameter_of(torch::nn::Module& module, const std::string& name, const std::string& parameter) const {
    const auto registered = detail::Registry::parameters(module)[parameter];
    std::shared_ptr<detail::WeightSlot> slot = std::make_shared<detail::ParameterSlot>(module, parameter);
    for (const auto& part : parts()) {
      for (const auto& target : part.targets) {
        const bool is_it = target.slot->handles().registered.is_same(registered);
        if (is_it) slot = std::make_shared<detail::TensorSlot>(target.slot->read());  // what its layer computes with
      }
    }
    auto view = layers::parameter_view(name, slot->read());
    return {name,
            name,
            "Parameter",
            [module = &module, alive = module.weak_from_this().lock()] { return module->is_training(); },
            std::move(slot),
            std::make_shared<Site>(std::move(view)),
            detail::Use::kAny};
  }

  torch::nn::Module* model_;
  std::weak_ptr<torch::nn::Module> alive_;  // empty for a model that no shared_ptr holds
  bool is_held_ = false;
};

}  // namespace LORA_ABI
}  // namespace lora
