#pragma once

#include <ATen/core/DimVector.h>
#include <c10/core/ScalarType.h>

#include <lora/version.hpp>

#include <cstdint>

namespace lora {
inline namespace LORA_ABI {

/// The shape in which a method sees a weight: a matrix whose rows are outputs, or a batch of such matrices.
struct MatrixShape {
  at::DimVector batch;  ///< empty for one matrix; else how many, e.g. the groups of a convolution
  int64_t out = 0, in = 0;
  int64_t rank_shares = 1;  ///< among how many matrices a rank is divided; 1: each has the whole rank
  bool is_lookup = false;   ///< whether inputs are numbers of columns (an embedding) and not vectors
};

/// The type in which an adapter of a `base` weight is kept: float for half precision and below, else the weight's own.
inline at::ScalarType adapter_dtype(at::ScalarType base) { return base == at::kDouble ? at::kDouble : at::kFloat; }

}  // namespace LORA_ABI
}  // namespace lora
