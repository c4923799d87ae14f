// The tokens that a Hugging Face directory names, and whether the model knows the tokens it is given.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "config.hpp"
#include "generation_config.hpp"
#include "tokenizer.hpp"

namespace gpt {

/// Names such as "eos_token" with the tokens as they are spelled: those of tokenizer_config.json and, where it names
/// none, of special_tokens_map.json. Empty when there is neither file. Throws lora::CheckpointError for a damaged file.
inline std::map<std::string, std::string> read_special_tokens(const std::filesystem::path& model_dir) {
  std::map<std::string, std::string> tokens;
  for (const auto* name : {"tokenizer_config.json", "special_tokens_map.json"}) {
    if (!std::filesystem::exists(model_dir / name)) continue;
    const auto file = read_json(model_dir / name);
    for (const auto* key :
         {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"}) {
      if (!file.contains(key) || file[key].is_null()) continue;
      const auto& text = file[key].is_object() && file[key].contains("content") ? file[key]["content"] : file[key];
      if (!text.is_string()) {
        throw lora::CheckpointError(model_dir / name, "\"", key, "\" must be a token, found ", file[key].dump());
      }
      tokens.emplace(key, text.get<std::string>());
    }
  }
  return tokens;
}

/// The token that closes a text, which stands behind a completion and between two texts: "eos_token" of the tokenizer,
/// else the first that ends texts by generation_config.json.
inline std::optional<int64_t> end_token(const std::filesystem::path& model_dir, const Tokenizer& tokenizer,
                                        const GenerationConfig& config) {
  const auto tokens = read_special_tokens(model_dir);
  const auto named = tokens.find("eos_token");
  if (named != tokens.end() && tokenizer.token_id(named->second)) return tokenizer.token_id(named->second);
  return config.eos_token_ids.empty() ? std::nullopt : std::make_optional(config.eos_token_ids.front());
}

/// Throws c10::ValueError when one of `ids`, which `what` names, has no row in an embedding of `rows`: the tokenizer is
/// of another model, or tokens were added to it alone.
template <class Ids>
void check_rows(const char* what, const Ids& ids, int64_t rows, const Tokenizer& tokenizer) {
  for (const auto id : ids) {
    TORCH_CHECK_VALUE(id >= 0 && id < rows, what, " has the token \"", tokenizer.decode({id}), "\", number ", id,
                      ", but the model's embedding has ", rows, " rows (0 to ", rows - 1, ") for the ",
                      tokenizer.vocab_size(),
                      " tokens of tokenizer.json; use the tokenizer that belongs to the model, or give the embedding "
                      "the missing rows first");
  }
}

}  // namespace gpt
