#pragma once

#include <lora/adapters.hpp>
#include <lora/peft/config.hpp>
#include <lora/peft/safetensors.hpp>

#include <cmath>
#include <filesystem>
#include <functional>
#include <map>
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

inline constexpr const char* kPrefix = "base_model.model.";

/// The name of a tensor in adapter_model.safetensors.
inline std::string peft_key(const Target& target, const NamedTensor& tensor) {
  const auto name = target.files.name ? target.files.name(tensor) : tensor.file_name;
  return kPrefix + target.file_name + "." + name;
}

/// A tensor of a layer as PEFT's file keeps it.
inline at::Tensor to_file(const Target& target, const NamedTensor& tensor) {
  at::NoGradGuard no_grad;
  return target.files.to_file ? target.files.to_file(tensor.name, *tensor.tensor) : *tensor.tensor;
}

/// Fills the tensors of a planned adapter from a file, after everything about the file was checked.
class PeftTensorReader {
 public:
  explicit PeftTensorReader(const std::filesystem::path& path) : path_(path), content_(read_safetensors(path)) {}

  void fill(AdapterPlan& plan) {
    for (auto& layer : plan.layers) {
      for (const auto& tensor : layer.method->tensors()) match(layer.target, tensor);
    }
    for (auto& full : plan.full) match(kPrefix + full.file_name, full.value, full.value.sizes(), {});
    for (const auto& [key, tensor] : content_) unexpected_.push_back(quoted(key) + " " + c10::str(tensor.sizes()));
    report();
    at::NoGradGuard no_grad;
    for (auto& [target, source] : copies_) target.copy_(source);
  }

 private:
  static std::string quoted(const std::string& key) { return "\"" + key + "\""; }

  using FromFile = std::function<at::Tensor(const at::Tensor& stored)>;

  void match(const Target& target, const NamedTensor& tensor) {
    FromFile from_file;
    if (target.files.from_file)
      from_file = [&](const at::Tensor& stored) { return target.files.from_file(tensor.name, stored); };
    match(peft_key(target, tensor), *tensor.tensor, to_file(target, tensor).sizes(), from_file);
  }

  /// Finds the tensor `key`, which has to have the sizes `stored_sizes` in the file, for `target`.
  void match(const std::string& key, const at::Tensor& target, at::IntArrayRef stored_sizes,
             const FromFile& from_file) {
    const auto found = content_.find(key);
    if (found == content_.end()) {
      missing_.push_back(quoted(key) + " " + c10::str(stored_sizes));
      return;
    }
    const auto& source = found->second;
    if (source.sizes() != stored_sizes) {
      misshapen_.push_back(quoted(key) + " is " + c10::str(source.sizes()) + ", not " + c10::str(stored_sizes));
    } else if (target.is_floating_point() && !source.is_floating_point()) {
      misshapen_.push_back(quoted(key) + " holds " + c10::str(source.scalar_type()));
    } else {
      copies_.emplace_back(target, from_file ? from_file(source) : source);
    }
    content_.erase(found);
  }

  void report() const {
    std::string text;
    for (const auto& [what, names] : {std::pair("missing: ", &missing_),
                                      {"unexpected: ", &unexpected_},
                                      {"not of the shape or type that rank and layer give: ", &misshapen_}}) {
      if (!names->empty()) text += (text.empty() ? "" : "; ") + (what + list(*names));
    }
    if (!text.empty()) throw CheckpointError(path_, "does not fit the model and ", kAdapterConfig, ": ", text);
  }

  const std::filesystem::path path_;
  std::map<std::string, at::Tensor> content_;  // what no layer has claimed yet
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;
  std::vector<std::string> missing_, unexpected_, misshapen_;
};

/// The adapter in a PEFT directory, worked out for the model of `adapters`, which stays as it is.
inline AdapterPlan read_plan(const Adapters& adapters, const std::filesystem::path& directory) {
  const FolderLock lock(directory, LOCK_SH);  // so that both files are of one save
  const auto config = read_adapter_config(directory / kAdapterConfig);
  PeftTensorReader tensors(directory / kAdapterTensors);
  try {
    auto plan = adapters.plan(config);
    tensors.fill(plan);
    return plan;
  } catch (CheckpointError&) {
    throw;
  } catch (c10::Error& error) {
    TORCH_RETHROW(error, "while loading the adapter in ", directory.string());
  }
}

/// The configuration as it is written: with the names of what was selected where PEFT would select something else. By
/// "all linear layers" it means all but the head, and it wants a prefix before a list of blocks.
inline LoRAConfig written_config(LoRAConfig config, const std::vector<Target>& targets, const std::string& adapter) {
  for (const auto& target : targets) {
    if (target.site->view().part_rows().empty()) continue;
    const auto& options = target.site->at(adapter).options();
    const auto parts = static_cast<double>(target.site->view().shape().batch.front());
    const auto alpha = options.alpha() * (options.rank_stabilized() ? std::sqrt(parts) : parts);
    note_options(config, target.name, LoRAOptions(options).rank(options.rank() * std::llround(parts)).alpha(alpha));
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
  for (const auto& target : targets) {
    for (const auto& item : target.site->at(adapter).tensors())
      tensors[detail::peft_key(target, item)] = detail::to_file(target, item);
  }
  for (const auto& full : full_[adapter]) tensors[detail::kPrefix + full.file_name] = full.value;
  const auto config_path = directory / detail::kAdapterConfig;
  const auto written = detail::written_config(configs_[adapter], targets, adapter);
  const auto text = detail::PeftConfigWriter(config_path, written).text();
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) throw CheckpointError(directory, "cannot be created: ", error.message());

  detail::AtomicFile config(config_path);
  config.write_at(0, text);
  detail::write_tensors(directory / detail::kAdapterTensors, tensors, {{"format", "pt"}},
                        [&](auto& writer) { writer.finish_with(config); });
}

inline void Adapters::load(const std::string& name, const std::filesystem::path& directory) {
  add(name, detail::read_plan(*this, directory));
}

/// Adapts a model as the configuration in a PEFT directory says, with the tensors in it. The adapter is named "default"
/// and trainable; its tensors take the type of an attached adapter whatever their type in the file.
///
///   auto adapters = lora::load_adapter(*model, "adapter");
///
/// Errors: CheckpointError if a file is missing or damaged, asks for what is not supported, or if a tensor is missing,
/// unexpected or of another shape than rank and layer give; c10::Error if the configuration names layers that the model
/// does not have. The model is unchanged then.
inline Adapters load_adapter(torch::nn::Module& model, const std::filesystem::path& directory) {
  Adapters adapters(model);
  adapters.load("default", directory);
  return adapters;
}

}  // namespace lora
