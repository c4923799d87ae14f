#pragma once

#include <ATen/core/Tensor.h>

#include <lora/version.hpp>

#include <optional>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// A tensor as operators take one that may be missing: undefined ones are.
inline std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  if (tensor.defined()) return tensor;
  return std::nullopt;
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
