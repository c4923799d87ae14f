#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/stack.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/softmax.h>

#include <lora/version.hpp>

#include <cmath>
#include <limits>
#include <optional>
#include <utility>

// The two operators that Python's MultiheadAttention and TransformerEncoderLayer call in evaluation mode, in one piece
// and without a derivative: here written in operators that have one.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Multihead attention with packed projections, batch first. A mask is true where nothing is attended to.
struct FusedAttention {
  int64_t heads;
  at::Tensor qkv_weight, qkv_bias, out_weight, out_bias;
  at::Tensor mask;                            // (queries, keys), (batch, keys) or one for each head; may be undefined
  std::optional<int64_t> mask_type = {};      // 0 and 1 say which of the first two
  bool need_weights = false, average = true;  // what to return beside the output

  /// Output (batch, queries, width), and attention weights, undefined when they are not needed.
  std::pair<at::Tensor, at::Tensor> operator()(const at::Tensor& query, const at::Tensor& key,
                                               const at::Tensor& value) const {
    const auto qkv = project(query, key, value).chunk(3, -1);
    const auto width = qkv[0].size(-1) / heads;
    const auto scores = at::matmul(split(qkv[0]) / std::sqrt(width), split(qkv[1]).transpose(-2, -1));
    const auto weights = at::softmax(masked(scores), -1);  // (batch, heads, queries, keys)
    const auto attended = at::matmul(weights, split(qkv[2])).transpose(1, 2).flatten(2);
    auto output = at::linear(attended, out_weight, out_bias);
    if (!need_weights) return {std::move(output), at::Tensor()};
    return {std::move(output), average ? weights.mean(1) : weights};
  }

 private:
  /// (batch, length, 3 width)
  at::Tensor project(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) const {
    if (query.is_same(key) && key.is_same(value)) return at::linear(query, qkv_weight, qkv_bias);
    const auto weights = qkv_weight.chunk(3), biases = qkv_bias.chunk(3);
    return at::cat({at::linear(query, weights[0], biases[0]), at::linear(key, weights[1], biases[1]),
                    at::linear(value, weights[2], biases[2])},
                   -1);
  }

  at::Tensor split(const at::Tensor& x) const { return x.unflatten(-1, {heads, -1}).transpose(1, 2); }

  at::Tensor masked(const at::Tensor& scores) const {
    if (!mask.defined()) return scores;
    auto hidden = mask.to(at::kBool);
    if (mask_type == 1) hidden = hidden.view({hidden.size(0), 1, 1, hidden.size(-1)});
    return scores.masked_fill(hidden, -std::numeric_limits<double>::infinity());
  }
};

/// Reads the operands of an operator one after the other.
class Operands {
 public:
  Operands(const torch::jit::Stack& stack, size_t count) : next_(stack.end() - static_cast<std::ptrdiff_t>(count)) {}

  at::Tensor tensor() {
    const auto& value = *next_++;
    return value.isNone() ? at::Tensor() : value.toTensor();
  }
  int64_t integer() { return (next_++)->toInt(); }
  double number() { return (next_++)->toDouble(); }
  bool boolean() { return (next_++)->toBool(); }
  std::optional<int64_t> optional_integer() { return (next_++)->toOptional<int64_t>(); }

 private:
  torch::jit::Stack::const_iterator next_;
};

/// aten::_native_multi_head_attention; takes the operands from the stack and leaves the results.
inline void unfused_attention(torch::jit::Stack& stack) {
  constexpr size_t kOperands = 13;
  Operands operands(stack, kOperands);
  const auto query = operands.tensor(), key = operands.tensor(), value = operands.tensor();
  operands.integer();  // the width, which the weights have, too
  FusedAttention attention{operands.integer(), operands.tensor(), operands.tensor(),
                           operands.tensor(),  operands.tensor(), operands.tensor()};
  attention.need_weights = operands.boolean();
  attention.average = operands.boolean();
  attention.mask_type = operands.optional_integer();
  auto [output, weights] = attention(query, key, value);
  torch::jit::drop(stack, kOperands);
  torch::jit::push(stack, std::move(output), std::move(weights));
}

/// aten::_transformer_encoder_layer_fwd, likewise.
inline void unfused_encoder_layer(torch::jit::Stack& stack) {
  constexpr size_t kOperands = 20;
  Operands operands(stack, kOperands);
  auto x = operands.tensor();
  const auto width = operands.integer();
  FusedAttention attention{operands.integer(), operands.tensor(), operands.tensor(),
                           operands.tensor(),  operands.tensor(), {}};
  const bool use_gelu = operands.boolean(), norm_first = operands.boolean();
  const auto eps = operands.number();
  const auto norm_of = [&](const at::Tensor& weight, const at::Tensor& bias) {
    return [=](const at::Tensor& in) { return at::layer_norm(in, {width}, weight, bias, eps); };
  };
  const auto scale1 = operands.tensor(), shift1 = operands.tensor();
  const auto scale2 = operands.tensor(), shift2 = operands.tensor();
  const auto norm1 = norm_of(scale1, shift1), norm2 = norm_of(scale2, shift2);
  const auto weight1 = operands.tensor(), bias1 = operands.tensor();
  const auto weight2 = operands.tensor(), bias2 = operands.tensor();
  attention.mask = operands.tensor();
  attention.mask_type = operands.optional_integer();
  const auto attend = [&](const at::Tensor& in) { return attention(in, in, in).first; };
  const auto feed_forward = [&](const at::Tensor& in) {
    const auto hidden = at::linear(in, weight1, bias1);
    return at::linear(use_gelu ? at::gelu(hidden) : at::relu(hidden), weight2, bias2);
  };
  x = norm_first ? x + attend(norm1(x)) : norm1(x + attend(x));
  x = norm_first ? x + feed_forward(norm2(x)) : norm2(x + feed_forward(x));
  torch::jit::drop(stack, kOperands);
  torch::jit::push(stack, std::move(x));
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
