#pragma once

#include <ATen/core/Tensor.h>

#include <lora/linkage.hpp>
#include <lora/version.hpp>

// Products of which one dimension is a rank, and another one the N rows of a batch. What has rows and features may be
// in half precision where the rest is float. Then a large one is not written out in float as a whole: a CPU with
// AVX-512 reads it as it is, others some of its rows at a time, as many as a cache holds; on CUDA, where LibTorch
// multiplies bfloat16 into floats, it is multiplied with the small operand as a sum of halves. Elsewhere it is written
// out.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// a x^T (rank, N) for a (rank, k), x (N, k), in the type of a.
LORA_INLINE at::Tensor thin_mm(const at::Tensor& a, const at::Tensor& x);

/// scale a x (rank, k) for a (rank, N), x (N, k), in the type of a, and any tensor of the result's shape and that type.
LORA_INLINE at::Tensor thin_mm_like(const at::Tensor& like, const at::Tensor& a, const at::Tensor& x, double scale);

/// Its transpose (k, rank) for a tensor `like` of that shape.
LORA_INLINE at::Tensor thin_mm_like_t(const at::Tensor& like, const at::Tensor& a, const at::Tensor& x, double scale);

/// sum += scale a^T b for a (rank, N), b (rank, n) of one type and a `sum` (N, n) that nobody else holds: where it is
/// faster it is new memory afterwards. One in half precision is rounded once; a large one in bfloat16 on CUDA, where
/// LibTorch adds the product, twice.
LORA_INLINE void add_thin_mm(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b, double scale);

/// The same of one type, in the memory of a sum that may be a part of something larger.
LORA_INLINE void add_thin_mm_(const at::Tensor& sum, const at::Tensor& a, const at::Tensor& b, double scale);

/// x (N, k) in the type of a factor (rank, k), where it is to be used more than once and the products above would write
/// it out as a whole; else as it is.
LORA_INLINE at::Tensor written_out_for(const at::Tensor& factor, const at::Tensor& x);

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <lora/weight/dense_product.hpp>
#include <lora/weight/one_row.hpp>
#include <lora/weight/plain.hpp>
#include <lora/weight/thin_kernels.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// at::mm whose result is float, of operands that are not; on CUDA since LibTorch 2.8.
template <class Tensor, class = void>
struct MmIntoFloat {
  static constexpr bool exists = false;
  static Tensor of(const Tensor& a, const Tensor& b) { return at::mm(a.to(at::kFloat), b.to(at::kFloat)); }
};
template <class Tensor>
struct MmIntoFloat<Tensor, std::void_t<decltype(at::mm(std::declval<Tensor>(), std::declval<Tensor>(), at::kFloat))>> {
  static constexpr bool exists = true;
  static Tensor of(const Tensor& a, const Tensor& b) { return at::mm(a, b, at::kFloat); }
};

/// Whether products of a float operand with `large` are computed as those of halves: where the passes over `large` that
/// this saves are more than the calls that it takes.
inline bool multiplies_halves(const at::Tensor& large) {
  constexpr int64_t kLeastNumbers = 1 << 22;
  return MmIntoFloat<at::Tensor>::exists && large.is_cuda() && large.scalar_type() == at::kBFloat16 &&
         large.numel() >= kLeastNumbers && !at::globalContext().hasROCM();
}

/// a as a sum of halves: the next 8 bits of each number in each of them. Three have the 24 bits of a float.
inline std::vector<at::Tensor> as_halves(const at::Tensor& a, size_t count) {
  std::vector<at::Tensor> halves;
  for (auto rest = a; halves.size() < count; rest = rest - halves.back()) halves.push_back(rest.to(at::kBFloat16));
  return halves;
}

/// Whether a is (rank, N), as factors of the rows x (N, k) in sums of them.
inline bool are_coefficients(const at::Tensor& a, int64_t rank, const at::Tensor& x) {
  return a.scalar_type() == at::kFloat && a.is_cpu() && a.dim() == 2 && a.size(0) == rank && x.dim() == 2 &&
         a.size(1) == x.size(0) && is_plain(a);
}

/// a b in float, for a (rank, k) in float, b (k, n) in bfloat16.
inline at::Tensor mm_of_halves(const at::Tensor& a, const at::Tensor& b) {
  const auto parts = as_halves(a, 3);
  return MmIntoFloat<at::Tensor>::of(at::cat(parts), b).view({3, a.size(0), b.size(1)}).sum(0);
}

/// So many numbers are written out at a time.
inline constexpr int64_t kBlockNumbers = 1 << 18;

inline at::Tensor written_out(const at::Tensor& large, at::ScalarType type) {
  if (large.scalar_type() == type || multiplies_halves(large)) return large;
  // On a device calls cost more than memory; and what a transform looks at is not written to.
  const bool is_whole = !large.is_cpu() || large.numel() <= kBlockNumbers || !is_plain(large);
  return is_whole ? large.to(type) : large;
}

LORA_INLINE at::Tensor written_out_for(const at::Tensor& factor, const at::Tensor& x) {
  return is_for_thin_kernels(factor, x) ? x : written_out(x, factor.scalar_type());
}

/// Calls `visit(first, count)` for some of the `rows` rows of `large` after the other, as many as are written out in
/// another type at a time.
template <class Visit>
void for_each_block(const at::Tensor& large, int64_t rows, const Visit& visit) {
  constexpr int64_t kLeastRows = 16;
  const auto width = large.numel() / std::max<int64_t>(rows, 1);
  const auto size = std::max(kLeastRows, kBlockNumbers / std::max<int64_t>(width, 1));
  for (int64_t first = 0; first < rows; first += size) visit(first, std::min(size, rows - first));
}

LORA_INLINE at::Tensor thin_mm(const at::Tensor& a, const at::Tensor& x) {
  if (x.size(0) == 1 && a.size(1) == x.size(1) && is_for_one_row(a, x)) return product_with_one(a, x);
  if (is_for_thin_kernels(a, x)) return thin_dots(a, x);
  const auto b = written_out(x, a.scalar_type()).t();
  if (a.scalar_type() == b.scalar_type()) {
    const bool is_faster = is_for_onednn(a, b, {}, /*inputs=*/0) && is_regular(a.size(0)) && is_regular(b.size(1));
    return is_faster ? onednn_mm(a, b, {}) : a.mm(b);
  }
  if (multiplies_halves(b)) return mm_of_halves(a, b);
  auto all = at::empty({a.size(0), b.size(1)}, a.options());
  for_each_block(b, b.size(1), [&](int64_t first, int64_t count) {
    auto some = all.narrow(1, first, count);
    at::mm_out(some, a, b.narrow(1, first, count).to(a.scalar_type()));
  });
  return all;
}

/// Whether a x is that of one column and one row, which are computed here; `factor` is (rank, k), or its transpose.
inline bool is_of_one(const at::Tensor& factor, const at::Tensor& a, const at::Tensor& x, int64_t ranks) {
  const bool is_one = a.size(1) == 1 && x.size(0) == 1;
  const bool fits = a.size(0) == factor.size(ranks) && x.size(1) == factor.size(1 - ranks);
  return is_one && fits && is_for_one_row(factor, a) && is_for_one_row(factor, x);
}

LORA_INLINE at::Tensor thin_mm_like(const at::Tensor& like, const at::Tensor& a, const at::Tensor& x, double scale) {
  if (is_of_one(like, a, x, /*ranks=*/0)) return outer_product(a, x, scale);
  if (are_coefficients(a, like.size(0), x) && is_for_thin_kernels(like, x)) return thin_sums(a, x, scale);
  const auto b = written_out(x, a.scalar_type());
  if (a.scalar_type() == b.scalar_type()) {
    const bool is_faster = is_for_onednn(a, b, {}, /*inputs=*/0) && is_regular(a.size(0)) && is_regular(b.size(0));
    return is_faster ? onednn_mm(a, b, {}).mul_(scale) : at::addmm(like, a, b, /*beta=*/0, scale);
  }
  if (multiplies_halves(b)) return mm_of_halves(a, b).mul_(scale);
  auto sum = at::zeros({a.size(0), b.size(1)}, a.options());
  for_each_block(b, b.size(0), [&](int64_t first, int64_t count) {
    sum.addmm_(a.narrow(1, first, count), b.narrow(0, first, count).to(a.scalar_type()), /*beta=*/1, scale);
  });
  return sum;
}

LORA_INLINE at::Tensor thin_mm_like_t(const at::Tensor& like, const at::Tensor& a, const at::Tensor& x, double scale) {
  if (is_of_one(like, a, x, /*ranks=*/1)) return outer_product(x, a, scale);
  const auto transposed = like.t();
  if (are_coefficients(a, like.size(1), x) && is_for_thin_kernels(transposed, x)) return thin_sums_t(a, x, scale);
  return thin_mm_like(transposed, a, x, scale).t();
}

LORA_INLINE void add_thin_mm(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b, double scale) {
  if (are_coefficients(a, b.size(0), sum) && is_for_thin_kernels(b, sum)) return add_thin(sum, a, b, scale);
  const auto c = a.t();
  if (c.scalar_type() != sum.scalar_type()) {
    if (multiplies_halves(sum)) {  // c b but for the product of both second halves, 2^-16 of it
      const auto cs = as_halves(c, 2), bs = as_halves(b, 2);
      sum.addmm_(at::cat({cs[0], cs[0], cs[1]}, 1), at::cat({bs[0], bs[1], bs[0]}), /*beta=*/1, scale);
      return;
    }
    if (!sum.is_cpu()) {
      sum.add_(c.mm(b), scale);
      return;
    }
    for_each_block(sum, sum.size(0), [&](int64_t first, int64_t count) {
      sum.narrow(0, first, count).add_(c.narrow(0, first, count).mm(b), scale);
    });
    return;
  }
  // Rows that are a multiple of 2 KB apart share few places of a cache, which costs MKL half of its time and more.
  constexpr int64_t kNumbers = 512;
  const bool collides = sum.dim() == 2 && sum.stride(0) % kNumbers == 0 && sum.is_contiguous();
  if (collides && is_regular(c.size(0)) && is_for_onednn(c, b, {}, /*inputs=*/0) && is_plain(sum)) {
    sum = onednn_plus(sum, c.mul(scale).contiguous(), b);
  } else {
    add_thin_mm_(sum, a, b, scale);
  }
}

LORA_INLINE void add_thin_mm_(const at::Tensor& sum, const at::Tensor& a, const at::Tensor& b, double scale) {
  const bool fits = a.size(1) == 1 && a.size(0) == b.size(0) && sum.size(1) == b.size(1);
  if (sum.size(0) == 1 && fits && is_for_one_row(b, a) && is_for_one_row(b, sum)) {
    add_product_with_one(sum, a, b, scale);
  } else if (are_coefficients(a, b.size(0), sum) && is_for_thin_kernels(b, sum)) {
    add_thin(sum, a, b, scale);
  } else {
    sum.addmm_(a.t(), b, /*beta=*/1, scale);
  }
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
