#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/linalg_vector_norm.h>

#include <lora/version.hpp>

#include <optional>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The limit on the norm of its entries that a lookup in an adapted table has to keep. A frozen table is not changed,
/// as a stock embedding with max_norm would do; what is looked up in W' is limited instead.
struct NormLimit {
  double max_norm, norm_type;

  /// Rows of `entries` (..., width), none longer than the limit; the factor is a constant for the gradient.
  at::Tensor apply(const at::Tensor& entries) const {
    const auto norm = at::linalg_vector_norm(entries.detach(), norm_type, {-1}, /*keepdim=*/true);
    return entries * (max_norm / (norm + 1e-7)).clamp_max(1);
  }

  /// That of the next lookup on this thread.
  static std::optional<NormLimit>& pending() {
    thread_local std::optional<NormLimit> limit;
    return limit;
  }
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
