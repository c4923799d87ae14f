#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <c10/util/Exception.h>

#include <lora/version.hpp>

#include <limits>
#include <optional>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The size of a matrix of attention scores.
struct AttentionSize {
  int64_t batch, heads, queries, keys;
};

/// Brings the masks of one attention into the one mask that at::scaled_dot_product_attention takes.
class AttentionMask {
 public:
  AttentionMask(AttentionSize size, at::ScalarType type) : size_(size), type_(type) {}

  /// A mask of any of the shapes that LoRAAttention takes.
  void add_attn_mask(const at::Tensor& mask) {
    const auto [batch, heads, queries, keys] = size_;
    auto full = mask;
    if (mask.dim() == 3) {
      full =
          mask.size(0) == batch * heads ? mask.reshape({batch, heads, mask.size(1), mask.size(2)}) : mask.unsqueeze(1);
    }
    TORCH_CHECK((full.dim() == 2 || full.dim() == 4) && broadcasts(full), "lora::LoRAAttention: attn_mask has to be (",
                queries, ", ", keys, "), (batch, queries, keys), (batch * num_heads, queries, keys) or ",
                "(batch, num_heads, queries, keys) = (", batch, ", ", heads, ", ", queries, ", ", keys,
                "), where any size may be 1, but its shape is ", mask.sizes());
    add("attn_mask", full);
  }

  void add_key_padding_mask(const at::Tensor& mask) {
    const auto padding = mask.dim() == 1 ? mask.unsqueeze(0) : mask;
    TORCH_CHECK(padding.dim() == 2 && padding.size(0) == size_.batch && padding.size(1) == size_.keys,
                "lora::LoRAAttention: key_padding_mask has to be (batch, keys) = (", size_.batch, ", ", size_.keys,
                "), but its shape is ", mask.sizes());
    add("key_padding_mask", padding.unsqueeze(1).unsqueeze(2));  // (batch, 1, 1, keys)
  }

  /// A query sees the keys up to its own place.
  void add_causal(at::Device device) {
    const auto options = at::TensorOptions(at::kBool).device(device);
    add("is_causal", at::ones({size_.queries, size_.keys}, options).triu(1));
  }

  /// True for what takes part, or what is added to the scores, or nothing: what scaled_dot_product_attention expects.
  std::optional<at::Tensor> combined() const {
    if (!added_.defined()) return blocked_.defined() ? std::optional(blocked_.logical_not()) : std::nullopt;
    if (!blocked_.defined()) return added_;
    return at::where(blocked_, -std::numeric_limits<double>::infinity(), added_);
  }

 private:
  /// Whether the mask's last sizes are those of the scores, or 1.
  bool broadcasts(const at::Tensor& mask) const {
    const int64_t wanted[] = {size_.batch, size_.heads, size_.queries, size_.keys};
    for (int64_t i = 1; i <= mask.dim(); ++i) {
      if (mask.size(-i) != 1 && mask.size(-i) != wanted[4 - i]) return false;
    }
    return true;
  }

  void add(const char* name, const at::Tensor& mask) {
    const bool additive = at::isFloatingType(mask.scalar_type());
    TORCH_CHECK(additive || mask.scalar_type() == at::kBool, "lora::LoRAAttention: ", name,
                " has to be boolean (true: not seen) or floating (added to the scores), but its type is ",
                mask.scalar_type());
    if (additive) {
      added_ = added_.defined() ? added_ + mask.to(type_) : mask.to(type_);
    } else {
      blocked_ = blocked_.defined() ? blocked_.logical_or(mask) : mask;
    }
  }

  AttentionSize size_;
  at::ScalarType type_;
  at::Tensor blocked_, added_;  // each broadcasts to (batch, heads, queries, keys)
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
