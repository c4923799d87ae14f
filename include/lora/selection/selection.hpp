#pragma once

#include <lora/config.hpp>
#include <lora/selection/patterns.hpp>
#include <lora/selection/candidate.hpp>
#include <lora/selection/expression.hpp>
#include <lora/selection/full.hpp>
#include <lora/selection/text.hpp>
#include <lora/model/model.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <regex>
#include <set>
#include <string>
#include <utility>
#include <vector>

// The rules by which a configuration selects weights: those of PEFT's LoraConfig, with an error where an entry matches
// nothing.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Finds the weights a configuration means in a model; `run()` names every entry that matches nothing.
class Selection {
 public:
  struct Layer {
    Candidate candidate;
    std::shared_ptr<Site> site;
    LoRAOptions options;
    std::string module;  // whose name patterns have to match
  };

  Selection(const Model& model, const LoRAConfig& config, Unmatched unmatched = Unmatched())
      : model_(model), config_(config), unmatched_(unmatched), parts_(model.parts()) {}

  std::vector<Layer> run() {
    config_.validate("lora::LoRAConfig");
    find_targets();
    take_parts();
    find_shared_weights(/*adapts=*/true);
    return with_options();
  }

  /// The weights alone, where they are not to be adapted: who shares them may do with them what their layers do.
  std::vector<std::shared_ptr<Site>> sites() {
    find_targets();
    find_shared_weights(/*adapts=*/false);
    std::vector<std::shared_ptr<Site>> all;
    for (const auto& target : targets_) all.push_back(target.site());
    return all;
  }

  /// What is trained in full; for after `run`.
  std::vector<FullSelection::Full> full() const {
    return FullSelection(model_, config_, parts_, targets_, unmatched_).run();
  }

 private:
  void find_targets() {
    check_request();
    for (const auto& part : parts_) {
      if (is_target(part) && !is_excluded(part.name) && saving_entry(config_, part.name).empty()) take(part);
    }
    take_parameters();
    check_entries();
  }

  /// The names of all that can be adapted.
  std::vector<std::string> adaptable() const {
    std::vector<std::string> names;
    for (const auto& part : parts_) {
      part.for_each_place([&](const Place& place) { names.push_back(place.name); });
    }
    return names;
  }

  /// Notes which parts are adapted where that is not all of a target.
  void take_parts() {
    for (const auto& fused : config_.fused()) {
      bool found = false;
      for (auto& target : targets_) {
        if (!is_or_ends_with(target.name(), fused.module)) continue;
        found = true;
        check_parts(target, fused);
        target.part_rows = fused.sizes;
        target.chosen_parts = fused.adapted;
      }
      if (!found) report(Unmatched(), fused.module, "fused");
    }
  }

  static void check_parts(const Candidate& target, const FusedProjection& fused) {
    const auto weight = target.tensor();
    const auto rows = std::accumulate(fused.sizes.begin(), fused.sizes.end(), int64_t{0});
    const bool positive = std::all_of(fused.sizes.begin(), fused.sizes.end(), [](auto size) { return size > 0; });
    TORCH_CHECK_VALUE(positive && weight.dim() == 2 && rows == weight.size(0) && target.use() == Use::kProduct,
                      "lora::attach: the parts of the fused projection \"", target.name(), "\" have ", fused.sizes,
                      " rows, together ", rows, ", but its weight is ", weight.sizes());
    const auto chosen = std::count(fused.adapted.begin(), fused.adapted.end(), true);
    TORCH_CHECK_VALUE(fused.adapted.size() == fused.sizes.size() && chosen > 0, "lora::attach: \"", target.name(),
                      "\" has ", fused.sizes.size(),
                      " parts; FusedProjection::adapted has to say of each of them whether "
                      "it is adapted, and of at least one that it is, but has ",
                      fused.adapted.size(), " entries, ", chosen, " of them true");
  }

  void check_request() const {
    TORCH_CHECK_VALUE(!config_.target_modules().empty() || !config_.target_parameters().empty(),
                      "lora::attach: target_modules is empty; name the modules to adapt, ",
                      "or pass lora::all_linear. Here are ", list(adaptable()));
    const bool by_list = config_.target_modules().names() != nullptr;
    TORCH_CHECK_VALUE(config_.layers_to_transform().empty() || by_list,
                      "lora::attach: layers_to_transform needs target_modules as a list of names");
    TORCH_CHECK_VALUE(config_.layers_pattern().empty() || !config_.layers_to_transform().empty(),
                      "lora::attach: layers_pattern needs layers_to_transform");
  }

  bool is_target(const ModelPart& item) {
    const auto& targets = config_.target_modules();
    if (targets.is_all_linear()) return item.is_linear;
    if (const auto* regex = targets.pattern())
      return std::regex_match(item.name, compiled(regex->pattern, regex->pattern));
    bool exact = false, found = false;
    for (const auto& entry : *targets.names()) {
      if (!is_or_ends_with(item.name, entry)) continue;
      matched_targets_.insert(entry);
      found = true;
      exact = exact || item.name == entry;
    }
    return exact || (found && is_wanted_layer(item.name));  // a full name outranks the list of layers
  }

  /// Whether the first number in `name` ("layers.3.q_proj") is one of `layers_to_transform`.
  bool is_wanted_layer(const std::string& name) {
    if (config_.layers_to_transform().empty()) return true;
    const auto layer = layer_number(name);
    if (layer < 0) return false;
    present_layers_.insert(layer);
    const auto& wanted = config_.layers_to_transform();
    return std::find(wanted.begin(), wanted.end(), layer) != wanted.end();
  }

  int64_t layer_number(const std::string& name) {
    std::vector<std::string> lists = config_.layers_pattern();
    if (lists.empty()) lists = {"[^.]*"};
    for (const auto& pattern : lists) {
      const auto& expression = compiled("(?:" + pattern + ")\\.(\\d+)\\.", pattern);
      for (auto from = name.begin();; ++from) {  // the first part of the name at which it matches
        std::smatch match;
        auto flags = std::regex_constants::match_continuous;
        if (from != name.begin()) flags |= std::regex_constants::match_prev_avail;
        if (std::regex_search(from, name.end(), match, expression, flags)) return std::stoll(match[match.size() - 1]);
        from = std::find(from, name.end(), '.');
        if (from == name.end()) break;
      }
    }
    return -1;
  }

  bool is_excluded(const std::string& name) {
    const auto& excluded = config_.exclude_modules();
    TORCH_CHECK_VALUE(!excluded.is_all_linear(), "lora::attach: exclude_modules takes names or a regular expression");
    if (const auto* regex = excluded.pattern()) {
      const bool match = std::regex_match(name, compiled(regex->pattern, regex->pattern));
      if (match) matched_excludes_.insert(regex->pattern);
      return match;
    }
    bool found = false;
    for (const auto& entry : *excluded.names()) {
      if (!is_or_ends_with(name, entry)) continue;
      matched_excludes_.insert(entry);
      found = true;
    }
    return found;
  }

  void take(const ModelPart& part) {
    TORCH_CHECK(!part.weights.empty() || !part.own.empty(), "lora::attach: \"", part.name, "\" is a ", part.type,
                ", which has no weight that can be adapted; name layers inside it instead. Here are ",
                list(adaptable()));
    for (auto& target : candidates(part)) {
      const auto& name = target.name();
      const bool excluded = name != part.name && is_excluded(name);  // one that comes with its parent
      if (excluded || !taken_.insert(name).second) continue;
      if (target.file_name != name) modules_[name] = part.name;
      targets_.push_back(std::move(target));
    }
  }

  /// The parameters that `target_parameters` names, with the rule for lists of modules.
  void take_parameters() {
    const auto& entries = config_.target_parameters();
    if (entries.empty()) return;
    std::set<std::string> matched;
    std::vector<std::string> names;
    for (const auto& parameter : model_.parameters()) {
      names.push_back(parameter.name);
      bool found = false;
      for (const auto& entry : entries) {
        if (is_or_ends_with(parameter.name, entry)) found = matched.insert(entry).second || true;
      }
      if (!found) continue;
      targets_.emplace_back(model_.parameter(parameter.name));
    }
    name_parameters();
    for (const auto& entry : entries) {
      if (matched.count(entry) > 0) continue;
      unmatched_.report("no parameter matches \"" + entry + "\" of target_parameters",
                        did_you_mean(entry, with_last_parts(names)), "Parameters here: " + list(names));
    }
  }

  /// PEFT's files name a parameter's adapter after its module; of several on one module the last one has the module's
  /// name, and each earlier one lies inside the next.
  void name_parameters() {
    std::map<std::string, std::string> names;
    for (auto target = targets_.rbegin(); target != targets_.rend(); ++target) {
      if (target->place().kind != "Parameter") continue;
      const auto owner = owner_of(target->name());
      auto& name = names[owner];
      if (name.empty()) {
        name = owner.empty() ? target->name() : owner;
      } else {
        name += ".base_layer";
      }
      target->file_name = name;
    }
  }

  /// Whether no layer is asked for, only what is trained in full: PEFT has a name for that.
  bool means_none() const {
    const auto* regex = config_.target_modules().pattern();
    return regex != nullptr && regex->pattern == "dummy-target-modules";
  }

  void check_entries() const {
    if (means_none()) return;
    const auto unmatched = targets_.empty() ? Unmatched() : unmatched_;  // nothing at all is an error in any case
    const auto& targets = config_.target_modules();
    if (const auto* names = targets.names()) {
      for (const auto& entry : *names) {
        if (matched_targets_.count(entry) == 0) report(unmatched, entry, kTargetModules);
      }
    }
    for (auto layer : config_.layers_to_transform()) {
      if (present_layers_.count(layer) > 0) continue;
      unmatched.report("layers_to_transform names layer " + std::to_string(layer) + ", but no target has that number" +
                           (config_.layers_pattern().empty() ? "" : " in the lists of layers_pattern"),
                       "", "the numbers here are " + numbers());
    }
    TORCH_CHECK(!targets_.empty(), "lora::attach: ", nothing_left());
    const auto* regex = config_.exclude_modules().pattern();
    const auto excludes = regex ? std::vector<std::string>{regex->pattern} : *config_.exclude_modules().names();
    for (const auto& entry : excludes) {
      if (matched_excludes_.count(entry) == 0) report(unmatched, entry, "exclude_modules");
    }
  }

  void report(const Unmatched& unmatched, const std::string& entry, const char* option) const {
    const bool of_all = option == kTargetModules;  // every other option picks among the targets
    const auto names = of_all ? adaptable() : names_of(targets_);
    unmatched.report(std::string("no ") + (of_all ? "module" : "target") + " matches \"" + entry + "\" of " + option,
                     did_you_mean(entry, with_last_parts(names)),
                     (of_all ? "Layers that can be adapted here: " : "The targets here: ") + list(names));
  }

  std::string nothing_left() const {
    const auto names = adaptable();
    if (names.empty()) return "the model has no layer inside that can be adapted (the model itself does not count)";
    if (const auto* regex = config_.target_modules().pattern(); regex != nullptr && matched_excludes_.empty()) {
      return "no module matches the regular expression \"" + regex->pattern +
             "\" of target_modules (it has to match a whole name). Layers that can be adapted here: " + list(names);
    }
    return "exclude_modules and layers_to_transform leave none of the targets. Layers that can be adapted here: " +
           list(names);
  }

  /// Uses of a weight are known by its memory, so those of two layers with one weight can be told apart only where one
  /// multiplies with it and the other looks entries up. Throws for others, if weights are to be adapted.
  void find_shared_weights(bool adapts) {
    std::multimap<const void*, const Place*> others;  // by their memory: there are many pairs
    for (const auto& part : parts_)
      part.for_each_place([&](const Place& place) { others.emplace(memory_of(place.slot->read()), &place); });
    std::vector<at::Tensor> weights;
    for (auto& target : targets_) {
      const auto weight = target.tensor();
      const auto [first, last] = others.equal_range(memory_of(weight));
      for (auto it = first; it != last; ++it) note_shared_weight(target, weight, *it->second, adapts);
      for (size_t i = 0; adapts && i < weights.size(); ++i) {
        TORCH_CHECK(!weight.is_same(weights[i]) || !overlap(target.use(), targets_[i].use()), "lora::attach: \"",
                    targets_[i].name(), "\" and \"", target.name(), "\" are the same weight; adapt one of them");
      }
      weights.push_back(weight);
    }
  }

  /// Equal for tensors that share memory.
  static const void* memory_of(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.has_storage()) return nullptr;
    return is_quantized(tensor) ? tensor.storage().unsafeGetStorageImpl() : tensor.storage().data();
  }

  static void note_shared_weight(Candidate& target, const at::Tensor& mine, const Place& other, bool adapts) {
    const auto theirs = other.slot->read();
    const bool shared = mine.defined() && share_memory(mine, theirs) && other.name != target.name() &&
                        mine.stride(0) != 0 && mine.storage_offset() == theirs.storage_offset();
    if (!shared || target.use() == Use::kAny) return;
    TORCH_CHECK(!adapts || !overlap(target.use(), other.use), "lora::attach: \"", target.name(), "\" and \"",
                other.name, "\" share one weight, so products of one cannot be told from those of the other; ",
                "give one of them a copy of it first");
    target.tied_to.push_back(other.name);
  }

  static std::vector<std::string> names_of(const std::vector<Candidate>& targets) {
    std::vector<std::string> names;
    for (const auto& target : targets) names.push_back(target.name());
    return names;
  }

  std::vector<Layer> with_options() {
    Patterns ranks(config_.rank_pattern());
    Patterns alphas(config_.alpha_pattern());
    std::vector<Layer> layers;
    for (auto& target : targets_) {
      const auto module = modules_.find(target.name());
      const auto& name = module == modules_.end() ? target.name() : module->second;
      LoRAOptions options(config_);
      options.rank(ranks.value(name, config_.rank()));
      options.alpha(alphas.value(name, config_.alpha()));
      options.validate("lora::LoRAConfig");
      auto site = target.site();
      check_rank(*site, options.rank());
      layers.push_back({target, std::move(site), options, name});
    }
    for (const auto& pattern : ranks.unused()) report(unmatched_, pattern, "rank_pattern");
    for (const auto& pattern : alphas.unused()) report(unmatched_, pattern, "alpha_pattern");
    return layers;
  }

  static void check_rank(const Site& site, int64_t rank) {
    const auto shares = site.view().shape().rank_shares;
    TORCH_CHECK_VALUE(rank % shares == 0, "lora::attach: \"", site.name(), "\" is a ", site.kind(), " of ", shares,
                      " groups, among which the rank is divided; so it has to be a multiple of that, but is ", rank,
                      "; rank_pattern gives a layer a rank of its own");
  }

  std::string numbers() const {
    std::vector<std::string> names;
    for (auto layer : present_layers_) names.push_back(std::to_string(layer));
    return list(names);
  }

  /// The same as `compile`, once for each pattern.
  const std::regex& compiled(const std::string& pattern, const std::string& shown) {
    auto found = expressions_.find(pattern);
    if (found == expressions_.end()) found = expressions_.emplace(pattern, compile(pattern, shown)).first;
    return found->second;
  }

  static constexpr const char* kTargetModules = "target_modules";

  const Model& model_;
  LoRAConfig config_;
  Unmatched unmatched_;
  std::vector<ModelPart> parts_;
  std::vector<Candidate> targets_;
  std::map<std::string, std::string> modules_;  // whose rank and alpha a target has that PEFT keeps inside of another
  std::set<std::string> taken_, matched_targets_, matched_excludes_;
  std::set<int64_t> present_layers_;
  std::map<std::string, std::regex> expressions_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
