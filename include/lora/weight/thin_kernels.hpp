#pragma once

#include <ATen/core/Tensor.h>

#include <lora/linkage.hpp>
#include <lora/version.hpp>

// The products of thin_product.hpp on a CPU with AVX-512, sixteen numbers at a time. A library for large matrices reads
// the few rows of a factor as if they were many, and does not multiply floats with halves: here the many rows are read
// once, in the type they have, and multiplied as floats.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Whether products of a factor (rank, k) with `rows` (N, k) are computed here: a factor in float, of a rank so small
/// that reading the rows counts; several rows in float or bfloat16, each of which lies together; a processor with
/// AVX-512.
LORA_INLINE bool is_for_thin_kernels(const at::Tensor& factor, const at::Tensor& rows);

/// Decides it for this process, for measurements and tests. Returns whether the processor has what it takes; without it
/// nothing is changed.
LORA_INLINE bool take_thin_kernels(bool taken);

/// factor x^T (rank, N) in float, for x (N, k), in memory as its transpose.
LORA_INLINE at::Tensor thin_dots(const at::Tensor& factor, const at::Tensor& x);

/// The same, and in `squares` (N), floats that lie together, the sum of the squares of each row of x.
LORA_INLINE at::Tensor thin_dots(const at::Tensor& factor, const at::Tensor& x, const at::Tensor& squares);

/// scale c x (rank, k) for c (rank, N) in float, x (N, k).
LORA_INLINE at::Tensor thin_sums(const at::Tensor& c, const at::Tensor& x, double scale);

/// Its transpose (k, rank), each row of which lies together.
LORA_INLINE at::Tensor thin_sums_t(const at::Tensor& c, const at::Tensor& x, double scale);

/// y += scale c^T factor for y (N, k), c (rank, N) in float, each number rounded once.
LORA_INLINE void add_thin(const at::Tensor& y, const at::Tensor& c, const at::Tensor& factor, double scale);

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/util/BFloat16.h>

#include <lora/system/parallel.hpp>
#include <lora/system/processor.hpp>
#include <lora/weight/plain.hpp>
#include <lora/weight/thin_avx512.hpp>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

#if defined(LORA_AVX512)

/// Calls `visit` with a number of the type that a tensor has.
template <class Visit>
void with_number(const at::Tensor& tensor, const Visit& visit) {
  tensor.scalar_type() == at::kFloat ? visit(float()) : visit(c10::BFloat16());
}

template <class Number>
NumberRows<const Number> const_rows(const at::Tensor& matrix) {
  return {matrix.const_data_ptr<Number>(), matrix.stride(0), matrix.size(0), matrix.size(1)};
}

template <class Number>
NumberRows<Number> mutable_rows(const at::Tensor& matrix) {
  return {matrix.mutable_data_ptr<Number>(), matrix.stride(0), matrix.size(0), matrix.size(1)};
}

inline Coefficients coefficients(const at::Tensor& c) { return {c.const_data_ptr<float>(), c.stride(1), c.stride(0)}; }

/// A factor whose rows lie together each, as those of A do; those of the transpose of B do not.
inline at::Tensor rows_together(const at::Tensor& factor) {
  if (factor.stride(1) == 1) return factor;
  if (factor.stride(0) != 1 || factor.stride(1) != factor.size(0)) return factor.contiguous();
  auto rows = at::empty(factor.sizes(), factor.options());
  transpose(factor.const_data_ptr<float>(), factor.size(1), factor.size(0), rows.mutable_data_ptr<float>());
  return rows;
}

/// So many rows of a width, or columns of some rows, are work for a thread.
inline std::int64_t thin_grain(std::int64_t numbers_of_each, std::int64_t least) {
  constexpr std::int64_t kNumbersEach = 1 << 16;
  return std::max(least, kNumbersEach / numbers_of_each);
}
inline std::int64_t rows_for_thread(std::int64_t width) { return thin_grain(width, avx512::kRowsOfDots); }
inline std::int64_t columns_for_thread(std::int64_t rows) {
  return thin_grain(rows, avx512::kVectorsOfSums * avx512::kNumbers);
}

struct ThinKernels {
  std::atomic<bool> are_taken{has_avx512()};

  static ThinKernels& instance() {
    static ThinKernels all;
    return all;
  }
};

LORA_INLINE bool take_thin_kernels(bool taken) {
  if (!has_avx512()) return false;
  ThinKernels::instance().are_taken = taken;
  return true;
}

LORA_INLINE bool is_for_thin_kernels(const at::Tensor& factor, const at::Tensor& rows) {
  if (!ThinKernels::instance().are_taken || !rows.is_cpu() || !factor.is_cpu()) return false;
  if (rows.scalar_type() != at::kFloat && rows.scalar_type() != at::kBFloat16) return false;
  if (factor.scalar_type() != at::kFloat || rows.dim() != 2 || factor.dim() != 2) return false;
  if (!is_plain(rows) || !is_plain(factor)) return false;
  if (rows.stride(1) != 1 || rows.size(0) < 2 || rows.size(1) != factor.size(1) || rows.numel() == 0) return false;
  return factor.size(0) > 0 && factor.size(0) <= kMostRanks;
}

inline at::Tensor dots_by(const at::Tensor& factor, const at::Tensor& x, float* squares) {
  const auto together = rows_together(factor);
  const auto a = const_rows<float>(together);
  auto products = at::empty_strided({a.count, x.size(0)}, {1, a.count}, factor.options());
  auto* out = products.mutable_data_ptr<float>();
  with_number(x, [&](auto number) {
    const auto rows = const_rows<decltype(number)>(x);
    parallel_for(0, rows.count, rows_for_thread(rows.width),
                 [&](std::int64_t first, std::int64_t last) { avx512::dots(a, rows, first, last, out, squares); });
  });
  return products;
}

LORA_INLINE at::Tensor thin_dots(const at::Tensor& factor, const at::Tensor& x) {
  return dots_by(factor, x, /*squares=*/nullptr);
}

LORA_INLINE at::Tensor thin_dots(const at::Tensor& factor, const at::Tensor& x, const at::Tensor& squares) {
  return dots_by(factor, x, squares.mutable_data_ptr<float>());
}

LORA_INLINE at::Tensor thin_sums(const at::Tensor& c, const at::Tensor& x, double scale) {
  auto sums = at::empty({c.size(0), x.size(1)}, c.options());
  const auto out = mutable_rows<float>(sums);
  const auto of = coefficients(c);
  with_number(x, [&](auto number) {
    const auto rows = const_rows<decltype(number)>(x);
    parallel_for(0, rows.width, columns_for_thread(rows.count), [&](std::int64_t first, std::int64_t last) {
      avx512::sums(of, rows, static_cast<float>(scale), first, last, out);
    });
  });
  return sums;
}

LORA_INLINE at::Tensor thin_sums_t(const at::Tensor& c, const at::Tensor& x, double scale) {
  const auto sums = thin_sums(c, x, scale);
  auto transposed = at::empty({sums.size(1), sums.size(0)}, sums.options());
  transpose(sums.const_data_ptr<float>(), sums.size(0), sums.size(1), transposed.mutable_data_ptr<float>());
  return transposed;
}

LORA_INLINE void add_thin(const at::Tensor& y, const at::Tensor& c, const at::Tensor& factor, double scale) {
  const auto together = rows_together(factor);
  const auto a = const_rows<float>(together);
  const auto of = coefficients(c);
  with_number(y, [&](auto number) {
    const auto rows = mutable_rows<decltype(number)>(y);
    parallel_for(0, rows.count, rows_for_thread(rows.width), [&](std::int64_t first, std::int64_t last) {
      avx512::add(rows, of, a, static_cast<float>(scale), first, last);
    });
  });
}

#else

LORA_INLINE bool take_thin_kernels(bool) { return false; }
LORA_INLINE bool is_for_thin_kernels(const at::Tensor&, const at::Tensor&) { return false; }
LORA_INLINE at::Tensor thin_dots(const at::Tensor& factor, const at::Tensor& x) { return factor.mm(x.t()); }
LORA_INLINE at::Tensor thin_dots(const at::Tensor& factor, const at::Tensor& x, const at::Tensor& squares) {
  squares.copy_(x.square().sum(1));
  return factor.mm(x.t());
}
LORA_INLINE at::Tensor thin_sums(const at::Tensor& c, const at::Tensor& x, double scale) { return c.mm(x).mul_(scale); }
LORA_INLINE at::Tensor thin_sums_t(const at::Tensor& c, const at::Tensor& x, double scale) {
  return x.t().mm(c.t()).mul_(scale);
}
LORA_INLINE void add_thin(const at::Tensor& y, const at::Tensor& c, const at::Tensor& factor, double scale) {
  y.addmm_(c.t(), factor, /*beta=*/1, scale);
}

#endif

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
