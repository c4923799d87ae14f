#pragma once

#include <ATen/ops/constant_pad_nd.h>

#include <lora/adapters.hpp>
#include <lora/peft/config.hpp>
#include <lora/peft/load_options.hpp>
#include <lora/peft/pickled.hpp>
#include <lora/peft/safetensors.hpp>

#include <cmath>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <regex>
#include <set>
#include <string>
#include <utility>
#include <vector>

// Adapters on disk are PEFT directories: adapter_config.json says what is adapted and how, adapter_model.safetensors
// holds the tensors as "base_model.model.<layer>.<tensor>". How a tensor is called there is in the description of its
// method, and what a layer is called in that of its kind of layer; nothing of that is known here.

namespace lora {
namespace detail {

inline constexpr const char* kAdapterConfig = "adapter_config.json";
inline constexpr const char* kAdapterTensors = "adapter_model.safetensors";
inline constexpr const char* kLegacyTensors = "adapter_model.bin";

inline constexpr const char* kPrefix = "base_model.model.";

/// The name of a tensor in adapter_model.safetensors, without the prefix.
inline std::string peft_key(const Target& target, const NamedTensor& tensor) {
  const auto name = target.files.name ? target.files.name(tensor) : tensor.file_name;
  return target.file_name + "." + name;
}

/// A tensor of a layer as PEFT's file keeps it.
inline at::Tensor to_file(const Target& target, const NamedTensor& tensor) {
  at::NoGradGuard no_grad;
  return target.files.to_file ? target.files.to_file(tensor.name, *tensor.tensor) : *tensor.tensor;
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

/// The name of the module that has a tensor.
inline std::string owner_of(const std::string& tensor) {
  const auto dot = tensor.rfind('.');
  return dot == std::string::npos ? "" : tensor.substr(0, dot);
}

/// The tensors of an adapter file, by their names in the model at hand.
class PeftTensors {
 public:
  PeftTensors(const std::filesystem::path& directory, const LoadOptions& options) : options_(options) {
    const auto newer = directory / kAdapterTensors, older = directory / kLegacyTensors;
    path_ = !std::filesystem::exists(newer) && std::filesystem::exists(older) ? older : newer;
    for (const auto& [pattern, replacement] : options.key_mapping())
      mapping_.emplace_back(compile(pattern, pattern), replacement);
    for (auto& [key, tensor] : path_ == older ? read_pickled_tensors(path_) : read_safetensors(path_))
      take(key, tensor);
  }

  const std::filesystem::path& path() const { return path_; }
  std::map<std::string, at::Tensor>& content() { return content_; }
  /// Those without the prefix.
  const std::map<std::string, at::Tensor>& foreign() const { return foreign_; }

  /// The configuration with the modules that the file has in full though their names only end in an entry's letters.
  LoRAConfig with_saved(LoRAConfig config) const {
    auto saved = config.modules_to_save();
    for (const auto& [key, tensor] : content_) {
      const auto name = saved_by_peft(config, owner_of(key));
      const auto means = [&](const std::string& entry) { return is_or_ends_with(name, entry); };
      if (!name.empty() && std::none_of(saved.begin(), saved.end(), means)) saved.push_back(name);
    }
    return config.modules_to_save(std::move(saved));
  }

  /// The configuration with the layers of the file, under their names here; for when there is a mapping.
  LoRAConfig mapped(LoRAConfig config) const {
    std::vector<std::string> names, parameters;
    std::vector<std::pair<std::string, int64_t>> ranks;
    std::vector<std::pair<std::string, double>> alphas;
    const auto rank_expressions = compile_patterns(config.rank_pattern());
    const auto alpha_expressions = compile_patterns(config.alpha_pattern());
    std::vector<bool> unused_ranks(config.rank_pattern().size()), unused_alphas(config.alpha_pattern().size());
    for (const auto& [name, python_name] : layers_and_parameters(config)) {
      (layers_.count(name) > 0 ? names : parameters).push_back(name);
      ranks.emplace_back("^" + escaped(name), pattern_value(config.rank_pattern(), rank_expressions, python_name,
                                                            config.rank(), unused_ranks));
      alphas.emplace_back("^" + escaped(name), pattern_value(config.alpha_pattern(), alpha_expressions, python_name,
                                                             config.alpha(), unused_alphas));
    }
    config.target_modules(names).exclude_modules({}).layers_to_transform({}).layers_pattern({});
    config.target_parameters(std::move(parameters)).modules_to_save(mapped_saved(config));
    return config.rank_pattern(std::move(ranks)).alpha_pattern(std::move(alphas));
  }

 private:
  /// What is adapted, under its names here and in the file, where parameters are named after their modules. An entry of
  /// target_parameters of which the file has nothing stays as it is, and is an error later.
  std::map<std::string, std::string> layers_and_parameters(const LoRAConfig& config) const {
    auto names = layers_;
    for (const auto& entry : config.target_parameters()) {
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
    auto here = name;
    for (const auto& [expression, replacement] : mapping_) {
      if (!std::regex_search(here, expression)) continue;
      here = std::regex_replace(here, expression, replacement, std::regex_constants::format_first_only);
      break;
    }
    const auto adapter = name.find(".lora_"), adapter_here = here.find(".lora_");
    const bool is_layer = adapter != std::string::npos && adapter_here != std::string::npos;
    if (is_layer && here.find(".base_layer.") == std::string::npos)
      layers_.emplace(here.substr(0, adapter_here), name.substr(0, adapter));
    if (!is_layer) others_.emplace(here, name);
    if (!content_.emplace(here, tensor).second)
      throw CheckpointError(path_, "key_mapping gives two tensors the name \"", here, "\"");
  }

  LoadOptions options_;
  std::filesystem::path path_;
  std::vector<std::pair<std::regex, std::string>> mapping_;
  std::map<std::string, at::Tensor> content_;  // without the prefix
  std::map<std::string, at::Tensor> foreign_;
  std::map<std::string, std::string> layers_;  // name here -> name in the file
  std::map<std::string, std::string> others_;  // the same of tensors that are no layer's
};

/// Fills the tensors of a planned adapter from a file, after everything about the file was checked.
class PeftTensorReader {
 public:
  PeftTensorReader(PeftTensors& tensors, const LoadOptions& options)
      : path_(tensors.path()), content_(std::move(tensors.content())), options_(options) {
    for (const auto& [key, tensor] : tensors.foreign()) report_.unexpected.push_back(shown(key, tensor.sizes()));
  }

  LoadReport fill(AdapterPlan& plan) {
    for (auto& layer : plan.layers) {
      for (const auto& tensor : layer.method->tensors()) match(layer.target, tensor);
    }
    for (auto& full : plan.full) match(full.file_name, full.value, full.value.sizes(), {});
    for (const auto& layer : plan.layers) match_base(layer.target);
    drop_copies(plan);
    for (const auto& [name, tensor] : content_) report_.unexpected.push_back(shown(in_file(name), tensor.sizes()));
    if (options_.strict()) refuse();
    if (!report_.missing.empty() || !report_.misshapen.empty()) plan.initialize();
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

  void match(const Target& target, const NamedTensor& tensor) {
    FromFile from_file;
    if (target.files.from_file)
      from_file = [&](const at::Tensor& stored) { return target.files.from_file(tensor.name, stored); };
    match(peft_key(target, tensor), *tensor.tensor, to_file(target, tensor).sizes(), from_file);
  }

  /// Finds the tensor `key`, which has to have the sizes `stored_sizes` in the file, for `target`.
  void match(const std::string& key, at::Tensor& target, at::IntArrayRef stored_sizes, const FromFile& from_file) {
    const auto found = content_.find(key);
    if (found == content_.end()) {
      report_.missing.push_back(shown(in_file(key), stored_sizes));
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

  /// PEFT writes the frozen tables of adapted embeddings along, in case the vocabulary grew.
  void match_base(const Target& target) {
    const auto found = content_.find(target.file_name + ".base_layer.weight");
    if (found == content_.end()) return;
    const auto& theirs = found->second;
    const auto own = target.site->pristine(*target.slot).to(theirs.device());
    const bool is_same = theirs.sizes() == own.sizes() &&
                         (own.equal(theirs.to(own.scalar_type())) || own.to(theirs.scalar_type()).equal(theirs));
    if (!is_same)
      report_.unexpected.push_back(shown(in_file(found->first), theirs.sizes()) +
                                   " (a frozen weight, and not the model's own)");
    content_.erase(found);
  }

  /// With "bias": "all" PEFT writes the biases inside of modules_to_save two times more, under names of its wrapper.
  void drop_copies(const AdapterPlan& plan) {
    for (const auto& full : plan.full) {
      const auto& name = full.file_name;
      for (auto dot = name.find('.'); dot != std::string::npos; dot = name.find('.', dot + 1)) {
        for (const auto* wrapper : {".original_module", ".modules_to_save"})
          content_.erase(name.substr(0, dot) + wrapper + name.substr(dot));
      }
    }
  }

  void copy(at::Tensor& target, const at::Tensor& source) const {
    const auto type = options_.keep_dtype() ? source.scalar_type() : options_.dtype().value_or(target.scalar_type());
    if (type != target.scalar_type() && target.is_floating_point()) target.set_data(target.detach().to(type));
    target.copy_(source);
  }

  void refuse() const {
    std::string text;
    for (const auto& [what, names] : {std::pair("missing: ", &report_.missing),
                                      {"unexpected: ", &report_.unexpected},
                                      {"not of the shape or type that rank and layer give: ", &report_.misshapen}}) {
      if (!names->empty()) text += (text.empty() ? "" : "; ") + (what + list(*names));
    }
    if (!text.empty()) throw CheckpointError(path_, "does not fit the model and ", kAdapterConfig, ": ", text);
  }

  const std::filesystem::path path_;
  std::map<std::string, at::Tensor> content_;  // what no layer has claimed yet
  LoadOptions options_;
  std::vector<std::pair<at::Tensor*, at::Tensor>> copies_;
  LoadReport report_;
};

/// The adapter in a PEFT directory, worked out for the model of `adapters`, which stays as it is.
inline std::pair<AdapterPlan, LoadReport> read_plan(const Adapters& adapters, const std::filesystem::path& directory,
                                                    const LoadOptions& options) {
  const FolderLock lock(directory, LOCK_SH);  // so that both files are of one save
  auto config = read_adapter_config(directory / kAdapterConfig);
  PeftTensors tensors(directory, options);
  try {
    if (!options.key_mapping().empty()) config = tensors.mapped(std::move(config));
    auto plan = adapters.plan(tensors.with_saved(std::move(config)));
    auto report = PeftTensorReader(tensors, options).fill(plan);
    return {std::move(plan), std::move(report)};
  } catch (CheckpointError&) {
    throw;
  } catch (c10::Error& error) {
    TORCH_RETHROW(error, "while loading the adapter in ", directory.string());
  }
}

/// The options, by name, of modules of which only parts are adapted, as files have them: with the ranks of all parts,
/// and the same s.
using StackedOptions = std::map<std::string, LoRAOptions>;

inline StackedOptions stacked_options(const std::vector<Target>& targets, const std::string& adapter) {
  StackedOptions stacked;
  for (const auto& target : targets) {
    if (target.site->view().part_rows().empty()) continue;
    const auto& options = target.site->at(adapter).options();
    const auto parts = target.site->view().shape().batch.front();
    const auto factor = static_cast<double>(parts);
    const auto alpha = options.alpha() * (options.rank_stabilized() ? std::sqrt(factor) : factor);
    stacked.emplace(target.name, LoRAOptions(options).rank(options.rank() * parts).alpha(alpha));
  }
  return stacked;
}

/// The configuration as it is written: with the names of what was selected where PEFT would select something else. By
/// "all linear layers" it means all but the head, and it wants a prefix before a list of blocks.
inline LoRAConfig written_config(LoRAConfig config, const std::vector<Target>& targets, const std::string& adapter,
                                 const StackedOptions& stacked) {
  for (const auto& target : targets) {
    const auto of_parts = stacked.find(target.name);
    if (of_parts != stacked.end())
      note_options(config, target.name, of_parts->second, target.site->at(adapter).options());
  }
  const bool by_blocks = !config.layers_to_transform().empty();
  const auto is_inside = [](const Target& target) { return target.file_name != target.name; };  // comes with its parent
  if (!config.target_modules().is_all_linear() && !by_blocks) return config;
  std::vector<std::string> names;
  for (const auto& target : targets) {
    if (!is_inside(target)) names.push_back(target.name);
  }
  return config.target_modules(names).exclude_modules({}).layers_to_transform({}).layers_pattern({});
}

/// A tensor as the file keeps it, filled up with zeros to the rank of the module that the target is an inner part of:
/// in a file all of a module has one rank, and with it s stays.
inline at::Tensor to_file(const Target& target, const NamedTensor& tensor, const StackedOptions& stacked) {
  const auto stored = to_file(target, tensor);
  const auto module = stacked.find(owner_of(target.name));
  if (target.file_name == target.name || module == stacked.end()) return stored;
  const auto rank = module->second.rank();
  if (tensor.name == "lora_A") return at::constant_pad_nd(stored, {0, 0, 0, rank - stored.size(0)});
  if (tensor.name == "lora_B") return at::constant_pad_nd(stored, {0, rank - stored.size(1)});
  return stored;
}

/// Writes both files of an adapter's directory, which is made when it does not exist.
inline void write_adapter(const std::filesystem::path& directory, const std::string& config,
                          const std::map<std::string, at::Tensor>& tensors) {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) throw CheckpointError(directory, "cannot be created: ", error.message());
  AtomicFile config_file(directory / kAdapterConfig);
  config_file.write_at(0, config);
  write_tensors(directory / kAdapterTensors, tensors, {{"format", "pt"}},
                [&](auto& writer) { writer.finish_with(config_file); });
}

}  // namespace detail

/// Writes the only adapter as a PEFT directory, which is made when it does not exist. Other files in it stay.
///
/// Both files appear under their names at one moment. Whoever is interrupted before it, by an error or by the end of
/// the process, leaves the adapter that was there; of two that save to the same place at a time, one is left complete.
///
/// Errors: CheckpointError with the path and the reason of the operating system.
inline void Adapters::save(const std::filesystem::path& directory) const { save(directory, only()); }

/// The same for one adapter among several.
inline void Adapters::save(const std::filesystem::path& directory, const std::string& adapter) const {
  const auto targets = targets_of(known(adapter));
  std::map<std::string, at::Tensor> tensors;
  const auto stacked = detail::stacked_options(targets, adapter);
  for (const auto& target : targets) {
    for (const auto& item : target.site->at(adapter).tensors())
      tensors[detail::kPrefix + detail::peft_key(target, item)] = detail::to_file(target, item, stacked);
  }
  for (const auto& full : full_[adapter]) tensors[detail::kPrefix + full.file_name] = full.value;
  for (const auto& tensor : model_->tensors()) {  // PEFT fails without those that only it saves
    if (!detail::saved_by_peft(configs_[adapter], detail::owner_of(tensor.name)).empty())
      tensors.emplace(detail::kPrefix + tensor.name, tensor.slot->read());
  }
  const auto written = detail::written_config(configs_[adapter], targets, adapter, stacked);
  const auto text = detail::PeftConfigWriter(directory / detail::kAdapterConfig, written).text();
  detail::write_adapter(directory, text, tensors);
}

/// Writes every parameter and buffer of the model under its name, with the only adapter merged in, as a safetensors
/// file. It is what `merge` makes of the model, which is as before when the file is written; a forward pass on another
/// thread meanwhile would see the merged weights.
///
/// Errors: those of `merge`; CheckpointError with the path and the reason of the operating system.
inline void Adapters::save_merged(const std::filesystem::path& file) { save_merged(file, only()); }

/// The same for one adapter among several.
inline void Adapters::save_merged(const std::filesystem::path& file, const std::string& adapter) {
  std::optional<MergeGuard<Adapters>> merged;
  if (merged_ != known(adapter)) merged.emplace(*this, adapter);
  std::map<std::string, at::Tensor> tensors;
  const auto adapters = own_tensors();
  for (const auto& tensor : model_->tensors()) {
    const auto value = tensor.slot->read();
    const bool is_adapter = adapters.count(value.unsafeGetTensorImpl()) > 0;
    if (value.defined() && !is_adapter) tensors.emplace(tensor.name, value);
  }
  write_safetensors(file, tensors);
}

inline LoadReport Adapters::load(const std::string& name, const std::filesystem::path& directory,
                                 const LoadOptions& options) {
  auto [plan, report] = detail::read_plan(*this, directory, options);
  add(name, std::move(plan));
  return report;
}

/// Writes every adapter: "default" into `directory` itself, each other one into the subdirectory of its name, as PEFT
/// does. Errors: as for `save`; those written before the one that fails are there.
inline void Adapters::save_all(const std::filesystem::path& directory) const {
  for (const auto& name : names()) save(name == "default" ? directory : directory / name, name);
}

/// Adapts a model as the configuration in a PEFT directory says, with the tensors in it. The adapter is named "default"
/// and trainable; its tensors take the type of an attached adapter whatever their type in the file.
///
///   auto adapters = lora::load_adapter(*model, "adapter");
///
/// Errors: CheckpointError if a file is missing or damaged, asks for what is not supported, or if a tensor is missing,
/// unexpected or of another shape than rank and layer give; c10::Error if the configuration names layers that the model
/// does not have. The model is unchanged then.
inline Adapters load_adapter(torch::nn::Module& model, const std::filesystem::path& directory,
                             const LoadOptions& options = {}, LoadReport* report = nullptr) {
  Adapters adapters(model);
  auto found = adapters.load("default", directory, options);
  if (report != nullptr) *report = std::move(found);
  return adapters;
}

namespace detail {

/// Loads every adapter below a directory for a model that has none yet.
inline Adapters load_all(Adapters adapters, const std::filesystem::path& directory, const LoadOptions& options) {
  std::vector<std::string> names;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(directory, error)) {
    if (std::filesystem::exists(entry.path() / kAdapterConfig)) names.push_back(entry.path().filename().string());
  }
  if (error) throw CheckpointError(directory, "cannot be read: ", error.message());
  std::sort(names.begin(), names.end());
  const bool has_default = std::filesystem::exists(directory / kAdapterConfig);
  if (names.empty() && !has_default) throw CheckpointError(directory, "holds no ", kAdapterConfig);
  try {
    if (has_default) adapters.load("default", directory, options);
    for (const auto& name : names) adapters.load(name, directory / name, options);
  } catch (...) {
    adapters.detach();
    throw;
  }
  return adapters;
}

}  // namespace detail

/// Loads every adapter below a directory that `Adapters::save_all` or PEFT's save_pretrained wrote: the one in it is
/// "default", those in its subdirectories have their names. Errors: as for `load_adapter`; CheckpointError when there
/// is none. The model is unchanged then.
inline Adapters load_adapters(torch::nn::Module& model, const std::filesystem::path& directory,
                              const LoadOptions& options = {}) {
  return detail::load_all(Adapters(model), directory, options);
}

}  // namespace lora
