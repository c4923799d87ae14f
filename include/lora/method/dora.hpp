#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/norm.h>

#include <lora/method/low_rank.hpp>
#include <lora/version.hpp>

#include <limits>

namespace lora {
inline namespace LORA_ABI {

/// Weight-decomposed low-rank adaptation: a magnitude for each output, and a direction that LoRA moves.
///
///   W' = m / ||W + s B A|| * (W + s B A),   y = x W'^T + b,   s = alpha / rank
///
/// Shapes: W (out, in); A (rank, in); B (out, rank); m (out); the norm is that of each row, and m starts as the norm of
/// W. Gradients do not pass through the norm (section 4.3 of the paper), and the bias is not scaled. With dropout both
/// terms of the difference to the frozen output see the same dropped input, as in PEFT.
/// Reference: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", eq. 5.
struct DoRA : LowRank {
  static constexpr MethodInfo info{"DoRA", "LORA", "use_dora"};

  static std::vector<MethodField<DoRA>> fields() {
    return {{"lora_A", &DoRA::lora_A, ".weight"},
            {"lora_B", &DoRA::lora_B, ".weight"},
            {"lora_magnitude_vector", &DoRA::lora_magnitude_vector, ""}};
  }

  using LowRank::LowRank;

  void allocate(const MatrixShape& shape, const at::TensorOptions& tensor_options) {
    LowRank::allocate(shape, tensor_options);
    auto rows = shape.batch;
    rows.push_back(shape.out);
    lora_magnitude_vector = at::empty(rows, tensor_options);
  }

  void initialize(const at::Tensor& weight) {
    LowRank::initialize(weight);
    at::NoGradGuard no_grad;
    lora_magnitude_vector.copy_(row_norms(moved(weight)));
  }

  at::Tensor delta(const at::Tensor& weight) const {
    auto direction = moved(weight);  // (out, in)
    return gain(direction).unsqueeze(-1) * direction - weight.to(direction.scalar_type());
  }

  at::Tensor forward(const FrozenProduct& product) const {
    const bool dropping = product.training && options.dropout() > 0 && !is_lookup;
    auto x = dropped(product);  // (..., in)
    auto g = gain(moved(product.weight));
    auto frozen = dropping                 ? product.times(x, product.weight.to(x.scalar_type()))
                  : product.bias.defined() ? product.output - product.bias
                                           : product.output;            // x W^T (..., out)
    auto moved_product = add_update(frozen, product.times(x, lora_A));  // x (W + s B A)^T (..., out)
    return (product.output + (g * moved_product - frozen)).to(product.output.scalar_type());
  }

  at::Tensor lora_magnitude_vector;  // m (out)

 private:
  /// W + s B A, in float at least.
  at::Tensor moved(const at::Tensor& weight) const {
    const auto type = adapter_dtype(lora_A.scalar_type());
    const auto w = weight.to(type), a = lora_A.to(type), b = lora_B.to(type);
    return w.dim() == 2 ? at::addmm(w, b, a, /*beta=*/1, scaling) : at::baddbmm(w, b, a, /*beta=*/1, scaling);
  }

  static at::Tensor row_norms(const at::Tensor& direction) { return at::norm(direction, 2, {-1}); }

  /// m / ||W + s B A||, the norm a constant for the gradient. (out)
  /// A row of zeros, whose m starts at zero, has the gain 0 and not 0 / 0.
  at::Tensor gain(const at::Tensor& direction) const {
    return lora_magnitude_vector / row_norms(direction.detach()).clamp_min(std::numeric_limits<float>::min());
  }
};

}  // namespace LORA_ABI
}  // namespace lora
