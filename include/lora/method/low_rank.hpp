#pragma once

#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>

#include <lora/method/contract.hpp>
#include <lora/version.hpp>

namespace lora {
inline namespace LORA_ABI {

/// Low-rank adaptation.
///
///   W' = W + s B A,   y = x W^T + b + s dropout(x) A^T B^T,   s = alpha / rank
///
/// Shapes: W (out, in); A (rank, in); B (out, rank); x (..., in) -> y (..., out). A batch of matrices has batches of A
/// and B. A starts from a normal distribution with standard deviation 1 / rank, B at zero: the first output is the
/// frozen one. For an embedding it is the other way round, as in PEFT: A at zero, B standard normal, so that columns
/// which are never looked up stay as they are.
/// Reference: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3.
struct LowRank {
  static constexpr MethodInfo info{"LowRank"};

  static std::vector<MethodField<LowRank>> fields() {
    return {{"lora_A", &LowRank::lora_A, ".weight"}, {"lora_B", &LowRank::lora_B, ".weight"}};
  }

  LowRank() : LowRank(LoRAOptions(8)) {}
  explicit LowRank(const LoRAOptions& options) : options(options), scaling(options.scaling()) {}

  void allocate(const MatrixShape& shape, const at::TensorOptions& tensor_options) {
    const auto rank = options.rank() / shape.rank_shares;
    is_lookup = shape.is_lookup;
    lora_A = at::empty(shape.with(rank, shape.in), tensor_options);
    lora_B = at::empty(shape.with(shape.out, rank), tensor_options);
  }

  void initialize(const at::Tensor& /*weight*/) {
    at::NoGradGuard no_grad;
    if (is_lookup) {
      lora_A.zero_();
      lora_B.normal_(0, options.init_std().value_or(1));
      return;
    }
    if (options.init() == Init::kKaiming) {
      const auto bound = 1 / std::sqrt(static_cast<double>(lora_A.size(-1)));
      lora_A.uniform_(-bound, bound);
    } else {
      lora_A.normal_(0, options.init_std().value_or(1.0 / static_cast<double>(options.rank())));
    }
    lora_B.zero_();
  }

  at::Tensor delta(const at::Tensor& /*weight*/) const {
    const auto type = adapter_dtype(lora_A.scalar_type());
    return at::matmul(lora_B.to(type), lora_A.to(type)).mul(scaling);
  }

  at::Tensor forward(const FrozenProduct& product) const {
    return add_update(product.output, product.times(dropped(product), lora_A));
  }

  /// The input of A: x in the adapter's type, with dropout in training mode. Numbers of columns stay as they are.
  at::Tensor dropped(const FrozenProduct& product) const {
    if (is_lookup) return product.input;
    auto x = in_type(product.input, lora_A.scalar_type());
    return options.dropout() > 0 ? at::dropout(x, options.dropout(), product.training) : x;
  }

  /// y + s x A^T B^T from x A^T (..., rank), computed in the adapter's type and returned in that of y.
  at::Tensor add_update(const at::Tensor& y, const at::Tensor& projected) const {
    const auto type = projected.scalar_type();
    if (y.dim() == 2) return in_type(add_rows(in_type(y, type), projected), y.scalar_type());
    auto sum = add_rows(in_type(y.reshape({-1, y.size(-1)}), type), projected.reshape({-1, projected.size(-1)}));
    return in_type(sum.view(y.sizes()), y.scalar_type());
  }

  /// y (rows, out) + s p B^T for p (rows, rank); the scale costs no pass of its own.
  at::Tensor add_rows(const at::Tensor& y, const at::Tensor& p) const {
    return at::addmm(y, p, lora_B.t(), /*beta=*/1, scaling);
  }

  LoRAOptions options;
  double scaling;
  bool is_lookup = false;
  at::Tensor lora_A, lora_B;
};

}  // namespace LORA_ABI
}  // namespace lora
