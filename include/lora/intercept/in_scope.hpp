#pragma once

#include <ATen/core/Tensor.h>

#include <lora/linkage.hpp>
#include <lora/version.hpp>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Whether an active scope of this thread adapts the weight.
LORA_INLINE bool is_in_scope(const at::Tensor& weight);

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <lora/intercept/scope.hpp>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

LORA_INLINE bool is_in_scope(const at::Tensor& weight) {
  bool found = false;
  for_each_match(weight, Use::kAny, [&](const Scope&, const ActiveSite&, const Part&) { found = true; });
  return found;
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
