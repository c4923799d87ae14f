#pragma once

#include <lora/adapter/activation.hpp>
#include <lora/adapter/plan.hpp>
#include <lora/config.hpp>
#include <lora/model/frozen_parameters.hpp>
#include <lora/selection/selection.hpp>
#include <lora/adapter/merge.hpp>
#include <lora/peft/load_options.hpp>
#include <lora/adapter/report.hpp>
#include <lora/version.hpp>

#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// The adapters of one model under their names. The model is not changed: its layers stay stock torch::nn layers, its
/// parameters are frozen while there is an adapter, and outside a scope of `activate` it is the base model, bit by bit,
/// unless it is merged.
///
///   auto adapters = lora::attach(*model, lora::LoRAConfig(8).alpha(16).target_modules({"q_proj", "v_proj"}));
///   torch::optim::AdamW optimizer(adapters.parameters());
///   { auto active = adapters.activate();  model->forward(x)...backward(); }
///   adapters.merge();
///
/// Layers stay alive as long as their adapters. Destroying an `Adapters` leaves the model as it is: frozen, and merged
/// if it was merged; `detach` gives it back. Several `Adapters` of one model are detached in the reverse order of their
/// first `add`. Errors: c10::Error that names what was asked for and what there is;
/// nothing is changed when one is thrown.
class Adapters {
 public:
  explicit Adapters(torch::nn::Module& model) : Adapters(std::make_shared<ModuleModel>(model)) {}
  explicit Adapters(std::shared_ptr<const Model> model) : model_(std::move(model)) {}
  Adapters(Adapters&&) = default;
  Adapters& operator=(Adapters&&) = default;

  /// Adds an adapter; the first one freezes the model's parameters. The tensors are those of a float layer even for a
  /// model in half precision. Throws when a part of the configuration matches nothing in the model.
  void add(const std::string& name, const LoRAConfig& config) {
    auto planned = plan(config);
    planned.initialize();
    add(name, std::move(planned));
  }

  /// Adds an adapter whose tensors have their values.
  void add(const std::string& name, AdapterPlan plan) {
    TORCH_CHECK(!name.empty() && name.find('.') == std::string::npos,
                "lora::Adapters: the name of an adapter has to be non-empty and without a \".\", but got \"", name,
                "\"");
    TORCH_CHECK(!configs_.contains(name), "lora::Adapters: there is an adapter \"", name, "\" already");
    check_addable(name, plan);
    freeze();
    for (auto& layer : plan.layers) layer_for(layer.target, name).target.site->add(name, std::move(layer.method));
    configs_.insert(name, std::move(plan.config));
    full_.insert(name, std::move(plan.full));
  }

  /// Adds the adapter in a PEFT directory, as `load_adapter` does. Defined in lora/peft/checkpoint.hpp.
  LoadReport load(const std::string& name, const std::filesystem::path& directory, const LoadOptions& options = {});

  /// Takes over the adapters that layers of this library (LoRALinear, ...) have of their own, as one adapter "default".
  /// What requires gradients stays as it is. Throws when the model has no such layers, or of different methods.
  void adopt();

  /// What `add` would add: the layers that `config` selects, with tensors that have no values yet.
  AdapterPlan plan(const LoRAConfig& config) const {
    AdapterPlan plan{config, {}, {}};
    detail::Selection selection(model(), config);
    for (auto& selected : selection.run()) {
      if (const auto layer = layer_named(selected.target.name)) take_known(selected.target, layer->target);
      const auto weight = selected.target.slot->read();
      const auto options = weight.options().dtype(adapter_dtype(weight.scalar_type())).requires_grad(false);
      const auto& shape = selected.target.site->view().shape();
      auto method = config.method().make(selected.options, shape, options);
      plan.layers.push_back({std::move(selected.target), std::move(method), std::move(selected.module)});
    }
    for (const auto& full : selection.full()) plan.full.push_back(planned(full, plan.layers));
    return plan;
  }

  /// Names of the adapters, in the order in which they were added.
  std::vector<std::string> names() const { return configs_.keys(); }

  /// The configuration with which an adapter was added.
  const LoRAConfig& config(const std::string& name) const { return configs_[known(name)]; }

  /// Sorted names of the layers that are adapted.
  std::vector<std::string> targets() const {
    std::vector<std::string> names;
    for (const auto& layer : layers_) names.push_back(layer->target.name);
    std::sort(names.begin(), names.end());
    return names;
  }

  /// The adapted layers in the order in which they were first adapted, which for one adapter is that of the model.
  const std::vector<std::shared_ptr<AdaptedLayer>>& layers() const { return layers_; }

  /// The trainable tensors of all adapters, or of one, by the name of their layer and their own: "fc2.lora_B". With
  /// more than one adapter the adapter's name follows: "fc2.lora_B.french".
  torch::OrderedDict<std::string, at::Tensor> named_parameters() const {
    if (configs_.size() == 1) return named_parameters(names().front());
    torch::OrderedDict<std::string, at::Tensor> all;
    for (const auto& name : names()) {
      for (const auto& item : named_parameters(name)) all.insert(item.key() + "." + name, item.value());
    }
    return all;
  }

  torch::OrderedDict<std::string, at::Tensor> named_parameters(const std::string& adapter) const {
    torch::OrderedDict<std::string, at::Tensor> all;
    for (const auto& layer : layers_of(known(adapter))) {
      for (const auto& item : layer->target.site->at(adapter).tensors()) {
        all.insert(layer->target.name + "." + item.name, *item.tensor);
      }
    }
    for (const auto& full : full_[adapter]) {
      if (!full.place.is_buffer) all.insert(full.name, full.value);
    }
    return all;
  }

  /// What an adapter trains in full.
  const std::vector<FullTensor>& full_tensors(const std::string& adapter) const { return full_[known(adapter)]; }

  /// The same tensors without their names, for an optimizer.
  std::vector<at::Tensor> parameters() const { return named_parameters().values(); }
  std::vector<at::Tensor> parameters(const std::string& adapter) const { return named_parameters(adapter).values(); }

  /// s in W + s B A of one layer.
  double scaling(const std::string& layer) const { return method(only(), layer).scaling(); }
  double scaling(const std::string& adapter, const std::string& layer) const {
    return method(adapter, layer).scaling();
  }

  /// The update W' - W of one layer, shaped like its weight, in the type of the adapter.
  at::Tensor delta(const std::string& adapter, const std::string& layer) const {
    const auto& target = find(layer).target;
    const auto& view = target.site->view();
    return view.weight(method(adapter, layer).delta(view.matrix(target.site->pristine(*target.slot))));
  }

  /// Forward passes on this thread use the adapter until the returned scope ends. Without a name: the only adapter. One
  /// that is merged is in the weights already and is not added again; while another one is merged it is an error.
  Activation activate() const { return activate(only()); }
  Activation activate(const std::string& adapter) const {
    TORCH_CHECK(!is_merged() || merged_ == adapter, "lora::activate: \"", merged_,
                "\" is merged, and the two would add up; unmerge it first");
    check_devices(known(adapter));
    const std::vector<std::string> names{adapter};
    detail::ReplacementTable replacements;
    if (!is_merged()) {
      for (const auto& full : full_[adapter])
        replacements.add(full.place.slot->read(),
                         {full.place.use, [full](const at::Tensor& original) { return full.substitute(original); }});
    }
    return Activation(
        std::make_shared<detail::AdapterScope>(usage_, layers_of(adapter), names, std::move(replacements)),
        model_->is_script());
  }

  /// Folds the adapter into the weights: W' = W + update, in float and rounded once. All layers or, when an update is
  /// not finite, none. The weights as they were are kept for `unmerge`.
  void merge() { merge(only()); }
  void merge(const std::string& adapter) {
    TORCH_CHECK(!is_merged(), "lora::merge: the adapter \"", merged_, "\" is merged already; unmerge it first");
    check_devices(known(adapter));
    auto replaced = replacements_of(adapter);
    detail::merge(targets_of(adapter), {adapter});
    put(std::move(replaced));
    merged_ = adapter;
  }

  /// Brings back the weights from before `merge`, bit by bit.
  void unmerge() {
    TORCH_CHECK(is_merged(), "lora::unmerge: nothing is merged");
    for (const auto& replaced : replaced_) {
      TORCH_CHECK(
          replaced.slot->holds(replaced.value), "lora::unmerge: ", replaced.name,
          " was replaced after it was merged; undo that first (other adapters merged later are unmerged first)");
    }
    detail::unmerge(targets_of(merged_));
    for (const auto& replaced : replaced_) detail::put_back(*replaced.slot, replaced.former);
    replaced_.clear();
    merged_.clear();
  }

  bool is_merged() const { return !merged_.empty(); }

  /// Folds the adapter in for good and lets the model go: no second copy of the weights stays, parameters require
  /// gradients as they did before, and no adapter is left in this object.
  void merge_and_unload() { merge_and_unload(only()); }
  void merge_and_unload(const std::string& adapter) {
    TORCH_CHECK(!is_merged() || merged_ == adapter, "lora::merge: the adapter \"", merged_,
                "\" is merged already; unmerge it first");
    check_devices(known(adapter));
    const auto targets = targets_of(adapter);
    std::vector<Replaced> replaced;
    if (!is_merged()) {
      replaced = replacements_of(adapter);
      detail::check_mergeable(targets, {adapter});
    }
    thaw();  // first, since merged tensors take over whether the weights they replace are trainable
    if (is_merged()) {
      for (const auto& target : targets) target.site->keep_merged(*target.slot);
    } else {
      detail::merge_for_good(targets, {adapter});
      put(std::move(replaced));
    }
    for (const auto& tensor : replaced_) tensor.slot->keep(tensor.former);
    own_.clear();  // the layers' own adapters are in their weights now
    clear();
  }

  /// Gives the model back as it was before the first adapter: weights unmerged, parameters trainable where they were.
  void detach() {
    if (is_merged()) unmerge();
    thaw();
    clear();
  }

  /// Sorted names of the adapted layers that no forward pass inside a scope has used so far.
  std::vector<std::string> unreached() const {
    std::vector<std::string> names;
    for (const auto& layer : layers_) {
      if (layer->uses == 0) names.push_back(layer->target.name);
    }
    std::sort(names.begin(), names.end());
    return names;
  }

  /// Runs `pass`, a function that computes with the model, and tells every use of every adapted weight in it: which
  /// operator, how often, and whether it computed with the adapter. A use that did not is one to know of.
  template <class Pass>
  std::vector<WeightUse> diagnose(const Pass& pass) const {
    usage_->start_recording();
    try {
      auto active = activate();
      pass();
    } catch (...) {
      usage_->stop_recording();
      throw;
    }
    return usage_->stop_recording();
  }

  /// Which layers are adapted with which rank and scaling, and how many parameters are trained.
  Report report() const {
    Report report;
    for (const auto& name : names()) {
      for (const auto& layer : layers_of(name)) report.layers.push_back(row(*layer, layer->target.site->at(name)));
    }
    for (const auto& row : report.layers) report.trainable += row.parameters;
    for (const auto& name : names()) {
      for (const auto& full : full_[name]) report.trainable += full.place.is_buffer ? 0 : full.value.numel();
    }
    for (const auto& tensor : frozen_.tensors()) {
      report.base += tensor.numel();
      report.base_bytes += static_cast<int64_t>(tensor.nbytes());
    }
    return report;
  }

  /// Writes the only adapter, or the named one, as a PEFT directory. Defined in lora/peft/checkpoint.hpp.
  void save(const std::filesystem::path& directory) const;
  void save(const std::filesystem::path& directory, const std::string& adapter) const;
  void save_all(const std::filesystem::path& directory) const;

  /// Writes the model with the only adapter, or the named one, merged in. Defined in lora/peft/checkpoint.hpp.
  void save_merged(const std::filesystem::path& file);
  void save_merged(const std::filesystem::path& file, const std::string& adapter);

 private:
  /// A tensor of the model that what was trained in its place has replaced.
  struct Replaced {
    std::string name;
    std::shared_ptr<detail::WeightSlot> slot;
    detail::WeightSlot::Handles former;
    at::Tensor value;
  };

  /// The model's own tensor, also while another one is merged in its place.
  at::Tensor original_of(const ModelTensor& tensor) const {
    const auto now = tensor.slot->read();
    for (const auto& replaced : replaced_) {
      if (replaced.slot->place() == tensor.slot->place())
        return replaced.former.member.to(now.device(), now.scalar_type());
    }
    return now;
  }

  void freeze() {
    if (!while_adapted_) while_adapted_ = model_->while_adapted();
    frozen_.remember(*model_);
    frozen_.freeze();
  }

  void thaw() {
    frozen_.thaw();
    while_adapted_.reset();
  }

  /// Lets go of everything but the adapters that layers have of their own.
  void clear() {
    for (const auto& layer : layers_) {
      for (const auto& name : names()) {
        if (name != own_ && layer->target.site->contains(name)) layer->target.site->remove(name);
      }
    }
    layers_.clear();
    configs_.clear();
    full_.clear();
    replaced_.clear();
    merged_.clear();
    own_.clear();
  }

  /// What an adapter of `layers` trains in full, with the values of the model, or zero.
  FullTensor planned(const detail::FullSelection::Full& full, const std::vector<AdapterPlan::Layer>& layers) const {
    const auto original = original_of(full.tensor).detach();
    if (full.biased.empty()) {
      const bool is_trained = !full.tensor.is_buffer && original.is_floating_point();
      return {full.tensor, full.tensor.name, full.file_name, original.clone().requires_grad_(is_trained)};
    }
    const auto is_it = [&](const AdapterPlan::Layer& layer) { return layer.target.name == full.biased; };
    const auto layer = std::find_if(layers.begin(), layers.end(), is_it);
    const auto bias = at::zeros_like(original, adapter_dtype(original.scalar_type())).requires_grad_(true);
    return {full.tensor, full.biased + ".lora_B.bias", full.file_name, bias, layer->method->scaling()};
  }

  /// The target as it is known from an earlier adapter, whose site knows what is merged.
  static void take_known(Target& selected, const Target& known) {
    const auto &wanted = selected.site->view(), &view = known.site->view();
    TORCH_CHECK(wanted.part_rows() == view.part_rows() && wanted.chosen_parts() == view.chosen_parts(),
                "lora::Adapters: \"", known.name,
                "\" is adapted already, with other parts (`fused`) than are asked for; "
                "all adapters of one layer have the same");
    const auto file_name = std::move(selected.file_name);
    selected = known;
    selected.file_name = file_name;
  }

  void check_addable(const std::string& name, const AdapterPlan& plan) const {
    for (const auto& layer : plan.layers) {
      TORCH_CHECK(!layer.target.site->contains(name), "lora::Adapters: the layer \"", layer.target.name,
                  "\" has an adapter \"", name,
                  "\" of its own; add this one under another name, or take over those of ",
                  "the layers with lora::adapters_of");
    }
  }

  /// What merging puts in the places of the tensors that an adapter trained in full. Throws when a value is not finite
  /// or a tensor cannot be replaced.
  std::vector<Replaced> replacements_of(const std::string& adapter) const {
    at::NoGradGuard no_grad;
    std::vector<Replaced> replaced;
    for (const auto& full : full_[adapter]) {
      const auto& [name, slot] = std::tie(full.place.name, full.place.slot);
      slot->check_replaceable(name);
      const auto value = full.substitute(slot->read()).detach().clone();
      TORCH_CHECK(!value.is_floating_point() || at::isfinite(value).all().item<bool>(), "lora::merge: ", name,
                  ": what was trained in its place is not finite (NaN or infinity); nothing was merged");
      replaced.push_back({name, slot, slot->handles(), value});
    }
    return replaced;
  }

  /// Puts what an adapter trained in full into the model.
  void put(std::vector<Replaced> replaced) {
    at::NoGradGuard no_grad;
    for (const auto& tensor : replaced) tensor.slot->set({tensor.value, tensor.value});
    replaced_ = std::move(replaced);
  }

  /// The layer of an earlier adapter with that weight, or a new one, for another adapter.
  AdaptedLayer& layer_for(const Target& target, const std::string& adapter) {
    auto layer = layer_named(target.name);
    if (layer == nullptr) layer = layers_.emplace_back(std::make_shared<AdaptedLayer>(target));
    layer->file_names[adapter] = target.file_name;
    return *layer;
  }

  const Model& model() const {
    TORCH_CHECK(!model_->is_gone(), "lora::Adapters: the model was destroyed before its adapters");
    return *model_;
  }

  const std::string& known(const std::string& adapter) const {
    TORCH_CHECK(configs_.contains(adapter), "lora::Adapters: there is no adapter \"", adapter,
                "\"; there are: ", detail::list(names()));
    return adapter;
  }

  std::string only() const {
    TORCH_CHECK(configs_.size() == 1,
                "lora::Adapters: name the adapter that is meant; there are: ", detail::list(names()));
    return names().front();
  }

  /// The adapted layer of that name, or null.
  std::shared_ptr<AdaptedLayer> layer_named(const std::string& name) const {
    const auto has_name = [&](const auto& layer) { return layer->target.name == name; };
    const auto found = std::find_if(layers_.begin(), layers_.end(), has_name);
    return found == layers_.end() ? nullptr : *found;
  }

  AdaptedLayer& find(const std::string& name) const {
    if (const auto layer = layer_named(name)) return *layer;
    TORCH_CHECK(false, "lora::Adapters: no layer \"", name, "\" is adapted;", detail::did_you_mean(name, targets()),
                " Adapted are: ", detail::list(targets()));
  }

  AnyMethod& method(const std::string& adapter, const std::string& layer) const {
    const auto& site = *find(layer).target.site;
    TORCH_CHECK(site.contains(known(adapter)), "lora::Adapters: \"", adapter, "\" does not adapt \"", layer, "\"");
    return site.at(adapter);
  }

  std::vector<std::shared_ptr<AdaptedLayer>> layers_of(const std::string& adapter) const {
    std::vector<std::shared_ptr<AdaptedLayer>> found;
    for (const auto& layer : layers_) {
      if (layer->target.site->contains(adapter)) found.push_back(layer);
    }
    return found;
  }

  std::vector<Target> targets_of(const std::string& adapter) const {
    std::vector<Target> targets;
    for (const auto& layer : layers_of(adapter)) {
      targets.push_back(layer->target);
      targets.back().file_name = layer->file_names.at(adapter);
    }
    return targets;
  }

  /// An adapter is made where its weight is; a model that is moved later leaves it behind.
  void check_devices(const std::string& adapter) const {
    const auto check = [](const std::string& name, const detail::WeightSlot& slot, const std::string& of_adapter,
                          const at::Tensor& tensor) {
      const auto device = slot.read().device();
      TORCH_CHECK(tensor.device() == device, "lora::Adapters: the model was moved after it was adapted: ", name,
                  " is on ", device, ", its ", of_adapter, " on ", tensor.device(),
                  "; move the model first, then attach or load the adapter");
    };
    for (const auto& layer : layers_of(adapter)) {
      const auto& target = layer->target;
      for (const auto& item : target.site->at(adapter).tensors())
        check(target.name, *target.slot, item.name, *item.tensor);
    }
    for (const auto& full : full_[adapter]) check(full.place.name, *full.place.slot, "trained copy", full.value);
  }

  static Report::Layer row(const AdaptedLayer& layer, AnyMethod& method) {
    int64_t parameters = 0;
    for (const auto& item : method.tensors()) parameters += item.tensor->numel();
    const auto& target = layer.target;
    const auto sizes = target.slot->read().sizes().vec();
    return {
        target.name, target.kind,   std::string(method.info().name), sizes, method.options().rank(), method.scaling(),
        parameters,  target.tied_to};
  }

  std::shared_ptr<const Model> model_;
  std::shared_ptr<detail::Usage> usage_ = std::make_shared<detail::Usage>();  // also tells these scopes from others'
  std::vector<std::shared_ptr<AdaptedLayer>> layers_;
  torch::OrderedDict<std::string, LoRAConfig> configs_{"Adapter"};
  detail::FrozenParameters frozen_;
  std::shared_ptr<const void> while_adapted_;
  torch::OrderedDict<std::string, std::vector<FullTensor>> full_{"Adapter"};
  std::vector<Replaced> replaced_;  // while merged
  std::string own_;                 // name of the adapter that is the layers' own, empty when there is none
  std::string merged_;              // name of the merged adapter, empty when there is none
};

inline void Adapters::adopt() {
  std::vector<Target> found;
  for (const auto& part : model_->parts()) {
    for (const auto& target : part.targets) {
      if (target.site->contains("default")) found.push_back(target);
    }
  }
  TORCH_CHECK(!found.empty(),
              "lora::adapters_of: no layer of the model has an adapter of its own; for stock layers "
              "there is lora::attach");
  const auto& first = found.front().site->at("default");
  LoRAConfig config(first.options().rank());
  config.alpha(first.options().alpha()).dropout(first.options().dropout());
  config.rank_stabilized(first.options().rank_stabilized()).method(detail::kind_named(first.info().name));
  std::vector<std::string> names;
  for (const auto& target : found) {
    const auto& method = target.site->at("default");
    TORCH_CHECK(method.info().name == first.info().name, "lora::adapters_of: ", found.front().name, " has a ",
                first.info().name, ", ", target.name, " a ", method.info().name, "; one adapter is of one method");
    names.push_back(target.name);
    detail::note_options(config, target.name, method.options(), LoRAOptions(config));
  }
  config.target_modules(names);
  frozen_.remember(*model_);
  for (auto& target : found) layer_for(target, "default");
  configs_.insert("default", std::move(config));
  full_.insert("default", {});
  own_ = "default";
}

/// The adapters of a model that is written with layers of this library: their own ones are the adapter "default", and
/// everything that can be done with an attached model can be done with this one: further adapters, scopes, merging,
/// files, reports. A layer's own adapter acts outside of scopes; inside of one the scope decides.
///
///   auto adapters = lora::adapters_of(*model);
///   adapters.save("adapter");
inline Adapters adapters_of(torch::nn::Module& model) {
  Adapters adapters(model);
  adapters.adopt();
  return adapters;
}

}  // namespace LORA_ABI
}  // namespace lora
