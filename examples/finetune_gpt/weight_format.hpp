// How the frozen weights of a model are held: in a type of floating point, or in few bits.
#pragma once

#include <torch/torch.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <optional>
#include <set>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <lora/lora.hpp>

#include "language_model.hpp"

namespace gpt {

/// The names of `parse_quantization`.
inline const std::vector<std::string>& quantization_names() {
  static const std::vector<std::string> names{"none", "nf4", "fp4", "int8", "lossless"};
  return names;
}

/// The way of packing that such a name stands for. Throws c10::ValueError for any other name.
inline std::optional<lora::Quantization> parse_quantization(const std::string& name) {
  if (name == "none") return std::nullopt;
  if (name == "nf4") return lora::NF4();
  if (name == "fp4") return lora::FP4();
  if (name == "int8") return lora::Int8();
  TORCH_CHECK_VALUE(name == "lossless", "quantization must be none, nf4, fp4, int8 or lossless, got \"", name, "\"");
  return lora::Lossless();
}

/// What the weights of a model are when it has them.
struct WeightFormat {
  /* implicit */ WeightFormat(torch::ScalarType type) : dtype(type) {}
  /// By the names of `parse_quantization`.
  WeightFormat(torch::ScalarType type, const std::string& layers_name, const std::string& tables_name)
      : dtype(type), layers(parse_quantization(layers_name)), tables(parse_quantization(tables_name)) {}

  torch::ScalarType dtype;  ///< of what is not held in few bits, and of all that is computed
  /// The linear layers but the head, which predicts tokens.
  std::optional<lora::Quantization> layers;
  /// The embedding of the tokens, and the head, tied to it or not.
  std::optional<lora::Quantization> tables;

  bool is_quantized() const { return layers || tables; }
};

namespace detail {

/// Gives back what was freed. The allocator of glibc keeps it where something that lives lies behind, and codes do lie
/// behind the numbers that they were made of: a tenth of a large model.
inline void give_back_freed_memory() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

/// "model.layers.0.mlp.up_proj" for "model.layers.0.mlp.up_proj.weight".
inline std::string layer_name(const std::string& parameter) { return parameter.substr(0, parameter.rfind('.')); }

}  // namespace detail

/// Gives every parameter of a model its numbers, `numbers(name)` shaped as it, and holds it in its format before the
/// next one is asked for: beside what stays, one parameter is in memory at a time. The model is then frozen and in eval
/// mode. One whose weights are held in few bits computes inside of scopes of adapters only.
template <class Numbers>
void fill_weights(LanguageModelImpl& model, const WeightFormat& format, const Numbers& numbers) {
  std::set<std::string> linear;
  for (const auto& item : model.named_modules()) {
    if (item.value()->as<torch::nn::LinearImpl>() != nullptr) linear.insert(item.key());
  }
  for (auto& [name, parameter] : detail::stored_parameters(model)) {
    const bool is_table = parameter.is_same(model.embedding().weight) || parameter.is_same(model.lm_head->weight);
    const bool is_layer = !is_table && parameter.dim() == 2 && linear.count(detail::layer_name(name)) > 0;
    parameter.set_data(numbers(name));
    parameter.requires_grad_(false);
    const auto& scheme = is_table ? format.tables : format.layers;
    if (!scheme || !(is_table || is_layer)) continue;
    lora::quantize(model, *scheme, lora::QuantizeOptions().target_modules({detail::layer_name(name)}));
    detail::give_back_freed_memory();
  }
  model.eval();
}

/// The memory that the weights of a model take, in words.
inline std::string weight_memory(const lora::Report& report) {
  return fmt::format("{:.3f} GB ({:.3f} GB in float32)", static_cast<double>(report.base_bytes) / 1e9,
                     static_cast<double>(report.base) * sizeof(float) / 1e9);
}

}  // namespace gpt
