#pragma once

#include <ATen/core/grad_mode.h>
#include <ATen/ops/linalg_vector_norm.h>

#include <lora/version.hpp>
#include <lora/weight/placeholder.hpp>

#include <cmath>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// ||W_q - W|| / ||W|| over several weights, each of which is written out a panel at a time.
class RoundingError {
 public:
  void add(const at::Tensor& weight, const QuantizedWeight& held) {
    at::NoGradGuard no_grad;
    for_each_panel(held, at::kFloat, [&](int64_t row, const at::Tensor& numbers) {
      const auto exact = weight.narrow(0, row, numbers.size(0)).to(at::kFloat);
      whole_ += square(exact);
      lost_ += square(numbers - exact);
    });
  }

  double relative() const { return whole_ > 0 ? std::sqrt(lost_ / whole_) : 0; }

 private:
  static double square(const at::Tensor& tensor) { return std::pow(at::linalg_vector_norm(tensor).item<double>(), 2); }

  double lost_ = 0, whole_ = 0;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
