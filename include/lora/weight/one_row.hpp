#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <lora/version.hpp>
#include <lora/weight/plain.hpp>
#include <lora/weight/row_kernels.hpp>

#include <algorithm>
#include <cstdint>
#include <utility>

// The products of thin_product.hpp for one row of a batch, in float32 on a CPU: there a call of a library that is made
// for large matrices would be most of what they cost.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

inline bool is_plain_float(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat && tensor.is_cpu() && is_plain(tensor);
}

/// A matrix in memory of which each row lies together, as in A, or each column, as in the transpose of B.
struct MatrixInMemory {
  explicit MatrixInMemory(const at::Tensor& matrix)
      : inputs(matrix.size(0)),
        outputs(matrix.size(1)),
        is_by_row(matrix.stride(1) == 1),
        stride(matrix.stride(is_by_row ? 0 : 1)),
        numbers(matrix.const_data_ptr<float>()) {}

  MatrixInMemory transposed() const {
    auto matrix = *this;
    std::swap(matrix.inputs, matrix.outputs);
    matrix.is_by_row = !is_by_row;
    return matrix;
  }

  int64_t inputs, outputs;
  bool is_by_row;
  int64_t stride;
  const float* numbers;
};

/// y += scale x M for x (inputs), a matrix M (inputs, outputs) and y (outputs), of the outputs [first, last).
inline void add_row_product(const MatrixInMemory& m, const float* x, float scale, int64_t first, int64_t last,
                            float* y) {
  const auto& kernels = row_kernels();
  if (m.is_by_row) {
    kernels.add_rows({m.numbers + first, m.stride, m.inputs}, x, scale, last - first, y + first);
  } else {
    kernels.add_dots({m.numbers + first * m.stride, m.stride, last - first}, x, scale, m.inputs, y + first);
  }
}

/// Whether products of a factor (rank, features) and one row, as a row or as a column, are computed here.
inline bool is_for_one_row(const at::Tensor& factor, const at::Tensor& one) {
  constexpr int64_t kMost = 1 << 17;  // numbers; of more, several threads may have some each
  const auto lies_together = [&](int64_t dim) { return one.size(dim) == 1 || one.stride(dim) == 1; };
  return factor.numel() > 0 && factor.numel() <= kMost && (factor.stride(1) == 1 || factor.stride(0) == 1) &&
         lies_together(0) && lies_together(1) && is_plain_float(factor) && is_plain_float(one);
}

/// M x^T (rank, 1) for a factor M (rank, features), x (1, features).
inline at::Tensor product_with_one(const at::Tensor& factor, const at::Tensor& x) {
  const auto transposed = MatrixInMemory(factor).transposed();
  auto product = at::empty({transposed.outputs, 1}, factor.options());
  auto* out = product.mutable_data_ptr<float>();
  std::fill_n(out, transposed.outputs, 0.0F);
  add_row_product(transposed, x.const_data_ptr<float>(), 1, 0, transposed.outputs, out);
  return product;
}

/// sum (1, features) += scale c^T M for c (rank, 1), a factor M (rank, features).
inline void add_product_with_one(const at::Tensor& sum, const at::Tensor& c, const at::Tensor& factor, double scale) {
  const MatrixInMemory m(factor);
  add_row_product(m, c.const_data_ptr<float>(), static_cast<float>(scale), 0, m.outputs, sum.mutable_data_ptr<float>());
}

/// scale times each number of a, for the rows, times each one of b, for the columns.
inline at::Tensor outer_product(const at::Tensor& a, const at::Tensor& b, double scale) {
  const auto width = b.numel();
  auto product = at::empty({a.numel(), width}, a.options());
  const auto *of_row = a.const_data_ptr<float>(), *of_column = b.const_data_ptr<float>();
  auto* out = product.mutable_data_ptr<float>();
  for (int64_t i = 0; i < a.numel(); ++i, out += width) {
    const auto factor = static_cast<float>(scale) * of_row[i];
    int64_t k = 0;
    for (; k + plain::kFour <= width; k += plain::kFour)
      plain::store(factor * plain::load_four(of_column + k), out + k);
    for (; k < width; ++k) out[k] = factor * of_column[k];
  }
  return product;
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
