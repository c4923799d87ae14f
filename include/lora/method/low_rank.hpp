#pragma once

#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>

#include <lora/method/method.hpp>

namespace lora {

/// Low-rank adaptation.
///
///   W' = W + s B A,   y = x W^T + b + s dropout(x) A^T B^T,   s = alpha / rank
///
/// Shapes: W (out, in); A (rank, in); B (out, rank); x (..., in) -> y (..., out).
/// A starts from a normal distribution with standard deviation 1 / rank, B at zero: the first output is the frozen one.
/// Reference: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3.
struct LowRank {
  static constexpr MethodInfo info{"LowRank"};

  static std::vector<MethodField<LowRank>> fields() {
    return {{"lora_A", &LowRank::lora_A, ".weight"}, {"lora_B", &LowRank::lora_B, ".weight"}};
  }

  LowRank() : LowRank(LoRAOptions(8)) {}
  explicit LowRank(const LoRAOptions& options) : options(options), scaling(options.scaling()) {}

  void allocate(int64_t out, int64_t in, const at::TensorOptions& tensor_options) {
    lora_A = at::empty({options.rank(), in}, tensor_options);
    lora_B = at::empty({out, options.rank()}, tensor_options);
  }

  void initialize(const at::Tensor& /*weight*/) {
    at::NoGradGuard no_grad;
    if (options.init() == Init::kKaiming) {
      const auto bound = 1 / std::sqrt(static_cast<double>(lora_A.size(1)));
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

  at::Tensor forward(const FrozenProduct& product) const { return add_update(product.output, dropped(product)); }

  /// The input of A: x in the adapter's type, with dropout in training mode.
  at::Tensor dropped(const FrozenProduct& product) const {
    auto x = product.input.to(lora_A.scalar_type());
    return options.dropout() > 0 ? at::dropout(x, options.dropout(), product.training) : x;
  }

  /// y + s x A^T B^T, computed in the adapter's type and returned in that of y.
  at::Tensor add_update(const at::Tensor& y, const at::Tensor& x) const {
    auto s = at::linear(x, lora_A).reshape({-1, options.rank()});    // (rows, rank)
    auto rows = y.reshape({-1, y.size(-1)}).to(s.scalar_type());     // (rows, out)
    auto sum = at::addmm(rows, s, lora_B.t(), /*beta=*/1, scaling);  // the scale costs no pass of its own
    return sum.view(y.sizes()).to(y.scalar_type());
  }

  LoRAOptions options;
  double scaling;
  at::Tensor lora_A, lora_B;
};

}  // namespace lora
