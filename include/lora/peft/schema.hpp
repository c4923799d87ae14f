#pragma once

#include <lora/files/json.hpp>
#include <lora/method/all.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <array>
#include <cctype>
#include <string>
#include <string_view>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Keeps the order of an object's keys: in rank_pattern and alpha_pattern the first match counts.
using PeftJson = nlohmann::ordered_json;

/// What a field of adapter_config.json means to this library.
enum class PeftEffect {
  kRead,         ///< part of LoRAConfig
  kNone,         ///< says nothing about the result: information, or the details of something that another field selects
  kTraining,     ///< changes how PEFT trains, not what the trained adapter does
  kUnsupported,  ///< changes the result, unless it has its default or is switched off
};

struct PeftField {
  const char* name;
  const char* standard;  ///< PEFT's default, as JSON
  PeftEffect effect;
};

/// The version of PEFT whose fields these are, and behind it who wrote the file, where PEFT's own builds between two
/// releases have the commit.
inline constexpr const char* kPeftVersion = "0.21.2@lora";

/// All fields of PEFT's LoraConfig but the flags that select a method; these are in the methods' own descriptions.
inline constexpr std::array<PeftField, 41> kPeftFields = {{
    {"alora_invocation_tokens", "null", PeftEffect::kUnsupported},
    {"alpha_pattern", "{}", PeftEffect::kRead},
    {"arrow_config", "null", PeftEffect::kUnsupported},
    {"auto_mapping", "null", PeftEffect::kNone},
    {"base_model_name_or_path", "null", PeftEffect::kRead},
    {"bias", "\"none\"", PeftEffect::kRead},
    {"corda_config", "null", PeftEffect::kNone},
    {"ensure_weight_tying", "false", PeftEffect::kUnsupported},
    {"eva_config", "null", PeftEffect::kNone},
    {"exclude_modules", "null", PeftEffect::kRead},
    {"fan_in_fan_out", "false", PeftEffect::kRead},
    {"inference_mode", "false", PeftEffect::kNone},
    {"init_lora_weights", "true", PeftEffect::kRead},
    {"kasa_config", "null", PeftEffect::kUnsupported},
    {"layer_replication", "null", PeftEffect::kUnsupported},
    {"layers_pattern", "null", PeftEffect::kRead},
    {"layers_to_transform", "null", PeftEffect::kRead},
    {"loftq_config", "{}", PeftEffect::kNone},
    {"lora_alpha", "8", PeftEffect::kRead},
    {"lora_bias", "false", PeftEffect::kRead},
    {"lora_dropout", "0.0", PeftEffect::kRead},
    {"lora_ga_config", "null", PeftEffect::kNone},
    {"megatron_config", "null", PeftEffect::kUnsupported},
    {"megatron_core", "\"megatron.core\"", PeftEffect::kNone},
    {"modules_to_save", "null", PeftEffect::kRead},
    {"monteclora_config", "null", PeftEffect::kTraining},
    {"peft_type", "null", PeftEffect::kRead},
    {"peft_version", "null", PeftEffect::kNone},
    {"qalora_group_size", "16", PeftEffect::kNone},
    {"r", "8", PeftEffect::kRead},
    {"rank_pattern", "{}", PeftEffect::kRead},
    {"revision", "null", PeftEffect::kNone},
    {"runtime_config", "null", PeftEffect::kNone},
    {"target_modules", "null", PeftEffect::kRead},
    {"target_parameters", "null", PeftEffect::kRead},
    {"task_type", "null", PeftEffect::kRead},
    {"trainable_token_indices", "null", PeftEffect::kUnsupported},
    {"use_bdlora", "null", PeftEffect::kUnsupported},
    {"use_qalora", "false", PeftEffect::kUnsupported},
    {"use_rslora", "false", PeftEffect::kRead},
    {"velora_config", "null", PeftEffect::kTraining},
}};

/// The entry of kPeftFields, or null.
inline const PeftField* peft_field(std::string_view name) {
  const auto* found =
      std::find_if(kPeftFields.begin(), kPeftFields.end(), [&](const auto& field) { return name == field.name; });
  return found == kPeftFields.end() ? nullptr : found;
}

/// Fields that every configuration of PEFT has.
inline constexpr std::array<std::string_view, 7> kCommonFields{
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type"};

/// Whether one of PEFT's configurations has, for that method, the field of a LoRA's.
inline bool has_field(const MethodInfo& method, std::string_view name) {
  if (method.peft_fields.empty() || std::find(kCommonFields.begin(), kCommonFields.end(), name) != kCommonFields.end())
    return true;
  const auto found = (" " + std::string(method.peft_fields) + " ").find(" " + std::string(name) + " ");
  return found != std::string::npos;
}

/// The value of `bias` by which PEFT means the biases of the adapted layers: "lora_only".
inline std::string only_name(const MethodInfo& method) {
  std::string name(method.peft_type);
  for (auto& letter : name) letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
  return name + "_only";
}

/// Whether a field selects one of the methods.
inline bool is_method_flag(std::string_view name) {
  const auto& methods = all_methods();
  return std::any_of(methods.begin(), methods.end(), [&](const auto& m) { return name == m.info().peft_flag; });
}

/// null, false and what is empty ask for nothing.
inline bool is_off(const PeftJson& value) {
  return value.is_null() || value == false || ((value.is_structured() || value.is_string()) && value.empty());
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
