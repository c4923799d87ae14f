#pragma once

#include <lora/config.hpp>
#include <lora/detail/text.hpp>
#include <lora/layers/all.hpp>

#include <optional>
#include <set>

// The rules by which a configuration selects weights: those of PEFT's LoraConfig, with an error where an entry matches
// nothing.

namespace lora::detail {

struct NamedModule {
  std::string name;
  std::shared_ptr<torch::nn::Module> module;
};

/// Every module below `model`, each once, under its first name.
inline std::vector<NamedModule> modules_of(const torch::nn::Module& model) {
  std::vector<NamedModule> modules;
  std::set<const torch::nn::Module*> seen;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    if (seen.insert(item.value().get()).second) modules.push_back({item.key(), item.value()});
  }
  return modules;
}

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
  };

  Selection(const torch::nn::Module& model, const LoRAConfig& config) : config_(config), modules_(modules_of(model)) {
    for (const auto& item : modules_) {
      for (auto& target : adaptable_weights(item.name, item.module)) {
        adaptable_.push_back(target.name);
        all_.push_back(std::move(target));
      }
    }
  }

  std::vector<Layer> run() {
    config_.validate("lora::LoRAConfig");
    check_request();
    for (const auto& item : modules_) {
      if (is_target(item) && !is_excluded(item.name)) take(item);
    }
    check_entries();
    check_shared_weights();
    return with_options();
  }

 private:
  void check_request() const {
    TORCH_CHECK_VALUE(!config_.target_modules().empty(),
                      "lora::attach: target_modules is empty; name the modules to adapt, ",
                      "or pass lora::all_linear. Here are ", list(adaptable_));
    const bool by_list = config_.target_modules().names() != nullptr;
    TORCH_CHECK_VALUE(config_.layers_to_transform().empty() || by_list,
                      "lora::attach: layers_to_transform needs target_modules as a list of names");
    TORCH_CHECK_VALUE(config_.layers_pattern().empty() || !config_.layers_to_transform().empty(),
                      "lora::attach: layers_pattern needs layers_to_transform");
  }

  bool is_target(const NamedModule& item) {
    const auto& targets = config_.target_modules();
    if (targets.is_all_linear()) return item.module->as<torch::nn::LinearImpl>() != nullptr;
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

  void take(const NamedModule& item) {
    auto found = adaptable_weights(item.name, item.module);
    TORCH_CHECK(!found.empty(), "lora::attach: \"", item.name, "\" is a ", item.module->name(),
                ", which has no weight that can be adapted; name layers inside it instead. Here are ",
                list(adaptable_));
    for (auto& target : found) {
      const bool excluded = target.name != item.name && is_excluded(target.name);  // one that comes with its parent
      if (!excluded && taken_.insert(target.name).second) targets_.push_back(std::move(target));
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

  /// Products are known by the memory of their weight, so those of two layers with one weight cannot be told apart.
  void check_shared_weights() const {
    for (const auto& target : targets_) {
      for (const auto& other : all_) {
        const auto &mine = target.slot.read(), &theirs = other.slot.read();
        const bool shared = other.name != target.name && mine.is_alias_of(theirs) && mine.stride(0) != 0 &&
                            mine.storage_offset() == theirs.storage_offset();
        TORCH_CHECK(!shared, "lora::attach: \"", target.name, "\" and \"", other.name,
                    "\" share one weight, so products of one cannot be told from those of the other; ",
                    "give one of them a copy of it first");
      }
    }
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
      LoRAOptions options(config_);
      options.rank(pattern_value(config_.rank_pattern(), rank_expressions, target.name, config_.rank(), ranks));
      options.alpha(pattern_value(config_.alpha_pattern(), alpha_expressions, target.name, config_.alpha(), alphas));
      options.validate("lora::LoRAConfig");
      layers.push_back({target, options});
    }
    check_patterns(config_.rank_pattern(), ranks, "rank_pattern");
    check_patterns(config_.alpha_pattern(), alphas, "alpha_pattern");
    return layers;
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

  LoRAConfig config_;
  std::vector<NamedModule> modules_;
  std::vector<std::string> adaptable_;  // names of all_
  std::vector<Target> all_, targets_;
  std::set<std::string> taken_, matched_targets_, matched_excludes_;
  std::set<int64_t> present_layers_;
  std::optional<std::regex> target_regex_;
};

}  // namespace lora::detail
