// Hugging Face directories: config.json, model.safetensors (or its shards with their index), tokenizer files.
#pragma once

#include <c10/util/hash.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <lora/files/bitsandbytes.hpp>
#include <lora/files/safetensors.hpp>
#include <lora/quantized_checkpoint.hpp>

#include "config.hpp"
#include "model.hpp"
#include "weight_format.hpp"

namespace gpt {

using TensorMap = std::map<std::string, torch::Tensor>;

inline constexpr const char* kWeights = "model.safetensors";
inline constexpr const char* kWeightsIndex = "model.safetensors.index.json";

/// The tensors of a directory under the names of its files, mapped and not copied: those of model.safetensors, else
/// those that model.safetensors.index.json lists. Throws lora::CheckpointError when neither is there or one is damaged.
inline TensorMap read_weights(const std::filesystem::path& dir) {
  const auto single = dir / kWeights, index = dir / kWeightsIndex;
  if (std::filesystem::exists(single)) return lora::read_safetensors(single);
  if (std::filesystem::exists(index)) return lora::read_safetensors_index(index);
  throw lora::CheckpointError(dir, "holds neither ", kWeights, " nor ", kWeightsIndex);
}

/// The file that names them all.
inline std::filesystem::path weight_file(const std::filesystem::path& dir) {
  const auto single = dir / kWeights;
  return std::filesystem::exists(single) ? single : dir / kWeightsIndex;
}

/// The same tensors, to be read one at a time, which leaves nothing of the files in memory.
inline lora::SafetensorsReader weight_reader(const std::filesystem::path& dir) {
  const auto file = weight_file(dir);
  return file.extension() == ".json" ? lora::SafetensorsReader::of_index(file) : lora::SafetensorsReader(file);
}

/// Tells the weights of directories apart: the SHA-1 of the sizes of their files and of pages from all over them, of
/// small files of everything.
inline std::string fingerprint_of_weights(const std::filesystem::path& dir) {
  std::set<std::filesystem::path> files{weight_file(dir)};
  if (files.begin()->extension() == ".json") {
    const auto index = read_json(*files.begin());
    for (const auto& item : index.at("weight_map").items()) files.insert(dir / item.value().get<std::string>());
  }
  constexpr uint64_t kPages = 256;
  std::string content, page(4096, '\0');
  for (const auto& file : files) {
    const auto size = std::filesystem::file_size(file);
    content += std::to_string(size) + "\n";
    std::ifstream stream(file, std::ios::binary);
    for (uint64_t i = 0; i < kPages; ++i) {
      stream.clear();
      stream.seekg(static_cast<std::streamoff>(size / kPages * i));
      stream.read(page.data(), static_cast<std::streamsize>(page.size()));
      content.append(page, 0, static_cast<size_t>(stream.gcount()));
    }
  }
  return c10::sha1(content).str();
}

/// Whether weights among them are in 4 or 8 bits, as quantize_checkpoint and bitsandbytes write them.
inline bool holds_few_bits(const TensorMap& weights) {
  return std::any_of(weights.begin(), weights.end(),
                     [&](const auto& item) { return lora::is_bitsandbytes_weight(item.first, weights); });
}
inline bool holds_few_bits(const std::filesystem::path& dir) { return holds_few_bits(read_weights(dir)); }

namespace detail {

inline bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// GPT-2's projections are stored as (in, out), the transpose of what torch::nn::Linear holds.
inline bool is_stored_transposed(const ModelConfig& config, const std::string& name) {
  if (config.architecture != Architecture::kGPT2) return false;
  return ends_with(name, ".c_attn.weight") || ends_with(name, ".c_proj.weight") || ends_with(name, ".c_fc.weight");
}

// The name that a tensor of a file has in the model; GPT-2 files exist with and without "transformer.".
inline std::string parameter_name(const ModelConfig& config, const std::string& name) {
  const bool complete = name.rfind("transformer.", 0) == 0 || name == "lm_head.weight";
  return config.architecture == Architecture::kLlama || complete ? name : "transformer." + name;
}

inline const char* embedding_name(const ModelConfig& config) {
  return config.architecture == Architecture::kLlama ? "model.embed_tokens.weight" : "transformer.wte.weight";
}

// Tensors that checkpoints carry but that are computed, or that another name holds already.
inline bool is_redundant(const ModelConfig& config, const std::string& name) {
  if (name == "lm_head.weight") return config.tie_word_embeddings;
  if (config.architecture == Architecture::kLlama) return ends_with(name, ".rotary_emb.inv_freq");
  return ends_with(name, ".attn.bias") || ends_with(name, ".attn.masked_bias");
}

// The two tables of a file that config.json may tie, where they are there.
inline std::pair<torch::Tensor, torch::Tensor> embedding_and_head(const ModelConfig& config, const TensorMap& weights) {
  std::pair<torch::Tensor, torch::Tensor> found;
  for (const auto& [stored_name, tensor] : weights) {
    const auto name = parameter_name(config, stored_name);
    if (name == embedding_name(config)) found.first = tensor;
    if (name == "lm_head.weight") found.second = tensor;
  }
  return found;
}

// Where the numbers of a parameter are.
struct StoredParameter {
  std::string name;  // of the tensor in its file
  bool transposed;

  torch::Tensor of(const torch::Tensor& tensor) const { return transposed ? tensor.t() : tensor; }
};

// The tensors of a file by the names that the model has for them, nothing redundant.
inline std::map<std::string, StoredParameter> as_stored(const ModelConfig& config, const TensorMap& weights) {
  std::map<std::string, StoredParameter> parameters;
  for (const auto& [stored_name, tensor] : weights) {
    const auto name = parameter_name(config, stored_name);
    if (is_redundant(config, name)) continue;
    parameters.emplace(name, StoredParameter{stored_name, is_stored_transposed(config, name) && tensor.dim() == 2});
  }
  const auto [embedding, head] = embedding_and_head(config, weights);
  if (config.tie_word_embeddings && !embedding.defined() && head.defined())  // the one table under its other name
    parameters.emplace(embedding_name(config), StoredParameter{"lm_head.weight", false});
  return parameters;
}

// The tensors of a file as the model wants them: its names, (out, in), nothing redundant. Views, no copies.
inline TensorMap as_parameters(const ModelConfig& config, const TensorMap& weights) {
  TensorMap parameters;
  for (const auto& [name, stored] : as_stored(config, weights))
    parameters.emplace(name, stored.of(weights.at(stored.name)));
  return parameters;
}

// Names what does not fit, a few of each kind: a checkpoint of another model would otherwise list hundreds.
class Mismatches {
 public:
  void add(const std::string& text) {
    if (++count_ <= kShown) text_ += (count_ == 1 ? "" : "; ") + text;
  }
  bool any() const { return count_ > 0; }
  std::string text() const { return count_ > kShown ? c10::str(text_, "; and ", count_ - kShown, " more") : text_; }

 private:
  static constexpr int kShown = 4;
  int count_ = 0;
  std::string text_;
};

inline void check_fit(const std::filesystem::path& dir, const ModelConfig& config, const TensorMap& parameters,
                      const TensorMap& found) {
  Mismatches mismatches;
  for (const auto& [name, parameter] : parameters) {
    const auto tensor = found.find(name);
    if (tensor == found.end()) {
      mismatches.add(c10::str(name, " ", parameter.sizes(), " is missing"));
    } else if (tensor->second.sizes() != parameter.sizes()) {
      mismatches.add(c10::str(name, " is ", tensor->second.sizes(), " but must be ", parameter.sizes()));
    } else if (!tensor->second.is_floating_point()) {
      mismatches.add(c10::str(name, " holds ", tensor->second.scalar_type(), ", no floating-point numbers"));
    }
  }
  for (const auto& [name, tensor] : found) {
    if (parameters.count(name) == 0) mismatches.add(c10::str(name, " ", tensor.sizes(), " is not part of the model"));
  }
  if (mismatches.any()) {
    throw lora::CheckpointError(dir, "the tensors do not fit ", architecture_name(config.architecture),
                                " as config.json describes it: ", mismatches.text());
  }
}

inline const char* dtype_name(torch::ScalarType dtype) {
  switch (dtype) {
    case torch::kFloat:
      return "float32";
    case torch::kBFloat16:
      return "bfloat16";
    case torch::kHalf:
      return "float16";
    case torch::kDouble:
      return "float64";
    default:
      TORCH_CHECK_VALUE(false, "a model cannot be saved as ", dtype);
  }
}

// What a directory holds beside the weights and config.json.
inline const std::vector<std::string>& companion_files() {
  static const std::vector<std::string> names = {
      "generation_config.json",   "tokenizer.json",      "tokenizer_config.json",
      "tokenizer.model",          "vocab.json",          "special_tokens_map.json",
      "added_tokens.json",        "chat_template.jinja", "merges.txt",
      "additional_chat_templates"};
  return names;
}

}  // namespace detail

/// What config.json says, corrected by the weights of the directory: a head that config.json ties to the embedding
/// while the file holds a table for each, and they differ, is not tied, as in transformers. Warns of it.
inline ModelConfig read_config(const std::filesystem::path& dir, const TensorMap& weights) {
  auto config = read_config(dir);
  if (!config.tie_word_embeddings) return config;
  const auto [embedding, head] = detail::embedding_and_head(config, weights);
  if (!embedding.defined() || !head.defined() || torch::equal(embedding, head)) return config;
  TORCH_WARN(dir.string(), ": config.json ties the head to the embedding, but the file holds two different tables, ",
             detail::embedding_name(config), " and lm_head.weight; both are used as they are");
  config.tie_word_embeddings = false;
  return config;
}

namespace detail {

/// A model that is about to be loaded from a directory of which weights are in few bits: with memory for the others.
inline LanguageModel model_for_few_bits(const std::filesystem::path& dir, const ModelConfig& config,
                                        const TensorMap& weights, torch::ScalarType dtype) {
  for (const auto& [name, tensor] : weights) {
    const bool has_numbers = tensor.dim() == 2 && tensor.is_floating_point();
    if (has_numbers && is_stored_transposed(config, parameter_name(config, name)))
      throw lora::CheckpointError(dir, name, " has numbers, and as GPT-2's files have them, while other layers are in ",
                                  "few bits; of GPT-2 all linear layers have to be so");
  }
  auto model = make_model(config);
  for (auto& [name, parameter] : stored_parameters(*model)) {
    const bool is_packed = lora::is_bitsandbytes_weight(name, weights);
    parameter.set_data(is_packed ? torch::zeros({}, dtype).expand(parameter.sizes())
                                 : torch::empty(parameter.sizes(), dtype));
    parameter.requires_grad_(false);
  }
  return model;
}

/// Loads a directory of which weights are in few bits, as they are; the tables are held as the format says.
inline LanguageModel load_quantized_model(const std::filesystem::path& dir, const WeightFormat& format) {
  TORCH_CHECK_VALUE(!format.layers, dir.string(), " holds layers in few bits already; leave --quantize out");
  LanguageModel model;
  ModelConfig config;
  {
    const auto weights = read_weights(dir);
    config = read_config(dir, weights);
    model = model_for_few_bits(dir, config, weights, format.dtype);
  }
  const auto file = weight_file(dir);
  if (format.tables) {
    std::vector<std::string> tables{layer_name(embedding_name(config))};
    if (!model->is_tied()) tables.push_back("lm_head");
    lora::load_quantized(*model, file, *format.tables, lora::QuantizeOptions().target_modules(tables));
  } else {
    lora::load_quantized(*model, file);
  }
  give_back_freed_memory();
  model->eval();
  return model;
}

}  // namespace detail

/// Loads a Hugging Face directory for use or for adapters: in eval mode and frozen.
///
/// Where type and device are those of the file, the parameters are the mapped file itself: nothing is copied or read
/// until it is used. Otherwise one tensor after the other is converted. Where weights are held in few bits, tensors are
/// read from the file and not mapped, so that beside the result one of them is in memory at a time. Those that are in
/// few bits in the files stay so.
/// Throws lora::CheckpointError for an unsupported config.json, and for tensors that are missing, misshapen or not part
/// of the model, naming them; beside weights in few bits no tensor may be there that is no part of the model, and no
/// other name than the model's.
inline LanguageModel load_model(const std::filesystem::path& dir, const WeightFormat& format, torch::Device device) {
  if (holds_few_bits(dir)) {
    auto model = detail::load_quantized_model(dir, format);
    model->to(device);
    return model;
  }
  LanguageModel model;
  std::map<std::string, detail::StoredParameter> stored;
  {
    const auto weights = read_weights(dir);
    const auto config = read_config(dir, weights);
    if (config.in_few_bits)
      throw lora::CheckpointError(dir, "config.json says that weights are in few bits, but none is in the files");
    model = make_model(config);
    const auto found = detail::as_parameters(model->config, weights);
    detail::check_fit(dir, model->config, detail::stored_parameters(*model), found);
    if (!format.is_quantized()) {
      fill_weights(*model, format, [&](const std::string& name) { return found.at(name).to(device, format.dtype); });
      return model;
    }
    stored = detail::as_stored(model->config, weights);
  }
  const auto reader = weight_reader(dir);
  fill_weights(*model, format, [&](const std::string& name) {
    const auto& place = stored.at(name);
    return place.of(reader.read(place.name)).to(device, format.dtype);
  });
  return model;
}

/// What has changed in a model since its config.json was written.
struct ConfigChanges {
  std::optional<torch::ScalarType> dtype;
  std::optional<bool> tie_word_embeddings;
  nlohmann::ordered_json quantization_config;  ///< null where no weight is in few bits
};

/// Copies the tokenizer and its companions and writes config.json last: only a complete directory can be loaded. Both
/// directories exist. Throws lora::CheckpointError or std::filesystem::filesystem_error when a file cannot be written.
inline void copy_model_files(const std::filesystem::path& source_dir, const std::filesystem::path& target_dir,
                             const ConfigChanges& changes) {
  using CopyOptions = std::filesystem::copy_options;
  for (const auto& name : detail::companion_files()) {
    std::filesystem::remove_all(target_dir / name);  // of a model that was in the target
    if (std::filesystem::exists(source_dir / name))
      std::filesystem::copy(source_dir / name, target_dir / name, CopyOptions::recursive);
  }
  std::ifstream source(source_dir / "config.json");
  auto config = nlohmann::ordered_json::parse(source);
  const char* dtype_key = config.contains("dtype") ? "dtype" : "torch_dtype";  // since transformers 5, and before
  if (changes.dtype) config[dtype_key] = detail::dtype_name(*changes.dtype);
  if (changes.tie_word_embeddings) config["tie_word_embeddings"] = *changes.tie_word_embeddings;
  config.erase("quantization_config");  // of a model that was in few bits
  if (!changes.quantization_config.is_null()) config["quantization_config"] = changes.quantization_config;
  write_json(target_dir / "config.json", config);
}

/// Throws lora::CheckpointError when the target is the directory that the model came from.
inline void check_target(const std::filesystem::path& source_dir, const std::filesystem::path& target_dir) {
  if (std::filesystem::exists(target_dir) && std::filesystem::equivalent(source_dir, target_dir))
    throw lora::CheckpointError(target_dir, "is the directory the model came from; name another one");
}

/// Makes an empty or existing directory ready to receive a model; it must not be the one the model came from.
inline void prepare_target(const std::filesystem::path& source_dir, const std::filesystem::path& target_dir) {
  std::filesystem::create_directories(target_dir);
  check_target(source_dir, target_dir);
}

/// Removes what makes an earlier model of the directory loadable, so that none is ever loaded that is half the earlier
/// one and half the new one. To be called when the new files are complete but not yet under their names.
inline void remove_earlier_model(const std::filesystem::path& target_dir) {
  for (const auto* name : {"config.json", kWeights, kWeightsIndex}) std::filesystem::remove(target_dir / name);
}

/// Writes the model as a Hugging Face directory that Python's transformers loads: model.safetensors in the model's own
/// dtype, and from `source_dir`, which the model was loaded from, config.json and the tokenizer files.
/// A model that was in the target is replaced. Throws lora::CheckpointError when the target cannot be written or is
/// `source_dir` itself.
inline void save_model(LanguageModelImpl& model, const std::filesystem::path& source_dir,
                       const std::filesystem::path& target_dir) {
  prepare_target(source_dir, target_dir);
  auto tensors = detail::stored_parameters(model);
  for (auto& [name, tensor] : tensors)
    tensor = detail::is_stored_transposed(model.config, name) ? tensor.detach().t() : tensor.detach();
  lora::SafetensorsWriter writer(target_dir / kWeights, lora::tensor_infos(tensors));
  for (const auto& [name, tensor] : tensors) writer.write(name, tensor);
  remove_earlier_model(target_dir);
  writer.finish();
  copy_model_files(source_dir, target_dir, {model.lm_head->weight.scalar_type(), model.is_tied(), nullptr});
}

}  // namespace gpt
