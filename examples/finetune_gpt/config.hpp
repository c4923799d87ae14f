// What config.json of a Hugging Face directory says about a model, checked once here so that the model can trust it.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <lora/files/error.hpp>

namespace gpt {

enum class Architecture {
  kLlama,  ///< LlamaForCausalLM: RMSNorm, rotary positions, grouped key/value heads, SwiGLU
  kGPT2,   ///< GPT2LMHeadModel: LayerNorm, learned positions, one packed q/k/v projection, GELU
};

/// How the frequencies of the rotary embedding are stretched for long texts.
enum class RopeScaling {
  kDefault,  ///< not at all
  kLinear,   ///< every frequency divided by `factor`
  kLlama3,   ///< long wavelengths divided by `factor`, short ones kept, those between interpolated
};

struct RopeConfig {
  RopeScaling scaling = RopeScaling::kDefault;
  double theta = 10000;
  double factor = 1;
  double low_frequency_factor = 1;   ///< kLlama3: wavelengths above original_positions / this are divided
  double high_frequency_factor = 4;  ///< kLlama3: wavelengths below original_positions / this are kept
  int64_t original_positions = 8192;
};

/// A model's sizes and switches under one set of names for both architectures.
struct ModelConfig {
  Architecture architecture = Architecture::kLlama;
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_key_value_heads = 0;  ///< a divisor of num_heads
  int64_t head_dim = 0;
  int64_t max_positions = 0;  ///< the longest text the model was trained on; for GPT-2 a hard limit
  double norm_epsilon = 1e-5;
  bool tie_word_embeddings = false;
  bool attention_bias = false;
  bool mlp_bias = false;
  double attention_dropout = 0;  ///< the three dropouts act in training mode only
  double residual_dropout = 0;
  double embedding_dropout = 0;
  bool scale_attention = true;            ///< GPT-2: divide the scores by sqrt(head_dim)
  bool scale_attention_by_layer = false;  ///< GPT-2: and by the number of the layer, counted from 1
  RopeConfig rope;
  std::vector<int64_t> eos_token_ids;
  bool in_few_bits = false;  ///< weights are in 4 or 8 bits, as bitsandbytes writes them
};

inline const char* architecture_name(Architecture architecture) {
  return architecture == Architecture::kLlama ? "LlamaForCausalLM" : "GPT2LMHeadModel";
}

/// The JSON object in a file. Throws lora::CheckpointError when the file cannot be read or holds no JSON object.
inline nlohmann::json read_json(const std::filesystem::path& file) {
  std::ifstream stream(file);
  if (!stream.good()) throw lora::CheckpointError(file, "cannot be opened");
  auto json = nlohmann::json::parse(stream, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) throw lora::CheckpointError(file, "is not a JSON object");
  return json;
}

/// Writes JSON to a file, indented, the order of keys as `json` has it. Throws lora::CheckpointError when the file
/// cannot be written.
template <class Json>
void write_json(const std::filesystem::path& file, const Json& json) {
  std::ofstream stream(file);
  stream << json.dump(2) << "\n";
  stream.close();  // which writes what is left, and may fail to
  if (!stream) throw lora::CheckpointError(file, "cannot be written");
}

namespace detail {

// Typed look-ups in one JSON file, whose errors name the file and the key.
class ConfigReader {
 public:
  explicit ConfigReader(std::filesystem::path file) : file_(std::move(file)), json_(read_json(file_)) {}
  ConfigReader(const ConfigReader& parent, const char* key) : file_(parent.file_), json_(parent.json_.at(key)) {}

  bool has(const char* key) const { return json_.contains(key) && !json_.at(key).is_null(); }
  bool is_object(const char* key) const { return has(key) && json_.at(key).is_object(); }

  template <class Value>
  Value get(const char* key) const {
    require(has(key), "has no \"", key, "\"");
    try {
      return json_.at(key).get<Value>();
    } catch (const nlohmann::json::exception&) {
      require(false, "\"", key, "\" has the wrong type: ", json_.at(key).dump());
    }
    return Value();
  }

  template <class Value>
  Value get_or(const char* key, Value fallback) const {
    return has(key) ? get<Value>(key) : fallback;
  }

  int64_t positive(const char* key) const {
    const auto value = get<int64_t>(key);
    require(value > 0, "\"", key, "\" must be positive, got ", value);
    return value;
  }

  std::vector<int64_t> ids(const char* key) const {
    if (!has(key)) return {};
    return json_.at(key).is_array() ? get<std::vector<int64_t>>(key) : std::vector<int64_t>{get<int64_t>(key)};
  }

  template <class... Parts>
  void require(bool condition, const Parts&... parts) const {
    if (!condition) throw lora::CheckpointError(file_, parts...);
  }

 private:
  std::filesystem::path file_;
  nlohmann::json json_;
};

inline Architecture read_architecture(const ConfigReader& json) {
  auto name = json.get_or<std::string>("model_type", "");
  if (name == "llama") name = "LlamaForCausalLM";
  if (name == "gpt2") name = "GPT2LMHeadModel";
  if (json.has("architectures")) {
    const auto names = json.get<std::vector<std::string>>("architectures");
    if (!names.empty()) name = names.front();
  }
  for (auto known : {Architecture::kLlama, Architecture::kGPT2}) {
    if (name == architecture_name(known)) return known;
  }
  json.require(false, "unknown architecture \"", name, "\"; supported: LlamaForCausalLM, GPT2LMHeadModel");
  return {};
}

// Both spellings: "rope_theta" beside "rope_scaling" (until transformers 4), and one "rope_parameters" (since 5).
inline RopeConfig read_rope(const ConfigReader& json, int64_t max_positions) {
  RopeConfig rope;
  rope.theta = json.get_or<double>("rope_theta", rope.theta);
  const char* key = json.is_object("rope_parameters") ? "rope_parameters" : "rope_scaling";
  if (!json.is_object(key)) return rope;
  const ConfigReader scaling(json, key);
  rope.theta = scaling.get_or<double>("rope_theta", rope.theta);
  const auto type = scaling.get_or<std::string>("rope_type", scaling.get_or<std::string>("type", "default"));
  json.require(type == "default" || type == "linear" || type == "llama3", "unknown rotary embedding \"", type,
               "\"; supported: default, linear, llama3");
  json.require(scaling.get_or<double>("partial_rotary_factor", 1.0) == 1.0,
               "partial rotary embeddings are unsupported");
  if (type == "default") return rope;
  rope.scaling = type == "linear" ? RopeScaling::kLinear : RopeScaling::kLlama3;
  rope.factor = scaling.get<double>("factor");
  if (rope.scaling == RopeScaling::kLinear) return rope;
  rope.low_frequency_factor = scaling.get<double>("low_freq_factor");
  rope.high_frequency_factor = scaling.get<double>("high_freq_factor");
  rope.original_positions = scaling.get_or<int64_t>("original_max_position_embeddings", max_positions);
  json.require(rope.low_frequency_factor < rope.high_frequency_factor, "\"low_freq_factor\" must be below ",
               "\"high_freq_factor\", got ", rope.low_frequency_factor, " and ", rope.high_frequency_factor);
  return rope;
}

inline void require_activation(const ConfigReader& json, const char* key, const std::vector<std::string>& known) {
  const auto name = json.get_or<std::string>(key, known.front());
  const bool found = std::find(known.begin(), known.end(), name) != known.end();
  json.require(found, "unknown \"", key, "\": \"", name, "\"; supported: ", c10::Join(", ", known));
}

inline void read_llama(const ConfigReader& json, ModelConfig& config) {
  require_activation(json, "hidden_act", {"silu", "swish"});
  config.hidden_size = json.positive("hidden_size");
  config.intermediate_size = json.positive("intermediate_size");
  config.num_layers = json.positive("num_hidden_layers");
  config.num_heads = json.positive("num_attention_heads");
  config.num_key_value_heads = json.get_or("num_key_value_heads", config.num_heads);
  config.head_dim = json.get_or("head_dim", config.hidden_size / config.num_heads);
  config.max_positions = json.get_or<int64_t>("max_position_embeddings", 2048);
  config.norm_epsilon = json.get_or("rms_norm_eps", 1e-6);
  config.tie_word_embeddings = json.get_or("tie_word_embeddings", false);
  config.attention_bias = json.get_or("attention_bias", false);
  config.mlp_bias = json.get_or("mlp_bias", false);
  config.attention_dropout = json.get_or("attention_dropout", 0.0);
  config.rope = read_rope(json, config.max_positions);
  json.require(config.head_dim > 0 && config.head_dim % 2 == 0, "\"head_dim\" must be even, got ", config.head_dim);
}

inline void read_gpt2(const ConfigReader& json, ModelConfig& config) {
  require_activation(json, "activation_function", {"gelu_new", "gelu_pytorch_tanh"});
  json.require(!json.get_or("add_cross_attention", false), "cross attention is unsupported");
  config.hidden_size = json.positive("n_embd");
  config.intermediate_size = json.get_or("n_inner", 4 * config.hidden_size);
  config.num_layers = json.positive("n_layer");
  config.num_heads = config.num_key_value_heads = json.positive("n_head");
  config.head_dim = config.hidden_size / config.num_heads;
  config.max_positions = json.positive("n_positions");
  config.norm_epsilon = json.get_or("layer_norm_epsilon", 1e-5);
  config.tie_word_embeddings = json.get_or("tie_word_embeddings", true);
  config.attention_bias = config.mlp_bias = true;
  config.attention_dropout = json.get_or("attn_pdrop", 0.1);
  config.residual_dropout = json.get_or("resid_pdrop", 0.1);
  config.embedding_dropout = json.get_or("embd_pdrop", 0.1);
  config.scale_attention = json.get_or("scale_attn_weights", true);
  config.scale_attention_by_layer = json.get_or("scale_attn_by_inverse_layer_idx", false);
  json.require(config.head_dim * config.num_heads == config.hidden_size, "\"n_embd\" ", config.hidden_size,
               " must be a multiple of \"n_head\" ", config.num_heads);
}

}  // namespace detail

/// Reads config.json of a Hugging Face directory. Throws lora::CheckpointError, naming the file and the key, for an
/// architecture, activation or rotary embedding that is not supported, weights in few bits that bitsandbytes did not
/// write, and sizes that do not fit.
inline ModelConfig read_config(const std::filesystem::path& model_dir) {
  const detail::ConfigReader json(model_dir / "config.json");
  ModelConfig config;
  config.architecture = detail::read_architecture(json);
  if (json.has("quantization_config")) {
    const detail::ConfigReader how(json, "quantization_config");
    const bool has_flag = how.has("load_in_4bit") || how.has("load_in_8bit");  // as bitsandbytes was alone once
    const auto method = how.get_or<std::string>("quant_method", has_flag ? "bitsandbytes" : "");
    json.require(method == "bitsandbytes", "weights in few bits by \"", method, "\" are unsupported, only by ",
                 "\"bitsandbytes\"; save the model dequantized first");
    config.in_few_bits = true;
  }
  config.vocab_size = json.positive("vocab_size");
  config.eos_token_ids = json.ids("eos_token_id");
  (config.architecture == Architecture::kLlama ? detail::read_llama : detail::read_gpt2)(json, config);
  json.require(config.num_key_value_heads > 0 && config.num_heads % config.num_key_value_heads == 0, "the ",
               config.num_heads, " attention heads must be a multiple of the ", config.num_key_value_heads,
               " key/value heads");
  return config;
}

}  // namespace gpt
