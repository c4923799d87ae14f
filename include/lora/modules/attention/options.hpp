#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

#include <lora/options.hpp>
#include <lora/version.hpp>

#include <array>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

namespace lora {
inline namespace LORA_ABI {

/// Whether one projection is adapted: `false`, `true` (with the options that the projections share), or with options of
/// its own: `LoRAOptions(4)`.
class Adaptation {
 public:
  template <class Choice, class = std::enable_if_t<std::is_convertible_v<Choice, LoRAOptions>>>
  /* implicit */ Adaptation(Choice choice) {
    if constexpr (std::is_same_v<Choice, bool>) {
      adapted_ = choice;
    } else {
      adapted_ = true;
      own_ = std::move(choice);
    }
  }

  bool adapted() const { return adapted_; }
  /// The options where it is adapted, `shared` unless it has its own; nothing where it is not.
  std::optional<LoRAOptions> options(const LoRAOptions& shared) const {
    return adapted_ ? std::optional(own_.value_or(shared)) : std::nullopt;
  }

 private:
  bool adapted_ = false;
  std::optional<LoRAOptions> own_;
};

/// Which of the four projections of an attention are adapted, and how: `Projections().q(LoRAOptions(4)).v(true)`.
struct Projections {
  static Projections all() { return Projections().q(true).k(true).v(true).o(true); }

  /// Queries. Default: false.
  TORCH_ARG(Adaptation, q) = false;
  /// Keys. Default: false.
  TORCH_ARG(Adaptation, k) = false;
  /// Values. Default: false.
  TORCH_ARG(Adaptation, v) = false;
  /// The output. Default: false.
  TORCH_ARG(Adaptation, o) = false;

 public:
  /// The names of the projections, in the order q, k, v, o.
  static constexpr std::array<const char*, 4> kNames{"q_proj", "k_proj", "v_proj", "o_proj"};

  /// The options of one of them, counted in that order; nothing where it is not adapted.
  std::optional<LoRAOptions> options(size_t index, const LoRAOptions& shared) const {
    return std::array{q_, k_, v_, o_}[index].options(shared);
  }

  /// Throws c10::ValueError when nothing is adapted, or when an option is out of its range.
  void validate(const LoRAOptions& shared) const {
    bool any = false;
    for (size_t i = 0; i < kNames.size(); ++i) {
      const auto own = options(i, shared);
      if (own) own->validate((std::string("lora::LoRAAttention: ") + kNames[i]).c_str());
      any = any || own;
    }
    TORCH_CHECK_VALUE(any, "lora::LoRAAttention: adapted names no projection; use e.g. Projections().q(true).v(true)");
  }
};

/// Options of a `LoRAAttention`.
struct LoRAAttentionOptions {
  LoRAAttentionOptions(int64_t width, int64_t num_heads, LoRAOptions adapter)
      : width_(width),
        num_heads_(num_heads),
        adapter_(std::move(adapter)),
        num_kv_heads_(num_heads),
        kdim_(width),
        vdim_(width) {}

  /// Size of the last dimension of the input and of the output.
  TORCH_ARG(int64_t, width);
  /// Heads of the queries.
  TORCH_ARG(int64_t, num_heads);
  /// Rank, alpha, dropout and so on of the projections that have no options of their own.
  TORCH_ARG(LoRAOptions, adapter);
  /// The projections that are adapted. Default: q and v, as in the paper.
  TORCH_ARG(Projections, adapted) = Projections().q(true).v(true);
  /// Heads of the keys and values, each of which num_heads / num_kv_heads consecutive heads of the queries share
  /// (grouped-query attention; 1: multi-query). Divides num_heads. Default: num_heads.
  TORCH_ARG(int64_t, num_kv_heads);
  /// Size of one head of queries, keys and values. Default: width / num_heads, which has to be whole.
  TORCH_ARG(std::optional<int64_t>, head_dim);
  /// Width of what the keys are made of. Default: width.
  TORCH_ARG(int64_t, kdim);
  /// Width of what the values are made of. Default: width.
  TORCH_ARG(int64_t, vdim);
  /// Whether the frozen projections have biases. Default: true.
  TORCH_ARG(bool, bias) = true;
  /// Probability with which each attention weight is zeroed in training mode; in [0, 1). Default: 0.
  TORCH_ARG(double, dropout) = 0;

 public:
  /// The size of one head, given or not.
  int64_t head_size() const { return head_dim_.value_or(width_ / num_heads_); }

  /// Throws c10::ValueError when an option is out of its range.
  void validate() const {
    const std::pair<const char*, int64_t> sizes[] = {
        {"width", width_}, {"num_heads", num_heads_}, {"num_kv_heads", num_kv_heads_},
        {"kdim", kdim_},   {"vdim", vdim_},           {"head_dim", head_dim_.value_or(1)}};
    for (const auto& [name, size] : sizes) {
      TORCH_CHECK_VALUE(size > 0, "lora::LoRAAttention: ", name, " has to be at least 1, but got ", size);
    }
    TORCH_CHECK_VALUE(
        head_dim_ || width_ % num_heads_ == 0,
        "lora::LoRAAttention: num_heads has to divide width, unless head_dim is given, but got num_heads ", num_heads_,
        " and width ", width_);
    TORCH_CHECK_VALUE(num_heads_ % num_kv_heads_ == 0,
                      "lora::LoRAAttention: num_kv_heads has to divide num_heads, but got num_kv_heads ", num_kv_heads_,
                      " and num_heads ", num_heads_);
    TORCH_CHECK_VALUE(dropout_ >= 0 && dropout_ < 1, "lora::LoRAAttention: dropout has to be in [0, 1), but got ",
                      dropout_);
    adapted_.validate(adapter_);
  }
};

/// What `LoRAAttention::forward` takes beside its input.
///
/// A true in a boolean mask means what it means to torch.nn.MultiheadAttention, in `attn_mask` and `key_padding_mask`
/// alike: that key is not seen. (at::scaled_dot_product_attention means the opposite.) A floating mask is added to the
/// scores. Several masks act together. A query that sees no key attends to nothing: its output is the bias of o.
struct AttentionInputs {
  /// What keys and values are made of, (batch, keys, kdim). Default: the input.
  TORCH_ARG(at::Tensor, context);
  /// What values are made of, (batch, keys, vdim), where that is something else. Default: the context.
  TORCH_ARG(at::Tensor, value_context);
  /// (queries, keys), (batch, queries, keys), (batch * num_heads, queries, keys) or (batch, num_heads, queries, keys);
  /// sizes of 1 are repeated. Boolean or floating. Default: none.
  TORCH_ARG(at::Tensor, attn_mask);
  /// (batch, keys), boolean or floating. Default: none.
  TORCH_ARG(at::Tensor, key_padding_mask);
  /// Query i sees the keys 0..i only, also where the numbers of queries and keys differ. Default: false.
  TORCH_ARG(bool, is_causal) = false;
};

}  // namespace LORA_ABI
}  // namespace lora
