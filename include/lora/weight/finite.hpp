#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linalg_vector_norm.h>

#include <lora/version.hpp>

#include <cmath>
#include <limits>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The largest magnitude of the numbers, NaN where one of them is, zero where there is none; of floating numbers.
inline double largest_magnitude(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  const at::NoGradGuard no_grad;
  if (!tensor.is_cpu()) return at::linalg_vector_norm(tensor, std::numeric_limits<double>::infinity()).item<double>();
  const auto [least, most] = at::aminmax(tensor);
  const auto a = std::abs(least.item<double>()), b = std::abs(most.item<double>());
  return a < b ? b : a;  // both are NaN where one is
}

/// Whether all numbers are finite, in one pass: at::isfinite writes several tensors and takes sixteen times as long.
inline bool is_finite(const at::Tensor& tensor) {
  const auto type = tensor.scalar_type();
  const bool is_usual = type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
  if (is_usual && tensor.layout() == at::kStrided) return std::isfinite(largest_magnitude(tensor));
  return at::isfinite(tensor).all().item<bool>();
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
