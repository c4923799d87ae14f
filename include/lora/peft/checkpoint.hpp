#pragma once

#include <lora/adapters.hpp>
#include <lora/files/error.hpp>
#include <lora/linkage.hpp>
#include <lora/peft/load_options.hpp>
#include <lora/version.hpp>

#include <filesystem>
#include <string>

// Adapters on disk are PEFT directories: adapter_config.json says what is adapted and how, adapter_model.safetensors
// holds the tensors as "base_model.model.<layer>.<tensor>".

namespace lora {
inline namespace LORA_ABI {

/// Writes one adapter as a PEFT directory, which is made when it does not exist. Other files in it stay.
///
/// An adapter that was loaded is written with the entries of its configuration as they were, also those that match
/// nothing in this model, and with the tables of the model that its file had. What PEFT might understand in another way
/// is written as the names of the adapted layers: all linear layers, a list of blocks (layers_to_transform), and what
/// is excluded where a type of PEFT's configurations has no such field; so is what a key_mapping renamed.
///
/// Both files appear under their names at one moment. Whoever is interrupted before it, by an error or by the end of
/// the process, leaves the adapter that was there; of two that save to the same place at a time, one is left complete.
///
/// Errors: CheckpointError with the path and the reason of the operating system.
LORA_INLINE void write_adapter(const Adapters& adapters, const std::string& name,
                               const std::filesystem::path& directory);

/// Writes every parameter and buffer of the model under its name, with an adapter merged in (and without its tensors,
/// where layers have it as their own), as a safetensors file. It is what `merge` makes of the model, which is as before
/// when the file is written; a forward pass on another thread meanwhile would see the merged weights.
///
/// Errors: those of `merge`; CheckpointError with the path and the reason of the operating system.
LORA_INLINE void write_merged(Adapters& adapters, const std::string& name, const std::filesystem::path& file);

/// Adds the adapter in a PEFT directory to those of a model. Errors: those of `load_adapter`.
LORA_INLINE LoadReport read_adapter(Adapters& adapters, const std::string& name, const std::filesystem::path& directory,
                                    const LoadOptions& options);

/// Writes every adapter: "default" into `directory` itself, each other one into the subdirectory of its name, as PEFT
/// does. What may not be in the name of a folder is written there as "%2F", a byte in hexadecimal digits:
/// `load_adapters` finds each adapter under the name it has here, and none is written outside of `directory`. Names are
/// in no file. Errors: as for one; those written before the one that fails are there.
LORA_INLINE void write_adapters(const Adapters& adapters, const std::filesystem::path& directory);

/// Adapts a model as the configuration in a PEFT directory says, with the tensors in it. The adapter is named "default"
/// and trainable; its tensors take the type of an attached adapter whatever their type in the file.
///
///   auto adapters = lora::load_adapter(*model, "adapter");
///
/// The tensors of the file decide: entries of its configuration that match nothing in this model are no error, unlike
/// those of a configuration for `attach`, as long as every tensor has its place; they are kept for the next file.
/// Tables of the model that PEFT wrote along have to be the model's, or see LoadOptions::take_tables.
///
/// Errors: CheckpointError if a file is missing or damaged, asks for what is not supported, or if a tensor is missing,
/// unexpected or of another shape than rank and layer give; c10::Error if the configuration names no layer that the
/// model has. The model is unchanged then.
LORA_INLINE Adapters load_adapter(torch::nn::Module& model, const std::filesystem::path& directory,
                                  const LoadOptions& options = {}, LoadReport* report = nullptr);

/// Loads every adapter below a directory that `Adapters::save_all` or PEFT's save_pretrained wrote: the one in it is
/// "default", those in its subdirectories have their names ("a/b" in PEFT's folder of that path, too). Errors: as for
/// `load_adapter`; CheckpointError when there is none. The model is unchanged then.
LORA_INLINE Adapters load_adapters(torch::nn::Module& model, const std::filesystem::path& directory,
                                   const LoadOptions& options = {});

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/ops/constant_pad_nd.h>

#include <lora/peft/config.hpp>
#include <lora/peft/folder_name.hpp>
#include <lora/peft/tables.hpp>
#include <lora/peft/tensors.hpp>
#include <lora/files/safetensors.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

namespace detail {

/// From 0.15 to 0.21 PEFT computes with MultiheadAttention's out_proj as W + 2 s B A, and merges it so. Earlier
/// versions adapt no such layer; before 0.18 they do not write which one they are.
inline bool adds_out_proj_twice(const std::string& version) {
  int major = 0, minor = 0;
  if (version.empty()) return true;
  if (version == kPeftVersion || std::sscanf(version.c_str(), "%d.%d", &major, &minor) != 2) return false;
  return major == 0 && minor >= 15 && minor <= 21;
}

inline void warn_of_out_proj(const Adapter& adapter, const std::string& version, const std::filesystem::path& file) {
  if (!adds_out_proj_twice(version)) return;
  std::vector<std::string> names;
  for (const auto& part : adapter.parts) {
    if (is_inner_out_proj(part)) names.push_back(part.site->name());
  }
  if (names.empty()) return;
  TORCH_WARN(file.string(), ": ",
             version.empty() ? "does not say which version of PEFT wrote it" : "is of PEFT " + version,
             "; from 0.15 to 0.21 PEFT counts the update of MultiheadAttention's out_proj twice, in training, too, and "
             "here it counts once. If this adapter was trained there, LoadOptions().out_proj_twice(true) computes what "
             "it learned. The layers: ",
             list(names));
}

/// Why nothing in the model may match: the layers of the file have one other beginning.
inline std::string other_names(const PeftTensors& tensors, const Adapters& adapters) {
  std::vector<std::string> here;
  for (const auto& part : adapters.model().parts()) here.push_back(part.name);
  const auto other = other_beginning(tensors.layers(), here);
  return other && other->first != other->second ? "; " + say_mapping(other->first, other->second) : "";
}

/// The adapter in a PEFT directory, worked out for the model of `adapters`, which stays as it is but for `tables`.
inline std::pair<Adapter, LoadReport> read_plan(const Adapters& adapters, const std::filesystem::path& directory,
                                                const LoadOptions& options, TakenTables& tables) {
  const FolderLock lock(directory, Lock::kShared);  // so that both files are of one save
  PeftConfigReader reader(directory / kAdapterConfig);
  auto config = reader.read();
  PeftTensors tensors(directory, options, config);
  bool is_planned = false;
  try {
    config = tensors.adjusted(std::move(config));
    if (options.take_tables()) tables.take(tensors, config);
    std::vector<std::string> unmatched;
    auto plan = adapters.plan(config, &unmatched);
    is_planned = true;
    const auto frozen = [&] { return frozen_tensors(adapters); };
    auto report = PeftTensorReader(tensors, options, frozen, std::move(unmatched)).fill(plan);
    if (!options.out_proj_twice()) warn_of_out_proj(plan, reader.version(), directory / kAdapterConfig);
    return {std::move(plan), std::move(report)};
  } catch (CheckpointError&) {
    throw;
  } catch (c10::Error& error) {
    TORCH_RETHROW(error, "while loading the adapter in ", directory.string(),
                  is_planned ? "" : other_names(tensors, adapters));
  }
}

/// The options, by name, of modules of which only parts are adapted, as files have them: with the ranks of all parts,
/// and the same s.
using StackedOptions = std::map<std::string, LoRAOptions>;

inline StackedOptions stacked_options(const Adapter& adapter) {
  StackedOptions stacked;
  for (const auto& part : adapter.parts) {
    if (part.site->view().part_rows().empty()) continue;
    const auto& options = part.method->options();
    const auto parts = part.site->view().shape().batch.front();
    const auto factor = static_cast<double>(parts);
    const auto alpha = options.alpha() * (options.rank_stabilized() ? std::sqrt(factor) : factor);
    stacked.emplace(part.site->name(), LoRAOptions(options).rank(options.rank() * parts).alpha(alpha));
  }
  return stacked;
}

/// The configuration as it is written: with the names of what was selected where PEFT would select something else. By
/// "all linear layers" it means all but the head, it wants a prefix before a list of blocks, and not every type of its
/// configurations can exclude modules.
inline LoRAConfig written_config(const Adapter& adapter, const StackedOptions& stacked) {
  auto config = adapter.config;
  std::vector<std::string> names;
  for (const auto& part : adapter.parts) {
    if (part.role != AdapterPart::Role::kLayer) continue;
    const auto& name = part.site->name();
    const auto of_parts = stacked.find(name);
    if (of_parts != stacked.end()) note_options(config, name, of_parts->second, part.method->options());
    if (part.file_name == name) names.push_back(name);  // else it comes with its parent
  }
  const bool by_blocks = !config.layers_to_transform().empty();
  const bool cannot_exclude =
      !config.exclude_modules().empty() && !has_field(config.method().info(), "exclude_modules");
  if (!config.target_modules().is_all_linear() && !by_blocks && !cannot_exclude) return config;
  return config.target_modules(names).exclude_modules({}).layers_to_transform({}).layers_pattern({});
}

/// A tensor as the file keeps it, filled up with zeros to the rank of the module that the layer is an inner part of: in
/// a file all of a module has one rank, and with it s stays.
inline at::Tensor to_file(const AdapterPart& part, const NamedTensor& tensor, const StackedOptions& stacked) {
  const auto stored = to_file(part, tensor);
  const auto& name = part.site->name();
  const auto module = stacked.find(owner_of(name));
  if (part.file_name == name || module == stacked.end()) return stored;
  const auto rank = module->second.rank();
  if (tensor.name == "lora_A") return at::constant_pad_nd(stored, {0, 0, 0, rank - stored.size(0)});
  if (tensor.name == "lora_B") return at::constant_pad_nd(stored, {0, rank - stored.size(1)});
  return stored;
}

/// Writes both files of an adapter's directory, which is made when it does not exist.
inline void write_files(const std::filesystem::path& directory, const std::string& config,
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

LORA_INLINE void write_adapter(const Adapters& adapters, const std::string& name,
                               const std::filesystem::path& directory) {
  const detail::BelowInterception below;
  const auto adapter = adapters.adapter(name);
  const auto& parts = adapter->parts;
  std::map<std::string, at::Tensor> tensors;
  const auto stacked = detail::stacked_options(*adapter);
  adapter->for_each_tensor([&](const AdapterPart& part, const NamedTensor& tensor) {
    if (!tensor.is_saved) return;
    const auto key =
        tensor.is_shared ? detail::kSharedPrefix + tensor.file_name : detail::kPrefix + detail::peft_key(part, tensor);
    tensors[key] = detail::to_file(part, tensor, stacked);
  });
  if (!adapter->config.modules_to_save().empty()) {
    for (const auto& tensor : adapters.model().tensors()) {  // PEFT fails without those that only it saves
      const auto owner = detail::owner_of(tensor.place.name);
      const auto is_it = [&](const AdapterPart& part) { return part.changed() == owner; };
      if (!detail::saved_by_peft(adapter->config, owner).empty() && std::none_of(parts.begin(), parts.end(), is_it))
        tensors.emplace(detail::kPrefix + tensor.place.name, detail::dequantized(tensor.place.slot->read()));
    }
  }
  if (!adapter->frozen.empty()) {
    const auto frozen = detail::frozen_tensors(adapters);
    for (const auto& item : adapter->frozen)
      tensors.emplace(detail::kPrefix + item.first, detail::dequantized(frozen.at(item.second)));
  }
  const auto written = detail::written_config(*adapter, stacked);
  const auto text = detail::PeftConfigWriter(directory / detail::kAdapterConfig, written).text();
  detail::write_files(directory, text, tensors);
}

LORA_INLINE void write_merged(Adapters& adapters, const std::string& name, const std::filesystem::path& file) {
  const auto adapter = adapters.adapter(name);
  adapters.model();  // which throws when it is gone
  const detail::BelowInterception below;
  std::optional<MergeGuard<Adapters>> merged;
  if (adapters.merged() != std::vector<std::string>{name}) merged.emplace(adapters, name);
  std::map<std::string, at::Tensor> tensors;
  std::set<const c10::TensorImpl*> merged_in;  // of layers that have the adapter as their own
  adapter->for_each_tensor(
      [&](const AdapterPart&, const NamedTensor& tensor) { merged_in.insert(tensor.tensor->unsafeGetTensorImpl()); });
  for (const auto& tensor : adapters.model().tensors()) {
    const auto value = tensor.place.slot->read();
    if (value.defined() && merged_in.count(value.unsafeGetTensorImpl()) == 0) tensors.emplace(tensor.place.name, value);
  }
  SafetensorsWriter writer(file, tensor_infos(tensors));
  for (const auto& item : tensors) writer.write(item.first, detail::dequantized(item.second));  // one at a time
  writer.finish();
}

LORA_INLINE LoadReport read_adapter(Adapters& adapters, const std::string& name, const std::filesystem::path& directory,
                                    const LoadOptions& options) {
  detail::TakenTables tables(adapters);
  auto [adapter, report] = detail::read_plan(adapters, directory, options, tables);
  adapters.add(name, std::move(adapter));
  tables.keep();
  return report;
}

LORA_INLINE void write_adapters(const Adapters& adapters, const std::filesystem::path& directory) {
  for (const auto& name : adapters.names()) {
    const auto path = name == "default" ? directory : directory / detail::folder_name(name);
    write_adapter(adapters, name, path);
  }
}

LORA_INLINE Adapters load_adapter(torch::nn::Module& model, const std::filesystem::path& directory,
                                  const LoadOptions& options, LoadReport* report) {
  Adapters adapters(model);
  auto found = adapters.load("default", directory, options);
  if (report != nullptr) *report = std::move(found);
  return adapters;
}

namespace detail {

/// Loads every adapter below a directory for a model that has none yet.
inline Adapters load_all(Adapters adapters, const std::filesystem::path& directory, const LoadOptions& options) {
  const auto stored = find_adapters(directory);
  const bool has_default = std::filesystem::exists(directory / kAdapterConfig);
  if (stored.empty() && !has_default) throw CheckpointError(directory, "holds no ", kAdapterConfig);
  try {
    if (has_default) adapters.load("default", directory, options);
    for (const auto& adapter : stored) adapters.load(adapter.name, adapter.directory, options);
  } catch (...) {
    adapters.detach();
    throw;
  }
  return adapters;
}

}  // namespace detail

LORA_INLINE Adapters load_adapters(torch::nn::Module& model, const std::filesystem::path& directory,
                                   const LoadOptions& options) {
  return detail::load_all(Adapters(model), directory, options);
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
