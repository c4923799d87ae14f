#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <lora/adapter/factors.hpp>
#include <lora/adapter/pruning.hpp>
#include <lora/adapter/weighted.hpp>
#include <lora/adapters.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// How the updates delta_i of several adapters become one; w_i are their weights. All of it acts on the updates
/// themselves, and so on adapters of any ranks, alphas and methods.
enum class CombineKind : uint8_t {
  /// sum_i w_i delta_i, exactly: the ranks side by side, so that the rank is their sum. Where a method has no low-rank
  /// form (DoRA, IA3), the sum as a matrix, whose rank is the smaller one of its sizes.
  kConcatenation,
  /// The same sum with the smallest rank that holds it: adapters with common directions have less than the sum of their
  /// ranks. (PEFT's "linear" sums A and B apart, which is another update.)
  kLinear,
  /// The best approximation of the same sum with a given rank or energy.
  kSvd,
  /// Each delta_i keeps its largest entries, signs are elected, and each entry is the mean of those w_i delta_i that
  /// have the elected sign. Signs are those of delta_i, before the weights, as in PEFT.
  kTies,
  /// Each delta_i keeps a random choice of entries, divided by the density; the weighted sum of these.
  kDareLinear,
  /// The same choice, and then the election and the mean of TIES.
  kDareTies,
  /// Each delta_i keeps its largest entries; the weighted sum of these.
  kMagnitudePrune
};

/// `CombineOptions(CombineKind::kTies).density(0.2)`.
struct CombineOptions {
  CombineOptions() = default;
  /* implicit */ CombineOptions(CombineKind kind) : kind_(kind) {}

  /// Default: the exact sum.
  TORCH_ARG(CombineKind, kind) = CombineKind::kConcatenation;
  /// The rank of every layer, by singular values; of a convolution with groups rounded up to a multiple of these.
  /// Layers have it even where less would do. Not for kConcatenation. Default: as large as nothing is lost.
  TORCH_ARG(std::optional<int64_t>, rank) = std::nullopt;
  /// The share, in (0, 1], of the energy ||update||^2 that every layer keeps, with the smallest rank for it; together
  /// with `rank` at most that. Not for kConcatenation. Default: all.
  TORCH_ARG(std::optional<double>, energy) = std::nullopt;
  /// The share, in (0, 1], of the entries of each update that are kept: floor(density * entries) of the largest, or
  /// each with this probability. Needed by the kinds that prune, and only there.
  TORCH_ARG(std::optional<double>, density) = std::nullopt;
  /// How kTies and kDareTies elect signs. Default: by the sum.
  TORCH_ARG(MajoritySign, majority_sign) = MajoritySign::kTotal;
  /// Of DARE's choice, which then is the same one every time, on every device. Default: LibTorch's generator of the CPU
  /// decides (`torch::manual_seed`).
  TORCH_ARG(std::optional<uint64_t>, seed) = std::nullopt;

 public:
  bool prunes() const { return kind_ >= CombineKind::kTies; }

  /// Throws c10::ValueError when an option is out of its range, missing or of another kind.
  void validate() const {
    TORCH_CHECK_VALUE(!rank_ || *rank_ > 0, "lora::combine: rank has to be at least 1, but got ", rank_.value_or(0));
    check_share("energy", energy_);
    check_share("density", density_);
    TORCH_CHECK_VALUE(density_.has_value() == prunes(), "lora::combine: density ",
                      prunes() ? "has to be given for a kind that prunes"
                               : "is for kTies, kDareLinear, kDareTies and kMagnitudePrune");
    const bool cuts = rank_ || energy_;
    TORCH_CHECK_VALUE(kind_ != CombineKind::kConcatenation || !cuts,
                      "lora::combine: a concatenation keeps all ranks; kSvd has one by rank or energy");
    TORCH_CHECK_VALUE(kind_ != CombineKind::kSvd || cuts, "lora::combine: kSvd needs a rank or an energy");
  }

 private:
  static void check_share(const char* name, const std::optional<double>& share) {
    TORCH_CHECK_VALUE(!share || (*share > 0 && *share <= 1), "lora::combine: ", name, " has to be in (0, 1], but got ",
                      share.value_or(0));
  }
};

namespace detail {

/// What adapters do to one tensor of a model together.
struct Combined {
  struct Share {
    std::string adapter;
    const AdapterPart* part;
    double scale;   // the adapter's own
    double weight;  // in the combination
  };

  std::shared_ptr<Site> site;
  std::vector<Share> shares = {};
  Factors update = {};  // of the weight of a layer
  int64_t rank = 0;     // that a configuration gives for it
};

/// Computes the updates of a combination, tensor by tensor.
class UpdateCombiner {
 public:
  explicit UpdateCombiner(const CombineOptions& options)
      : options_(options),
        generator_(options.seed() ? at::detail::createCPUGenerator(*options.seed())
                                  : at::detail::getDefaultCPUGenerator()) {}

  /// Works out the product and the rank of a layer's update.
  void combine(Combined& layer) const {
    const auto& shape = layer.site->view().shape();
    layer.update = factors(layer);
    const auto largest = std::min(shape.in, shape.out);
    TORCH_INTERNAL_ASSERT(layer.update.rank() > 0 && largest > 0, layer.site->name());
    const auto wanted =
        options_.rank() && !options_.energy() ? divided(*options_.rank(), shape.rank_shares) : layer.update.rank();
    layer.rank = wanted * shape.rank_shares;
  }

  /// sum_i w_i delta_i of a tensor as a whole, shaped like it.
  static at::Tensor sum(const Combined& tensor) {
    const auto type = sum_dtype(tensor.site->pristine().scalar_type());
    auto sum = at::zeros(tensor.site->pristine().sizes(), tensor.site->pristine().options().dtype(type));
    for (const auto& share : tensor.shares) sum = sum.add(change(*tensor.site, share), share.weight);
    return sum;
  }

  /// The type in which numbers of the type `type` are added.
  static at::ScalarType sum_dtype(at::ScalarType type) {
    return at::isFloatingType(type) ? adapter_dtype(type) : at::kDouble;
  }

 private:
  static int64_t divided(int64_t rank, int64_t shares) { return (rank + shares - 1) / shares; }

  Factors factors(const Combined& layer) const {
    if (options_.prunes()) return cut(layer, pruned(layer));
    const bool is_product = std::all_of(layer.shares.begin(), layer.shares.end(),
                                        [&](const auto& share) { return is_low_rank(*layer.site, share); });
    return is_product ? cut(layer, product(layer)) : cut(layer, layer.site->view().matrix(sum(layer)));
  }

  static bool is_low_rank(const Site& site, const Combined::Share& share) {
    if (share.part->role != AdapterPart::Role::kLayer || !share.part->method->has_term()) return false;
    const auto term = share.part->method->term(site.base());
    return term.A.defined() && !term.scales_weight();
  }

  static Factors product(const Combined& layer) {
    std::vector<Factors> all;
    for (const auto& share : layer.shares) all.push_back(product(*layer.site, share));
    return concatenated(all);
  }

  static Factors product(const Site& site, const Combined::Share& share) {
    const auto term = share.part->method->term(site.base());
    const auto type = adapter_dtype(site.weight().scalar_type());
    auto b = term.B.to(type) * (term.scale * share.scale * share.weight);
    if (!site.view().part_rows().empty()) b = b * is_used(site).narrow(-1, 0, 1);  // rows that no part has
    check_finite(site, share, term.A);
    check_finite(site, share, b);
    return {term.A.to(type), b};
  }

  /// The update of one adapter, shaped like the tensor. What is trained in full has no other shape.
  static at::Tensor change(const Site& site, const Combined::Share& share) {
    if (share.part->role != AdapterPart::Role::kFull) return site.view().weight(matrix(site, share));
    const auto& full = static_cast<const MethodOf<FullDelta>&>(*share.part->method).value;
    const auto weight = site.pristine();
    const auto value = full.value.to(weight.device(), sum_dtype(weight.scalar_type()));
    const auto change = (full.scale ? value * *full.scale : value - weight) * share.scale;
    check_finite(site, share, change);
    return change;
  }

  /// The update of one adapter as a matrix, with the adapter's own scale.
  static at::Tensor matrix(const Site& site, const Combined::Share& share) {
    const auto weight = site.pristine();
    const auto base = site.base(weight.to(sum_dtype(weight.scalar_type())));
    const auto update = share.part->method->delta(base).to(base.dtype()) * share.scale;
    check_finite(site, share, update);
    return update;
  }

  static void check_finite(const Site& site, const Combined::Share& share, const at::Tensor& tensor) {
    TORCH_CHECK(at::isfinite(tensor).all().item<bool>(), "lora::combine: the update of adapter \"", share.adapter,
                "\" to ", site.name(), " is not finite (NaN or infinity)");
  }

  /// Which entries of a layer's matrix are ones of its weight, as 0 and 1: of fused projections some are not.
  static at::Tensor is_used(const Site& site) {
    const auto weight = site.weight();
    return site.view().matrix(
        at::ones(weight.sizes(), weight.options().dtype(adapter_dtype(weight.scalar_type())).requires_grad(false)));
  }

  /// The entries of an update in the order of the weight, those of projections that are not adapted left out.
  static at::Tensor entries(const Site& site, const at::Tensor& matrix) {
    const auto weight = site.view().weight(matrix);
    return site.view().part_rows().empty() ? weight.flatten() : weight.masked_select(is_adapted(site));
  }

  static at::Tensor from_entries(const Site& site, const at::Tensor& entries) {
    if (site.view().part_rows().empty()) return site.view().matrix(entries.reshape(site.weight().sizes()));
    const auto weight = at::zeros(site.weight().sizes(), entries.options());
    return site.view().matrix(weight.masked_scatter(is_adapted(site), entries));
  }

  static at::Tensor is_adapted(const Site& site) { return site.view().weight(is_used(site)).gt(0); }

  at::Tensor pruned(const Combined& layer) const {
    std::vector<at::Tensor> kept;
    std::vector<double> weights;
    for (const auto& share : layer.shares) {
      kept.push_back(pruned(entries(*layer.site, matrix(*layer.site, share))));
      weights.push_back(share.weight);
    }
    const bool elects = options_.kind() == CombineKind::kTies || options_.kind() == CombineKind::kDareTies;
    return from_entries(*layer.site,
                        elects ? disjoint_mean(kept, weights, options_.majority_sign()) : weighted_sum(kept, weights));
  }

  at::Tensor pruned(const at::Tensor& entries) const {
    const bool is_random = options_.kind() == CombineKind::kDareLinear || options_.kind() == CombineKind::kDareTies;
    return is_random ? random_entries(entries, *options_.density(), generator_)
                     : largest_entries(entries, *options_.density());
  }

  Factors cut(const Combined& layer, const Factors& product) const {
    return options_.kind() == CombineKind::kConcatenation ? product : cut(layer, spectrum(product));
  }
  Factors cut(const Combined& layer, const at::Tensor& matrix) const {
    const bool keeps_all = options_.kind() == CombineKind::kConcatenation || options_.prunes();
    return keeps_all && !options_.rank() && !options_.energy() ? whole(matrix) : cut(layer, spectrum(matrix));
  }
  Factors cut(const Combined& layer, const Spectrum& spectrum) const {
    const auto shares = layer.site->view().shape().rank_shares;
    auto rank = options_.rank() ? divided(*options_.rank(), shares) : spectrum.s.size(-1);
    if (options_.energy()) rank = std::min(rank, rank_for_energy(spectrum.s, *options_.energy()));
    if (!options_.energy() && !options_.rank()) rank = spectrum.numerical_rank();
    return spectrum.first(rank);
  }

  const CombineOptions options_;
  const at::Generator generator_;
};

/// Makes the adapter of a combination: works out a configuration that means all that the others change, and fills it.
class Combination {
 public:
  Combination(const Adapters& adapters, const WeightedAdapters& wanted) : adapters_(adapters) {
    for (const auto& [name, weight] : wanted) {
      TORCH_CHECK_VALUE(std::isfinite(weight), "lora::combine: the weight of \"", name,
                        "\" has to be a finite number, but got ", weight);
      sources_.push_back(adapters.adapter(name));
      for (const auto& part : sources_.back()->parts)
        combined(part.site).shares.push_back({name, &part, adapters.scale(name), weight});
      const auto& saved = sources_.back()->config.modules_to_save();
      saved_.insert(saved.begin(), saved.end());
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
    return plan;
  }

 private:
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
      TORCH_CHECK(!module.empty() && saved_.insert(module).second, "lora::combine: ", missing->name(),
                  " cannot be a part of a combined adapter");
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
      if (name.empty()) {
        parameters.push_back(tensor.site->name());
      } else if (saving_entry(config, name).empty()) {
        const auto& view = tensor.site->view();
        modules.push_back(name);
        if (!view.part_rows().empty()) fused.push_back({tensor.site->name(), view.part_rows(), view.chosen_parts()});
      }
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
  ModuleSelector selector(std::vector<std::string> names, const std::vector<std::string>& parameters) const {
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
      set_update(method, tensor == nullptr ? Factors{method.lora_A.zero_(), method.lora_B.zero_()} : tensor->update);
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
      const auto sum = tensor.site->pristine().to(change.scalar_type()) + change;
      full.value.copy_(full.value.is_floating_point() ? sum : sum.round());
    }
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
inline void combine_adapters(Adapters& adapters, const std::string& name, const WeightedAdapters& parts,
                             const CombineOptions& options = {}) {
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
