#pragma once

#include <lora/adapter/combine_options.hpp>
#include <lora/adapter/weighted.hpp>
#include <lora/adapters.hpp>
#include <lora/linkage.hpp>
#include <lora/version.hpp>

#include <string>

namespace lora {
inline namespace LORA_ABI {

/// Adds an adapter that is made of others: of each layer that one of them changes
///
///   update = sum_i w_i delta_i,   delta_i = W'_i - W with the adapter's `set_scale`,
///
/// or what else `options` say. It is a LowRank adapter with alpha = rank that acts, trains, merges and is saved like
/// any other; without dropout, trainable, and independent of the adapters that it was made of. Weights may be negative.
/// Layers that only some of the adapters change get the updates of these. Biases, and modules that are trained in full
/// in one of the adapters, are the weighted sum of their differences from the model, whatever the kind. (A module whose
/// bias has no place in a LoRA's files, as IA3 changes that of an attention's inputs, becomes one trained in full.)
///
///   adapters.combine("both", {{"french", 0.5}, {"poet", -2.0}});
///   adapters.combine("small", {{"french"}, {"poet"}}, lora::CombineOptions(lora::CombineKind::kSvd).rank(8));
///   adapters.combine("merged", {{"a"}, {"b"}, {"c"}}, lora::CombineOptions(lora::CombineKind::kTies).density(0.2));
///
/// FlexLoRA: clients train adapters of different ranks, the server averages their updates, and each client gets the
/// average back in its own rank:
///
///   adapters.combine("average", {{"phone", 0.2}, {"laptop", 0.8}});  // weights: shares of the data
///   const auto average = [](int64_t rank) { return lora::CombineOptions(lora::CombineKind::kSvd).rank(rank); };
///   adapters.combine("to phone", {{"average"}}, average(4));
///   adapters.combine("to laptop", {{"average"}}, average(64));
///
/// Errors: c10::ValueError for no adapters, weights that are not finite, and options out of range or of another kind;
/// c10::Error for a name that is taken, one that is unknown, and updates that are not finite. Nothing is changed then.
/// References: Yadav et al. 2023, "TIES-Merging"; Yu et al. 2023, "Language Models are Super Mario" (DARE); Bai et al.
/// 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources" (FlexLoRA).
LORA_INLINE void combine_adapters(Adapters& adapters, const std::string& name, const WeightedAdapters& parts,
                                  const CombineOptions& options = {});

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/matmul.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <lora/adapter/combined_update.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

namespace detail {

/// Makes the adapter of a combination: works out a configuration that means all that the others change, and fills it.
class Combination {
 public:
  Combination(const Adapters& adapters, const WeightedAdapters& wanted) : adapters_(adapters) {
    for (const auto& [name, weight] : wanted) {
      TORCH_CHECK_VALUE(std::isfinite(weight), "lora::combine: the weight of \"", name,
                        "\" has to be a finite number, but got ", weight);
      take(name, weight);
    }
    for (const auto& part : adapters.model().parts())
      part.for_each_place([&](const Place& place) { modules_.emplace(place.slot->place(), part.name); });
  }

  Adapter run(const CombineOptions& options) {
    const UpdateCombiner combiner(options);
    for (auto& tensor : combined_) {
      if (is_layer(tensor) && !is_full(tensor)) combiner.combine(tensor);
    }
    auto plan = adapters_.plan(with_ranks(planned()), &unmatched_);
    for (auto& part : plan.parts) fill(part);
    note_tables(plan);
    return plan;
  }

 private:
  void take(const std::string& name, double weight) {
    const auto& source = sources_.emplace_back(adapters_.adapter(name));
    if (source->start) source->start->follow();
    for (const auto& part : source->parts)
      combined(part.site).shares.push_back({name, &part, adapters_.scale(name, part.changed()), weight});
    const auto& saved = source->config.modules_to_save();
    saved_.insert(saved.begin(), saved.end());
  }

  Combined& combined(const std::shared_ptr<Site>& site) {
    if (places_.emplace(site.get(), combined_.size()).second) combined_.push_back({site});
    return combined_[places_.at(site.get())];
  }

  static bool has(const Combined& tensor, AdapterPart::Role role) {
    return std::any_of(tensor.shares.begin(), tensor.shares.end(),
                       [&](const auto& share) { return share.part->role == role; });
  }
  static bool is_layer(const Combined& tensor) { return has(tensor, AdapterPart::Role::kLayer); }
  /// Whether an adapter trains it in full, as the combined one does then.
  static bool is_full(const Combined& tensor) { return has(tensor, AdapterPart::Role::kFull); }

  /// A plan that has a place for everything. What no other option reaches is trained in full with its module.
  Adapter planned() {
    for (;;) {
      auto plan = adapters_.plan(config(), &unmatched_);
      const auto* missing = missing_in(plan);
      if (missing == nullptr) return plan;
      const auto module = owner_of(missing->name());
      TORCH_CHECK(
          !module.empty() && saved_.insert(module).second, "lora::combine: ", missing->name(),
          " has no place beside what the other adapters change; a tensor that is adapted as a parameter by one adapter "
          "and trained with its module by another cannot be combined");
    }
  }

  const Site* missing_in(const Adapter& plan) const {
    for (const auto& tensor : combined_) {
      const auto is_it = [&](const AdapterPart& part) { return part.site == tensor.site; };
      if (std::none_of(plan.parts.begin(), plan.parts.end(), is_it)) return tensor.site.get();
    }
    return nullptr;
  }

  /// What all the sources change, with a rank that every layer can have.
  LoRAConfig config() const {
    LoRAConfig config(1);
    config.modules_to_save({saved_.begin(), saved_.end()});
    std::vector<std::string> modules, parameters;
    std::vector<FusedProjection> fused;
    for (const auto& tensor : combined_) {
      if (!is_layer(tensor)) continue;
      const auto name = module_of(tensor);
      const auto& view = tensor.site->view();
      if (!saving_entry(config, name.empty() ? owner_of(tensor.site->name()) : name).empty()) continue;
      (name.empty() ? parameters : modules).push_back(name.empty() ? tensor.site->name() : name);
      if (!view.part_rows().empty()) fused.push_back({tensor.site->name(), view.part_rows(), view.chosen_parts()});
    }
    set_biases(config);
    note_base(config);
    return config.rank(common_rank())
        .target_modules(selector(modules, parameters))
        .target_parameters(parameters)
        .fused(fused);
  }

  /// The module whose name selects a layer; empty for a bare parameter.
  std::string module_of(const Combined& tensor) const {
    const auto& part = *tensor.shares.front().part;
    if (tensor.site->kind() == "Parameter") return "";
    const auto module = modules_.equal_range(tensor.site->slot().place());
    for (auto found = module.first; found != module.second; ++found) {
      if (found->second == part.module) return part.module;
    }
    return module.first == module.second ? part.module : module.first->second;
  }

  /// By names, which may be ends of other names, too; then as a whole.
  ModuleSelector selector(const std::vector<std::string>& names, const std::vector<std::string>& parameters) const {
    if (names.empty()) return parameters.empty() ? ModuleSelector(regex("dummy-target-modules")) : ModuleSelector();
    std::vector<std::string> unique;
    std::string pattern;
    for (const auto& name : names) {
      if (std::find(unique.begin(), unique.end(), name) != unique.end()) continue;
      unique.push_back(name);
      pattern += (pattern.empty() ? "" : "|") + escaped(name);
    }
    for (const auto& part : adapters_.model().parts()) {
      const auto ends_so = [&](const std::string& name) {
        return part.name != name && is_or_ends_with(part.name, name);
      };
      const bool is_meant = std::find(unique.begin(), unique.end(), part.name) != unique.end();
      if (!is_meant && std::any_of(unique.begin(), unique.end(), ends_so)) return regex(pattern);
    }
    return unique;
  }

  /// An update has biases of its own where those of all sources have; else the layers' own are trained.
  void set_biases(LoRAConfig& config) const {
    const auto adds = [](const auto& source) { return source->config.lora_bias(); };
    if (std::all_of(sources_.begin(), sources_.end(), adds)) {
      config.lora_bias(true);
      return;
    }
    for (const auto& source : sources_) {
      const auto changes = [](const AdapterPart& part) { return part.role == AdapterPart::Role::kBias; };
      const bool any = adds(source) || source->config.bias() == Bias::kAdaptedOnly ||
                       std::any_of(source->parts.begin(), source->parts.end(), changes);
      if (any && config.bias() == Bias::kNone) config.bias(Bias::kAdaptedOnly);
      if (source->config.bias() == Bias::kAll) config.bias(Bias::kAll);
    }
  }

  /// What only Python asks for.
  void note_base(LoRAConfig& config) const {
    for (auto source = sources_.rbegin(); source != sources_.rend(); ++source) {
      const auto& from = (*source)->config;
      if (from.fan_in_fan_out()) config.fan_in_fan_out(true);
      if (!from.base_model_name_or_path().empty()) config.base_model_name_or_path(from.base_model_name_or_path());
      if (!from.task_type().empty()) config.task_type(from.task_type());
    }
  }

  int64_t common_rank() const {
    int64_t rank = 1;
    for (const auto& tensor : combined_) rank = std::lcm(rank, tensor.site->view().shape().rank_shares);
    return rank;
  }

  /// The configuration with the rank that most modules have, the others by their names, and alpha the same everywhere:
  /// s = 1. The layers of one module have one rank in files.
  LoRAConfig with_ranks(const Adapter& plan) const {
    std::map<std::string, int64_t> ranks;
    for (const auto& part : plan.parts) {
      const auto place = places_.find(part.site.get());
      if (part.role != AdapterPart::Role::kLayer) continue;
      auto& rank = ranks[part.module];
      rank = std::max(rank, place == places_.end() ? int64_t{1} : combined_[place->second].rank);
    }
    auto config = plan.config;
    const auto rank = most_frequent(ranks);
    config.rank(rank).alpha(static_cast<double>(rank));
    for (const auto& item : ranks) {
      const auto alpha = static_cast<double>(item.second);
      note_options(config, item.first, LoRAOptions(item.second).alpha(alpha), LoRAOptions(config));
    }
    return config;
  }

  static int64_t most_frequent(const std::map<std::string, int64_t>& ranks) {
    std::map<int64_t, int64_t> counts;
    for (const auto& item : ranks) ++counts[item.second];
    const auto is_rarer = [](const auto& a, const auto& b) { return a.second < b.second; };
    const auto most = std::max_element(counts.begin(), counts.end(), is_rarer);
    return most == counts.end() ? 1 : most->first;
  }

  void fill(AdapterPart& part) const {
    const auto place = places_.find(part.site.get());
    const auto* tensor = place == places_.end() ? nullptr : &combined_[place->second];
    if (part.role == AdapterPart::Role::kFull) {
      if (tensor != nullptr) fill_full(static_cast<MethodOf<FullDelta>&>(*part.method).value, *tensor);
    } else {
      auto& method = static_cast<MethodOf<LowRank>&>(*part.method).value;
      const bool has_update = tensor != nullptr && tensor->update.A.defined();
      set_update(method, has_update ? tensor->update : Factors{method.lora_A.zero_(), method.lora_B.zero_()});
    }
    for (const auto& item : part.method->tensors()) {
      TORCH_CHECK(!item.tensor->is_floating_point() || at::isfinite(*item.tensor).all().item<bool>(),
                  "lora::combine: the combined update to ", part.site->name(), " is too large for its type");
    }
  }

  /// Whole numbers stay such.
  static void fill_full(FullDelta& full, const Combined& tensor) {
    const auto& [a, b] = tensor.update;
    const auto change = a.defined() ? tensor.site->view().weight(at::matmul(b, a)) : UpdateCombiner::sum(tensor);
    if (full.scale) {
      full.value.copy_(change / *full.scale);
    } else {
      const auto sum = dequantized(tensor.site->pristine()).to(change.scalar_type()) + change;
      full.value.copy_(full.value.is_floating_point() ? sum : sum.round());
    }
  }

  /// Notes the tables of the model that the files of the sources hold, under the names that they have with what is
  /// adapted now.
  void note_tables(Adapter& plan) const {
    for (const auto& source : sources_) {
      for (const auto& item : source->frozen) plan.frozen.emplace(file_name(plan, item.second), item.second);
    }
  }

  static std::string file_name(const Adapter& plan, const std::string& tensor) {
    const auto* part = plan.part(owner_of(tensor));
    if (part == nullptr || part->role != AdapterPart::Role::kLayer) return tensor;
    return part->file_name + ".base_layer" + tensor.substr(part->site->name().size());
  }

  const Adapters& adapters_;
  std::vector<std::shared_ptr<const Adapter>> sources_;
  std::vector<Combined> combined_;
  std::map<const Site*, size_t> places_;             // in it
  std::multimap<const void*, std::string> modules_;  // by the place of their weights
  std::set<std::string> saved_;                      // entries of modules_to_save
  std::vector<std::string> unmatched_;               // of entries from files, which the model need not have
};

}  // namespace detail

LORA_INLINE void combine_adapters(Adapters& adapters, const std::string& name, const WeightedAdapters& parts,
                                  const CombineOptions& options) {
  const detail::BelowInterception below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::NoGradGuard no_grad;
  const auto names = adapters.names();
  options.validate();
  TORCH_CHECK_VALUE(!parts.empty(), "lora::combine: name the adapters to combine; there are: ", detail::list(names));
  TORCH_CHECK(std::find(names.begin(), names.end(), name) == names.end(), "lora::combine: there is an adapter \"", name,
              "\" already");
  adapters.add(name, detail::Combination(adapters, parts).run(options));
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
