#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <c10/util/FunctionRef.h>

#include <lora/version.hpp>
#include <lora/weight/base.hpp>
#include <lora/weight/frozen_product.hpp>

#include <cstdint>

namespace lora {
inline namespace LORA_ABI {

/// A low-rank update, as a method yields it:
///
///   W' = diag(gain) (W + scale B A) diag(input_gain)
///
/// Shapes: W (out, in); A (rank, in); B (out, rank); gain (out); input_gain (in). Each of them may be left undefined:
/// without A and B there is no product to add, without a gain nothing is scaled. For a batch of matrices all have its
/// dimension first.
struct Term {
  at::Tensor A, B;
  double scale = 1;
  at::Tensor gain = {}, input_gain = {};

  /// W' - W, in the type of the adapter but at least in float.
  at::Tensor delta(const Base& base) const {
    const auto type = adapter_dtype(dtype());
    if (!scales_weight()) return at::matmul(B.to(type), A.to(type)).mul(scale);
    const auto weight = base.dense().to(type);
    auto changed = A.defined() ? moved(weight) : weight;
    if (gain.defined()) changed = gain.unsqueeze(-1) * changed;
    if (input_gain.defined()) changed = changed * input_gain.unsqueeze(-2);
    return changed - weight;
  }

  /// Whether it does more than to add a product.
  bool scales_weight() const { return gain.defined() || input_gain.defined(); }
  at::ScalarType dtype() const { return (A.defined() ? A : gain.defined() ? gain : input_gain).scalar_type(); }

  /// W + scale B A, in the type of W.
  at::Tensor moved(const at::Tensor& weight) const {
    const auto a = A.to(weight.scalar_type()), b = B.to(weight.scalar_type());
    return weight.dim() == 2 ? at::addmm(weight, b, a, /*beta=*/1, scale) : at::baddbmm(weight, b, a, 1, scale);
  }
};

/// `tensor.to(type)`, without the call where there is nothing to do: for small products calls are what costs.
inline at::Tensor in_type(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

/// What a layer is about to compute and nobody has computed yet: y = op(x, W) + b, linear in W.
struct Product {
  /// The layer's operator, for any operand in the place of W.
  using Run = c10::function_ref<at::Tensor(const at::Tensor& x, const at::Tensor& operand, const at::Tensor& bias)>;
  /// x M^T (..., n) as the layer would compute it, for a matrix M (n, in).
  using Times = c10::function_ref<at::Tensor(const at::Tensor& x, const at::Tensor& matrix)>;

  at::Tensor x;        ///< (..., in), or the numbers of the columns that are looked up
  at::Tensor operand;  ///< the frozen weight, or a part of it, as the operator takes it
  at::Tensor bias;     ///< undefined where there is none, or where somebody else adds it
  Run op;
  Times times;
  /// Whether the operand is W, or rows of it, and y has one number for each of these rows, so that updates can be added
  /// to y. If not, the operator is run with W' in the place of W.
  bool adds = true;
  /// What the operand is where the operator is y = x M^T + b for a matrix M (out, in), and nothing else.
  enum class Form : uint8_t {
    kOther,
    kRows,     ///< M
    kColumns,  ///< its transpose
    kEntries   ///< and where rows of the operand are looked up: that table
  };
  Form form = Form::kOther;

  /// The operator, for any operand in the place of W, also for one that is held in few bits.
  at::Tensor run(const at::Tensor& other_x, const at::Tensor& other_operand, const at::Tensor& other_bias) const {
    const bool is_rows = form == Form::kRows;
    if ((is_rows || form == Form::kColumns) &&
        detail::is_computed_here(other_x, other_operand, other_bias, /*inputs=*/is_rows ? 1 : 0))
      return detail::frozen_linear(other_x, is_rows ? other_operand.t() : other_operand, other_bias);
    if (form == Form::kEntries && detail::is_quantized(other_operand))
      return detail::quantized_entries(other_operand, other_x);
    return op(other_x, detail::dequantized(other_operand), other_bias);
  }
  /// y without any update.
  at::Tensor frozen() const {
    if (form != Form::kEntries) detail::check_type(x, operand);
    return run(x, operand, bias);
  }
  /// The same for another x, with another operand, without the bias.
  at::Tensor without_bias(const at::Tensor& other_x, const at::Tensor& other_operand) const {
    return run(other_x, other_operand, at::Tensor());
  }
};

/// `Product::times` of a linear layer.
inline at::Tensor linear_times(const at::Tensor& x, const at::Tensor& matrix) {
  return x.dim() == 2 ? at::mm(x, matrix.t()) : at::linear(x, matrix);
}

}  // namespace LORA_ABI
}  // namespace lora
