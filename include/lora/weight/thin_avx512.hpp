#pragma once

#include <lora/system/processor.hpp>
#include <lora/version.hpp>

#if defined(LORA_AVX512)

#include <c10/util/BFloat16.h>

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

// The loops of thin_kernels.hpp, over numbers in memory.

#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 finds that in its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wsign-conversion"  // without optimization some of its functions are macros
#endif

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Rows of numbers in memory, each of which lies together.
template <class Number>
struct NumberRows {
  Number* numbers;
  std::int64_t stride, count, width;

  Number* row(std::int64_t i) const { return numbers + i * stride; }
};

/// One factor for each of some rows, and of each row of a factor.
struct Coefficients {
  const float* numbers;
  std::int64_t stride_of_row, stride_of_rank;
};

/// Factors have no more rows.
inline constexpr std::int64_t kMostRanks = 64;

namespace avx512 {

/// Loops of so many turns as are known here are written out, so that sums stay in registers.
#define LORA_UNROLL _Pragma("GCC unroll 8")

inline constexpr int kRanks = 4;  ///< rows of a factor at a time, in dots
inline constexpr int kRowsOfDots = 6, kRowsOfSquares = 4, kRowsOfSum = 8, kVectorsOfSum = 3;
inline constexpr int kRowsOfSums = 32, kVectorsOfSums = 3;
inline constexpr std::int64_t kNumbers = 16;  ///< of a vector

/// Of the numbers that are left those of one vector.
inline __mmask16 of_vector(std::int64_t left) {
  return left >= kNumbers ? __mmask16{0xFFFF} : static_cast<__mmask16>((1U << std::max<std::int64_t>(left, 0)) - 1);
}

LORA_AVX512 inline __m512 load(__mmask16 mask, const float* from) { return _mm512_maskz_loadu_ps(mask, from); }

LORA_AVX512 inline __m512 load(__mmask16 mask, const c10::BFloat16* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

LORA_AVX512 inline void store(__mmask16 mask, __m512 numbers, float* to) { _mm512_mask_storeu_ps(to, mask, numbers); }

/// Rounded to the nearest, of two as near to the even one. The processor's own instruction takes the smallest ones for
/// zero.
LORA_AVX512 inline void store(__mmask16 mask, __m512 numbers, c10::BFloat16* to) {
  const auto bits = _mm512_castps_si512(numbers);
  const auto odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const auto rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const auto is_nan = _mm512_cmp_ps_mask(numbers, numbers, _CMP_UNORD_Q);
  const auto all = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7FC00000));
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(all, 16)));
}

/// Has memory on its way that is to be read soon, or not quite so soon; what is none is no fault.
template <class Number>
void fetch(const Number* from) {
  _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T0);
}
template <class Number>
void fetch_early(const Number* from) {
  _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T1);
}

/// The four sums of the numbers of each.
LORA_AVX512 inline __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
  const auto ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const auto cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const auto all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const auto half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/// out[n * a.count + i] = <a_i, x_n> and, if asked for, squares[n] = <x_n, x_n> for kRows rows of x from the n-th one
/// on, as far as they come before `last`, and kRanks of a. In the place of what is beyond the end of either its last
/// row is read once more.
template <int kRows, bool kSquares, class Number>
LORA_AVX512 void some_dots(const NumberRows<const float>& a, std::int64_t rank, const NumberRows<const Number>& x,
                           std::int64_t n, std::int64_t last, float* out, float* squares) {
  constexpr std::int64_t kAhead = 128;  // numbers; behind the end of a row those of the one that is read next
  // With the squares it is the rows of a weight, of which a processor itself is ahead.
  const bool fetches = !kSquares && rank == 0;
  const Number* x_rows[kRows];
  const float* a_rows[kRanks];
  __m512 sums[kRanks][kRows], of_squares[kRows];
  LORA_UNROLL for (int j = 0; j < kRows; ++j) {
    x_rows[j] = x.row(std::min(n + j, last - 1));
    of_squares[j] = _mm512_setzero_ps();
  }
  LORA_UNROLL for (int i = 0; i < kRanks; ++i) {
    a_rows[i] = a.row(std::min(rank + i, a.count - 1));
    LORA_UNROLL for (int j = 0; j < kRows; ++j) sums[i][j] = _mm512_setzero_ps();
  }
  for (std::int64_t k = 0; k < a.width; k += kNumbers) {
    const auto mask = of_vector(a.width - k);
    __m512 some[kRows];
    LORA_UNROLL for (int j = 0; j < kRows; ++j) some[j] = load(mask, x_rows[j] + k);
    if (fetches) {
      const auto ahead = k + kAhead < a.width ? k + kAhead : k + kAhead - a.width + kRows * x.stride;
      LORA_UNROLL for (int j = 0; j < kRows; ++j) fetch(x_rows[j] + ahead);
    }
    LORA_UNROLL for (int i = 0; i < kRanks; ++i) {
      const auto of_factor = load(mask, a_rows[i] + k);
      LORA_UNROLL for (int j = 0; j < kRows; ++j) sums[i][j] = _mm512_fmadd_ps(of_factor, some[j], sums[i][j]);
    }
    if constexpr (kSquares) {
      LORA_UNROLL for (int j = 0; j < kRows; ++j) of_squares[j] = _mm512_fmadd_ps(some[j], some[j], of_squares[j]);
    }
  }
  const auto ranks = static_cast<__mmask8>((1U << std::min<std::int64_t>(kRanks, a.count - rank)) - 1);
  LORA_UNROLL for (int j = 0; j < kRows; ++j) {
    if (n + j >= last) break;
    const auto four = sums_of(sums[0][j], sums[1][j], sums[2][j], sums[3][j]);
    _mm_mask_storeu_ps(out + (n + j) * a.count + rank, ranks, four);
    if constexpr (kSquares) squares[n + j] = _mm512_reduce_add_ps(of_squares[j]);
  }
}

/// Of the rows [first, last) of x; `squares` may be null.
template <class Number>
LORA_AVX512 void dots(const NumberRows<const float>& a, const NumberRows<const Number>& x, std::int64_t first,
                      std::int64_t last, float* out, float* squares) {
  if (squares != nullptr) {
    for (auto n = first; n < last; n += kRowsOfSquares) {
      some_dots<kRowsOfSquares, true>(a, 0, x, n, last, out, squares);
      for (std::int64_t rank = kRanks; rank < a.count; rank += kRanks)
        some_dots<kRowsOfSquares, false>(a, rank, x, n, last, out, squares);
    }
    return;
  }
  for (auto n = first; n < last; n += kRowsOfDots) {
    for (std::int64_t rank = 0; rank < a.count; rank += kRanks)
      some_dots<kRowsOfDots, false>(a, rank, x, n, last, out, squares);
  }
}

/// The coefficients of kTile ranks from `rank` on, of up to kRowsOfSums rows, so that those of a row lie together.
template <int kTile>
class CoefficientsOfRows {
 public:
  CoefficientsOfRows(const Coefficients& c, std::int64_t first, std::int64_t last, std::int64_t rank,
                     std::int64_t ranks) {
    if (c.stride_of_rank == 1 && rank + kTile <= ranks) {
      numbers_ = c.numbers + first * c.stride_of_row + rank;
      stride_ = c.stride_of_row;
      return;
    }
    for (auto n = first; n < last; ++n) {
      for (int i = 0; i < kTile; ++i) {
        auto& to = copies_[(n - first) * kTile + i];
        to = rank + i < ranks ? c.numbers[n * c.stride_of_row + (rank + i) * c.stride_of_rank] : 0;
      }
    }
  }

  CoefficientsOfRows(const CoefficientsOfRows&) = delete;
  CoefficientsOfRows& operator=(const CoefficientsOfRows&) = delete;

  /// Of the n-th of the rows.
  const float* row(std::int64_t n) const { return numbers_ + n * stride_; }

 private:
  const float* numbers_ = copies_;
  std::int64_t stride_ = kTile;
  float copies_[kRowsOfSums * kTile];
};

/// out_i = scale * sum over n of c(n, i) x_n over the rows [begin, end) of x, or that more than it was where these are
/// not the first ones, of kTile ranks from `rank` on, and of the numbers of kVectorsOfSums vectors from k on that come
/// before `last`.
template <int kTile, class Number>
LORA_AVX512 void some_sums(const CoefficientsOfRows<kTile>& c, const NumberRows<const Number>& x, float scale,
                           std::int64_t begin, std::int64_t end, std::int64_t rank, std::int64_t k, std::int64_t last,
                           const NumberRows<float>& out) {
  // Those of the next rows, of which every line is asked for once.
  const auto ahead = rank == 0 && end < x.count ? (end - begin) * x.stride : 0;
  __mmask16 masks[kVectorsOfSums];
  __m512 all[kTile][kVectorsOfSums];
  LORA_UNROLL for (int v = 0; v < kVectorsOfSums; ++v) masks[v] = of_vector(last - k - v * kNumbers);
  LORA_UNROLL for (int i = 0; i < kTile; ++i) {
    LORA_UNROLL for (int v = 0; v < kVectorsOfSums; ++v) all[i][v] = _mm512_setzero_ps();
  }
  for (auto n = begin; n < end; ++n) {
    const auto* row = x.row(n) + k;
    const auto* of_row = c.row(n - begin);
    __m512 some[kVectorsOfSums];
    LORA_UNROLL for (int v = 0; v < kVectorsOfSums; ++v) some[v] = load(masks[v], row + v * kNumbers);
    if (ahead != 0) {
      LORA_UNROLL for (int v = 0; v < kVectorsOfSums; ++v) fetch_early(row + ahead + v * kNumbers);
    }
    LORA_UNROLL for (int i = 0; i < kTile; ++i) {
      const auto one = _mm512_set1_ps(of_row[i]);
      LORA_UNROLL for (int v = 0; v < kVectorsOfSums; ++v) all[i][v] = _mm512_fmadd_ps(one, some[v], all[i][v]);
    }
  }
  const auto factor = _mm512_set1_ps(scale);
  LORA_UNROLL for (int i = 0; i < kTile; ++i) {
    if (rank + i >= out.count) break;
    LORA_UNROLL for (int v = 0; v < kVectorsOfSums; ++v) {
      auto* to = out.row(rank + i) + k + v * kNumbers;
      const auto before = begin == 0 ? _mm512_setzero_ps() : load(masks[v], to);
      store(masks[v], _mm512_fmadd_ps(factor, all[i][v], before), to);
    }
  }
}

/// The same of the columns [left, right) of each row.
template <int kTile, class Number>
LORA_AVX512 void sums_of_rows(const Coefficients& c, const NumberRows<const Number>& x, float scale, std::int64_t begin,
                              std::int64_t end, std::int64_t rank, std::int64_t left, std::int64_t right,
                              const NumberRows<float>& out) {
  const CoefficientsOfRows<kTile> of_rows(c, begin, end, rank, out.count);
  for (auto k = left; k < right; k += kVectorsOfSums * kNumbers)
    some_sums<kTile>(of_rows, x, scale, begin, end, rank, k, right, out);
}

/// out_i = scale * sum over n of c(n, i) x_n, of the columns [first, last) of each row.
template <class Number>
LORA_AVX512 void sums(const Coefficients& c, const NumberRows<const Number>& x, float scale, std::int64_t first,
                      std::int64_t last, const NumberRows<float>& out) {
  constexpr int kFew = 4, kMany = 8;                                 // ranks at a time
  constexpr std::int64_t kColumns = 16 * kVectorsOfSums * kNumbers;  // of so many rows a cache has some more
  for (auto left = first; left < last; left += kColumns) {
    const auto right = std::min(left + kColumns, last);
    for (std::int64_t begin = 0; begin < x.count; begin += kRowsOfSums) {
      const auto end = std::min(begin + kRowsOfSums, x.count);
      for (std::int64_t rank = 0; rank < out.count; rank += kMany) {
        out.count - rank > kFew ? sums_of_rows<kMany>(c, x, scale, begin, end, rank, left, right, out)
                                : sums_of_rows<kFew>(c, x, scale, begin, end, rank, left, right, out);
      }
    }
  }
}

/// y_n += scale * sum over i of c(n, i) a_i for the kRows rows of y from the n-th one on. In the place of what is
/// beyond the last of them is that row once more, to which the same is written.
template <int kRows, class Number>
LORA_AVX512 void add_some(const NumberRows<Number>& y, const Coefficients& c, const NumberRows<const float>& a,
                          float scale, std::int64_t n, std::int64_t last) {
  constexpr auto kWidth = kVectorsOfSum * kNumbers;
  const auto factor = _mm512_set1_ps(scale);
  Number* rows[kRows];
  float of_ranks[kMostRanks][kRows];  // the coefficients of a rank together
  LORA_UNROLL for (int j = 0; j < kRows; ++j) {
    const auto row = std::min(n + j, last - 1);
    rows[j] = y.row(row);
    for (std::int64_t i = 0; i < a.count; ++i) of_ranks[i][j] = c.numbers[row * c.stride_of_row + i * c.stride_of_rank];
  }
  for (std::int64_t k = 0; k < y.width; k += kWidth) {
    const auto ahead = k + kWidth < y.width ? k + kWidth : kRows * y.stride;  // what comes next
    __mmask16 masks[kVectorsOfSum];
    __m512 all[kRows][kVectorsOfSum];
    LORA_UNROLL for (int v = 0; v < kVectorsOfSum; ++v) masks[v] = of_vector(y.width - k - v * kNumbers);
    LORA_UNROLL for (int j = 0; j < kRows; ++j) {
      LORA_UNROLL for (int v = 0; v < kVectorsOfSum; ++v) all[j][v] = _mm512_setzero_ps();
    }
    for (std::int64_t i = 0; i < a.count; ++i) {
      for (auto j = i; j < kRows; j += a.count) {  // evenly among the ranks
        LORA_UNROLL for (int v = 0; v < kVectorsOfSum; ++v) fetch(rows[j] + ahead + v * kNumbers);
      }
      __m512 of_factor[kVectorsOfSum];
      LORA_UNROLL for (int v = 0; v < kVectorsOfSum; ++v) of_factor[v] = load(masks[v], a.row(i) + k + v * kNumbers);
      LORA_UNROLL for (int j = 0; j < kRows; ++j) {
        const auto one = _mm512_set1_ps(of_ranks[i][j]);
        LORA_UNROLL for (int v = 0; v < kVectorsOfSum; ++v) all[j][v] = _mm512_fmadd_ps(one, of_factor[v], all[j][v]);
      }
    }
    LORA_UNROLL for (int j = 0; j < kRows; ++j) {
      LORA_UNROLL for (int v = 0; v < kVectorsOfSum; ++v) all[j][v] =
          _mm512_fmadd_ps(factor, all[j][v], load(masks[v], rows[j] + k + v * kNumbers));
    }
    LORA_UNROLL for (int j = 0; j < kRows; ++j) {
      LORA_UNROLL for (int v = 0; v < kVectorsOfSum; ++v) store(masks[v], all[j][v], rows[j] + k + v * kNumbers);
    }
  }
}

/// Of the rows [first, last) of y.
template <class Number>
LORA_AVX512 void add(const NumberRows<Number>& y, const Coefficients& c, const NumberRows<const float>& a, float scale,
                     std::int64_t first, std::int64_t last) {
  auto n = first;
  for (; n + kRowsOfSum / 2 < last; n += kRowsOfSum) add_some<kRowsOfSum>(y, c, a, scale, n, last);
  if (n < last) add_some<kRowsOfSum / 2>(y, c, a, scale, n, last);
}

#undef LORA_UNROLL

}  // namespace avx512

/// to (columns, rows) = the transpose of from (rows, columns), which both lie together.
inline void transpose(const float* from, std::int64_t rows, std::int64_t columns, float* to) {
  std::int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    std::int64_t k = 0;
    for (; k + 4 <= columns; k += 4) {
      const auto* corner = from + i * columns + k;
      auto a = _mm_loadu_ps(corner), b = _mm_loadu_ps(corner + columns), c = _mm_loadu_ps(corner + 2 * columns),
           d = _mm_loadu_ps(corner + 3 * columns);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      auto* there = to + k * rows + i;
      _mm_storeu_ps(there, a);
      _mm_storeu_ps(there + rows, b);
      _mm_storeu_ps(there + 2 * rows, c);
      _mm_storeu_ps(there + 3 * rows, d);
    }
    for (; k < columns; ++k) {
      for (int j = 0; j < 4; ++j) to[k * rows + i + j] = from[(i + j) * columns + k];
    }
  }
  for (; i < rows; ++i) {
    for (std::int64_t k = 0; k < columns; ++k) to[k * rows + i] = from[i * columns + k];
  }
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#endif
