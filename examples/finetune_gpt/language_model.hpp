// What both architectures share: the interface of a language model, its key/value cache, attention, and layers that are
// built without memory because a checkpoint is about to provide it.
#pragma once

#include <torch/torch.h>

#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "config.hpp"
#include "key_value_cache.hpp"

namespace gpt {

/// Runs a block of a model, (B, T, hidden_size) -> the same shape.
using RunBlock =
    std::function<torch::Tensor(const std::function<torch::Tensor(const torch::Tensor&)>& block, const torch::Tensor&)>;

/// A decoder that predicts the next token: Llama or GPT2, with the parameter names of Hugging Face's implementation.
class LanguageModelImpl : public torch::nn::Module {
 public:
  explicit LanguageModelImpl(ModelConfig options) : config(std::move(options)) {}

  /// What the head sees. Token ids (B, T) int64 -> (B, T, hidden_size). With a cache, the ids continue the texts in it.
  virtual torch::Tensor hidden_states(const torch::Tensor& ids, KeyValueCache* cache = nullptr) = 0;

  /// Scores of the next token at every position: (B, T) int64 -> logits (B, T, vocab_size).
  torch::Tensor forward(const torch::Tensor& ids, KeyValueCache* cache = nullptr) {
    return lm_head->forward(hidden_states(ids, cache));
  }

  /// The embedding of the tokens, to whose weight the head is tied when config.tie_word_embeddings says so.
  virtual const torch::nn::EmbeddingImpl& embedding() const = 0;

  /// Whether the head's weight is the embedding's. Merging an adapter into a tied head separates the two.
  bool is_tied() const { return lm_head->weight.is_same(embedding().weight); }

  /// How its blocks are run; by default they are called. Who trains it may compute their activations twice instead of
  /// keeping them.
  RunBlock run_block = [](const auto& block, const torch::Tensor& x) { return block(x); };

  const ModelConfig config;
  torch::nn::Linear lm_head = nullptr;  ///< its weight is the embedding's tensor when the head is tied
};

using LanguageModel = std::shared_ptr<LanguageModelImpl>;

namespace detail {

// A tensor of the right shape in the memory of one number. NaN, so that a model whose weights were never loaded cannot
// be taken for a trained one.
inline torch::Tensor placeholder(torch::IntArrayRef shape) {
  return torch::full({1}, std::numeric_limits<float>::quiet_NaN()).expand(shape);
}

// The constructor of a full-sized layer would allocate and randomize weights only for the checkpoint to replace them.
inline torch::nn::Linear make_linear(int64_t in_features, int64_t out_features, bool bias) {
  torch::nn::Linear layer(torch::nn::LinearOptions(1, 1).bias(bias));
  layer->options = torch::nn::LinearOptions(in_features, out_features).bias(bias);
  layer->weight.set_data(placeholder({out_features, in_features}));
  if (bias) layer->bias.set_data(placeholder({out_features}));
  return layer;
}

inline torch::nn::Embedding make_embedding(int64_t count, int64_t width) {
  torch::nn::Embedding layer(1, 1);
  layer->options = torch::nn::EmbeddingOptions(count, width);
  layer->weight.set_data(placeholder({count, width}));
  return layer;
}

// Opens the registry of any module, so that a tied weight can be registered: torch::nn has no way to do it.
struct Registry : torch::nn::Module {
  static auto& of(torch::nn::Module& module) { return module.*(&Registry::parameters_); }
};

// One tensor under two names. Not only the member but also the registered parameter is replaced, so that parameters(),
// to() and torch::save see the weight that forward uses.
inline void tie(torch::nn::LinearImpl& head, const torch::nn::EmbeddingImpl& embedding) {
  head.weight = embedding.weight;
  Registry::of(head)["weight"] = embedding.weight;
}

inline torch::nn::Linear make_head(const ModelConfig& config, const torch::nn::EmbeddingImpl& embedding) {
  auto head = make_linear(config.hidden_size, config.vocab_size, /*bias=*/false);
  if (config.tie_word_embeddings) tie(*head, embedding);
  return head;
}

inline void check_ids(const torch::Tensor& ids) {
  TORCH_CHECK(ids.dim() == 2 && ids.scalar_type() == torch::kLong,
              "LanguageModel: ids must be int64 of shape (batch, length), got ", ids.scalar_type(), " ", ids.sizes());
}

// Query t of the last T positions sees the keys up to its own: true where key <= total - T + t.
inline torch::Tensor causal_mask(int64_t queries, int64_t keys, torch::Device device) {
  return torch::ones({queries, keys}, torch::TensorOptions(device).dtype(torch::kBool)).tril(keys - queries);
}

// What a pass with a cache may see, as a mask that broadcasts to (B, H, T, S); none where that is all that came before,
// or what scaled_dot_product_attention means by causal. `padding` (B), if defined, has the keys in front of each text.
inline std::optional<torch::Tensor> attention_mask(int64_t queries, int64_t keys, const torch::Tensor& padding,
                                                   torch::Device device) {
  const bool is_continued = queries > 1 && keys > queries;
  if (!padding.defined()) return is_continued ? std::make_optional(causal_mask(queries, keys, device)) : std::nullopt;
  const auto places = torch::arange(keys, padding.options());
  const auto visible = (places >= padding.unsqueeze(1)).unsqueeze(1).unsqueeze(1);  // (B, 1, 1, S)
  return queries > 1 ? visible & causal_mask(queries, keys, device) : visible;
}

// softmax(scale * q k^T) v over what came before. q (B, H, T, D); k, v (B, K, S, D) with H a multiple of K and S >= T.
inline torch::Tensor causal_attention(const torch::Tensor& q, torch::Tensor k, torch::Tensor v, double dropout,
                                      std::optional<double> scale = std::nullopt, const torch::Tensor& padding = {}) {
  const auto heads = q.size(1), length = q.size(2), total = k.size(2);
  bool grouped = k.size(1) != heads;
  if (grouped && q.is_cuda() && q.scalar_type() == torch::kFloat) {
    // CUDA's fused kernels take grouped heads in half precision only; in float the unfused one would hold all scores.
    k = k.repeat_interleave(heads / k.size(1), 1);
    v = v.repeat_interleave(heads / v.size(1), 1);
    grouped = false;
  }
  const auto mask = attention_mask(length, total, padding, q.device());
  return at::scaled_dot_product_attention(q, k, v, mask, dropout, /*is_causal=*/length > 1 && !mask, scale, grouped);
}

// The positions (T) of a text, or those with which a cache goes on, (T) or (B, T).
inline torch::Tensor positions(const torch::Tensor& ids, const KeyValueCache* cache) {
  return cache == nullptr ? torch::arange(ids.size(1), ids.options())
                          : cache->next_positions(ids.size(1), ids.device());
}

// The parameters that a checkpoint of the model holds, by name: all but a tied head.
inline std::map<std::string, torch::Tensor> stored_parameters(const LanguageModelImpl& model) {
  std::map<std::string, torch::Tensor> parameters;
  for (const auto& item : model.named_parameters()) {
    if (item.key() == "lm_head.weight" && model.is_tied()) continue;
    parameters.emplace(item.key(), item.value());
  }
  return parameters;
}

inline torch::Tensor padding_of(const KeyValueCache* cache) {
  return cache == nullptr ? torch::Tensor() : cache->padding();
}

}  // namespace detail
}  // namespace gpt
