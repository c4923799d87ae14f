#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linalg_vector_norm.h>

#include <lora/version.hpp>
#include <lora/weight/stamp.hpp>

#include <mutex>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// ||w||^2 of every row w of a frozen matrix, kept until somebody writes to it. Any number of threads may ask.
class RowSquares {
 public:
  /// Of `matrix`, in `type`, which is a view of `weight`.
  at::Tensor of(const at::Tensor& matrix, const at::Tensor& weight, at::ScalarType type) {
    if (weight.is_inference()) return squares(matrix, type);  // which may be written to unseen
    const Stamp now(weight);
    std::lock_guard<std::mutex> lock(mutex_);
    if (!squares_.defined() || squares_.scalar_type() != type || stamp_ != now) {
      squares_ = squares(matrix, type);
      stamp_ = now;
    }
    return squares_;
  }

 private:
  static at::Tensor squares(const at::Tensor& matrix, at::ScalarType type) {
    at::NoGradGuard no_grad;
    return at::linalg_vector_norm(matrix, 2, {-1}, /*keepdim=*/false, type).square_();
  }

  std::mutex mutex_;
  Stamp stamp_;
  at::Tensor squares_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
