#pragma once

#include <torch/nn/module.h>

#include <lora/layers/layer_weight.hpp>
#include <lora/linkage.hpp>
#include <lora/model/model.hpp>
#include <lora/version.hpp>

#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// A model of torch::nn modules.
class ModuleModel final : public Model {
 public:
  explicit ModuleModel(torch::nn::Module& model);

  std::vector<ModelPart> parts() const override;

  std::vector<NamedParameter> parameters() const override;

  LayerWeights tensors() const override;

  std::vector<Place> running_means() const override;

  LayerWeight parameter(const std::string& name) const override;

  void note_rows(const std::string& name) const override;

  bool is_gone() const override;

 private:
  struct KnownPlace {
    std::shared_ptr<detail::WeightSlot> slot;
    Use use;
    std::optional<int64_t> row_axis;
  };
  using Places = std::vector<KnownPlace>;
  using Modules = std::set<const torch::nn::Module*>;
  using NamedModules = std::vector<std::pair<std::string, torch::nn::Module*>>;

  /// Every module by name, the model itself first; that one may be held by no shared_ptr.
  NamedModules modules() const;

  /// The layers inside of a MultiheadAttention or a layer of a Transformer, whose inputs are (length, batch, width).
  static Modules inner_layers(const NamedModules& modules);

  static LayerWeights weights_of(const std::string& name, torch::nn::Module& module, const Modules& inner);

  /// The tensors of a layer of which the library knows the members and what they are used for.
  static Places known_places(const std::string& name, torch::nn::Module& module, const Modules& inner);

  /// In whatever layer it is used: all that are tied to it get its merged values.
  LayerWeight parameter_of(torch::nn::Module& module, const std::string& name, const std::string& parameter) const;

  torch::nn::Module* model_;
  std::weak_ptr<torch::nn::Module> alive_;  // empty for a model that no shared_ptr holds
  bool is_held_ = false;
};

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/transformerlayer.h>

#include <lora/layers/adaptable.hpp>
#include <lora/layers/all.hpp>
#include <lora/layers/parameter.hpp>
#include <lora/selection/text.hpp>

namespace lora {
inline namespace LORA_ABI {

LORA_INLINE ModuleModel::ModuleModel(torch::nn::Module& model) : model_(&model), alive_(model.weak_from_this()) {
  is_held_ = alive_.lock() != nullptr;
}

LORA_INLINE std::vector<ModelPart> ModuleModel::parts() const {
  std::vector<ModelPart> parts;
  std::set<const torch::nn::Module*> seen;
  const auto all = modules();
  const auto inner = inner_layers(all);
  parts.reserve(all.size());
  for (const auto& [name, module] : all) {
    if (module == model_ || !seen.insert(module).second) continue;
    parts.push_back({name, module->name(), false, {}, {}});
    auto& part = parts.back();
    if (auto* adaptable = dynamic_cast<AdaptableModule*>(module)) {
      part.own = adaptable->own_sites();
      for (const auto& site : part.own) site->rename(name);
    } else {
      part.weights = weights_of(name, *module, inner);
    }
    part.for_each_place([&](const Place& place) { part.is_linear = place.kind == "Linear"; });
    part.is_linear = part.is_linear && part.weights.size() + part.own.size() == 1;
  }
  return parts;
}

LORA_INLINE std::vector<NamedParameter> ModuleModel::parameters() const {
  std::vector<NamedParameter> parameters;
  std::set<const c10::TensorImpl*> seen;
  for (const auto& item : model_->named_parameters()) {
    if (seen.insert(item.value().unsafeGetTensorImpl()).second) parameters.push_back({item.key(), item.value()});
  }
  return parameters;
}

LORA_INLINE LayerWeights ModuleModel::tensors() const {
  LayerWeights tensors;
  const auto all = modules();
  const auto inner = inner_layers(all);
  for (const auto& named : all) {
    const auto& name = named.first;
    auto* module = named.second;
    const auto prefix = name.empty() ? "" : name + ".";
    const auto places = known_places(name, *module, inner);
    const auto take = [&](const std::string& key, const at::Tensor& tensor, bool is_buffer) {
      if (!tensor.defined()) return;
      tensors.push_back(layers::registered_weight(prefix + key, "", *module, tensor));
      auto& found = tensors.back();
      found.form = LayerWeight::Form::kNone;
      found.is_buffer = is_buffer;
      found.place.use = Use::kAny;
      found.place.row_axis = std::nullopt;
      for (const auto& place : places) {
        if (!place.slot->handles().registered.is_same(tensor)) continue;
        found.place.slot = place.slot;
        found.place.use = place.use;
        found.place.row_axis = place.row_axis;
      }
    };
    for (const auto& item : module->named_parameters(/*recurse=*/false)) take(item.key(), item.value(), false);
    for (const auto& item : module->named_buffers(/*recurse=*/false)) take(item.key(), item.value(), true);
  }
  return tensors;
}

LORA_INLINE std::vector<Place> ModuleModel::running_means() const {
  std::vector<Place> means;
  for (const auto& [name, module] : modules()) {
    const auto buffers = module->named_buffers(/*recurse=*/false);
    const auto* mean = buffers.find(detail::kRunningMean);
    if (mean == nullptr || !mean->defined()) continue;
    means.push_back(layers::registered_weight(detail::joined(name, detail::kRunningMean), "", *module, *mean).place);
  }
  return means;
}

LORA_INLINE LayerWeight ModuleModel::parameter(const std::string& name) const {
  const auto owner = detail::owner_of(name);
  for (const auto& [module_name, module] : modules()) {
    if (module_name == owner) return parameter_of(*module, name, name.substr(owner.empty() ? 0 : owner.size() + 1));
  }
  C10_THROW_ERROR(Error, "lora::attach: no module has the parameter \"" + name + "\"");
}

LORA_INLINE void ModuleModel::note_rows(const std::string& name) const {
  for (const auto& [module_name, module] : modules()) {
    if (module_name != detail::owner_of(name)) continue;
    if (auto* table = module->as<torch::nn::EmbeddingImpl>()) table->options.num_embeddings(table->weight.size(0));
    if (auto* head = module->as<torch::nn::LinearImpl>()) head->options.out_features(head->weight.size(0));
  }
}

LORA_INLINE bool ModuleModel::is_gone() const { return is_held_ && alive_.expired(); }

LORA_INLINE ModuleModel::NamedModules ModuleModel::modules() const {
  NamedModules modules;
  model_->apply([&](const std::string& name, torch::nn::Module& module) { modules.emplace_back(name, &module); });
  return modules;
}

LORA_INLINE ModuleModel::Modules ModuleModel::inner_layers(const NamedModules& modules) {
  Modules inner;
  for (const auto& named : modules) {
    if (auto* attention = named.second->as<torch::nn::MultiheadAttentionImpl>())
      inner.insert(attention->out_proj.get());
    if (auto* layer = named.second->as<torch::nn::TransformerEncoderLayerImpl>())
      inner.insert({layer->linear1.get(), layer->linear2.get()});
    if (auto* layer = named.second->as<torch::nn::TransformerDecoderLayerImpl>())
      inner.insert({layer->linear1.get(), layer->linear2.get()});
  }
  return inner;
}

LORA_INLINE LayerWeights ModuleModel::weights_of(const std::string& name, torch::nn::Module& module,
                                                 const Modules& inner) {
  auto weights = layer_weights(name, module);
  if (inner.count(&module) > 0) {
    for (auto& weight : weights) weight.place.row_axis = 1;
  }
  return weights;
}

LORA_INLINE ModuleModel::Places ModuleModel::known_places(const std::string& name, torch::nn::Module& module,
                                                          const Modules& inner) {
  Places places;
  const auto take = [&](const Place& place) {
    places.push_back({place.slot, place.use, place.row_axis});
    if (place.bias) places.push_back({place.bias, Use::kAny, place.row_axis});
  };
  if (auto* adaptable = dynamic_cast<AdaptableModule*>(&module)) {
    for (const auto& site : adaptable->own_sites()) take(site->place());
  } else {
    for (const auto& weight : weights_of(name, module, inner)) take(weight.place);
  }
  return places;
}

LORA_INLINE LayerWeight ModuleModel::parameter_of(torch::nn::Module& module, const std::string& name,
                                                  const std::string& parameter) const {
  const auto registered = detail::Registry::parameters(module)[parameter];
  auto tensor = registered;  // what its layer computes with, where it has a handle of its own
  for (const auto& [module_name, other] : modules()) {
    for (const auto& place : known_places(module_name, *other, {})) {
      if (place.slot->handles().registered.is_same(registered)) tensor = place.slot->read();
    }
  }
  layers::check_parameter(name, tensor);
  auto found = layers::registered_weight(name, "Parameter", module, tensor);
  found.place.use = Use::kAny;
  found.place.row_axis = std::nullopt;
  return found;
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
