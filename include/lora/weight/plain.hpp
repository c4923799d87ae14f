#pragma once

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>

#include <lora/version.hpp>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Whether a tensor is numbers and strides, which mean what is in memory, and no transform (vmap, forward mode) looks
/// at what is computed with it.
inline bool is_plain(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && !tensor.is_nested() && !at::isTensorSubclassLike(tensor) &&
         !tensor.is_neg() && !tensor._is_zerotensor() && !tensor._fw_grad(0).defined();
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
