// Folds an adapter into the model it was trained on: base directory + PEFT directory -> Hugging Face directory.
//
// The weights go from the mapped files of the base to the files of the result, one tensor in memory at a time, so a
// model that is larger than the memory can be merged. The arithmetic is the library's: float, rounded once.
#pragma once

#include <torch/torch.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <lora/files/bitsandbytes.hpp>
#include <lora/lora.hpp>
#include <lora/peft/checkpoint.hpp>

#include "checkpoint.hpp"
#include "generation_config.hpp"

namespace gpt {

namespace detail {

/// Tensors by the name of the file that holds them; the result has the same files.
using Shards = std::map<std::string, TensorMap>;

inline Shards read_shards(const std::filesystem::path& base) {
  if (std::filesystem::exists(base / kWeights)) return {{kWeights, read_weights(base)}};
  Shards shards;
  const auto tensors = read_weights(base);
  const auto index = read_json(base / kWeightsIndex);
  for (const auto& [name, tensor] : tensors) shards[index["weight_map"][name].get<std::string>()][name] = tensor;
  return shards;
}

/// Weights of the base that are in few bits, as what they stand for.
class PackedWeights {
 public:
  /// Takes them out of the shards, and leaves tensors without memory in their place, as a model that was never in few
  /// bits has them in its files.
  PackedWeights(const ModelConfig& config, Shards& shards) {
    TensorMap all;
    for (const auto& [file, tensors] : shards) all.insert(tensors.begin(), tensors.end());
    if (!holds_few_bits(all)) return;
    const auto [embedding, head] = embedding_and_head(config, all);
    const auto& table = embedding.defined() ? embedding : head;
    const auto dtype = table.defined() ? table.scalar_type() : torch::kFloat;  // else missing, which is said later
    for (const auto& [name, tensor] : all) {
      if (!lora::is_bitsandbytes_weight(name, all)) continue;
      const bool transposed = is_stored_transposed(config, parameter_name(config, name));
      const auto& weight = weights_.emplace(name, Packed{lora::read_bitsandbytes_weight(name, all).weight, transposed})
                               .first->second.weight;
      const auto shape = torch::zeros({}, dtype).expand(weight->sizes());
      for (auto& [file, tensors] : shards) {
        const bool is_here = tensors.count(name) > 0;
        for (const auto& part : lora::bitsandbytes_names(name)) tensors.erase(part);
        if (is_here) tensors.emplace(name, transposed ? shape.t() : shape);
      }
    }
  }

  /// The numbers of a tensor of the shards, of a weight in few bits in float.
  torch::Tensor numbers(const std::string& stored_name, const torch::Tensor& tensor) const {
    const auto found = weights_.find(stored_name);
    if (found == weights_.end()) return tensor;
    const auto numbers = found->second.weight->dense();
    return found->second.transposed ? numbers.t() : numbers;
  }

 private:
  struct Packed {
    std::shared_ptr<const lora::QuantizedWeight> weight;  // (out, in)
    bool transposed;                                      // not so in the files of such a model
  };

  std::map<std::string, Packed> weights_;
};

/// The merged tensors of a model, computed when they are asked for.
class MergedWeights {
 public:
  /// `found` are the tensors of the base under the names of the model.
  MergedWeights(const std::filesystem::path& base, const ModelConfig& model_config, const TensorMap& found,
                const std::filesystem::path& adapter)
      : model_(make_model(model_config)), adapters_(load_adapter(base, found, adapter)) {
    for (const auto& part : adapter_->parts) {
      for (const auto& name : parameters_of(part)) parts_[name] = part;
    }
  }

  const ModelConfig& config() const { return model_->config; }
  size_t count() const { return adapters_.targets().size(); }

  /// A head that is adapted or trained apart from the embedding, or not together with it, cannot stay tied: it gets a
  /// tensor of its own, made from the embedding's.
  bool separates_head() const {
    if (!config().tie_word_embeddings) return false;
    for (const auto& item : model_->named_parameters()) {
      if (item.value().is_same(model_->embedding().weight) && changes_alone(item.key())) return true;
    }
    return false;
  }
  bool is_embedding(const std::string& stored_name) const {
    const auto parameters = model_->named_parameters();
    const auto* weight = parameters.find(parameter_name(config(), stored_name));
    return weight != nullptr && weight->is_same(model_->embedding().weight);
  }

  /// The tensor as it is in the merged model, in the layout and type of the file.
  torch::Tensor at(const std::string& stored_name, const torch::Tensor& tensor) const {
    const auto name = parameter_name(config(), stored_name);
    const bool transposed = is_stored_transposed(config(), name);
    const auto part = parts_.find(name);
    if (part == parts_.end()) return tensor;
    const auto& [site, method] = std::tie(part->second.site, part->second.method);
    const auto merged = site->merged(transposed ? tensor.t() : tensor, {{adapters_.names().front(), method}});
    return transposed ? merged.t() : merged;
  }

  static constexpr const char* kHead = "lm_head.weight";

 private:
  /// Gives the model the mapped tensors, of which nothing is read before it is used, and adapts it.
  lora::Adapters load_adapter(const std::filesystem::path& base, const TensorMap& found,
                              const std::filesystem::path& adapter) {
    auto parameters = stored_parameters(*model_);
    check_fit(base, config(), parameters, found);
    for (auto& [name, parameter] : parameters) parameter.set_data(found.at(name));
    return lora::load_adapter(*model_, adapter);
  }

  /// The names of what a merged tensor stands for: its layer's own, or, for a parameter, all that are tied.
  std::vector<std::string> parameters_of(const lora::AdapterPart& part) const {
    const auto& name = part.changed();
    if (!is_parameter(part)) return {part.role == lora::AdapterPart::Role::kLayer ? name + ".weight" : name};
    std::vector<std::string> names;
    for (const auto& item : model_->named_parameters()) {
      if (item.value().is_same(part.site->weight())) names.push_back(item.key());
    }
    return names;
  }

  static bool is_parameter(const lora::AdapterPart& part) { return part.site->kind() == "Parameter"; }

  bool changes_alone(const std::string& parameter) const {
    const auto part = parts_.find(parameter);
    return part != parts_.end() && !is_parameter(part->second);
  }

  LanguageModel model_;
  lora::Adapters adapters_;
  std::shared_ptr<const lora::Adapter> adapter_ = adapters_.adapter(adapters_.names().front());
  std::map<std::string, lora::AdapterPart> parts_;
};

/// Gives the embedding its own name where the one table that it shares with the head is in the file under the head's.
inline void name_embedding(const ModelConfig& config, const TensorMap& weights, Shards& shards) {
  const auto [embedding, head] = embedding_and_head(config, weights);
  if (!config.tie_word_embeddings || embedding.defined()) return;
  for (auto& [file, tensors] : shards) {
    auto table = tensors.extract(MergedWeights::kHead);
    if (table.empty()) continue;
    table.key() = embedding_name(config);
    tensors.insert(std::move(table));
  }
}

/// Adds a head of its own beside the embedding, and drops a redundant copy of the tied one.
inline void separate_head(const MergedWeights& merged, Shards& shards) {
  for (auto& [file, tensors] : shards) tensors.erase(MergedWeights::kHead);
  for (auto& [file, tensors] : shards) {
    for (const auto& [name, tensor] : tensors) {
      if (!merged.is_embedding(name)) continue;
      tensors.emplace(MergedWeights::kHead, tensor);
      return;
    }
  }
}

/// The numbers in the type that the file has for them, which only those of few bits are not in yet.
inline torch::Tensor rounded(const torch::Tensor& numbers, const std::string& name, const torch::Tensor& as) {
  if (numbers.scalar_type() == as.scalar_type()) return numbers;
  const auto result = numbers.to(as.scalar_type());
  TORCH_CHECK(result.isfinite().all().item<bool>(), name, " is too large for ", as.scalar_type(), " when it is merged");
  return result;
}

inline std::unique_ptr<lora::SafetensorsWriter> write_shard(const std::filesystem::path& file, const TensorMap& tensors,
                                                            const PackedWeights& packed, const MergedWeights& merged) {
  std::filesystem::create_directories(file.parent_path());
  auto writer = std::make_unique<lora::SafetensorsWriter>(file, lora::tensor_infos(tensors));
  for (const auto& [name, tensor] : tensors)
    writer->write(name, rounded(merged.at(name, packed.numbers(name, tensor)), name, tensor));
  return writer;
}

inline nlohmann::json make_index(const std::filesystem::path& base, const Shards& shards) {
  nlohmann::json index = read_json(base / kWeightsIndex);
  int64_t size = 0;
  index["weight_map"].clear();
  for (const auto& [file, tensors] : shards) {
    for (const auto& [name, tensor] : tensors) {
      index["weight_map"][name] = file;
      size += static_cast<int64_t>(tensor.nbytes());
    }
  }
  index["metadata"]["total_size"] = size;
  return index;
}

}  // namespace detail

/// Writes the model of `base` with the adapter of a PEFT directory folded in to `out`, file by file with one tensor in
/// memory at a time, and returns how many layers were adapted. Weights in few bits become the numbers that they stand
/// for, in the type of the embedding. A model that was in `out` is replaced.
///
/// Errors: lora::CheckpointError and what lora::load_adapter throws, with the earlier model of `out` as it was, also
/// where an update is not finite.
inline size_t merge_files(const std::filesystem::path& base, const std::filesystem::path& adapter,
                          const std::filesystem::path& out) {
  auto shards = detail::read_shards(base);
  const detail::PackedWeights packed(read_config(base), shards);
  TensorMap weights;
  for (const auto& [file, tensors] : shards) weights.insert(tensors.begin(), tensors.end());
  const auto model_config = read_config(base, weights);
  detail::name_embedding(model_config, weights, shards);
  const detail::MergedWeights merged(base, model_config, detail::as_parameters(model_config, weights), adapter);
  if (merged.separates_head()) detail::separate_head(merged, shards);

  // No file appears under its name before all are written: an update that is not finite leaves nothing behind.
  prepare_target(base, out);
  std::vector<std::unique_ptr<lora::SafetensorsWriter>> writers;
  for (const auto& [file, tensors] : shards)
    writers.push_back(detail::write_shard(out / file, tensors, packed, merged));
  const bool is_sharded = shards.count(kWeights) == 0;
  const auto index = is_sharded ? detail::make_index(base, shards) : nlohmann::json();
  remove_earlier_model(out);
  for (const auto& writer : writers) writer->finish();
  if (is_sharded) write_json(out / kWeightsIndex, index);
  ConfigChanges changes;
  const bool is_wrong = read_config(base).tie_word_embeddings && !model_config.tie_word_embeddings;
  if (merged.separates_head() || is_wrong) changes.tie_word_embeddings = false;
  copy_model_files(base, out, changes);
  const auto generation = adapter / kGenerationConfig;  // of an adapter that ends its texts in its own way
  if (std::filesystem::exists(generation)) {
    std::filesystem::copy_file(generation, out / kGenerationConfig, std::filesystem::copy_options::overwrite_existing);
  }
  return merged.count();
}

}  // namespace gpt
