#pragma once

#include <torch/csrc/api/include/torch/nn/module.h>
#include <torch/csrc/api/include/torch/ordered_dict.h>

#include <lora/adapter/activation.hpp>
#include <lora/adapter/adapter.hpp>
#include <lora/adapter/report.hpp>
#include <lora/adapter/weighted.hpp>
#include <lora/batch_rows.hpp>
#include <lora/config.hpp>
#include <lora/fwd.hpp>
#include <lora/intercept/weight_use.hpp>
#include <lora/linkage.hpp>
#include <lora/model/model.hpp>
#include <lora/version.hpp>
#include <lora/weight/quantized.hpp>

#include <initializer_list>
#include <memory>
#include <set>
#include <string>
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
/// first `add`. Errors: c10::Error that names what was asked for and what there is; nothing is changed when one is
/// thrown.
///
/// Threads: an adapter is a value, and the list of them is copied when it changes. So `add`, `load`, `remove` and
/// `set_scale` may run beside forward and backward passes of other threads that are inside scopes, and beside
/// `activate`: a pass uses the adapters as they were when its scope opened. Adapting a layer for the first time marks
/// its weight, so the first adapter of a model is added before other threads use it, or `prepare` is called. `merge`,
/// `unmerge`, `detach`, and what holds weights in few bits (`quantize`, or a configuration that asks for it) change the
/// weights and need the model for themselves.
class Adapters {
 public:
  explicit Adapters(torch::nn::Module& model);
  explicit Adapters(std::shared_ptr<const Model> model);
  Adapters(Adapters&&) noexcept;
  Adapters& operator=(Adapters&&) noexcept;
  ~Adapters();

  /// Adds an adapter; the first one freezes the model's parameters. The tensors are those of a float layer even for a
  /// model in half precision. The name may be any text but "". Throws when a part of the configuration matches nothing
  /// in the model.
  void add(const std::string& name, const LoRAConfig& config);

  /// Adds an adapter whose tensors have their values.
  void add(const std::string& name, Adapter adapter);

  /// Holds the weights that an adapter of the model is going to change in few bits, as `LoRAConfig::quantize` asks for
  /// it. Throws, with nothing changed, where one has no matrix, is merged, or has numbers that are not finite.
  void quantize(const Adapter& adapter, const Quantization& scheme);

  /// Puts another adapter in the place of one, with its scale: scopes that are open have the former one, later ones
  /// this. Throws when it is merged.
  void replace(const std::string& name, Adapter adapter);

  /// Does to the model what the first adapter does: freezes it, and marks the weights and biases of all layers that can
  /// be adapted. After it adapters of any of them may be added beside passes of other threads.
  void prepare();

  /// Takes an adapter away. Throws when it is merged.
  void remove(const std::string& name);

  /// Multiplies the update of an adapter as a whole; 1 at first. Files hold an adapter without it. Throws when it is
  /// merged.
  void set_scale(const std::string& name, double scale);
  /// The same for one of its layers, beside the adapter's own scale: both are factors. What a layer has in its bias
  /// goes with it.
  void set_scale(const std::string& name, const std::string& layer, double scale);

  /// Whether the adapter's tensors are trained. At first they are; whether an adapter acts is another matter.
  void set_requires_grad(const std::string& name, bool requires_grad);

  /// Takes over the adapters that layers of this library (LoRALinear, ...) have of their own, as one adapter "default".
  /// What requires gradients stays as it is. Throws when the model has no such layers, or of different methods.
  void adopt();

  /// What `add` would add: the layers that `config` selects, with tensors that have no values yet. Entries that match
  /// nothing are an error, or are noted in `unmatched` where that is given and anything is selected at all.
  Adapter plan(const LoRAConfig& config, std::vector<std::string>* unmatched = nullptr) const;

  /// Names of the adapters, in the order in which they were added.
  std::vector<std::string> names() const;

  /// An adapter as a value, which stays what it is whatever happens to the list.
  std::shared_ptr<const Adapter> adapter(const std::string& name) const;

  /// The configuration with which an adapter was added.
  const LoRAConfig& config(const std::string& name) const;

  /// Sorted names of the layers that are adapted.
  std::vector<std::string> targets() const;

  /// The adapted layers in the order in which they were first adapted, which for one adapter is that of the model.
  std::vector<std::shared_ptr<const Site>> sites() const;

  /// The trainable tensors of all adapters, or of one, by the name of their layer and their own: "fc2.lora_B". With
  /// more than one adapter the adapter's name follows: "fc2.lora_B.french".
  torch::OrderedDict<std::string, at::Tensor> named_parameters() const;

  torch::OrderedDict<std::string, at::Tensor> named_parameters(const std::string& name) const;

  /// The same tensors without their names, for an optimizer.
  std::vector<at::Tensor> parameters() const;
  std::vector<at::Tensor> parameters(const std::string& name) const;

  /// s in W + s B A of one layer, with the adapter's scale.
  double scaling(const std::string& layer) const;
  double scaling(const std::string& name, const std::string& layer) const;

  /// The update W' - W of one layer, shaped like its weight, in the type of the adapter. Also that of a bias, or of
  /// what is trained in full, by the name of the parameter.
  at::Tensor delta(const std::string& name, const std::string& layer) const;

  /// Forward passes on this thread use the adapter until the returned scope ends. Without a name: the only adapter. One
  /// that is merged is in the weights already and is not added again; while one is merged that is not named, it is an
  /// error. The empty name is that of the base model alone, whose weights may be held in few bits.
  Activation activate() const;
  Activation activate(const std::string& name) const;

  /// Several at once, each with a factor: W' = W + sum of weight_i (W'_i - W). Those that are merged act by being so,
  /// with the factor 1, and the others are added to them.
  ///
  ///   auto active = adapters.activate(lora::WeightedAdapters{{"french", 1.0}, {"poet", 0.5}});
  Activation activate(const WeightedAdapters& adapters) const;

  /// A different adapter for each row of a batch: `rows` has a name for each, the empty one for the base model. A
  /// linear layer computes its frozen product once for all rows, and for each adapter the update of its own rows, in
  /// training as well; rows are grouped here and not in every layer, so that their order costs nothing.
  ///
  ///   auto active = adapters.activate(std::vector<std::string>{"french", "", "poet"});
  ///   auto y = model->forward(x);  // of three rows
  ///
  /// The first dimension of a layer's inputs counts the rows; of a torch::nn::MultiheadAttention the second. Inputs in
  /// which it has several entries for each row, one after the other, e.g. (rows * positions, features), are known as
  /// such once an input with a dimension of rows and as many positions was seen in the scope. `options` tells what
  /// differs.
  ///
  /// Methods that are no plain low-rank updates, adapters of another type than the input (those of a model in half
  /// precision, autocast), convolutions, lookups and layers that are trained in full compute the
  /// rows of each adapter apart. An operator that takes a weight for all rows together (recurrent layers, bilinear
  /// ones, norms that are trained in full) throws. So does an input whose number of rows is another one. Layers that
  /// have an adapter of their own (`adapters_of`) leave it to the names whether it acts.
  Activation activate(const std::vector<std::string>& rows, RowOptions options = {}) const;
  Activation activate(std::initializer_list<std::string> rows) const;

  /// Folds the adapter, or several, into the weights: W' = W + the updates, in float and rounded once. All layers or,
  /// when an update is not finite, none. The weights as they were are kept for `unmerge`. Whoever holds a weight sees
  /// the merged values; only one that is tied to another layer is replaced by a tensor of its own. Other adapters can
  /// be activated together with those that are merged; they see the weights without these.
  void merge();
  void merge(const std::string& name);
  void merge(std::initializer_list<std::string> names);
  void merge(const std::vector<std::string>& names);

  /// Brings back the weights from before `merge`, bit by bit.
  void unmerge();

  bool is_merged() const;
  bool is_merged(const std::string& name) const;
  /// The names of the adapters that are merged; none at first.
  const std::vector<std::string>& merged() const;

  /// Folds the adapter in for good and lets the model go: no second copy of the weights stays, parameters require
  /// gradients as they did before, and no adapter is left in this object. Weights that were held in few bits for its
  /// adapters are there in their own type again. Throws, with nothing changed, when an update or a merged weight is not
  /// finite, when something else is merged, and inside of a scope that adapts a layer which is held in few bits.
  void merge_and_unload();
  void merge_and_unload(const std::string& name);
  /// The same, but the merged weights are held in few bits at once, so that the model never has them all as numbers:
  /// those of the adapter's layers. What is trained in full stays numbers, and what was held for other adapters stays
  /// so. Returns what that loses of them, ||W_q - W'|| / ||W'||. Throws as `quantize` does, too.
  double merge_and_unload(const std::string& name, const Quantization& scheme);

  /// Gives the model back as it was before the first adapter: weights unmerged, parameters trainable where they were.
  /// Weights that were held in few bits for adapters get numbers again, as far as these held them.
  void detach();

  /// Sorted names of the adapted layers that no forward pass inside a scope has used so far.
  std::vector<std::string> unreached() const;

  /// Runs `pass`, a function that computes with the model, and tells every use of every adapted weight in it: which
  /// operator, how often, and whether it computed with the adapter. A use that did not is one to know of.
  template <class Pass>
  std::vector<WeightUse> diagnose(const Pass& pass) const {
    start_recording();
    try {
      auto active = activate();
      pass();
    } catch (...) {
      stop_recording();
      throw;
    }
    return stop_recording();
  }

  /// Which layers are adapted with which rank and scaling, and how many parameters are trained.
  Report report() const;

  /// The factor that `set_scale` gave an adapter.
  double scale(const std::string& name) const;
  /// That of one of its layers, with the adapter's.
  double scale(const std::string& name, const std::string& layer) const;

  /// Forty digits that are the same for what computes the same, here, in another process, and under another name: those
  /// of its layers, scales and numbers. A cache of what a model computed with an adapter, such as the keys and values
  /// of a prompt, belongs to them, and is not gone on with when they differ. All numbers are read for it, so it is kept
  /// rather than asked for again. Of the base model, whose name is empty, there are none.
  std::string fingerprint(const std::string& name) const;

  /// Adds an adapter made of others, whose updates are weighted and add up, or are combined as the options say
  /// (`CombineOptions`): in lora/combine.hpp, which has to be included for it.
  template <class Options = CombineOptions>
  void combine(const std::string& name, const WeightedAdapters& adapters, const Options& options = {}) {
    combine_adapters(*this, name, adapters, options);
  }

  /// The files of adapters: what follows is in lora/peft/checkpoint.hpp, which has to be included for it.

  /// Adds the adapter in a PEFT directory, as `load_adapter` does, and reports what did not fit.
  template <class Directory, class Options = LoadOptions>
  auto load(const std::string& name, const Directory& directory, const Options& options = {}) {
    return read_adapter(*this, name, directory, options);
  }
  /// Writes the only adapter, or the named one, as a PEFT directory.
  template <class Directory>
  void save(const Directory& directory) const {
    write_adapter(*this, only(), directory);
  }
  template <class Directory>
  void save(const Directory& directory, const std::string& name) const {
    write_adapter(*this, name, directory);
  }
  /// Writes all: "default" into `directory` itself, each other one into the subdirectory of its name, as PEFT does;
  /// what may not be in the name of a folder is written there as "%2F".
  template <class Directory>
  void save_all(const Directory& directory) const {
    write_adapters(*this, directory);
  }
  /// Writes the model with the only adapter, or the named one, merged in.
  template <class File>
  void save_merged(const File& file) {
    write_merged(*this, only(), file);
  }
  template <class File>
  void save_merged(const File& file, const std::string& name) {
    write_merged(*this, name, file);
  }

  /// The model. Throws when it was destroyed.
  const Model& model() const;

 private:
  struct State;

  std::vector<WeightUse> stop_recording() const;
  void start_recording() const;

  std::shared_ptr<const detail::AdapterList> list() const;

  /// An adapter of a list that is going to be published. Throws when it is merged.
  detail::AdapterEntry& changeable(detail::AdapterList& list, const std::string& name) const;

  /// The adapter with the sites of this model, whose weights are marked.
  std::shared_ptr<const Adapter> taken(Adapter adapter);

  /// Merges for good. Whatever can fail comes before anything is changed.
  double unload(const std::string& name, const Quantization* scheme);

  void hold(const std::vector<detail::HeldWeight>& weights);

  /// Undoes what `quantize` did.
  void dequantize();

  /// A scope without any adapter.
  Activation activate_base() const;

  /// Layers that have adapters of their own, which are not to act.
  void add_own_layers(detail::ActiveSets& sets) const;

  std::string only() const;

  /// An adapter and its active set, which is kept until something changes.
  detail::ActiveAdapter active(const std::string& name) const;

  Activation open(std::shared_ptr<const detail::ActiveSet> set) const;

  /// Throws when something is merged that is not among the names.
  void check_merged(const std::set<std::string>& names) const;

  /// Throws when no adapter acts on a layer that RowOptions name.
  void check_axis(const std::string& layer) const;

  void freeze();

  void thaw();

  /// Lets go of everything but the adapters that layers have of their own.
  void clear();

  const AdapterPart& layer_of(const detail::AdapterList& all, const detail::AdapterEntry& entry,
                              const std::string& layer) const;

  std::vector<detail::Merging> mergings(const std::vector<std::string>& names) const;

  std::shared_ptr<const Model> model_;
  std::unique_ptr<State> state_;
  std::string own_;                  // name of the adapter that is the layers' own, empty when there is none
  std::vector<std::string> merged_;  // names of the merged adapters
};

/// The adapters of a model that is written with layers of this library: their own ones are the adapter "default", and
/// everything that can be done with an attached model can be done with this one: further adapters, scopes, merging,
/// files, reports. A layer's own adapter acts outside of scopes; inside of one the scope decides.
///
///   auto adapters = lora::adapters_of(*model);
///   adapters.save("adapter");
LORA_INLINE Adapters adapters_of(torch::nn::Module& model);

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <lora/adapter/fingerprint.hpp>
#include <lora/adapter/held_weights.hpp>
#include <lora/adapter/merge.hpp>
#include <lora/adapter/plan.hpp>
#include <lora/adapter/registry.hpp>
#include <lora/intercept/kernels.hpp>
#include <lora/model/frozen_parameters.hpp>
#include <lora/model/module_model.hpp>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <utility>

namespace lora {
inline namespace LORA_ABI {

namespace detail {

/// The name of the adapter that layers have of their own.
inline constexpr const char* kOwnName = "default";

inline void check_addable(const std::string& name, const Adapter& adapter) {
  for (const auto& part : adapter.parts) {
    TORCH_CHECK(!part.site->own() || name != kOwnName || part.site->own() == part.method,
                "lora::Adapters: the layer \"", part.site->name(), "\" has an adapter \"", name,
                "\" of its own; add this one under another name, or take over those of the layers with ",
                "lora::adapters_of");
  }
}

inline void check_new(const AdapterList& list, const std::string& name, const Adapter& adapter) {
  TORCH_CHECK(!name.empty(), "lora::Adapters: an adapter has to have a name that is not empty");
  TORCH_CHECK(list.find(name) == nullptr, "lora::Adapters: there is an adapter \"", name, "\" already");
  check_addable(name, adapter);
}

}  // namespace detail

struct Adapters::State {
  detail::AdapterRegistry registry;
  std::mutex writing;  // held by who changes what follows, or the list
  detail::SiteIndex index;
  detail::FrozenParameters frozen;
  std::vector<std::shared_ptr<Site>> quantized;  // that were so for adapters of this object
  std::shared_ptr<const void> while_adapted;
  std::shared_ptr<detail::Usage> usage = std::make_shared<detail::Usage>();  // also tells these scopes from others'
};

LORA_INLINE Adapters::Adapters(Adapters&&) noexcept = default;
LORA_INLINE Adapters& Adapters::operator=(Adapters&&) noexcept = default;
LORA_INLINE Adapters::~Adapters() = default;

LORA_INLINE Adapters::Adapters(torch::nn::Module& model) : Adapters(std::make_shared<ModuleModel>(model)) {}

LORA_INLINE Adapters::Adapters(std::shared_ptr<const Model> model)
    : model_(std::move(model)), state_(std::make_unique<State>()) {
  detail::register_kernels();
}

LORA_INLINE void Adapters::add(const std::string& name, const LoRAConfig& config) {
  auto planned = plan(config);
  detail::check_loftq(config);
  const bool has_start = config.loftq() > 0;
  if (has_start) planned.initialize();  // else from the numbers that the few bits hold
  if (const auto& scheme = config.quantize()) {
    detail::check_new(*list(), name, planned);
    hold(has_start ? detail::packed_by_loftq(planned, *scheme) : detail::packed(planned, *scheme));
  }
  if (!has_start) planned.initialize();
  add(name, std::move(planned));
}

LORA_INLINE void Adapters::add(const std::string& name, Adapter adapter) {
  std::lock_guard<std::mutex> lock(state_->writing);
  auto list = *state_->registry.read();
  detail::check_new(list, name, adapter);
  freeze();
  list.running_means = model().running_means();
  list.entries.push_back({name, taken(std::move(adapter))});
  state_->registry.publish(std::move(list));
}

LORA_INLINE void Adapters::quantize(const Adapter& adapter, const Quantization& scheme) {
  hold(detail::packed(adapter, scheme));
}

LORA_INLINE void Adapters::replace(const std::string& name, Adapter adapter) {
  std::lock_guard<std::mutex> lock(state_->writing);
  auto list = *state_->registry.read();
  auto& entry = changeable(list, name);
  detail::check_addable(name, adapter);
  entry.adapter = taken(std::move(adapter));
  state_->registry.publish(std::move(list));
}

LORA_INLINE void Adapters::prepare() {
  std::lock_guard<std::mutex> lock(state_->writing);
  freeze();
  for (const auto& part : model().parts()) {
    part.for_each_place([](const Place& place) {
      detail::mark(*place.slot);
      if (place.bias) detail::mark(*place.bias);
    });
  }
}

LORA_INLINE void Adapters::remove(const std::string& name) {
  std::lock_guard<std::mutex> lock(state_->writing);
  auto list = *state_->registry.read();
  changeable(list, name);
  const auto is_it = [&](const auto& entry) { return entry.name == name; };
  list.entries.erase(std::find_if(list.entries.begin(), list.entries.end(), is_it));
  if (own_ == name) own_.clear();
  state_->registry.publish(std::move(list));
}

LORA_INLINE void Adapters::set_scale(const std::string& name, double scale) {
  TORCH_CHECK_VALUE(std::isfinite(scale), "lora::Adapters: the scale has to be a finite number, but got ", scale);
  std::lock_guard<std::mutex> lock(state_->writing);
  auto list = *state_->registry.read();
  changeable(list, name).scale = scale;
  state_->registry.publish(std::move(list));
}

LORA_INLINE void Adapters::set_scale(const std::string& name, const std::string& layer, double scale) {
  TORCH_CHECK_VALUE(std::isfinite(scale), "lora::Adapters: the scale has to be a finite number, but got ", scale);
  std::lock_guard<std::mutex> lock(state_->writing);
  auto list = *state_->registry.read();
  auto& entry = changeable(list, name);
  const auto& parts = entry.adapter->parts;
  const auto is_its = [&](const AdapterPart& part) { return detail::owner_of(part.changed()) == layer; };
  if (layer.empty() || std::none_of(parts.begin(), parts.end(), is_its)) layer_of(list, entry, layer);
  entry.scales[layer] = scale;
  state_->registry.publish(std::move(list));
}

LORA_INLINE void Adapters::set_requires_grad(const std::string& name, bool requires_grad) {
  for (const auto& tensor : parameters(name)) tensor.set_requires_grad(requires_grad);
}

LORA_INLINE Adapter Adapters::plan(const LoRAConfig& config, std::vector<std::string>* unmatched) const {
  std::lock_guard<std::mutex> lock(state_->writing);
  return detail::Planner(model(), state_->index, config, detail::Unmatched(unmatched)).run();
}

LORA_INLINE std::vector<std::string> Adapters::names() const { return list()->names(); }

LORA_INLINE std::shared_ptr<const Adapter> Adapters::adapter(const std::string& name) const {
  return list()->at(name).adapter;
}

LORA_INLINE const LoRAConfig& Adapters::config(const std::string& name) const { return adapter(name)->config; }

LORA_INLINE std::vector<std::string> Adapters::targets() const {
  std::vector<std::string> names;
  for (const auto& site : sites()) names.push_back(site->name());
  std::sort(names.begin(), names.end());
  return names;
}

LORA_INLINE std::vector<std::shared_ptr<const Site>> Adapters::sites() const {
  std::vector<std::shared_ptr<const Site>> sites;
  const auto all = list();
  for (const auto& entry : all->entries) {
    for (const auto& part : entry.adapter->parts) {
      const bool is_new = std::find(sites.begin(), sites.end(), part.site) == sites.end();
      if (part.role == AdapterPart::Role::kLayer && is_new) sites.push_back(part.site);
    }
  }
  return sites;
}

LORA_INLINE torch::OrderedDict<std::string, at::Tensor> Adapters::named_parameters() const {
  const auto all = list();
  if (all->entries.size() == 1) return all->entries.front().adapter->named_parameters();
  torch::OrderedDict<std::string, at::Tensor> tensors;
  for (const auto& entry : all->entries) {
    for (const auto& item : entry.adapter->named_parameters())
      tensors.insert(item.key() + "." + entry.name, item.value());
  }
  return tensors;
}

LORA_INLINE torch::OrderedDict<std::string, at::Tensor> Adapters::named_parameters(const std::string& name) const {
  return adapter(name)->named_parameters();
}

LORA_INLINE std::vector<at::Tensor> Adapters::parameters() const { return named_parameters().values(); }

LORA_INLINE std::vector<at::Tensor> Adapters::parameters(const std::string& name) const {
  return named_parameters(name).values();
}

LORA_INLINE double Adapters::scaling(const std::string& layer) const { return scaling(only(), layer); }

LORA_INLINE double Adapters::scaling(const std::string& name, const std::string& layer) const {
  const auto all = list();
  const auto& entry = all->at(name);
  const auto& part = layer_of(*all, entry, layer);
  return entry.scale_of(part) * part.method->scaling();
}

LORA_INLINE at::Tensor Adapters::delta(const std::string& name, const std::string& layer) const {
  const detail::BelowInterception below;
  const auto all = list();
  const auto& entry = all->at(name);
  const auto& part = layer_of(*all, entry, layer);
  const auto base = part.site->base();
  const auto delta = base.view().weight(part.method->delta(base));
  const auto scale = entry.scale_of(part);
  return scale == 1 ? delta : delta * scale;
}

LORA_INLINE Activation Adapters::activate() const { return activate(only()); }

LORA_INLINE Activation Adapters::activate(const std::string& name) const {
  if (name.empty()) return activate_base();
  check_merged({name});
  return open(active(name).set);
}

LORA_INLINE Activation Adapters::activate(const WeightedAdapters& adapters) const {
  detail::ActiveSets sets;
  std::set<std::string> names;
  for (const auto& [name, weight] : adapters) {
    TORCH_CHECK_VALUE(std::isfinite(weight), "lora::activate: the weight of \"", name,
                      "\" has to be a finite number, but got ", weight);
    TORCH_CHECK_VALUE(names.insert(name).second, "lora::activate: \"", name, "\" is named twice");
    TORCH_CHECK(weight == 1 || !is_merged(name), "lora::activate: \"", name, "\" is merged, which is with the factor ",
                "1, not ", weight, "; unmerge it first");
    sets.add(*active(name).set, weight);
  }
  TORCH_CHECK_VALUE(!adapters.empty(), "lora::activate: no adapter is named");
  check_merged(names);
  return open(sets.take());
}

LORA_INLINE Activation Adapters::activate(const std::vector<std::string>& rows, RowOptions options) const {
  auto batch = std::make_shared<const detail::BatchRows>(rows, std::move(options));
  for (const auto& axis : batch->options().axes()) check_axis(axis.first);
  detail::ActiveSets sets;
  for (size_t group = 0; group < batch->groups(); ++group) {
    const auto& name = batch->names()[group];
    if (!name.empty()) sets.add(*active(name).set, /*weight=*/1, group);
  }
  add_own_layers(sets);
  TORCH_CHECK(!is_merged(), "lora::activate: ", detail::quoted(merged_), " is merged, and rows of other adapters, ",
              "or of the base model, would have it too; unmerge it first");
  return open(sets.take(std::move(batch)));
}

LORA_INLINE Activation Adapters::activate(std::initializer_list<std::string> rows) const {
  return activate(std::vector<std::string>(rows));
}

LORA_INLINE void Adapters::merge() { merge(only()); }

LORA_INLINE void Adapters::merge(const std::string& name) { merge(std::vector<std::string>{name}); }

LORA_INLINE void Adapters::merge(std::initializer_list<std::string> names) { merge(std::vector<std::string>(names)); }

LORA_INLINE void Adapters::merge(const std::vector<std::string>& names) {
  TORCH_CHECK(!is_merged(), "lora::merge: ", detail::quoted(merged_), " is merged already; unmerge it first");
  TORCH_CHECK_VALUE(!names.empty(), "lora::merge: no adapter is named");
  TORCH_CHECK_VALUE(std::set<std::string>(names.begin(), names.end()).size() == names.size(),
                    "lora::merge: an adapter is named twice among ", detail::quoted(names));
  detail::merge(mergings(names));
  merged_ = names;
}

LORA_INLINE void Adapters::unmerge() {
  TORCH_CHECK(is_merged(), "lora::unmerge: nothing is merged");
  std::vector<std::shared_ptr<Site>> sites;
  for (const auto& merging : detail::mergings_of(*list(), merged_)) sites.push_back(merging.site);
  detail::unmerge(sites);
  merged_.clear();
}

LORA_INLINE bool Adapters::is_merged() const { return !merged_.empty(); }

LORA_INLINE bool Adapters::is_merged(const std::string& name) const {
  return std::find(merged_.begin(), merged_.end(), name) != merged_.end();
}

LORA_INLINE const std::vector<std::string>& Adapters::merged() const { return merged_; }

LORA_INLINE void Adapters::merge_and_unload() { merge_and_unload(only()); }

LORA_INLINE void Adapters::merge_and_unload(const std::string& name) { unload(name, nullptr); }

LORA_INLINE double Adapters::merge_and_unload(const std::string& name, const Quantization& scheme) {
  return unload(name, &scheme);
}

LORA_INLINE void Adapters::detach() {
  if (is_merged()) unmerge();
  dequantize();
  thaw();
  clear();
}

LORA_INLINE std::vector<std::string> Adapters::unreached() const {
  std::vector<std::string> names;
  for (const auto& site : sites()) {
    if (site->uses.count == 0) names.push_back(site->name());
  }
  std::sort(names.begin(), names.end());
  return names;
}

LORA_INLINE Report Adapters::report() const {
  Report report;
  const auto all = list();
  for (const auto& entry : all->entries) {
    for (const auto& part : entry.adapter->parts) {
      if (part.role == AdapterPart::Role::kLayer)
        report.layers.push_back(detail::report_row(part, entry.scale_of(part)));
    }
    for (const auto& item : entry.adapter->named_parameters()) report.trainable += item.value().numel();
  }
  for (const auto& tensor : state_->frozen.tensors()) {
    report.base += tensor.numel();
    report.base_bytes += detail::held_bytes(tensor);
  }
  return report;
}

LORA_INLINE double Adapters::scale(const std::string& name) const { return list()->at(name).scale; }

LORA_INLINE double Adapters::scale(const std::string& name, const std::string& layer) const {
  const auto all = list();
  const auto& entry = all->at(name);
  return entry.scale_of(layer_of(*all, entry, layer));
}

LORA_INLINE std::string Adapters::fingerprint(const std::string& name) const {
  return name.empty() ? "" : detail::fingerprint(list()->at(name));
}

LORA_INLINE const Model& Adapters::model() const {
  TORCH_CHECK(!model_->is_gone(), "lora::Adapters: the model was destroyed before its adapters");
  return *model_;
}

LORA_INLINE std::vector<WeightUse> Adapters::stop_recording() const { return state_->usage->stop_recording(); }

LORA_INLINE void Adapters::start_recording() const { state_->usage->start_recording(); }

LORA_INLINE std::shared_ptr<const detail::AdapterList> Adapters::list() const { return state_->registry.read(); }

LORA_INLINE detail::AdapterEntry& Adapters::changeable(detail::AdapterList& list, const std::string& name) const {
  list.at(name);
  TORCH_CHECK(!is_merged(name), "lora::Adapters: \"", name, "\" is merged into the weights; unmerge it first");
  return *std::find_if(list.entries.begin(), list.entries.end(), [&](const auto& entry) { return entry.name == name; });
}

LORA_INLINE std::shared_ptr<const Adapter> Adapters::taken(Adapter adapter) {
  for (auto& part : adapter.parts) {
    part.site = state_->index.take(part.site);
    detail::mark(part.site->slot());
  }
  return std::make_shared<const Adapter>(std::move(adapter));
}

LORA_INLINE double Adapters::unload(const std::string& name, const Quantization* scheme) {
  TORCH_CHECK(!is_merged() || merged_ == std::vector<std::string>{name}, "lora::merge: ", detail::quoted(merged_),
              " is merged already; unmerge it first");
  const auto all = mergings({name});
  if (!is_merged()) detail::check_places(all);
  for (const auto& merging : all) detail::check_leaves_scopes(*merging.site);
  detail::RoundingError error;
  detail::HeldWeights held;
  if (scheme != nullptr) {
    held = detail::packed_merged(all, *adapter(name), *scheme, error);
  } else if (!is_merged()) {
    detail::check_updates(all);
  }
  thaw();  // first, since merged tensors take over whether the weights they replace are trainable
  for (const auto& merging : all) {
    const auto& site = merging.site;
    const auto is_it = [&](const detail::HeldWeight& weight) { return weight.site == site; };
    const auto packed = std::find_if(held.begin(), held.end(), is_it);
    const bool needs_values = packed == held.end() || site->is_told_apart();
    if (!site->is_merged() && needs_values) detail::merge_for_good(merging);
    if (site->is_merged()) site->keep_merged();
    if (packed != held.end()) site->hold(packed->packed);
    if (site->own() && own_ == name) site->set_own(nullptr);  // it is in the weight now
  }
  if (scheme == nullptr) dequantize();
  state_->quantized.clear();
  clear();
  return error.relative();
}

LORA_INLINE void Adapters::hold(const std::vector<detail::HeldWeight>& weights) {
  if (weights.empty()) return;
  std::lock_guard<std::mutex> lock(state_->writing);
  freeze();
  detail::hold(weights);
  for (const auto& weight : weights) state_->quantized.push_back(weight.site);
}

LORA_INLINE void Adapters::dequantize() {
  for (const auto& site : state_->quantized) site->dequantize();
  state_->quantized.clear();
}

LORA_INLINE Activation Adapters::activate_base() const {
  check_merged({});
  detail::ActiveSets sets;
  add_own_layers(sets);
  return open(sets.take());
}

LORA_INLINE void Adapters::add_own_layers(detail::ActiveSets& sets) const {
  state_->index.for_each([&](const std::shared_ptr<Site>& site) {
    if (site->own()) sets.add_layer(site);
  });
}

LORA_INLINE std::string Adapters::only() const {
  const auto all = list();
  TORCH_CHECK(all->entries.size() == 1,
              "lora::Adapters: name the adapter that is meant; there are: ", detail::list(all->names()));
  return all->entries.front().name;
}

LORA_INLINE detail::ActiveAdapter Adapters::active(const std::string& name) const {
  auto active = state_->registry.active(name);
  if (!active) {
    const auto all = list();
    const auto& entry = all->at(name);
    detail::check_devices(*entry.adapter);
    active = {entry.adapter, detail::make_active_set(*all, entry)};
    state_->registry.keep(name, all, *active);
  }
  if (active->adapter->start) active->adapter->start->follow();
  return *active;
}

LORA_INLINE Activation Adapters::open(std::shared_ptr<const detail::ActiveSet> set) const {
  return Activation(std::move(set), state_->usage, model_->needs_plain_scripts());
}

LORA_INLINE void Adapters::check_merged(const std::set<std::string>& names) const {
  for (const auto& name : merged_) {
    TORCH_CHECK(names.count(name) > 0, "lora::activate: \"", name, "\" is merged, and the two would add up; unmerge ",
                "it first, or name it, too");
  }
}

LORA_INLINE void Adapters::check_axis(const std::string& layer) const {
  const auto all = list();
  std::set<std::string> names;
  for (const auto& entry : all->entries) {
    for (const auto& part : entry.adapter->parts) {
      if (detail::is_of_layer(*part.site, layer)) return;
      names.insert(part.site->name());
    }
  }
  TORCH_CHECK_VALUE(false, "lora::RowOptions: none of the adapters acts on a layer \"", layer,
                    "\"; adapted are: ", detail::list({names.begin(), names.end()}));
}

LORA_INLINE void Adapters::freeze() {
  if (!state_->while_adapted) state_->while_adapted = model_->while_adapted();
  state_->frozen.remember(model());
  state_->frozen.freeze();
}

LORA_INLINE void Adapters::thaw() {
  state_->frozen.thaw();
  state_->while_adapted.reset();
}

LORA_INLINE void Adapters::clear() {
  state_->registry.publish({});
  state_->index.clear();
  merged_.clear();
  own_.clear();
}

LORA_INLINE const AdapterPart& Adapters::layer_of(const detail::AdapterList& all, const detail::AdapterEntry& entry,
                                                  const std::string& layer) const {
  if (const auto* part = entry.adapter->part(layer)) return *part;
  for (const auto& other : all.entries) {
    TORCH_CHECK(other.adapter->part(layer) == nullptr, "lora::Adapters: \"", entry.name, "\" does not adapt \"", layer,
                "\"");
  }
  C10_THROW_ERROR(Error, c10::str("lora::Adapters: no layer \"", layer, "\" is adapted;",
                                  detail::did_you_mean(layer, targets()), " Adapted are: ", detail::list(targets())));
}

LORA_INLINE std::vector<detail::Merging> Adapters::mergings(const std::vector<std::string>& names) const {
  const auto all = list();
  for (const auto& name : names) detail::check_devices(*all->at(name).adapter);
  return detail::mergings_of(*all, names);
}

LORA_INLINE void Adapters::adopt() {
  std::vector<std::shared_ptr<Site>> found;
  for (const auto& part : model().parts()) {
    for (const auto& site : part.own) {
      if (site->own()) found.push_back(site);
    }
  }
  TORCH_CHECK(!found.empty(),
              "lora::adapters_of: no layer of the model has an adapter of its own; for stock layers "
              "there is lora::attach");
  const auto& first = *found.front()->own();
  LoRAConfig config(first.options().rank());
  config.alpha(first.options().alpha()).dropout(first.options().dropout());
  config.rank_stabilized(first.options().rank_stabilized()).method(MethodKind(first.copy()));
  Adapter adapter{config, {}};
  std::vector<std::string> names;
  for (const auto& site : found) {
    const auto& method = *site->own();
    TORCH_CHECK(method.info().name == first.info().name, "lora::adapters_of: ", found.front()->name(), " has a ",
                first.info().name, ", ", site->name(), " a ", method.info().name, "; one adapter is of one method");
    names.push_back(site->name());
    detail::note_options(adapter.config, site->name(), method.options(), LoRAOptions(adapter.config));
    adapter.parts.push_back(
        {AdapterPart::Role::kLayer, site, site->own(), site->name(), site->place().file_name, site->name()});
  }
  for (size_t i = 0; i < found.size(); ++i) {
    const auto& part = adapter.parts[i];
    if (part.method->changes_bias() && part.site->place().bias) adapter.parts.push_back(detail::bias_part(part));
  }
  adapter.config.target_modules(names);
  state_->frozen.remember(model());
  for (const auto& part : adapter.parts) {
    state_->index.take(part.site);
    detail::mark(part.site->weight());
  }
  own_ = detail::kOwnName;
  state_->registry.publish(
      {{{detail::kOwnName, std::make_shared<const Adapter>(std::move(adapter))}}, model().running_means()});
}

LORA_INLINE Adapters adapters_of(torch::nn::Module& model) {
  Adapters adapters(model);
  adapters.adopt();
  return adapters;
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
