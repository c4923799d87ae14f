#pragma once

#include <ATen/ops/constant_pad_nd.h>

#include <lora/adapters.hpp>
#include <lora/peft/tensors.hpp>
#include <lora/peft/config.hpp>
#include <lora/peft/load_options.hpp>
#include <lora/files/safetensors.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

// Adapters on disk are PEFT directories: adapter_config.json says what is adapted and how, adapter_model.safetensors
// holds the tensors as "base_model.model.<layer>.<tensor>".

namespace lora {
inline namespace LORA_ABI {
namespace detail {

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
  if (!configs_[adapter].modules_to_save().empty()) {
    for (const auto& tensor : model().tensors()) {  // PEFT fails without those that only it saves
      const auto owner = detail::owner_of(tensor.name);
      const auto is_it = [&](const Target& target) { return target.name == owner; };
      if (!detail::saved_by_peft(configs_[adapter], owner).empty() &&
          std::none_of(targets.begin(), targets.end(), is_it))
        tensors.emplace(detail::kPrefix + tensor.name, tensor.slot->read());
    }
  }
  const auto written = detail::written_config(configs_[adapter], targets, adapter, stacked);
  const auto text = detail::PeftConfigWriter(directory / detail::kAdapterConfig, written).text();
  detail::write_adapter(directory, text, tensors);
}

/// Writes every parameter and buffer of the model under its name, with the only adapter merged in (and without its
/// tensors, where layers have it as their own), as a safetensors file. It is what `merge` makes of the model, which is
/// as before when the file is written; a forward pass on another thread meanwhile would see the merged weights.
///
/// Errors: those of `merge`; CheckpointError with the path and the reason of the operating system.
inline void Adapters::save_merged(const std::filesystem::path& file) { save_merged(file, only()); }

/// The same for one adapter among several.
inline void Adapters::save_merged(const std::filesystem::path& file, const std::string& adapter) {
  std::optional<MergeGuard<Adapters>> merged;
  if (merged_ != known(adapter)) merged.emplace(*this, adapter);
  std::map<std::string, at::Tensor> tensors;
  std::set<const c10::TensorImpl*> merged_in;  // of layers that have the adapter as their own
  for (const auto& target : targets_of(adapter)) {
    for (const auto& item : target.site->at(adapter).tensors()) merged_in.insert(item.tensor->unsafeGetTensorImpl());
  }
  for (const auto& tensor : model().tensors()) {
    const auto value = tensor.slot->read();
    if (value.defined() && merged_in.count(value.unsafeGetTensorImpl()) == 0) tensors.emplace(tensor.name, value);
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

}  // namespace LORA_ABI
}  // namespace lora
