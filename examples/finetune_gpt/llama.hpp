// LlamaForCausalLM in plain torch::nn: RMSNorm, rotary positions, grouped key/value heads, SwiGLU.
// Follows Hugging Face transformers' modeling_llama.py in names and arithmetic; every Linear is a stock one.
#pragma once

#include <torch/torch.h>
#include <c10/util/MathConstants.h>

#include "language_model.hpp"

namespace gpt {

namespace detail {

/// n = s x with s = 1 / sqrt(mean(x^2) + epsilon), the mean over the last dimension, in float whatever the type of x.
/// Keeps n and s for backward, where LibTorch would keep x and differentiate each operator. For g = dL/dn,
///
///   dx = s (g - n mean(g n))
class Normalize : public torch::autograd::Function<Normalize> {
 public:
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& x, double epsilon) {
    const auto in_float = x.to(torch::kFloat);
    const auto scale = torch::rsqrt(in_float.pow(2).mean(-1, /*keepdim=*/true) + epsilon);
    const auto normalized = (in_float * scale).to(x.scalar_type());
    context->save_for_backward({normalized, scale});
    return normalized;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto kept = context->get_saved_variables();
    const auto n = kept[0].to(torch::kFloat), g = gradients[0].to(torch::kFloat);
    const auto mean = (g * n).mean(-1, /*keepdim=*/true);
    return {torch::addcmul(g, n, mean, -1).mul_(kept[1]).to(kept[0].scalar_type()), torch::Tensor()};
  }
};

}  // namespace detail

/// y = weight * x / sqrt(mean(x^2) + epsilon), the mean over the last dimension in float whatever the type of x.
class RMSNormImpl : public torch::nn::Module {
 public:
  RMSNormImpl(int64_t size, double epsilon)
      : weight(register_parameter("weight", torch::ones({size}))), epsilon_(epsilon) {}

  torch::Tensor forward(const torch::Tensor& x) {
    if (!x.is_cpu()) return at::rms_norm(x, weight.sizes(), weight, epsilon_);  // one call in place of seven
    return weight * detail::Normalize::apply(x, epsilon_);                      // an adapter has to see the weight
  }

  torch::Tensor weight;

 private:
  double epsilon_;
};
TORCH_MODULE(RMSNorm);

/// Rotary position embedding: the two halves of each head's vector are the coordinates of D/2 planes, and plane i is
/// turned by position * frequency_i.
struct Rotation {
  torch::Tensor cosine;  ///< (T, D), or (B, 1, T, D) where texts are at different positions
  torch::Tensor sine;    ///< the same, negated in the first half

  /// (B, H, T, D) -> the same shape.
  torch::Tensor operator()(const torch::Tensor& x) const {
    return torch::addcmul(x * cosine, x.roll(x.size(-1) / 2, -1), sine);
  }
};

namespace detail {

// Long wavelengths are divided by the factor, short ones kept, those between blended. (D/2) -> (D/2).
inline torch::Tensor llama3_frequencies(const torch::Tensor& frequencies, const RopeConfig& rope) {
  const auto turns = rope.original_positions * frequencies / (2 * c10::pi<double>);  // within the original context
  const auto blend = (turns - rope.low_frequency_factor) / (rope.high_frequency_factor - rope.low_frequency_factor);
  const auto kept = blend.clamp(0, 1);
  return (1 - kept) * frequencies / rope.factor + kept * frequencies;
}

// Radians per position of each plane, (D/2), in float as the models were trained with.
inline torch::Tensor rotary_frequencies(const ModelConfig& config) {
  const auto exponents = torch::arange(0, config.head_dim, 2, torch::kFloat) / config.head_dim;
  const auto frequencies = 1.0 / torch::pow(config.rope.theta, exponents);
  switch (config.rope.scaling) {
    case RopeScaling::kLinear:
      return frequencies / config.rope.factor;
    case RopeScaling::kLlama3:
      return llama3_frequencies(frequencies, config.rope);
    case RopeScaling::kDefault:
      break;
  }
  return frequencies;
}

/// silu(gate) * up, which keeps for backward the two and nothing that follows from them. For g = dL/dy,
///
///   dgate = g * up * silu'(gate),   dup = g * silu(gate)
class SwiGLU : public torch::autograd::Function<SwiGLU> {
 public:
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& gate,
                               const torch::Tensor& up) {
    context->save_for_backward({gate, up});
    return torch::silu(gate).mul_(up);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto kept = context->get_saved_variables();
    const auto &gate = kept[0], &up = kept[1], &g = gradients[0];
    return {at::silu_backward(g * up, gate), torch::silu(gate).mul_(g)};
  }
};

}  // namespace detail

class LlamaAttentionImpl : public torch::nn::Module {
 public:
  LlamaAttentionImpl(const ModelConfig& config, size_t layer) : config_(config), layer_(layer) {
    const auto width = config.hidden_size, queries = config.num_heads * config.head_dim;
    const auto keys = config.num_key_value_heads * config.head_dim;
    const auto bias = config.attention_bias;
    q_proj = register_module("q_proj", detail::make_linear(width, queries, bias));
    k_proj = register_module("k_proj", detail::make_linear(width, keys, bias));
    v_proj = register_module("v_proj", detail::make_linear(width, keys, bias));
    o_proj = register_module("o_proj", detail::make_linear(queries, width, bias));
  }

  /// (B, T, hidden_size) -> (B, T, hidden_size)
  torch::Tensor forward(const torch::Tensor& x, const Rotation& rotate, KeyValueCache* cache) {
    auto q = rotate(heads(q_proj->forward(x)));  // (B, H, T, D)
    auto k = rotate(heads(k_proj->forward(x)));  // (B, K, T, D)
    auto v = heads(v_proj->forward(x));          // (B, K, T, D)
    if (cache != nullptr) std::tie(k, v) = cache->append(layer_, k, v);
    auto mixed = detail::causal_attention(q, k, v, is_training() ? config_.attention_dropout : 0.0, std::nullopt,
                                          detail::padding_of(cache));
    return o_proj->forward(mixed.transpose(1, 2).flatten(2));
  }

  torch::nn::Linear q_proj = nullptr, k_proj = nullptr, v_proj = nullptr, o_proj = nullptr;

 private:
  // (B, T, heads * D) -> (B, heads, T, D)
  torch::Tensor heads(const torch::Tensor& x) const { return x.unflatten(-1, {-1, config_.head_dim}).transpose(1, 2); }

  ModelConfig config_;
  size_t layer_;
};
TORCH_MODULE(LlamaAttention);

class LlamaMLPImpl : public torch::nn::Module {
 public:
  explicit LlamaMLPImpl(const ModelConfig& config) {
    const auto width = config.hidden_size, inner = config.intermediate_size;
    gate_proj = register_module("gate_proj", detail::make_linear(width, inner, config.mlp_bias));
    up_proj = register_module("up_proj", detail::make_linear(width, inner, config.mlp_bias));
    down_proj = register_module("down_proj", detail::make_linear(inner, width, config.mlp_bias));
  }

  torch::Tensor forward(const torch::Tensor& x) {
    return down_proj->forward(detail::SwiGLU::apply(gate_proj->forward(x), up_proj->forward(x)));
  }

  torch::nn::Linear gate_proj = nullptr, up_proj = nullptr, down_proj = nullptr;
};
TORCH_MODULE(LlamaMLP);

class LlamaLayerImpl : public torch::nn::Module {
 public:
  LlamaLayerImpl(const ModelConfig& config, size_t layer)
      : self_attn(register_module("self_attn", LlamaAttention(config, layer))),
        mlp(register_module("mlp", LlamaMLP(config))),
        input_layernorm(register_module("input_layernorm", RMSNorm(config.hidden_size, config.norm_epsilon))),
        post_attention_layernorm(
            register_module("post_attention_layernorm", RMSNorm(config.hidden_size, config.norm_epsilon))) {}

  torch::Tensor forward(const torch::Tensor& x, const Rotation& rotate, KeyValueCache* cache) {
    auto y = x + self_attn->forward(input_layernorm->forward(x), rotate, cache);
    return y + mlp->forward(post_attention_layernorm->forward(y));
  }

  LlamaAttention self_attn;
  LlamaMLP mlp;
  RMSNorm input_layernorm, post_attention_layernorm;
};
TORCH_MODULE(LlamaLayer);

/// Everything under "model." in the checkpoint: the embedding, the layers, the last norm.
class LlamaBodyImpl : public torch::nn::Module {
 public:
  explicit LlamaBodyImpl(const ModelConfig& config)
      : embed_tokens(register_module("embed_tokens", detail::make_embedding(config.vocab_size, config.hidden_size))),
        layers(register_module("layers", torch::nn::ModuleList())),
        norm(register_module("norm", RMSNorm(config.hidden_size, config.norm_epsilon))),
        frequencies_(detail::rotary_frequencies(config)) {
    for (int64_t i = 0; i < config.num_layers; ++i) layers->push_back(LlamaLayer(config, static_cast<size_t>(i)));
  }

  torch::Tensor forward(const torch::Tensor& ids, KeyValueCache* cache, const RunBlock& run_block) {
    auto x = embed_tokens->forward(ids);  // (B, T, C)
    const auto rotate = rotation(detail::positions(ids, cache), x);
    for (const auto& layer : *layers) {
      x = run_block([=](const auto& in) { return layer->as<LlamaLayer>()->forward(in, rotate, cache); }, x);
    }
    if (cache != nullptr) cache->advance(ids.size(1));
    return norm->forward(x);
  }

  torch::nn::Embedding embed_tokens;
  torch::nn::ModuleList layers;
  RMSNorm norm;

 private:
  // Angles in float, then in the type of x.
  Rotation rotation(const torch::Tensor& positions, const torch::Tensor& x) const {
    auto angles = positions.to(torch::kFloat).unsqueeze(-1) * frequencies_.to(x.device());  // (T, D/2) or (B, T, D/2)
    if (angles.dim() == 3) angles = angles.unsqueeze(1);                                    // for all heads
    const auto cosine = angles.cos(), sine = angles.sin();
    return {torch::cat({cosine, cosine}, -1).to(x.scalar_type()), torch::cat({-sine, sine}, -1).to(x.scalar_type())};
  }

  torch::Tensor frequencies_;  // no buffer: to(kBFloat16) must not round it
};
TORCH_MODULE(LlamaBody);

class LlamaImpl : public LanguageModelImpl {
 public:
  explicit LlamaImpl(const ModelConfig& options) : LanguageModelImpl(options) {
    model = register_module("model", LlamaBody(config));
    lm_head = register_module("lm_head", detail::make_head(config, *model->embed_tokens));
  }

  torch::Tensor hidden_states(const torch::Tensor& ids, KeyValueCache* cache = nullptr) override {
    detail::check_ids(ids);
    return model->forward(ids, cache, run_block);
  }

  const torch::nn::EmbeddingImpl& embedding() const override { return *model->embed_tokens; }

  LlamaBody model = nullptr;
};
TORCH_MODULE(Llama);

}  // namespace gpt
