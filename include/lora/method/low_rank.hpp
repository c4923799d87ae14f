#pragma once

#include <ATen/core/grad_mode.h>

#include <lora/method/contract.hpp>
#include <lora/version.hpp>

#include <cmath>
#include <vector>

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
struct LowRank : Method {
  static constexpr MethodInfo info{"LowRank"};

  std::vector<MethodField<LowRank>> fields() const {
    return {{"lora_A", &LowRank::lora_A, {kRank, kIn}, ".weight"},
            {"lora_B", &LowRank::lora_B, {kOut, kRank}, ".weight"}};
  }

  void initialize(const Base& /*base*/) {
    at::NoGradGuard no_grad;
    if (shape.is_lookup) {
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

  Term term(const Base& /*base*/) const { return {lora_A, lora_B, scaling}; }

  at::Tensor lora_A, lora_B;
};

}  // namespace LORA_ABI
}  // namespace lora
