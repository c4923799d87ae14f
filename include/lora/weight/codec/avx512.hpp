#pragma once

#include <lora/system/processor.hpp>
#include <lora/weight/codec/avx2.hpp>
#include <lora/weight/codec/plain.hpp>

#if defined(LORA_AVX512)
#include <immintrin.h>

#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 finds that in its own header, in most of what is used here
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wsign-conversion"  // without optimization some of its functions are macros
#endif

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The functions of `plain`, sixteen numbers at a time.
namespace avx512 {

/// 8 bytes as 16 nibbles, in the lowest four bits of each place; a permutation does not look at what is above them.
LORA_AVX512 inline __m512i nibbles(const std::uint8_t* bytes) {
  const auto spread = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  return _mm512_srlv_epi32(_mm512_shuffle_epi32(spread, _MM_PERM_CCAA), _mm512_set1_epi64(4));
}

LORA_AVX512 inline void scales(const BlockScales& blocks, std::int64_t first, std::int64_t count, float* out) {
  std::int64_t b = first;
  const auto offset = _mm512_set1_ps(blocks.offset);
  for (; b + 16 <= first + count; b += 16, out += 16) {
    const auto codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(blocks.codes + b)));
    // Sixteen blocks have one nested scale, or two.
    const auto changes = static_cast<int>(std::min<std::int64_t>(16, kNestedBlockSize - b % kNestedBlockSize));
    const float* nested = blocks.nested_absmax + b / kNestedBlockSize;
    auto product = _mm512_set1_ps(*nested);
    if (changes < 16)
      product = _mm512_mask_mov_ps(product, static_cast<__mmask16>(0xFFFFU << changes), _mm512_set1_ps(nested[1]));
    product = _mm512_mul_ps(_mm512_i32gather_ps(codes, blocks.map, 4), product);
    __asm__("" : "+v"(product));  // no single instruction with the sum: it rounds in another way
    _mm512_storeu_ps(out, _mm512_add_ps(product, offset));
  }
  plain::scales(blocks, b, first + count - b, out);
}

LORA_AVX512 inline void unpack4(const std::uint8_t* codes, const float* values, int block_bits, const float* scales,
                                std::int64_t first, std::int64_t last, float* out) {
  const auto all_values = _mm512_loadu_ps(values);
  for (auto i = first; i < last; ++scales) {
    const auto end = std::min(last, ((i >> block_bits) + 1) << block_bits);
    if (i % 2 != 0) *out++ = plain::value4(codes, values, i++) * *scales;
    const auto scaled = _mm512_mul_ps(all_values, _mm512_set1_ps(*scales));
    for (; i + 16 <= end; i += 16, out += 16)
      _mm512_storeu_ps(out, _mm512_permutexvar_ps(nibbles(codes + i / 2), scaled));
    for (; i < end; ++i) *out++ = plain::value4(codes, values, i) * *scales;
  }
}

/// Adds the products of the halves of 16 bytes with what each of them is multiplied by.
LORA_AVX512 inline void add_products4(const std::uint8_t* codes, __m512 values, const float* x_high, const float* x_low,
                                      __m512& high, __m512& low) {
  const auto bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  high = _mm512_fmadd_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values), _mm512_loadu_ps(x_high), high);
  low = _mm512_fmadd_ps(_mm512_permutexvar_ps(bytes, values), _mm512_loadu_ps(x_low), low);
}

/// Of numbers inside of one block, without its scale. In blocks of 4096 these may be most of a row.
LORA_AVX512 inline float dot4_in_block(const std::uint8_t* codes, const float* values, std::int64_t first,
                                       std::int64_t last, Factors4& x) {
  const auto all_values = _mm512_loadu_ps(values);
  const float before = plain::dot4_odd(codes, values, first, last, x);
  auto high = _mm512_setzero_ps(), low = high;
  for (; first + 32 <= last; first += 32, x.high += 16, x.low += 16)
    add_products4(codes + first / 2, all_values, x.high, x.low, high, low);
  return before + _mm512_reduce_add_ps(_mm512_add_ps(high, low)) + plain::dot4_in_block(codes, values, first, last, x);
}

LORA_AVX512 inline float dot4(const std::uint8_t* codes, const float* values, int block_bits, const float* scales,
                              std::int64_t first, std::int64_t last, Factors4 x) {
  const auto ends = plain::whole_blocks(first, last, block_bits);
  float rest = 0;
  if (first < ends.first) rest += dot4_in_block(codes, values, first, ends.first, x) * *scales++;
  const auto all_values = _mm512_loadu_ps(values);
  const auto bytes_of_block = std::int64_t{1} << (block_bits - 1);
  auto high_sum = _mm512_setzero_ps(), low_sum = high_sum;
  for (auto byte = ends.first / 2; byte < ends.last / 2; byte += bytes_of_block, ++scales) {
    auto high = _mm512_setzero_ps(), low = high;
    for (std::int64_t k = 0; k < bytes_of_block; k += 16)
      add_products4(codes + byte + k, all_values, x.high + k, x.low + k, high, low);
    x.high += bytes_of_block;
    x.low += bytes_of_block;
    high_sum = _mm512_fmadd_ps(high, _mm512_set1_ps(*scales), high_sum);
    low_sum = _mm512_fmadd_ps(low, _mm512_set1_ps(*scales), low_sum);
  }
  if (ends.last < last) rest += dot4_in_block(codes, values, ends.last, last, x) * *scales;
  return _mm512_reduce_add_ps(_mm512_add_ps(high_sum, low_sum)) + rest;
}

LORA_AVX512 inline std::uint32_t largest(const float* x, std::int64_t count) {
  const auto no_sign = _mm512_set1_epi32(0x7FFFFFFF);
  auto most = _mm512_setzero_si512();
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_loadu_si512(x + i), no_sign));
  return std::max(static_cast<std::uint32_t>(_mm512_reduce_max_epi32(most)), plain::largest(x + i, count - i));
}

LORA_AVX512 inline void quantize4(const FourBitCode& code, const float* x, std::int64_t count, float factor,
                                  std::uint8_t* codes) {
  const auto factors = _mm512_set1_ps(factor), most = _mm512_set1_ps(1), least = _mm512_set1_ps(-1);
  const auto one = _mm512_set1_epi32(1);
  const auto ascending = _mm_loadu_si128(reinterpret_cast<const __m128i*>(code.ascending));
  const auto high_and_low = _mm_set1_epi16(0x0110);  // pairs of bytes times 16 and 1
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16, codes += 8) {
    const auto scaled = _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), factors), least), most);
    auto places = _mm512_setzero_si512();
    for (const float bound : code.bounds)
      places =
          _mm512_mask_add_epi32(places, _mm512_cmp_ps_mask(_mm512_set1_ps(bound), scaled, _CMP_LT_OQ), places, one);
    const auto nibbles = _mm_shuffle_epi8(ascending, _mm512_cvtepi32_epi8(places));
    const auto bytes = _mm_maddubs_epi16(nibbles, high_and_low);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), _mm_packus_epi16(bytes, bytes));
  }
  plain::quantize4(code, x + i, count - i, factor, codes);
}

LORA_AVX512 inline __m512 values8(const std::int8_t* codes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
}

LORA_AVX512 inline void unpack8(const std::int8_t* codes, std::int64_t count, float absmax, float* out) {
  const auto scale = _mm512_set1_ps(absmax), per_int8 = _mm512_set1_ps(kPerInt8);
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_mul_ps(values8(codes + i), scale), per_int8));
  plain::unpack8(codes + i, count - i, absmax, out + i);
}

LORA_AVX512 inline float dot8(const std::int8_t* codes, std::int64_t count, const float* x) {
  auto a = _mm512_setzero_ps(), b = a, c = a, d = a;
  std::int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    a = _mm512_fmadd_ps(values8(codes + i), _mm512_loadu_ps(x + i), a);
    b = _mm512_fmadd_ps(values8(codes + i + 16), _mm512_loadu_ps(x + i + 16), b);
    c = _mm512_fmadd_ps(values8(codes + i + 32), _mm512_loadu_ps(x + i + 32), c);
    d = _mm512_fmadd_ps(values8(codes + i + 48), _mm512_loadu_ps(x + i + 48), d);
  }
  for (; i + 16 <= count; i += 16) a = _mm512_fmadd_ps(values8(codes + i), _mm512_loadu_ps(x + i), a);
  const auto sum = _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d));
  return _mm512_reduce_add_ps(sum) + plain::dot8(codes + i, count - i, x + i);
}

LORA_AVX512 inline void quantize8(const float* x, std::int64_t count, float factor, std::int8_t* codes) {
  const auto factors = _mm512_set1_ps(factor);
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const auto rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), factors));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(rounded));
  }
  plain::quantize8(x + i, count - i, factor, codes + i);
}

/// Sixteen of bfloat16 as floats.
LORA_AVX512 inline __m512 as_floats(__m256i numbers) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

LORA_AVX512 inline void unpack12(const Row12& row, std::int64_t first, std::int64_t count, float* out) {
  const auto exponents = avx2::exponents12(row.largest);
  std::int64_t i = count > 0 ? first % 2 : 0;
  if (i == 1) plain::unpack12(row, first, 1, out);
  for (; i + 32 <= count; i += 32) {
    const auto numbers = avx2::numbers12(row, first + i, exponents);
    _mm512_storeu_ps(out + i, as_floats(numbers.first));
    _mm512_storeu_ps(out + i + 16, as_floats(numbers.second));
  }
  plain::unpack12(row, first + i, count - i, out + i);
}

LORA_AVX512 inline float dot12(const Row12& row, std::int64_t count, const float* x) {
  const auto exponents = avx2::exponents12(row.largest);
  auto a = _mm512_setzero_ps(), b = a;
  std::int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const auto numbers = avx2::numbers12(row, i, exponents);
    a = _mm512_fmadd_ps(as_floats(numbers.first), _mm512_loadu_ps(x + i), a);
    b = _mm512_fmadd_ps(as_floats(numbers.second), _mm512_loadu_ps(x + i + 16), b);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(a, b)) +
         plain::dot12({row.codes + i, row.below + i / 2, row.largest}, count - i, x + i);
}

}  // namespace avx512
}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif
