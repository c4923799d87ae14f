#pragma once

#include <ATen/core/Tensor.h>

#include <lora/version.hpp>

#include <cstdint>

namespace lora {
inline namespace LORA_ABI {

/// What a weight is multiplied with, as far as rounding it has to know: for inputs x the sum of x x^T.
struct SeenInputs {
  at::Tensor moments;  ///< (in, in), Float
  int64_t dim = 1;     ///< the dimension of the weight that counts inputs: 1 for W (out, in), 0 for its transpose
};

}  // namespace LORA_ABI
}  // namespace lora
