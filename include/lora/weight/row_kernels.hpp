#pragma once

#include <lora/system/processor.hpp>
#include <lora/version.hpp>

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(LORA_AVX2)
#include <immintrin.h>
#endif

// Products of one row with a matrix of float32 in memory, each of whose rows lies together.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// `count` rows w_i of numbers, each `stride` after the one before.
struct RowsInMemory {
  const float* numbers;
  std::int64_t stride, count;

  const float* row(std::int64_t i) const { return numbers + i * stride; }
};

namespace plain {

/// Four numbers at a time, as every processor has them that LibTorch runs on; one where the compiler has no such type.
#if defined(__GNUC__)
using Four = float __attribute__((vector_size(16)));
inline float sum_of(Four four) { return (four[0] + four[2]) + (four[1] + four[3]); }
#else
struct Four {
  float only;
  friend Four operator*(Four a, Four b) { return {a.only * b.only}; }
  friend Four operator*(float a, Four b) { return {a * b.only}; }
  Four& operator+=(Four other) { return only += other.only, *this; }
};
inline float sum_of(Four four) { return four.only; }
#endif

inline constexpr std::int64_t kFour = sizeof(Four) / sizeof(float);

inline Four load_four(const float* from) {
  Four four;
  std::memcpy(&four, from, sizeof(four));
  return four;
}

inline void store(Four four, float* to) { std::memcpy(to, &four, sizeof(four)); }

/// The sum of a_i b_i.
inline float dot(const float* a, const float* b, std::int64_t count) {
  Four sums[4] = {};
  std::int64_t i = 0;
  for (; i + 4 * kFour <= count; i += 4 * kFour) {
    sums[0] += load_four(a + i) * load_four(b + i);
    sums[1] += load_four(a + i + kFour) * load_four(b + i + kFour);
    sums[2] += load_four(a + i + 2 * kFour) * load_four(b + i + 2 * kFour);
    sums[3] += load_four(a + i + 3 * kFour) * load_four(b + i + 3 * kFour);
  }
  for (; i + kFour <= count; i += kFour) sums[0] += load_four(a + i) * load_four(b + i);
  float rest = 0;
  for (; i < count; ++i) rest += a[i] * b[i];
  sums[0] += sums[1];
  sums[2] += sums[3];
  sums[0] += sums[2];
  return rest + sum_of(sums[0]);
}

/// out_i += scale <w_i, x> for an x of `features` numbers
inline void add_dots(const RowsInMemory& w, const float* x, float scale, std::int64_t features, float* out) {
  for (std::int64_t i = 0; i < w.count; ++i) out[i] += scale * dot(w.row(i), x, features);
}

/// y (features) += sum over i of scale c_i w_i
inline void add_rows(const RowsInMemory& w, const float* c, float scale, std::int64_t features, float* y) {
  std::int64_t k = 0;
  for (; k + kFour <= features; k += kFour) {  // the sums of so few are in registers
    Four even = {}, odd = {};
    for (std::int64_t i = 0; i < w.count; ++i) (i % 2 == 0 ? even : odd) += c[i] * load_four(w.row(i) + k);
    even += odd;
    auto sum = load_four(y + k);
    sum += scale * even;
    store(sum, y + k);
  }
  for (; k < features; ++k) {
    float sum = 0;
    for (std::int64_t i = 0; i < w.count; ++i) sum += c[i] * w.row(i)[k];
    y[k] += scale * sum;
  }
}

/// out[n * a.count + i] = <a_i, x_n>, squares[n] = <x_n, x_n>
inline void dots_and_squares(const RowsInMemory& a, const RowsInMemory& x, std::int64_t features, float* out,
                             float* squares) {
  for (std::int64_t n = 0; n < x.count; ++n) {
    for (std::int64_t i = 0; i < a.count; ++i) out[n * a.count + i] = dot(a.row(i), x.row(n), features);
    squares[n] = dot(x.row(n), x.row(n), features);
  }
}

}  // namespace plain

#if defined(LORA_AVX2)

/// The functions of `plain`, eight numbers at a time, of four rows each.
namespace avx2 {

/// Of fewer numbers those of `plain` are faster.
inline constexpr std::int64_t kShort = 16;

LORA_AVX2 inline float sum_of(__m256 eight) {
  const auto four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const auto two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

LORA_AVX2 inline float dot(const float* a, const float* b, std::int64_t count) {
  auto sum0 = _mm256_setzero_ps(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  std::int64_t k = 0;
  for (; k + 32 <= count; k += 32) {
    sum0 = _mm256_fmadd_ps(_mm256_loadu_ps(a + k), _mm256_loadu_ps(b + k), sum0);
    sum1 = _mm256_fmadd_ps(_mm256_loadu_ps(a + k + 8), _mm256_loadu_ps(b + k + 8), sum1);
    sum2 = _mm256_fmadd_ps(_mm256_loadu_ps(a + k + 16), _mm256_loadu_ps(b + k + 16), sum2);
    sum3 = _mm256_fmadd_ps(_mm256_loadu_ps(a + k + 24), _mm256_loadu_ps(b + k + 24), sum3);
  }
  const auto sum = sum_of(_mm256_add_ps(_mm256_add_ps(sum0, sum1), _mm256_add_ps(sum2, sum3)));
  return k < count ? sum + plain::dot(a + k, b + k, count - k) : sum;
}

LORA_AVX2 inline void add_dots(const RowsInMemory& w, const float* x, float scale, std::int64_t features, float* out) {
  if (features < kShort) return plain::add_dots(w, x, scale, features, out);
  std::int64_t i = 0;
  for (; i + 4 <= w.count; i += 4) {
    const float *w0 = w.row(i), *w1 = w.row(i + 1), *w2 = w.row(i + 2), *w3 = w.row(i + 3);
    auto sum0 = _mm256_setzero_ps(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
    auto other0 = sum0, other1 = sum0, other2 = sum0, other3 = sum0;  // so that no sum waits for itself
    std::int64_t k = 0;
    for (; k + 16 <= features; k += 16) {
      const auto some = _mm256_loadu_ps(x + k), others = _mm256_loadu_ps(x + k + 8);
      sum0 = _mm256_fmadd_ps(some, _mm256_loadu_ps(w0 + k), sum0);
      sum1 = _mm256_fmadd_ps(some, _mm256_loadu_ps(w1 + k), sum1);
      sum2 = _mm256_fmadd_ps(some, _mm256_loadu_ps(w2 + k), sum2);
      sum3 = _mm256_fmadd_ps(some, _mm256_loadu_ps(w3 + k), sum3);
      other0 = _mm256_fmadd_ps(others, _mm256_loadu_ps(w0 + k + 8), other0);
      other1 = _mm256_fmadd_ps(others, _mm256_loadu_ps(w1 + k + 8), other1);
      other2 = _mm256_fmadd_ps(others, _mm256_loadu_ps(w2 + k + 8), other2);
      other3 = _mm256_fmadd_ps(others, _mm256_loadu_ps(w3 + k + 8), other3);
    }
    out[i] += scale * sum_of(_mm256_add_ps(sum0, other0));
    out[i + 1] += scale * sum_of(_mm256_add_ps(sum1, other1));
    out[i + 2] += scale * sum_of(_mm256_add_ps(sum2, other2));
    out[i + 3] += scale * sum_of(_mm256_add_ps(sum3, other3));
    if (k < features) plain::add_dots({w0 + k, w.stride, 4}, x + k, scale, features - k, out + i);
  }
  for (; i < w.count; ++i) out[i] += scale * dot(w.row(i), x, features);
}

LORA_AVX2 inline void add_rows(const RowsInMemory& w, const float* c, float scale, std::int64_t features, float* y) {
  if (features < kShort || w.count == 0) return plain::add_rows(w, c, scale, features, y);  // none: no memory
  const auto whole = features / 8 * 8;
  std::int64_t i = 0;
  for (; i + 4 <= w.count; i += 4) {
    const float *w0 = w.row(i), *w1 = w.row(i + 1), *w2 = w.row(i + 2), *w3 = w.row(i + 3);
    const auto c0 = _mm256_set1_ps(scale * c[i]), c1 = _mm256_set1_ps(scale * c[i + 1]),
               c2 = _mm256_set1_ps(scale * c[i + 2]), c3 = _mm256_set1_ps(scale * c[i + 3]);
    for (std::int64_t k = 0; k < whole; k += 8) {
      auto sum = _mm256_fmadd_ps(c0, _mm256_loadu_ps(w0 + k), _mm256_loadu_ps(y + k));
      sum = _mm256_fmadd_ps(c1, _mm256_loadu_ps(w1 + k), sum);
      sum = _mm256_fmadd_ps(c2, _mm256_loadu_ps(w2 + k), sum);
      _mm256_storeu_ps(y + k, _mm256_fmadd_ps(c3, _mm256_loadu_ps(w3 + k), sum));
    }
  }
  if (i < w.count) plain::add_rows({w.row(i), w.stride, w.count - i}, c + i, scale, whole, y);
  if (whole < features) plain::add_rows({w.numbers + whole, w.stride, w.count}, c, scale, features - whole, y + whole);
}

/// Of four rows of a, from the i-th one on, and two of x, from the n-th one on; with the squares or without.
template <bool kSquares>
LORA_AVX2 inline void four_by_two(const RowsInMemory& a, std::int64_t i, const RowsInMemory& x, std::int64_t n,
                                  std::int64_t features, float* out, float* squares) {
  const float *a0 = a.row(i), *a1 = a.row(i + 1), *a2 = a.row(i + 2), *a3 = a.row(i + 3);
  const float *x0 = x.row(n), *x1 = x.row(n + 1);
  auto sum00 = _mm256_setzero_ps(), sum01 = sum00, sum02 = sum00, sum03 = sum00;
  auto sum10 = sum00, sum11 = sum00, sum12 = sum00, sum13 = sum00, square0 = sum00, square1 = sum00;
  std::int64_t k = 0;
  for (; k + 8 <= features; k += 8) {
    const auto some0 = _mm256_loadu_ps(x0 + k), some1 = _mm256_loadu_ps(x1 + k);
    auto row = _mm256_loadu_ps(a0 + k);
    sum00 = _mm256_fmadd_ps(some0, row, sum00);
    sum10 = _mm256_fmadd_ps(some1, row, sum10);
    row = _mm256_loadu_ps(a1 + k);
    sum01 = _mm256_fmadd_ps(some0, row, sum01);
    sum11 = _mm256_fmadd_ps(some1, row, sum11);
    row = _mm256_loadu_ps(a2 + k);
    sum02 = _mm256_fmadd_ps(some0, row, sum02);
    sum12 = _mm256_fmadd_ps(some1, row, sum12);
    row = _mm256_loadu_ps(a3 + k);
    sum03 = _mm256_fmadd_ps(some0, row, sum03);
    sum13 = _mm256_fmadd_ps(some1, row, sum13);
    if constexpr (kSquares) {
      square0 = _mm256_fmadd_ps(some0, some0, square0);
      square1 = _mm256_fmadd_ps(some1, some1, square1);
    }
  }
  auto *out0 = out + n * a.count + i, *out1 = out0 + a.count;
  out0[0] = sum_of(sum00);
  out0[1] = sum_of(sum01);
  out0[2] = sum_of(sum02);
  out0[3] = sum_of(sum03);
  out1[0] = sum_of(sum10);
  out1[1] = sum_of(sum11);
  out1[2] = sum_of(sum12);
  out1[3] = sum_of(sum13);
  if constexpr (kSquares) {
    squares[n] = sum_of(square0) + plain::dot(x0 + k, x0 + k, features - k);
    squares[n + 1] = sum_of(square1) + plain::dot(x1 + k, x1 + k, features - k);
  }
  if (k == features) return;
  plain::add_dots({a0 + k, a.stride, 4}, x0 + k, 1, features - k, out0);
  plain::add_dots({a0 + k, a.stride, 4}, x1 + k, 1, features - k, out1);
}

LORA_AVX2 inline void dots_and_squares(const RowsInMemory& a, const RowsInMemory& x, std::int64_t features, float* out,
                                       float* squares) {
  const auto pairs = x.count / 2 * 2, fours = a.count / 4 * 4;
  for (std::int64_t n = 0; n < pairs; n += 2) {
    for (std::int64_t i = 0; i < fours; i += 4)
      (i == 0 ? four_by_two<true> : four_by_two<false>)(a, i, x, n, features, out, squares);
  }
  for (std::int64_t n = 0; n < x.count; ++n) {
    for (auto i = n < pairs ? fours : 0; i < a.count; ++i) out[n * a.count + i] = dot(a.row(i), x.row(n), features);
    if (n >= pairs || fours == 0) squares[n] = dot(x.row(n), x.row(n), features);
  }
}

}  // namespace avx2

#endif

/// The functions of `plain`, or of those beside it that use what some processors have.
struct RowKernels {
  const char* name;
  decltype(&plain::add_dots) add_dots;
  decltype(&plain::add_rows) add_rows;
  decltype(&plain::dots_and_squares) dots_and_squares;
};

/// All that this processor can run, the fastest first.
inline std::vector<RowKernels> runnable_row_kernels() {
  std::vector<RowKernels> kernels;
#if defined(LORA_AVX2)
  if (has_avx2()) kernels.push_back({"AVX2", avx2::add_dots, avx2::add_rows, avx2::dots_and_squares});
#endif
  kernels.push_back({"plain", plain::add_dots, plain::add_rows, plain::dots_and_squares});
  return kernels;
}

/// The fastest that this processor can run.
inline const RowKernels& row_kernels() {
  static const RowKernels fastest = runnable_row_kernels().front();
  return fastest;
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
