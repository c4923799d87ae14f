// Hugging Face directories of tiny models with random weights, for tests of what reads them.
#pragma once

#include "support/testing.hpp"

#include <filesystem>
#include <fstream>
#include <string>

#include <nlohmann/json.hpp>

#include "checkpoint.hpp"

namespace testing {

inline const nlohmann::json kLlamaJson = {
    {"architectures", {"LlamaForCausalLM"}},
    {"model_type", "llama"},
    {"vocab_size", 31},
    {"hidden_size", 24},
    {"intermediate_size", 40},
    {"num_hidden_layers", 2},
    {"num_attention_heads", 6},
    {"num_key_value_heads", 2},
    {"max_position_embeddings", 160},
    {"rms_norm_eps", 1e-5},
    {"rope_theta", 100.0},
    {"tie_word_embeddings", false},
    {"eos_token_id", 2},
    {"torch_dtype", "float32"},
};

inline const nlohmann::json kGPT2Json = {
    {"architectures", {"GPT2LMHeadModel"}},
    {"model_type", "gpt2"},
    {"vocab_size", 31},
    {"n_embd", 24},
    {"n_layer", 2},
    {"n_head", 3},
    {"n_positions", 160},
    {"eos_token_id", {2, 5}},
    {"dtype", "float32"},
};

inline void write_text(const std::filesystem::path& file, const std::string& text) { std::ofstream(file) << text; }

// Random tensors under the names and in the shapes that a checkpoint of this configuration has.
inline gpt::TensorMap random_weights(const gpt::ModelConfig& config) {
  torch::manual_seed(7);
  gpt::TensorMap weights;
  for (const auto& [name, parameter] : gpt::detail::stored_parameters(*gpt::make_model(config))) {
    const auto stored = gpt::detail::is_stored_transposed(config, name) ? parameter.t() : parameter;
    const bool is_norm = parameter.dim() == 1 && gpt::detail::ends_with(name, "weight");
    weights[name] = torch::randn(stored.sizes()) * 0.3 + (is_norm ? 1.0 : 0.0);
  }
  return weights;
}

// A Hugging Face directory of its own, with random weights.
class ModelFolder {
 public:
  explicit ModelFolder(const nlohmann::json& config) {
    write_text(path() / "config.json", config.dump());
    weights = random_weights(gpt::read_config(path()));
    write();
  }

  void write() const { lora::write_safetensors(path() / "model.safetensors", weights); }
  /// The same in two files with an index, in place of the one.
  void split() const {
    gpt::TensorMap shards[2];
    nlohmann::json map;
    for (const auto& [name, tensor] : weights) {
      const bool second = name > "model.layers.1";
      shards[second][name] = tensor;
      map[name] = second ? "b.safetensors" : "a.safetensors";
    }
    lora::write_safetensors(path() / "a.safetensors", shards[0]);
    lora::write_safetensors(path() / "b.safetensors", shards[1]);
    write_text(path() / "model.safetensors.index.json", nlohmann::json{{"weight_map", map}}.dump());
    std::filesystem::remove(path() / "model.safetensors");
  }
  const std::filesystem::path& path() const { return folder_.path(); }
  gpt::LanguageModel load() const { return gpt::load_model(path(), torch::kFloat, torch::kCPU); }
  std::string load_error() const {
    return error_of([&] { load(); });
  }

  gpt::TensorMap weights;

 private:
  TemporaryFolder folder_;
};

inline nlohmann::json changed(nlohmann::json config, const nlohmann::json& changes) {
  config.update(changes);
  return config;
}

// For GENERATE, which cannot hold JSON.
inline nlohmann::json config_json(const std::string& kind) {
  if (kind == "gpt2") return kGPT2Json;
  if (kind == "llama tied") return changed(kLlamaJson, {{"tie_word_embeddings", true}});
  if (kind == "llama biased") return changed(kLlamaJson, {{"attention_bias", true}, {"mlp_bias", true}});
  return kLlamaJson;
}

inline torch::Tensor random_ids(int64_t batch, int64_t length) {
  torch::manual_seed(11);
  return torch::randint(31, {batch, length}, torch::kLong);
}

}  // namespace testing
