#pragma once

#include <lora/adapter/adapter.hpp>
#include <lora/peft/load_options.hpp>
#include <lora/files/pickled.hpp>
#include <lora/files/safetensors.hpp>
#include <lora/selection/expression.hpp>
#include <lora/selection/patterns.hpp>
#include <lora/selection/text.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <regex>
#include <set>
#include <string>
#include <utility>
#include <vector>

// The tensors of a PEFT directory: what they are called, and how those of a file get into an adapter. How a tensor is
// called there is in the description of its method, and what a layer is called in that of its kind of layer; nothing of
// that is known here.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

inline constexpr const char* kAdapterConfig = "adapter_config.json";
inline constexpr const char* kAdapterTensors = "adapter_model.safetensors";
inline constexpr const char* kLegacyTensors = "adapter_model.bin";

inline constexpr const char* kPrefix = "base_model.model.";

/// What all layers share is beside the layers.
inline constexpr const char* kSharedPrefix = "base_model.";

/// The name of a tensor of a part in adapter_model.safetensors, without the prefix.
inline std::string peft_key(const AdapterPart& part, const NamedTensor& tensor) {
  const auto& files = part.site->files();
  const auto name = files.name ? files.name(tensor) : tensor.file_name;
  return name.empty() ? part.file_name : part.file_name + "." + name;
}

/// A tensor of a part as PEFT's file keeps it.
inline at::Tensor to_file(const AdapterPart& part, const NamedTensor& tensor) {
  at::NoGradGuard no_grad;
  const auto& files = part.site->files();
  const bool is_own = files.to_file && !tensor.is_shared && part.role == AdapterPart::Role::kLayer;
  return is_own ? files.to_file(tensor.name, *tensor.tensor) : *tensor.tensor;
}

/// The module that PEFT saves in full and that is `name` or has it inside; empty when there is none. Unlike here any
/// name that ends in an entry of modules_to_save is meant there: with "classifier" also "pre_classifier".
inline std::string saved_by_peft(const LoRAConfig& config, std::string name) {
  for (auto dot = name.size(); dot != std::string::npos; dot = name.rfind('.')) {
    name.resize(dot);
    for (const auto& entry : config.modules_to_save()) {
      if (ends_with(name, entry)) return name;
    }
  }
  return "";
}

/// The modules that PEFT trains in full for a task, whether modules_to_save has them or not.
inline std::vector<std::string> task_heads(const std::string& task) {
  if (task == "SEQ_CLS" || task == "TOKEN_CLS") return {"classifier", "score"};
  if (task == "QUESTION_ANS") return {"qa_outputs"};
  return {};
}

/// Whether the last `letters` of a name are whole parts of it: "fc.weight" in "head.fc.weight".
inline bool are_parts(const std::string& name, size_t letters) {
  return letters == name.size() || name[name.size() - letters - 1] == '.';
}

/// Two beginnings by which names differ.
struct OtherBeginning {
  std::string first, second;
};

/// The one difference of all `names` from some of `others`: each is `first` + rest, where `second` + rest is there.
inline std::optional<OtherBeginning> other_beginning(const std::vector<std::string>& names,
                                                     const std::vector<std::string>& others) {
  if (names.empty()) return std::nullopt;
  const auto& name = names.front();
  const std::set<std::string> there(others.begin(), others.end());
  for (const auto& other : others) {
    const auto ends = std::mismatch(name.rbegin(), name.rend(), other.rbegin(), other.rend());
    auto same = static_cast<size_t>(ends.first - name.rbegin());
    while (same > 0 && !(are_parts(name, same) && are_parts(other, same))) --same;
    if (same == 0) continue;
    const OtherBeginning found{name.substr(0, name.size() - same), other.substr(0, other.size() - same)};
    const auto fits = [&](const std::string& each) {
      const auto size = found.first.size();
      return each.compare(0, size, found.first) == 0 && there.count(found.second + each.substr(size)) > 0;
    };
    if (std::all_of(names.begin(), names.end(), fits)) return found;
  }
  return std::nullopt;
}

/// Whether a tensor of a file is one of the model, which may be of another type.
inline bool is_same(const at::Tensor& theirs, const at::Tensor& frozen) {
  if (theirs.sizes() != frozen.sizes()) return false;
  const auto own = dequantized(frozen).to(theirs.device());
  return own.equal(theirs.to(own.scalar_type())) || own.to(theirs.scalar_type()).equal(theirs);
}

/// The tensors of an adapter file, by their names in the model at hand.
class PeftTensors {
 public:
  PeftTensors(const std::filesystem::path& directory, const LoadOptions& options, const LoRAConfig& config)
      : options_(options), tensor_start_("." + config.method().prototype().tensor_prefix()) {
    const auto newer = directory / kAdapterTensors, older = directory / kLegacyTensors;
    path_ = !std::filesystem::exists(newer) && std::filesystem::exists(older) ? older : newer;
    for (const auto& [pattern, replacement] : options.key_mapping())
      mapping_.emplace_back(compile(pattern, pattern, MatchFor::kParts), replacement);
    for (auto& [key, tensor] : path_ == older ? read_pickled_tensors(path_) : read_safetensors(path_))
      take(key, tensor);
  }

  const std::filesystem::path& path() const { return path_; }
  std::map<std::string, at::Tensor>& content() { return content_; }
  /// Those without the prefix.
  const std::map<std::string, at::Tensor>& foreign() const { return foreign_; }

  /// The configuration under the names here, with every module that the file has in full.
  LoRAConfig adjusted(LoRAConfig config) const {
    config = with_task_heads(std::move(config));
    return with_saved(is_renamed_ ? mapped(std::move(config)) : std::move(config));
  }

  /// The names of the modules of which the file has adapters.
  std::vector<std::string> layers() const {
    std::set<std::string> names;
    for (const auto& item : content_) {
      const auto end = item.first.find(tensor_start_);
      if (end != std::string::npos) names.insert(item.first.substr(0, end));
    }
    return {names.begin(), names.end()};
  }

 private:
  /// PEFT trains the heads of some tasks in full without being asked, and did not always write that down.
  LoRAConfig with_task_heads(LoRAConfig config) const {
    auto saved = config.modules_to_save();
    for (const auto& entry : task_heads(config.task_type())) {
      const auto alone = LoRAConfig(1).modules_to_save({entry});
      const auto has_tensor = [&](const auto& item) {
        const auto name = saved_by_peft(alone, owner_of(item.first));
        return !name.empty() && !is_adapted(name);
      };
      const bool is_known = std::find(saved.begin(), saved.end(), entry) != saved.end();
      if (!is_known && std::any_of(content_.begin(), content_.end(), has_tensor)) saved.push_back(entry);
    }
    return config.modules_to_save(std::move(saved));
  }

  /// The configuration with the modules that the file has in full though their names only end in an entry's letters.
  LoRAConfig with_saved(LoRAConfig config) const {
    auto saved = config.modules_to_save();
    for (const auto& [key, tensor] : content_) {
      const auto name = saved_by_peft(config, owner_of(key));
      if (is_adapted(name)) continue;
      const auto means = [&](const std::string& entry) { return is_or_ends_with(name, entry); };
      if (!name.empty() && std::none_of(saved.begin(), saved.end(), means)) saved.push_back(name);
    }
    return config.modules_to_save(std::move(saved));
  }

  /// The configuration with the layers of the file, under their names here; for when a mapping changed any.
  LoRAConfig mapped(LoRAConfig config) const {
    std::vector<std::string> names, parameters;
    std::vector<std::pair<std::string, int64_t>> ranks;
    std::vector<std::pair<std::string, double>> alphas;
    Patterns rank_pattern(config.rank_pattern());
    Patterns alpha_pattern(config.alpha_pattern());
    for (const auto& [name, python_name] : layers_and_parameters(config)) {
      (layers_.count(name) > 0 ? names : parameters).push_back(name);
      ranks.emplace_back("^" + escaped(name), rank_pattern.value(python_name, config.rank()));
      alphas.emplace_back("^" + escaped(name), alpha_pattern.value(python_name, config.alpha()));
    }
    config.target_modules(names).exclude_modules({}).layers_to_transform({}).layers_pattern({});
    config.target_parameters(std::move(parameters)).modules_to_save(mapped_saved(config));
    return config.rank_pattern(std::move(ranks)).alpha_pattern(std::move(alphas));
  }

  /// Whether the file has an adapter of the module `name`.
  bool is_adapted(const std::string& name) const {
    const auto first = name + tensor_start_;
    const auto found = content_.lower_bound(first);
    return found != content_.end() && found->first.compare(0, first.size(), first) == 0;
  }

  /// What is adapted, under its names here and in the file, where parameters are named after their modules. An entry of
  /// target_parameters of which the file has nothing stays as it is, and is an error later.
  std::map<std::string, std::string> layers_and_parameters(const LoRAConfig& config) const {
    auto names = layers_;
    for (const auto& entry : config.target_parameters()) {
      if (owner_of(entry).empty())
        throw CheckpointError(path_, "target_parameters has \"", entry, "\", of which key_mapping cannot tell the ",
                              "module; name that, too: \"experts.", entry, "\"");
      const auto parameter = entry.substr(owner_of(entry).size());  // ".weight"
      bool found = false;
      for (const auto& [name, python_name] : layers_) {
        if (!is_or_ends_with(python_name, owner_of(entry))) continue;
        names.erase(name);
        names.emplace(name + parameter, python_name + parameter);
        found = true;
      }
      if (!found) names.emplace(entry, entry);
    }
    return names;
  }

  /// The modules of modules_to_save under their names here; an entry of which the file has nothing stays as it is.
  std::vector<std::string> mapped_saved(const LoRAConfig& config) const {
    std::set<std::string> saved, missing(config.modules_to_save().begin(), config.modules_to_save().end());
    for (const auto& [name, python_name] : others_) {
      const auto module = saved_by_peft(config, owner_of(python_name));
      const auto rest = module.empty() ? "" : python_name.substr(module.size());  // ".weight"
      if (module.empty() || !ends_with(name, rest)) continue;
      saved.insert(name.substr(0, name.size() - rest.size()));
      for (const auto& entry : config.modules_to_save()) {
        if (ends_with(module, entry)) missing.erase(entry);
      }
    }
    saved.insert(missing.begin(), missing.end());
    return {saved.begin(), saved.end()};
  }

  void take(const std::string& key, const at::Tensor& tensor) {
    const auto& prefix = options_.prefix();
    if (key.compare(0, prefix.size(), prefix) != 0) {
      foreign_.emplace(key, tensor);
      return;
    }
    const auto name = key.substr(prefix.size());
    if (mapping_.empty()) {
      content_.emplace(name, tensor);
      return;
    }
    auto here = name;
    for (const auto& [expression, replacement] : mapping_) {
      if (!std::regex_search(here, expression)) continue;
      here = std::regex_replace(here, expression, replacement, std::regex_constants::format_first_only);
      break;
    }
    is_renamed_ = is_renamed_ || here != name;
    const auto adapter = name.find(tensor_start_), adapter_here = here.find(tensor_start_);
    const bool is_layer = adapter != std::string::npos && adapter_here != std::string::npos;
    if (is_layer && here.find(".base_layer.") == std::string::npos)
      layers_.emplace(here.substr(0, adapter_here), name.substr(0, adapter));
    if (!is_layer) others_.emplace(here, name);
    if (!content_.emplace(here, tensor).second)
      throw CheckpointError(path_, "key_mapping gives two tensors the name \"", here, "\"");
  }

  LoadOptions options_;
  std::string tensor_start_;  // ".lora_", with which the name of an adapter's tensor begins behind that of its layer
  std::filesystem::path path_;
  std::vector<std::pair<std::regex, std::string>> mapping_;
  std::map<std::string, at::Tensor> content_;  // without the prefix
  std::map<std::string, at::Tensor> foreign_;
  // What the mapping did, if there is one: name here -> name in the file
  std::map<std::string, std::string> layers_;
  std::map<std::string, std::string> others_;  // tensors that are no layer's
  bool is_renamed_ = false;
};

/// What reads names that begin in another way than those of the model.
inline std::string say_mapping(const std::string& theirs, const std::string& own) {
  auto pattern = "^" + escaped(theirs), literal = std::string();
  for (const auto letter : pattern) literal += letter == '\\' ? "\\\\" : std::string(1, letter);
  return "every name begins with \"" + theirs + "\" in the file and with \"" + own +
         "\" in the model; LoadOptions().key_mapping({{\"" + literal + "\", \"" + own + "\"}}) reads them";
}

/// Whether the names of a part's tensors in files are those of the output projection inside of a MultiheadAttention.
inline bool is_inner_out_proj(const AdapterPart& part) {
  return part.role == AdapterPart::Role::kLayer && is_or_ends_with(part.file_name, "base_layer.out_proj");
}

/// Fills the tensors of a planned adapter from a file, after everything about the file was checked.
class PeftTensorReader {
 public:
  /// The tensors of the model by name, as they are without any adapter.
  using FrozenTensors = std::function<std::map<std::string, at::Tensor>()>;

  /// `unmatched`: what the configuration names and the model does not have.
  PeftTensorReader(PeftTensors& tensors, const LoadOptions& options, FrozenTensors frozen,
                   std::vector<std::string> unmatched)
      : path_(tensors.path()),
        content_(std::move(tensors.content())),
        foreign_(tensors.foreign()),
        options_(options),
        frozen_(std::move(frozen)) {
    report_.unmatched = std::move(unmatched);
  }

  LoadReport fill(Adapter& adapter) {
    bool computes = false;  // what the file does not have to hold
    adapter.for_each_tensor([&](const AdapterPart& part, const NamedTensor& tensor) {
      computes = computes || !tensor.is_saved;
      tensor.is_shared ? match_shared(tensor) : match(part, tensor);
    });
    drop_copies(adapter);
    if (!content_.empty()) match_frozen(adapter);
    for (const auto& [name, tensor] : content_) report_.unexpected.push_back(shown(in_file(name), tensor.sizes()));
    for (const auto& [key, tensor] : foreign_) report_.unexpected.push_back(shown(key, tensor.sizes()));
    if (options_.strict()) refuse();
    if (computes || !report_.missing.empty() || !report_.misshapen.empty()) adapter.initialize();
    at::NoGradGuard no_grad;
    for (auto& [target, source] : copies_) copy(*target, source);
    return std::move(report_);
  }

 private:
  using FromFile = std::function<at::Tensor(const at::Tensor& stored)>;

  static std::string shown(const std::string& key, at::IntArrayRef sizes) {
    return "\"" + key + "\" " + c10::str(sizes);
  }
  std::string in_file(const std::string& name) const { return options_.prefix() + name; }

  void match(const AdapterPart& part, const NamedTensor& tensor) {
    FromFile from_file;
    if (part.site->files().from_file && part.role == AdapterPart::Role::kLayer)
      from_file = [&](const at::Tensor& stored) { return part.site->files().from_file(tensor.name, stored); };
    if (options_.out_proj_twice() && tensor.name == "lora_B" && is_inner_out_proj(part)) {
      from_file = [inner = std::move(from_file)](const at::Tensor& stored) {
        return (inner ? inner(stored) : stored) * 2;
      };
    }
    const auto sizes = to_file(part, tensor).sizes().vec();
    note_table(part, tensor, sizes);
    match(peft_key(part, tensor), *tensor.tensor, sizes, from_file);
  }

  /// Not below the prefix of the layers; it may be left out where it can be computed.
  void match_shared(const NamedTensor& tensor) {
    const auto found = foreign_.find(kSharedPrefix + tensor.file_name);
    if (found != foreign_.end()) {
      content_.insert_or_assign(tensor.file_name, found->second);
      foreign_.erase(found);
    }
    if (content_.count(tensor.file_name) > 0 || tensor.is_saved)
      match(tensor.file_name, *tensor.tensor, tensor.tensor->sizes(), {});
  }

  /// Finds the tensor `key`, which has to have the sizes `stored_sizes` in the file, for `target`.
  void match(const std::string& key, at::Tensor& target, at::IntArrayRef stored_sizes, const FromFile& from_file) {
    const auto found = content_.find(key);
    if (found == content_.end()) {
      report_.missing.push_back(shown(in_file(key), stored_sizes));
      missing_.push_back(key);
      return;
    }
    const auto& source = found->second;
    if (source.sizes() != stored_sizes) {
      report_.misshapen.push_back("\"" + in_file(key) + "\" is " + c10::str(source.sizes()) + ", not " +
                                  c10::str(stored_sizes));
    } else if (target.requires_grad() && !source.is_floating_point()) {  // a buffer may count in any type
      report_.misshapen.push_back("\"" + in_file(key) + "\" holds " + c10::str(source.scalar_type()));
    } else {
      copies_.emplace_back(&target, from_file ? from_file(source) : source);
    }
    content_.erase(found);
  }

  /// What PEFT writes of the model along: the tables of adapted embeddings and heads, and those of a model that got
  /// more tokens. What is the model's own is remembered for the next file, what is not is not to be lost in silence.
  void match_frozen(Adapter& adapter) {
    std::map<std::string, std::string> names;  // in the file, and in the model
    for (const auto& part : adapter.parts) {
      if (part.role != AdapterPart::Role::kLayer) continue;
      for (const std::string own : {".weight", ".bias"})
        names.emplace(part.file_name + ".base_layer" + own, part.site->name() + own);
    }
    const auto frozen = frozen_();
    for (const auto& item : frozen) names.emplace(item.first, item.first);
    for (auto item = content_.begin(); item != content_.end();) {
      const auto name = names.find(item->first);
      const auto own = name == names.end() ? frozen.end() : frozen.find(name->second);
      if (own == frozen.end()) {
        ++item;
        continue;
      }
      if (is_same(item->second, own->second)) {
        adapter.frozen.emplace(item->first, own->first);
      } else {
        report_.unexpected.push_back(shown(in_file(item->first), item->second.sizes()) +
                                     " (a frozen weight, and not the model's own, which is " +
                                     c10::str(own->second.sizes()) + ")");
        note_table(item->second, own->second.sizes(), 0);
      }
      item = content_.erase(item);
    }
  }

  /// Notes a table of the file that has at least so many rows more than the model's.
  void note_table(const at::Tensor& theirs, at::IntArrayRef own, int64_t at_least) {
    if (theirs.dim() != 2 || own.size() != 2 || theirs.size(1) != own[1] || theirs.size(0) < own[0] + at_least) return;
    more_rows_ = std::max(more_rows_.value_or(0), theirs.size(0) - own[0]);
  }

  /// The same of the tensors of an adapter on a table, and of a table that was trained in full.
  void note_table(const AdapterPart& part, const NamedTensor& tensor, at::IntArrayRef own) {
    const auto found = content_.find(peft_key(part, tensor));
    if (found == content_.end()) return;
    const bool is_lookup = part.role == AdapterPart::Role::kLayer && part.site->kind() == "Embedding";
    const auto& theirs = found->second;
    if (is_lookup && tensor.name == "lora_A" && theirs.dim() == 2) note_table(theirs.t(), {own[1], own[0]}, 1);
    if (part.role == AdapterPart::Role::kFull) note_table(theirs, own, 1);
  }

  /// With "bias": "all" PEFT writes the biases inside of modules_to_save two times more, under names of its wrapper.
  void drop_copies(const Adapter& adapter) {
    for (const auto& part : adapter.parts) {
      if (part.role != AdapterPart::Role::kFull) continue;
      const auto& name = part.file_name;
      for (auto dot = name.find('.'); dot != std::string::npos; dot = name.find('.', dot + 1)) {
        for (const auto* wrapper : {".original_module", ".modules_to_save"})
          content_.erase(name.substr(0, dot) + wrapper + name.substr(dot));
      }
    }
  }

  void copy(at::Tensor& target, const at::Tensor& source) const {
    const auto type = options_.keep_dtype() ? source.scalar_type() : options_.dtype().value_or(target.scalar_type());
    if (type != target.scalar_type() && target.is_floating_point()) target.set_data(target.detach().to(type));
    const bool is_reshaped = source.sizes() != target.sizes() && source.numel() == target.numel();
    target.copy_(is_reshaped ? source.reshape(target.sizes()) : source);
  }

  void refuse() const {
    std::string text;
    for (const auto& [what, names] : {std::pair("missing: ", &report_.missing),
                                      {"unexpected: ", &report_.unexpected},
                                      {"not of the shape or type that rank and layer give: ", &report_.misshapen}}) {
      if (!names->empty()) text += (text.empty() ? "" : ";\n") + (what + list(*names));
    }
    if (text.empty()) return;
    for (const auto& hint : {unmatched(), beginning(), tables()}) text += hint.empty() ? "" : ";\n" + hint;
    throw CheckpointError(path_, "does not fit the model and ", kAdapterConfig, ": ", text);
  }

  /// What the configuration names in vain is no fault by itself, but it may be why tensors were left over.
  std::string unmatched() const {
    return report_.unmatched.empty() ? "" : "of the configuration: " + list(report_.unmatched);
  }

  /// Where no tensor was found and all would be under one other beginning: which, and what reads them.
  std::string beginning() const {
    if (!copies_.empty()) return "";
    std::vector<std::string> below, others;
    for (const auto& item : content_) below.push_back(item.first);
    for (const auto& item : foreign_) others.push_back(item.first);
    if (const auto other = other_beginning(missing_, others); other && other->first.empty())
      return say_prefix(other->second);
    const auto other = other_beginning(missing_, below);
    if (!other) return "";
    return other->first.empty() ? say_prefix(in_file(other->second)) : say_mapping(other->second, other->first);
  }

  std::string say_prefix(const std::string& prefix) const {
    return "every name begins with \"" + prefix + "\" in the file, where \"" + options_.prefix() +
           "\" is expected; LoadOptions().prefix(\"" + prefix + "\") reads them";
  }

  std::string tables() const {
    if (!more_rows_) return "";
    const auto rows = std::to_string(*more_rows_) + (*more_rows_ == 1 ? " row" : " rows");
    return (*more_rows_ == 0 ? "if tokens were added before training, the table has their rows"
                             : "a table with " + rows + " more than the model's is likely one of added tokens") +
           "; LoadOptions().take_tables(true) gives the model the tables of the file, or give it such tables first";
  }

  const std::filesystem::path path_;
  std::map<std::string, at::Tensor> content_;  // what no layer has claimed yet
  std::map<std::string, at::Tensor> foreign_;  // the same of what is not below the prefix
  LoadOptions options_;
  FrozenTensors frozen_;
  std::vector<std::pair<at::Tensor*, at::Tensor>> copies_;
  std::vector<std::string> missing_;  // without the prefix
  std::optional<int64_t> more_rows_;  // of a table in the file that is not the model's
  LoadReport report_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
