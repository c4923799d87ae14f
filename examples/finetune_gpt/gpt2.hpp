// GPT2LMHeadModel in plain torch::nn: LayerNorm, learned positions, one packed projection for q, k and v, GELU.
// Follows Hugging Face transformers' modeling_gpt2.py in names and arithmetic. Checkpoints hold the projections as
// (in, out); here they are stock Linear layers whose weight is the transposed view of what the file holds.
#pragma once

#include <torch/torch.h>

#include "language_model.hpp"

namespace gpt {

class GPT2AttentionImpl : public torch::nn::Module {
 public:
  GPT2AttentionImpl(const ModelConfig& config, size_t layer)
      : c_attn(register_module("c_attn", detail::make_linear(config.hidden_size, 3 * config.hidden_size, true))),
        c_proj(register_module("c_proj", detail::make_linear(config.hidden_size, config.hidden_size, true))),
        config_(config),
        layer_(layer) {}

  /// (B, T, hidden_size) -> (B, T, hidden_size)
  torch::Tensor forward(const torch::Tensor& x, KeyValueCache* cache) {
    auto packed = c_attn->forward(x).unflatten(-1, {3, config_.num_heads, config_.head_dim});  // (B, T, 3, H, D)
    auto parts = packed.permute({2, 0, 3, 1, 4}).unbind(0);                                    // 3 times (B, H, T, D)
    auto k = parts[1], v = parts[2];
    if (cache != nullptr) std::tie(k, v) = cache->append(layer_, k, v);
    auto mixed = detail::causal_attention(parts[0], k, v, is_training() ? config_.attention_dropout : 0.0, scale(),
                                          detail::padding_of(cache));
    auto y = c_proj->forward(mixed.transpose(1, 2).flatten(2));
    return torch::dropout(y, config_.residual_dropout, is_training());
  }

  torch::nn::Linear c_attn, c_proj;

 private:
  double scale() const {
    const auto by_width = config_.scale_attention ? 1 / std::sqrt(static_cast<double>(config_.head_dim)) : 1.0;
    return config_.scale_attention_by_layer ? by_width / static_cast<double>(layer_ + 1) : by_width;
  }

  ModelConfig config_;
  size_t layer_;
};
TORCH_MODULE(GPT2Attention);

class GPT2MLPImpl : public torch::nn::Module {
 public:
  explicit GPT2MLPImpl(const ModelConfig& config)
      : c_fc(register_module("c_fc", detail::make_linear(config.hidden_size, config.intermediate_size, true))),
        c_proj(register_module("c_proj", detail::make_linear(config.intermediate_size, config.hidden_size, true))),
        dropout_(config.residual_dropout) {}

  torch::Tensor forward(const torch::Tensor& x) {
    auto y = c_proj->forward(torch::gelu(c_fc->forward(x), "tanh"));
    return torch::dropout(y, dropout_, is_training());
  }

  torch::nn::Linear c_fc, c_proj;

 private:
  double dropout_;
};
TORCH_MODULE(GPT2MLP);

class GPT2BlockImpl : public torch::nn::Module {
 public:
  GPT2BlockImpl(const ModelConfig& config, size_t layer)
      : ln_1(register_module("ln_1", torch::nn::LayerNorm(norm_options(config)))),
        attn(register_module("attn", GPT2Attention(config, layer))),
        ln_2(register_module("ln_2", torch::nn::LayerNorm(norm_options(config)))),
        mlp(register_module("mlp", GPT2MLP(config))) {}

  static torch::nn::LayerNormOptions norm_options(const ModelConfig& config) {
    return torch::nn::LayerNormOptions({config.hidden_size}).eps(config.norm_epsilon);
  }

  torch::Tensor forward(const torch::Tensor& x, KeyValueCache* cache) {
    auto y = x + attn->forward(ln_1->forward(x), cache);
    return y + mlp->forward(ln_2->forward(y));
  }

  torch::nn::LayerNorm ln_1;
  GPT2Attention attn;
  torch::nn::LayerNorm ln_2;
  GPT2MLP mlp;
};
TORCH_MODULE(GPT2Block);

/// Everything under "transformer." in the checkpoint: both embeddings, the blocks, the last norm.
class GPT2BodyImpl : public torch::nn::Module {
 public:
  explicit GPT2BodyImpl(const ModelConfig& config)
      : wte(register_module("wte", detail::make_embedding(config.vocab_size, config.hidden_size))),
        wpe(register_module("wpe", detail::make_embedding(config.max_positions, config.hidden_size))),
        h(register_module("h", torch::nn::ModuleList())),
        ln_f(register_module("ln_f", torch::nn::LayerNorm(GPT2BlockImpl::norm_options(config)))),
        dropout_(config.embedding_dropout) {
    for (int64_t i = 0; i < config.num_layers; ++i) h->push_back(GPT2Block(config, static_cast<size_t>(i)));
  }

  torch::Tensor forward(const torch::Tensor& ids, KeyValueCache* cache, const RunBlock& run_block) {
    const auto first = cache == nullptr ? 0 : cache->length(), end = first + ids.size(1);
    TORCH_CHECK(end <= wpe->options.num_embeddings(), "GPT2: a text of ", end, " tokens is longer than the model's ",
                wpe->options.num_embeddings(), " positions");
    auto x = wte->forward(ids) + wpe->forward(detail::positions(ids, cache));  // (B, T, C)
    x = torch::dropout(x, dropout_, is_training());
    for (const auto& block : *h) {
      x = run_block([=](const auto& in) { return block->as<GPT2Block>()->forward(in, cache); }, x);
    }
    if (cache != nullptr) cache->advance(ids.size(1));
    return ln_f->forward(x);
  }

  torch::nn::Embedding wte, wpe;
  torch::nn::ModuleList h;
  torch::nn::LayerNorm ln_f;

 private:
  double dropout_;
};
TORCH_MODULE(GPT2Body);

class GPT2Impl : public LanguageModelImpl {
 public:
  explicit GPT2Impl(const ModelConfig& options) : LanguageModelImpl(options) {
    transformer = register_module("transformer", GPT2Body(config));
    lm_head = register_module("lm_head", detail::make_head(config, *transformer->wte));
  }

  torch::Tensor hidden_states(const torch::Tensor& ids, KeyValueCache* cache = nullptr) override {
    detail::check_ids(ids);
    return transformer->forward(ids, cache, run_block);
  }

  const torch::nn::EmbeddingImpl& embedding() const override { return *transformer->wte; }

  GPT2Body transformer = nullptr;
};
TORCH_MODULE(GPT2);

}  // namespace gpt
