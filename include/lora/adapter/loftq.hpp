#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/matmul.h>

#include <lora/adapter/adapter.hpp>
#include <lora/method/low_rank.hpp>
#include <lora/version.hpp>
#include <lora/weight/quantized.hpp>

#include <algorithm>
#include <memory>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The method of a part as one that LoftQ can start. Throws for others.
inline LowRank& loftq_method(const AdapterPart& part) {
  auto* method = dynamic_cast<MethodOf<LowRank>*>(part.method.get());
  TORCH_CHECK_VALUE(method != nullptr, "lora::LoRAConfig: loftq starts A and B of LowRank; \"", part.site->name(),
                    "\" has a ", part.method->info().name);
  return method->value;
}

/// Starts A and B with what the few bits lose of a weight, and returns what these hold:
///
///   Q_t = q(W - s B_t-1 A_t-1),   s B_t A_t: the best approximation of W - Q_t of the rank,   B_0 A_0 = 0
///
/// With W - Q_t = U S V^T, A is sqrt(S) V^T and s B is U sqrt(S), cut off at the rank; after the last step Q_t is kept.
/// Reference: Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", algorithm 1. PEFT
/// leaves out that the layer scales the product by s; here Q + s B A is near to W for any alpha. Where the bits lose
/// nothing, A and B stay as they are, of which the update is zero, too: two zeros would not learn.
inline std::shared_ptr<const QuantizedWeight> loftq(const Site& site, LowRank& method, const Quantization& scheme,
                                                    int64_t iterations) {
  at::NoGradGuard no_grad;
  const auto weight = site.weight().detach();
  const auto& view = site.view();
  const auto type = method.lora_A.scalar_type();
  const auto exact = weight.to(type);
  auto rest = exact;
  std::shared_ptr<const QuantizedWeight> held;
  for (int64_t step = 0; step < iterations; ++step) {
    held = scheme.pack(rest, site.name());
    const auto lost = view.matrix(exact - held->dense().to(type));
    if (step == 0 && !lost.any().item<bool>()) break;
    const auto [u, s, v] = at::linalg_svd(lost, /*full_matrices=*/false);
    const auto rank = std::min(method.lora_A.size(-2), s.size(-1));
    const auto root = s.narrow(-1, 0, rank).sqrt();
    method.lora_A.zero_().narrow(-2, 0, rank).copy_(root.unsqueeze(-1) * v.narrow(-2, 0, rank));
    method.lora_B.zero_().narrow(-1, 0, rank).copy_(u.narrow(-1, 0, rank) * root.unsqueeze(-2) / method.scaling);
    rest = exact - view.weight(method.scaling * at::matmul(method.lora_B, method.lora_A));
  }
  return held;
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
