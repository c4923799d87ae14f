#pragma once

#include <lora/activation.hpp>
#include <lora/config.hpp>
#include <lora/detail/select.hpp>
#include <lora/merge.hpp>
#include <lora/report.hpp>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace lora {

/// An adapter that is worked out for a model but not part of it yet: its layers and its tensors, without values.
struct AdapterPlan {
  struct Layer {
    Target target;
    std::shared_ptr<AnyMethod> method;
  };

  LoRAConfig config;
  std::vector<Layer> layers;

  /// Gives every tensor its first values.
  void initialize() {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    for (auto& layer : layers) {
      const auto& site = *layer.target.site;
      layer.method->initialize(site.view().matrix(site.pristine(*layer.target.slot)));
    }
  }
};

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
    freeze();
    for (auto& layer : plan.layers) layer_for(layer.target).target.site->add(name, std::move(layer.method));
    configs_.insert(name, std::move(plan.config));
  }

  /// What `add` would add: the layers that `config` selects, with tensors that have no values yet.
  AdapterPlan plan(const LoRAConfig& config) const {
    TORCH_CHECK(!model_->is_gone(), "lora::Adapters: the model was destroyed before its adapters");
    AdapterPlan plan{config, {}};
    for (auto& selected : detail::Selection(*model_, config).run()) {
      for (const auto& layer : layers_) {  // whose site knows what is merged
        if (layer->target.name == selected.target.name) selected.target = layer->target;
      }
      const auto weight = selected.target.slot->read();
      const auto options = weight.options().dtype(adapter_dtype(weight.scalar_type())).requires_grad(false);
      const auto& shape = selected.target.site->view().shape();
      plan.layers.push_back({selected.target, config.method().make(selected.options, shape, options)});
    }
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
    return all;
  }

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
    return Activation(std::make_shared<detail::AdapterScope>(usage_, layers_of(adapter), names), model_->is_script());
  }

  /// Folds the adapter into the weights: W' = W + update, in float and rounded once. All layers or, when an update is
  /// not finite, none. The weights as they were are kept for `unmerge`.
  void merge() { merge(only()); }
  void merge(const std::string& adapter) {
    TORCH_CHECK(!is_merged(), "lora::merge: the adapter \"", merged_, "\" is merged already; unmerge it first");
    check_devices(known(adapter));
    detail::merge(targets_of(adapter), {adapter});
    merged_ = adapter;
  }

  /// Brings back the weights from before `merge`, bit by bit.
  void unmerge() {
    TORCH_CHECK(is_merged(), "lora::unmerge: nothing is merged");
    detail::unmerge(targets_of(merged_));
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
    if (!is_merged()) detail::check_mergeable(targets, {adapter});
    thaw();  // first, since merged tensors take over whether the weights they replace are trainable
    if (is_merged()) {
      for (const auto& target : targets) target.site->keep_merged(*target.slot);
    } else {
      detail::merge_for_good(targets, {adapter});
    }
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
    for (const auto& parameter : frozen_) {
      report.base += parameter.tensor.numel();
      report.base_bytes += static_cast<int64_t>(parameter.tensor.nbytes());
    }
    return report;
  }

  /// Writes the only adapter, or the named one, as a PEFT directory. Defined in lora/peft/checkpoint.hpp.
  void save(const std::filesystem::path& directory) const;
  void save(const std::filesystem::path& directory, const std::string& adapter) const;

 private:
  struct Frozen {
    at::Tensor tensor;
    bool requires_grad;
  };

  void freeze() {
    if (!frozen_.empty()) return;
    for (const auto& parameter : model_->parameters()) {
      frozen_.push_back({parameter.tensor, parameter.tensor.requires_grad()});
      parameter.tensor.requires_grad_(false);
    }
  }

  void thaw() {
    for (const auto& parameter : frozen_) parameter.tensor.requires_grad_(parameter.requires_grad);
    frozen_.clear();
  }

  void clear() {
    layers_.clear();
    configs_.clear();
    merged_.clear();
  }

  /// The layer of an earlier adapter with that weight, or a new one.
  AdaptedLayer& layer_for(const Target& target) {
    for (const auto& layer : layers_) {
      if (layer->target.name == target.name) return *layer;
    }
    layers_.push_back(std::make_shared<AdaptedLayer>(target));
    return *layers_.back();
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

  AdaptedLayer& find(const std::string& name) const {
    for (const auto& layer : layers_) {
      if (layer->target.name == name) return *layer;
    }
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
    for (const auto& layer : layers_of(adapter)) targets.push_back(layer->target);
    return targets;
  }

  /// An adapter is made where its weight is; a model that is moved later leaves it behind.
  void check_devices(const std::string& adapter) const {
    for (const auto& layer : layers_of(adapter)) {
      const auto device = layer->target.slot->read().device();
      for (const auto& item : layer->target.site->at(adapter).tensors()) {
        TORCH_CHECK(item.tensor->device() == device,
                    "lora::Adapters: the model was moved after it was adapted: ", layer->target.name, " is on ", device,
                    ", its ", item.name, " on ", item.tensor->device(),
                    "; move the model first, then attach or load the adapter");
      }
    }
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
  std::vector<Frozen> frozen_;
  std::string merged_;  // name of the merged adapter, empty when there is none
};

}  // namespace lora
