#pragma once

#include <ATen/core/Tensor.h>

#include <lora/linkage.hpp>
#include <lora/version.hpp>

// The norms of the rows of W + s B A, which is not formed:
//
//   ||w + s b A||^2 = ||w||^2 + 2 s <A w, b> + s^2 <A A^T b, b>   for each row w of W and b of B
//
// A sum of this kind has the digits of its largest term, so of a row that the update all but cancels fewer are right.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The norms (out) or (batch, out) for W (..., out, in), A (..., rank, in) and B (..., out, rank) of one type, without
/// a gradient.
LORA_INLINE at::Tensor updated_norms(const at::Tensor& W, const at::Tensor& A, const at::Tensor& B, double scale);

/// The same from A W^T (..., rank, out) and ||w||^2 (..., out).
LORA_INLINE at::Tensor updated_norms(const at::Tensor& product, const at::Tensor& squares, const at::Tensor& A,
                                     const at::Tensor& B, double scale);

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/matmul.h>

#include <torch/csrc/jit/frontend/tracer.h>

#include <lora/system/parallel.hpp>
#include <lora/system/processor.hpp>
#include <lora/weight/one_row.hpp>
#include <lora/weight/row_kernels.hpp>
#include <lora/weight/thin_kernels.hpp>
#include <lora/weight/thin_product.hpp>

#include <algorithm>
#include <cmath>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Whether the norms are computed in one pass over W: all are numbers of float32 on a CPU, A fits a cache beside the
/// rows of W, and nothing records operators.
inline bool is_for_norms_by_rows(const at::Tensor& W, const at::Tensor& A, const at::Tensor& B) {
  constexpr int64_t kMostNumbers = 1 << 16, kLargestRank = 64;
  const auto is_matrix = [](const at::Tensor& matrix) {
    return matrix.dim() == 2 && is_plain_float(matrix) && matrix.is_contiguous();
  };
  if (!is_matrix(W) || !is_matrix(A) || !is_matrix(B)) return false;
  const bool fits = A.size(1) == W.size(1) && B.size(0) == W.size(0) && B.size(1) == A.size(0);
  return fits && A.size(0) <= kLargestRank && A.numel() <= kMostNumbers && has_avx2() &&
         !torch::jit::tracer::isTracing();
}

/// W A^T (out, rank), and in `squares` (out) ||w||^2.
inline at::Tensor products_and_squares(const at::Tensor& W, const at::Tensor& A, const at::Tensor& squares) {
  constexpr int64_t kNumbersOfThread = 1 << 14;
  if (is_for_thin_kernels(A, W)) return thin_dots(A, W, squares).t();
  const auto features = W.size(1), rank = A.size(0);
  auto products = at::empty({W.size(0), rank}, W.options());
  const RowsInMemory a{A.const_data_ptr<float>(), features, rank};
  const auto* w = W.const_data_ptr<float>();
  auto *out = products.mutable_data_ptr<float>(), *of_rows = squares.mutable_data_ptr<float>();
  parallel_for(0, W.size(0), std::max<int64_t>(1, kNumbersOfThread / std::max<int64_t>(features, 1)),
               [&](int64_t begin, int64_t end) {
                 const RowsInMemory rows{w + begin * features, features, end - begin};
                 row_kernels().dots_and_squares(a, rows, features, out + begin * rank, of_rows + begin);
               });
  return products;
}

inline at::Tensor norms_by_rows(const at::Tensor& W, const at::Tensor& A, const at::Tensor& B, double scale) {
  auto norms = at::empty({W.size(0)}, W.options());
  const auto sums = products_and_squares(W, A, norms);
  add_thin_mm_(sums, B.t(), thin_mm(A, A), scale / 2);  // so that what is beside ||w||^2 is one product with b
  const auto rank = A.size(0);
  const auto *b = B.const_data_ptr<float>(), *of_row = sums.const_data_ptr<float>();
  auto* out = norms.mutable_data_ptr<float>();
  const auto factor = static_cast<float>(2 * scale);
  for (int64_t i = 0; i < norms.size(0); ++i, b += rank, of_row += rank)
    out[i] = std::sqrt(std::max(out[i] + factor * plain::dot(b, of_row, rank), 0.0F));
  return norms;
}

LORA_INLINE at::Tensor updated_norms(const at::Tensor& W, const at::Tensor& A, const at::Tensor& B, double scale) {
  if (is_for_norms_by_rows(W, A, B)) return norms_by_rows(W, A, B, scale);
  return updated_norms(A.matmul(W.mT()), at::linalg_vector_norm(W, 2, {-1}).square(), A, B, scale);
}

LORA_INLINE at::Tensor updated_norms(const at::Tensor& product, const at::Tensor& squares, const at::Tensor& A,
                                     const at::Tensor& B, double scale) {
  const auto B_t = B.mT();
  const auto changes = product.mul(2 * scale).add_(A.matmul(A.mT()).matmul(B_t), scale * scale);
  return squares.add(changes.mul_(B_t).sum(-2)).clamp_min_(0).sqrt_();
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
