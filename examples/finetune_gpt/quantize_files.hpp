// Holds a model in few bits for good: a Hugging Face directory whose weights are as bitsandbytes keeps them.
#pragma once

#include <torch/torch.h>

#include <filesystem>
#include <functional>
#include <regex>
#include <string>
#include <vector>

#include <lora/lora.hpp>

#include "checkpoint.hpp"
#include "common.hpp"
#include "language_model.hpp"
#include "weight_format.hpp"

namespace gpt {

struct QuantizeFilesOptions {
  std::string scheme = "nf4";      ///< of the linear layers but the head: nf4, fp4 or int8
  std::string int8;                ///< a regular expression: those of them that are held in int8 in any case
  std::string dtype = "bfloat16";  ///< of everything else

  bool is_mixed() const { return !int8.empty() && scheme != "int8"; }
};

namespace detail {

inline std::vector<std::string> linear_layers(const LanguageModelImpl& model) {
  std::vector<std::string> names;
  for (const auto& item : model.named_modules()) {
    const auto* linear = item.value()->as<torch::nn::LinearImpl>();
    if (linear != nullptr && linear != model.lm_head.get()) names.push_back(item.key());
  }
  return names;
}

/// Those of the names that the expression matches from end to end. Throws c10::ValueError when there is none.
inline std::vector<std::string> matching(const std::vector<std::string>& names, const std::string& expression) {
  std::vector<std::string> found;
  try {
    const std::regex pattern(expression);
    for (const auto& name : names) {
      if (std::regex_match(name, pattern)) found.push_back(name);
    }
  } catch (const std::regex_error& error) {
    TORCH_CHECK_VALUE(false, "--int8: \"", expression, "\" is no regular expression: ", error.what());
  }
  TORCH_CHECK_VALUE(!found.empty(), "--int8: \"", expression,
                    "\" matches no linear layer from end to end; the first is ", names.front());
  return found;
}

/// What transformers has to know of such a directory; nothing where it cannot read it, as where 4 and 8 bits are mixed.
inline nlohmann::ordered_json quantization_config(const QuantizeFilesOptions& options) {
  if (options.is_mixed()) return nullptr;
  const bool is_int8 = options.scheme == "int8";
  nlohmann::ordered_json config{{"quant_method", "bitsandbytes"},
                                {"load_in_8bit", is_int8},
                                {"load_in_4bit", !is_int8},
                                {"llm_int8_skip_modules", {"lm_head"}}};
  if (is_int8) return config;
  config["bnb_4bit_quant_type"] = options.scheme;
  config["bnb_4bit_use_double_quant"] = true;
  config["bnb_4bit_compute_dtype"] = options.dtype;
  return config;
}

}  // namespace detail

/// Holds the linear layers of a model but the head in few bits; with passes, whose inputs the codes are chosen by
/// (`lora::QuantizeOptions::calibration`). Those in int8 come first, so that the passes see what they became.
/// Throws c10::ValueError for an expression that matches nothing, and for passes that nothing is chosen by.
inline lora::QuantizeReport quantize_layers(LanguageModelImpl& model, const QuantizeFilesOptions& options,
                                            const std::function<void()>& passes) {
  const auto layers = detail::linear_layers(model);
  lora::QuantizeReport first;
  if (options.is_mixed()) {
    const auto chosen = detail::matching(layers, options.int8);
    TORCH_CHECK_VALUE(chosen.size() < layers.size(), "--int8: \"", options.int8, "\" matches all linear layers; ",
                      "--quantize int8 says that");
    first = lora::quantize(model, lora::Int8(), lora::QuantizeOptions().target_modules(chosen));
  }
  auto report = lora::quantize(model, *parse_quantization(options.scheme),
                               lora::QuantizeOptions().target_modules(layers).calibration(passes));
  report.layers.insert(report.layers.end(), first.layers.begin(), first.layers.end());
  report.bytes_before += first.bytes_before;
  report.bytes_after += first.bytes_after;
  return report;
}

/// Writes a model with weights in few bits as a Hugging Face directory, with config.json and the tokenizer files of
/// `source_dir`, which it was loaded from. A model that was in the target is replaced. Throws lora::CheckpointError
/// when the target cannot be written or is `source_dir` itself.
inline void save_quantized_model(LanguageModelImpl& model, const QuantizeFilesOptions& options,
                                 const std::filesystem::path& source_dir, const std::filesystem::path& target_dir) {
  prepare_target(source_dir, target_dir);
  const auto written = target_dir / "model_in_few_bits.safetensors";
  lora::save_quantized(model, written);
  remove_earlier_model(target_dir);
  std::filesystem::rename(written, target_dir / kWeights);
  ConfigChanges changes{parse_dtype(options.dtype), model.is_tied(), detail::quantization_config(options)};
  copy_model_files(source_dir, target_dir, changes);
}

}  // namespace gpt
