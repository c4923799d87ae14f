#pragma once

#include <lora/config.hpp>
#include <lora/detail/text.hpp>
#include <lora/layers/parameter.hpp>
#include <lora/layers/parts.hpp>
#include <lora/model.hpp>

#include <map>
#include <numeric>
#include <optional>
#include <set>

// The rules by which a configuration selects weights: those of PEFT's LoraConfig, with an error where an entry matches
// nothing.

namespace lora::detail {

/// The regular expressions of rank_pattern or alpha_pattern.
template <class T>
std::vector<std::regex> compile_patterns(const std::vector<std::pair<std::string, T>>& patterns) {
  std::vector<std::regex> expressions;
  for (const auto& item : patterns) expressions.push_back(compile("(.*\\.)?(" + item.first + ")", item.first));
  return expressions;
}

/// The value of the first pattern that matches `name`, tried as `(.*\.)?(pattern)` on the whole name, else `otherwise`.
/// Marks in `used` every pattern that matches.
template <class T>
T pattern_value(const std::vector<std::pair<std::string, T>>& patterns, const std::vector<std::regex>& expressions,
                const std::string& name, T otherwise, std::vector<bool>& used) {
  std::optional<T> value;
  for (size_t i = 0; i < patterns.size(); ++i) {
    if (!std::regex_match(name, expressions[i])) continue;
    used[i] = true;
    if (!value) value = patterns[i].second;
  }
  return value.value_or(otherwise);
}

/// Finds the weights a configuration means in a model; `run()` throws and names every entry that matches nothing.
class Selection {
 public:
  struct Layer {
    Target target;
    LoRAOptions options;
    std::string module;  // whose name patterns have to match
  };

  Selection(const Model& model, const LoRAConfig& config) : model_(model), config_(config), parts_(model.parts()) {
    for (const auto& part : parts_) {
      for (const auto& target : part.targets) adaptable_.push_back(target.name);
    }
  }

  /// A parameter or buffer that is trained in full, or to which the adapter of a layer adds a bias of its own.
  struct Full {
    ModelTensor tensor;
    std::string file_name;
    std::string biased = "";  // the layer whose update has the bias
  };

  std::vector<Layer> run() {
    config_.validate("lora::LoRAConfig");
    check_request();
    for (const auto& part : parts_) {
      if (is_target(part) && !is_excluded(part.name) && !is_saved(part.name)) take(part);
    }
    take_parameters();
    check_entries();
    take_parts();
    check_shared_weights();
    return with_options();
  }

  /// What is trained in full; for after `run`.
  std::vector<Full> full() const {
    std::vector<Full> found;
    if (config_.modules_to_save().empty() && config_.bias() == Bias::kNone && !config_.lora_bias()) return found;
    std::set<std::string> saved;
    for (auto& tensor : model_.tensors()) {
      const auto dot = tensor.name.rfind('.');
      const auto owner = dot == std::string::npos ? std::string() : tensor.name.substr(0, dot);
      const auto entry = saving_entry(owner);
      if (!entry.empty()) {
        saved.insert(entry);
        check_layout(tensor, owner);
        found.push_back({tensor, tensor.name});
      } else if (!tensor.is_buffer && is_trained_bias(tensor.name, owner)) {
        found.push_back({tensor, file_name_of_bias(tensor.name, owner)});
      } else if (config_.lora_bias() && tensor.name == owner + ".bias" && target_named(owner) != nullptr) {
        found.push_back({tensor, target_named(owner)->file_name + ".lora_B.bias", owner});
      }
    }
    check_biases(found);
    for (const auto& entry : config_.modules_to_save()) {
      TORCH_CHECK(saved.count(entry) > 0, "lora::attach: no module with parameters matches \"", entry,
                  "\" of modules_to_save;", did_you_mean(entry, with_last_parts(part_names())),
                  " Modules here: ", list(part_names()));
    }
    return found;
  }

 private:
  /// The entry of modules_to_save that means the module, or one it is inside of; empty when none does.
  std::string saving_entry(std::string name) const {
    for (;; name = name.substr(0, name.rfind('.'))) {
      for (const auto& entry : config_.modules_to_save()) {
        if (is_or_ends_with(name, entry)) return entry;
      }
      if (name.rfind('.') == std::string::npos) return "";
    }
  }
  bool is_saved(const std::string& name) const { return !saving_entry(name).empty(); }

  const Target* target_named(const std::string& name) const {
    const auto has_name = [&](const Target& target) { return target.name == name; };
    const auto found = std::find_if(targets_.begin(), targets_.end(), has_name);
    return found == targets_.end() ? nullptr : &*found;
  }

  bool is_trained_bias(const std::string& name, const std::string& owner) const {
    if (config_.bias() == Bias::kNone || !is_or_ends_with(name, "bias")) return false;
    return config_.bias() == Bias::kAll || target_named(owner) != nullptr;
  }

  std::string file_name_of_bias(const std::string& name, const std::string& owner) const {
    const auto* target = target_named(owner);
    return target == nullptr ? name : target->file_name + ".base_layer.bias";
  }

  /// Of a square weight nobody would notice that Python keeps it as (in, out).
  void check_layout(const ModelTensor& tensor, const std::string& owner) const {
    const auto weight = tensor.slot->read();
    const auto is_it = [&](const ModelPart& part) { return part.name == owner && part.is_linear; };
    const bool is_square = weight.dim() == 2 && weight.size(0) == weight.size(1);
    TORCH_CHECK(!config_.fan_in_fan_out() || !is_square || std::none_of(parts_.begin(), parts_.end(), is_it),
                "lora::attach: \"", tensor.name, "\" of modules_to_save is square, and with fan_in_fan_out Python may ",
                "keep it as (in, out) or as (out, in), which its file does not say; make the module a target instead");
  }

  void check_biases(const std::vector<Full>& full) const {
    if (!config_.lora_bias()) return;
    TORCH_CHECK_VALUE(config_.bias() == Bias::kNone,
                      "lora::LoRAConfig: either `bias` trains the layers' own biases, or ",
                      "`lora_bias` gives the updates biases, not both");
    TORCH_CHECK_VALUE(config_.method().info().name == all_methods().front().info().name,
                      "lora::LoRAConfig: lora_bias is for ", all_methods().front().info().name, ", not for ",
                      config_.method().info().name);
    for (const auto& target : targets_) {
      const auto is_its = [&](const Full& item) { return item.biased == target.name; };
      TORCH_CHECK(std::any_of(full.begin(), full.end(), is_its), "lora::attach: lora_bias adds to the biases of the ",
                  "adapted layers, but \"", target.name, "\" (", target.kind, ") has none");
    }
  }

  std::vector<std::string> part_names() const {
    std::vector<std::string> names;
    for (const auto& part : parts_) names.push_back(part.name);
    return names;
  }

  /// Gives the targets of which only parts are adapted a site of those.
  void take_parts() {
    for (const auto& fused : config_.fused()) {
      bool found = false;
      for (auto& target : targets_) {
        if (!is_or_ends_with(target.name, fused.module)) continue;
        found = true;
        check_parts(target, fused);
        target.site =
            std::make_shared<Site>(MatrixView::parts(target.slot->read().sizes(), fused.sizes, fused.adapted));
        target.files = layers::PartFiles(target.site->view()).layout();
      }
      check_matched(found, fused.module, "fused");
    }
  }

  static void check_parts(const Target& target, const FusedProjection& fused) {
    const auto weight = target.slot->read();
    const auto rows = std::accumulate(fused.sizes.begin(), fused.sizes.end(), int64_t{0});
    const bool positive = std::all_of(fused.sizes.begin(), fused.sizes.end(), [](auto size) { return size > 0; });
    TORCH_CHECK_VALUE(positive && weight.dim() == 2 && rows == weight.size(0) && target.use == Use::kProduct,
                      "lora::attach: the parts of the fused projection \"", target.name, "\" have ", fused.sizes,
                      " rows, together ", rows, ", but its weight is ", weight.sizes());
    const auto chosen = std::count(fused.adapted.begin(), fused.adapted.end(), true);
    TORCH_CHECK_VALUE(fused.adapted.size() == fused.sizes.size() && chosen > 0, "lora::attach: \"", target.name,
                      "\" has ", fused.sizes.size(),
                      " parts; FusedProjection::adapted has to say of each of them whether "
                      "it is adapted, and of at least one that it is, but has ",
                      fused.adapted.size(), " entries, ", chosen, " of them true");
  }

  void check_request() const {
    TORCH_CHECK_VALUE(!config_.target_modules().empty() || !config_.target_parameters().empty(),
                      "lora::attach: target_modules is empty; name the modules to adapt, ",
                      "or pass lora::all_linear. Here are ", list(adaptable_));
    const bool by_list = config_.target_modules().names() != nullptr;
    TORCH_CHECK_VALUE(config_.layers_to_transform().empty() || by_list,
                      "lora::attach: layers_to_transform needs target_modules as a list of names");
    TORCH_CHECK_VALUE(config_.layers_pattern().empty() || !config_.layers_to_transform().empty(),
                      "lora::attach: layers_pattern needs layers_to_transform");
  }

  bool is_target(const ModelPart& item) {
    const auto& targets = config_.target_modules();
    if (targets.is_all_linear()) return item.is_linear;
    if (const auto* regex = targets.pattern()) return std::regex_match(item.name, target_regex(regex->pattern));
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

  int64_t layer_number(const std::string& name) const {
    std::vector<std::string> lists = config_.layers_pattern();
    if (lists.empty()) lists = {"[^.]*"};
    for (const auto& pattern : lists) {
      std::smatch match;
      if (std::regex_search(name, match, compile("^(?:.*?\\.)?(?:" + pattern + ")\\.(\\d+)\\.", pattern))) {
        return std::stoll(match[match.size() - 1]);
      }
    }
    return -1;
  }

  bool is_excluded(const std::string& name) {
    const auto& excluded = config_.exclude_modules();
    TORCH_CHECK_VALUE(!excluded.is_all_linear(), "lora::attach: exclude_modules takes names or a regular expression");
    if (const auto* regex = excluded.pattern()) {
      const bool match = std::regex_match(name, compile(regex->pattern, regex->pattern));
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
    TORCH_CHECK(!part.targets.empty(), "lora::attach: \"", part.name, "\" is a ", part.type,
                ", which has no weight that can be adapted; name layers inside it instead. Here are ",
                list(adaptable_));
    for (const auto& target : part.targets) {
      const bool excluded = target.name != part.name && is_excluded(target.name);  // one that comes with its parent
      if (excluded || !taken_.insert(target.name).second) continue;
      targets_.push_back(target);
      if (target.file_name != target.name) modules_[target.name] = part.name;
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
      targets_.push_back(model_.parameter_target(parameter.name));
      targets_.back().files = layers::parameter_files(targets_.back().slot->read());
    }
    name_parameters();
    for (const auto& entry : entries) {
      TORCH_CHECK(matched.count(entry) > 0, "lora::attach: no parameter matches \"", entry, "\" of target_parameters;",
                  did_you_mean(entry, with_last_parts(names)), " Parameters here: ", list(names));
    }
  }

  /// PEFT's files name a parameter's adapter after its module; of several on one module the last one has the module's
  /// name, and each earlier one lies inside the next.
  void name_parameters() {
    std::map<std::string, std::string> names;
    for (auto target = targets_.rbegin(); target != targets_.rend(); ++target) {
      if (target->kind != "Parameter") continue;
      const auto dot = target->name.rfind('.');
      auto& name = names[dot == std::string::npos ? "" : target->name.substr(0, dot)];
      if (name.empty()) {
        name = dot == std::string::npos ? target->name : target->name.substr(0, dot);
      } else {
        name += ".base_layer";
      }
      target->file_name = name;
    }
  }

  void check_entries() const {
    const auto& targets = config_.target_modules();
    if (const auto* names = targets.names()) {
      for (const auto& entry : *names) check_matched(matched_targets_.count(entry) > 0, entry, kTargetModules);
    }
    for (auto layer : config_.layers_to_transform()) {
      TORCH_CHECK(present_layers_.count(layer) > 0, "lora::attach: layers_to_transform names layer ", layer,
                  ", but no target has that number",
                  config_.layers_pattern().empty() ? "" : " in the lists of layers_pattern", "; the numbers here are ",
                  numbers());
    }
    TORCH_CHECK(!targets_.empty(), "lora::attach: ", nothing_left());
    if (const auto* regex = config_.exclude_modules().pattern()) {
      check_matched(matched_excludes_.count(regex->pattern) > 0, regex->pattern, "exclude_modules");
    } else {
      for (const auto& entry : *config_.exclude_modules().names()) {
        check_matched(matched_excludes_.count(entry) > 0, entry, "exclude_modules");
      }
    }
  }

  void check_matched(bool matched, const std::string& entry, const char* option) const {
    const bool of_all = option == kTargetModules;  // every other option picks among the targets
    const auto names = of_all ? adaptable_ : names_of(targets_);
    TORCH_CHECK(matched, "lora::attach: no ", of_all ? "module" : "target", " matches \"", entry, "\" of ", option, ";",
                did_you_mean(entry, with_last_parts(names)),
                of_all ? " Layers that can be adapted here: " : " The targets here: ", list(names));
  }

  std::string nothing_left() const {
    if (adaptable_.empty())
      return "the model has no layer inside that can be adapted (the model itself does not count)";
    if (const auto* regex = config_.target_modules().pattern(); regex != nullptr && matched_excludes_.empty()) {
      return "no module matches the regular expression \"" + regex->pattern +
             "\" of target_modules (it has to match a whole name). Layers that can be adapted here: " +
             list(adaptable_);
    }
    return "exclude_modules and layers_to_transform leave none of the targets. Layers that can be adapted here: " +
           list(adaptable_);
  }

  /// Uses of a weight are known by its memory, so those of two layers with one weight can be told apart only where one
  /// multiplies with it and the other looks entries up.
  void check_shared_weights() {
    std::vector<std::pair<const Target*, at::Tensor>> others;  // each weight is read once: there are many pairs
    for (const auto& part : parts_) {
      for (const auto& other : part.targets) others.emplace_back(&other, other.slot->read());
    }
    std::vector<at::Tensor> weights;
    for (auto& target : targets_) {
      const auto weight = target.slot->read();
      for (const auto& [other, theirs] : others) check_shared_weight(target, weight, *other, theirs);
      for (size_t i = 0; i < weights.size(); ++i) {
        TORCH_CHECK(!weight.is_same(weights[i]) || !overlap(target.use, targets_[i].use), "lora::attach: \"",
                    targets_[i].name, "\" and \"", target.name, "\" are the same weight; adapt one of them");
      }
      weights.push_back(weight);
    }
  }

  static void check_shared_weight(Target& target, const at::Tensor& mine, const Target& other,
                                  const at::Tensor& theirs) {
    const bool shared = mine.defined() && mine.is_alias_of(theirs) && other.name != target.name &&
                        mine.stride(0) != 0 && mine.storage_offset() == theirs.storage_offset();
    if (!shared || target.use == Use::kAny) return;
    TORCH_CHECK(!overlap(target.use, other.use), "lora::attach: \"", target.name, "\" and \"", other.name,
                "\" share one weight, so products of one cannot be told from those of the other; ",
                "give one of them a copy of it first");
    target.tied_to.push_back(other.name);
  }

  static std::vector<std::string> names_of(const std::vector<Target>& targets) {
    std::vector<std::string> names;
    for (const auto& target : targets) names.push_back(target.name);
    return names;
  }

  std::vector<Layer> with_options() {
    std::vector<bool> ranks(config_.rank_pattern().size()), alphas(config_.alpha_pattern().size());
    const auto rank_expressions = compile_patterns(config_.rank_pattern());
    const auto alpha_expressions = compile_patterns(config_.alpha_pattern());
    std::vector<Layer> layers;
    for (auto& target : targets_) {
      const auto module = modules_.find(target.name);
      const auto& name = module == modules_.end() ? target.name : module->second;
      LoRAOptions options(config_);
      options.rank(pattern_value(config_.rank_pattern(), rank_expressions, name, config_.rank(), ranks));
      options.alpha(pattern_value(config_.alpha_pattern(), alpha_expressions, name, config_.alpha(), alphas));
      options.validate("lora::LoRAConfig");
      check_rank(target, options.rank());
      layers.push_back({target, options, name});
    }
    check_patterns(config_.rank_pattern(), ranks, "rank_pattern");
    check_patterns(config_.alpha_pattern(), alphas, "alpha_pattern");
    return layers;
  }

  static void check_rank(const Target& target, int64_t rank) {
    const auto shares = target.site->view().shape().rank_shares;
    TORCH_CHECK_VALUE(rank % shares == 0, "lora::attach: \"", target.name, "\" is a ", target.kind, " of ", shares,
                      " groups, among which the rank is divided; so it has to be a multiple of that, but is ", rank,
                      "; rank_pattern gives a layer a rank of its own");
  }

  template <class T>
  void check_patterns(const std::vector<std::pair<std::string, T>>& patterns, const std::vector<bool>& used,
                      const char* option) const {
    for (size_t i = 0; i < patterns.size(); ++i) check_matched(used[i], patterns[i].first, option);
  }

  /// What a mistyped entry may have meant: the names and their last parts.
  static std::vector<std::string> with_last_parts(std::vector<std::string> names) {
    for (size_t i = 0, size = names.size(); i < size; ++i) names.push_back(names[i].substr(names[i].rfind('.') + 1));
    return names;
  }

  std::string numbers() const {
    std::vector<std::string> names;
    for (auto layer : present_layers_) names.push_back(std::to_string(layer));
    return list(names);
  }

  const std::regex& target_regex(const std::string& pattern) {
    if (!target_regex_) target_regex_ = compile(pattern, pattern);
    return *target_regex_;
  }

  static constexpr const char* kTargetModules = "target_modules";

  const Model& model_;
  LoRAConfig config_;
  std::vector<ModelPart> parts_;
  std::vector<std::string> adaptable_;  // names of what `parts_` have to adapt
  std::vector<Target> targets_;
  std::map<std::string, std::string> modules_;  // whose rank and alpha a target has that PEFT keeps inside of another
  std::set<std::string> taken_, matched_targets_, matched_excludes_;
  std::set<int64_t> present_layers_;
  std::optional<std::regex> target_regex_;
};

}  // namespace lora::detail
