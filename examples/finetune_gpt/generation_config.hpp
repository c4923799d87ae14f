// How a model wants to be continued: generation_config.json of a Hugging Face directory, read as transformers does.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "config.hpp"

namespace gpt {

inline constexpr const char* kGenerationConfig = "generation_config.json";

/// The defaults are those of transformers, for files that say nothing.
struct GenerationConfig {
  std::filesystem::path file;          ///< where it was read
  std::vector<int64_t> eos_token_ids;  ///< each of them ends a text
  bool do_sample = false;              ///< false: always the most likely token
  double temperature = 1;
  int64_t top_k = 50;
  double top_p = 1;
  double repetition_penalty = 1;
  std::optional<int64_t> max_new_tokens;
  std::vector<std::string> ignored;  ///< what the file asks for and nobody does here, as `"num_beams": 4`
};

namespace detail {

/// What else changes a text in transformers, with the values (beside null) that leave it as it is.
inline const std::vector<std::pair<const char*, nlohmann::json>>& foreign_settings() {
  static const std::vector<std::pair<const char*, nlohmann::json>> settings = {
      {"num_beams", 1},
      {"num_beam_groups", 1},
      {"penalty_alpha", 0},
      {"no_repeat_ngram_size", 0},
      {"bad_words_ids", nullptr},
      {"min_length", 0},
      {"min_new_tokens", 0},
      {"min_p", 0},
      {"top_h", nullptr},
      {"typical_p", 1},
      {"epsilon_cutoff", 0},
      {"eta_cutoff", 0},
      {"forced_bos_token_id", nullptr},
      {"forced_eos_token_id", nullptr},
      {"suppress_tokens", nullptr},
      {"begin_suppress_tokens", nullptr},
      {"sequence_bias", nullptr},
      {"guidance_scale", 1},
      {"exponential_decay_length_penalty", nullptr},
      {"watermarking_config", nullptr},
      {"stop_strings", nullptr},
      {"max_time", nullptr},
  };
  return settings;
}

}  // namespace detail

/// Reads generation_config.json, or what config.json says where there is none. When `adapter_dir` holds one (of an
/// adapter that was trained to end its texts with another token), that one counts.
/// Throws lora::CheckpointError that names file and key.
inline GenerationConfig read_generation_config(const std::filesystem::path& model_dir,
                                               const std::filesystem::path& adapter_dir = {}) {
  GenerationConfig config;
  config.file = model_dir / kGenerationConfig;
  const bool is_of_adapter = !adapter_dir.empty() && std::filesystem::exists(adapter_dir / kGenerationConfig);
  if (is_of_adapter) config.file = adapter_dir / kGenerationConfig;
  if (!std::filesystem::exists(config.file)) config.file = model_dir / "config.json";
  const detail::ConfigReader json(config.file);
  config.eos_token_ids = json.ids("eos_token_id");
  config.do_sample = json.get_or("do_sample", config.do_sample);
  config.temperature = json.get_or("temperature", config.temperature);
  config.top_k = json.get_or("top_k", config.top_k);
  config.top_p = json.get_or("top_p", config.top_p);
  config.repetition_penalty = json.get_or("repetition_penalty", config.repetition_penalty);
  if (json.has("max_new_tokens")) config.max_new_tokens = json.positive("max_new_tokens");
  const auto content = read_json(config.file);
  for (const auto& [key, neutral] : detail::foreign_settings()) {
    if (json.has(key) && content[key] != neutral) config.ignored.push_back(c10::str("\"", key, "\": ", content[key]));
  }
  return config;
}

/// Throws c10::ValueError when a token that ends texts is none of the model's: it could never come, so no text would
/// end.
inline void check_ends(const GenerationConfig& config, int64_t rows) {
  for (const auto id : config.eos_token_ids) {
    TORCH_CHECK_VALUE(id >= 0 && id < rows, config.file.string(), ": \"eos_token_id\" ", id,
                      " is no token of the model, whose embedding has ", rows, " rows (0 to ", rows - 1,
                      "); correct the file");
  }
}

/// Writes generation_config.json into `target_dir`: that of `config`, with `ends` added to what ends a text. Does
/// nothing when all of them do already. Throws lora::CheckpointError when it cannot be written.
inline void write_ends(const GenerationConfig& config, const std::vector<int64_t>& ends,
                       const std::filesystem::path& target_dir) {
  auto all = config.eos_token_ids;
  for (const auto id : ends) {
    if (std::find(all.begin(), all.end(), id) == all.end()) all.push_back(id);
  }
  if (all.size() == config.eos_token_ids.size()) return;
  auto content = nlohmann::ordered_json::object();
  std::ifstream source(config.file);
  const auto found = nlohmann::ordered_json::parse(source);
  const bool is_all = config.file.filename() == kGenerationConfig;
  static const std::set<std::string> about_texts = {"bos_token_id", "pad_token_id", "do_sample",         "temperature",
                                                    "top_k",        "top_p",        "repetition_penalty"};
  for (const auto& item : found.items()) {
    if (is_all || about_texts.count(item.key()) > 0) content[item.key()] = item.value();
  }
  content.erase("_from_model_config");  // transformers would take such a file for a copy of config.json
  content["eos_token_id"] = all;
  write_json(target_dir / kGenerationConfig, content);
}

}  // namespace gpt
