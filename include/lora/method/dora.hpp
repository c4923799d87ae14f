#pragma once

#include <ATen/TensorOperators.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <lora/method/low_rank.hpp>
#include <lora/version.hpp>

#include <limits>
#include <vector>

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
struct DoRA : Method {
  static constexpr MethodInfo info{"DoRA", "LORA", "use_dora"};

  std::vector<MethodField<DoRA>> fields() const {
    return {{"lora_A", &DoRA::lora_A, {kRank, kIn}, ".weight"},
            {"lora_B", &DoRA::lora_B, {kOut, kRank}, ".weight"},
            {"lora_magnitude_vector", &DoRA::lora_magnitude_vector, {kOut}}};
  }

  void initialize(const Base& base) {
    at::NoGradGuard no_grad;
    LowRank start;  // of which A and B begin as they do there
    start.options = options;
    start.shape = shape;
    start.lora_A = lora_A;
    start.lora_B = lora_B;
    start.initialize(base);
    follow(base);
  }

  void follow(const Base& base) { lora_magnitude_vector.copy_(norms(base)); }

  /// A row of zeros, whose m starts at zero, has the gain 0 and not 0 / 0.
  Term term(const Base& base) const {
    const auto norm = norms(base).clamp_min(std::numeric_limits<float>::min());
    return {lora_A, lora_B, scaling, lora_magnitude_vector / norm};
  }

  at::Tensor lora_A, lora_B;
  at::Tensor lora_magnitude_vector;  // m (out)

 private:
  /// ||W + s B A|| (out), in float at least.
  at::Tensor norms(const Base& base) const {
    at::NoGradGuard no_grad;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto type = adapter_dtype(lora_A.scalar_type());
    return base.updated_norms(lora_A.detach().to(type), lora_B.detach().to(type), scaling);
  }
};

}  // namespace LORA_ABI
}  // namespace lora
