#pragma once

#include <lora/system/processor.hpp>
#include <lora/weight/codec/plain.hpp>
#include <lora/weight/row_kernels.hpp>

#if defined(LORA_AVX2)
#include <immintrin.h>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The functions of `plain`, eight numbers at a time.
namespace avx2 {

/// Sixteen values by nibble: each half of them is looked up, and the nibble's highest bit says which counts.
struct Values4 {
  __m256 low, high;
};

LORA_AVX2 inline Values4 load_values4(const float* values) {
  return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)};
}

/// 8 bytes as 16 nibbles, one a byte.
LORA_AVX2 inline __m128i nibbles(const std::uint8_t* bytes) {
  const auto packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
  const auto mask = _mm_set1_epi8(15);
  return _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(packed, 4), mask), _mm_and_si128(packed, mask));
}

/// The values of eight nibbles, each in the lowest bits of its place; with its highest bit in that of `choice`.
LORA_AVX2 inline __m256 values4(__m256i nibbles, __m256i choice, const Values4& values) {
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(values.low, nibbles), _mm256_permutevar8x32_ps(values.high, nibbles),
                          _mm256_castsi256_ps(choice));
}

/// The values of the first eight nibbles, one a byte.
LORA_AVX2 inline __m256 values4(__m128i nibbles, const Values4& values) {
  const auto places = _mm256_cvtepu8_epi32(nibbles);
  return values4(places, _mm256_slli_epi32(places, 28), values);
}

LORA_AVX2 inline void scales(const BlockScales& blocks, std::int64_t first, std::int64_t count, float* out) {
  std::int64_t b = first;
  const auto offset = _mm256_set1_ps(blocks.offset);
  for (; b + 8 <= first + count; b += 8, out += 8) {
    const auto codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(blocks.codes + b)));
    // Eight blocks have one nested scale, or two.
    const auto changes = static_cast<int>(std::min<std::int64_t>(8, kNestedBlockSize - b % kNestedBlockSize));
    const float* nested = blocks.nested_absmax + b / kNestedBlockSize;
    auto product = _mm256_set1_ps(*nested);
    if (changes < 8) {
      const auto places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      const auto second = _mm256_castsi256_ps(_mm256_cmpgt_epi32(places, _mm256_set1_epi32(changes - 1)));
      product = _mm256_blendv_ps(product, _mm256_set1_ps(nested[1]), second);
    }
    product = _mm256_mul_ps(_mm256_i32gather_ps(blocks.map, codes, 4), product);
    __asm__("" : "+x"(product));  // no single instruction with the sum: it rounds in another way
    _mm256_storeu_ps(out, _mm256_add_ps(product, offset));
  }
  plain::scales(blocks, b, first + count - b, out);
}

LORA_AVX2 inline void unpack4(const std::uint8_t* codes, const float* values, int block_bits, const float* scales,
                              std::int64_t first, std::int64_t last, float* out) {
  const auto all_values = load_values4(values);
  for (auto i = first; i < last; ++scales) {
    const auto end = std::min(last, ((i >> block_bits) + 1) << block_bits);
    if (i % 2 != 0) *out++ = plain::value4(codes, values, i++) * *scales;
    const auto scale = _mm256_set1_ps(*scales);
    const Values4 scaled{_mm256_mul_ps(all_values.low, scale), _mm256_mul_ps(all_values.high, scale)};
    for (; i + 16 <= end; i += 16, out += 16) {
      const auto sixteen = nibbles(codes + i / 2);
      _mm256_storeu_ps(out, values4(sixteen, scaled));
      _mm256_storeu_ps(out + 8, values4(_mm_srli_si128(sixteen, 8), scaled));
    }
    for (; i < end; ++i) *out++ = plain::value4(codes, values, i) * *scales;
  }
}

/// Adds the products of the halves of 8 bytes with what each of them is multiplied by.
LORA_AVX2 inline void add_products4(const std::uint8_t* codes, const Values4& values, const float* x_high,
                                    const float* x_low, __m256& high, __m256& low) {
  const auto bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  const auto of_high = values4(_mm256_srli_epi32(bytes, 4), _mm256_slli_epi32(bytes, 24), values);
  const auto of_low = values4(bytes, _mm256_slli_epi32(bytes, 28), values);
  high = _mm256_fmadd_ps(of_high, _mm256_loadu_ps(x_high), high);
  low = _mm256_fmadd_ps(of_low, _mm256_loadu_ps(x_low), low);
}

/// Of numbers inside of one block, without its scale. In blocks of 4096 these may be most of a row.
LORA_AVX2 inline float dot4_in_block(const std::uint8_t* codes, const float* values, std::int64_t first,
                                     std::int64_t last, Factors4& x) {
  const auto all_values = load_values4(values);
  const float before = plain::dot4_odd(codes, values, first, last, x);
  auto high = _mm256_setzero_ps(), low = high;
  for (; first + 16 <= last; first += 16, x.high += 8, x.low += 8)
    add_products4(codes + first / 2, all_values, x.high, x.low, high, low);
  return before + sum_of(_mm256_add_ps(high, low)) + plain::dot4_in_block(codes, values, first, last, x);
}

LORA_AVX2 inline float dot4(const std::uint8_t* codes, const float* values, int block_bits, const float* scales,
                            std::int64_t first, std::int64_t last, Factors4 x) {
  const auto ends = plain::whole_blocks(first, last, block_bits);
  float rest = 0;
  if (first < ends.first) rest += dot4_in_block(codes, values, first, ends.first, x) * *scales++;
  const auto all_values = load_values4(values);
  const auto bytes_of_block = std::int64_t{1} << (block_bits - 1);
  auto high_sum = _mm256_setzero_ps(), low_sum = high_sum;
  for (auto byte = ends.first / 2; byte < ends.last / 2; byte += bytes_of_block, ++scales) {
    auto high = _mm256_setzero_ps(), low = high;
    for (std::int64_t k = 0; k < bytes_of_block; k += 8)
      add_products4(codes + byte + k, all_values, x.high + k, x.low + k, high, low);
    x.high += bytes_of_block;
    x.low += bytes_of_block;
    high_sum = _mm256_fmadd_ps(high, _mm256_set1_ps(*scales), high_sum);
    low_sum = _mm256_fmadd_ps(low, _mm256_set1_ps(*scales), low_sum);
  }
  if (ends.last < last) rest += dot4_in_block(codes, values, ends.last, last, x) * *scales;
  return sum_of(_mm256_add_ps(high_sum, low_sum)) + rest;
}

LORA_AVX2 inline std::uint32_t largest(const float* x, std::int64_t count) {
  const auto no_sign = _mm256_set1_epi32(0x7FFFFFFF);
  auto most = _mm256_setzero_si256();
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const auto bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    most = _mm256_max_epi32(most, _mm256_and_si256(bits, no_sign));
  }
  std::uint32_t lanes[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), most);
  return std::max(*std::max_element(lanes, lanes + 8), plain::largest(x + i, count - i));
}

/// How many bounds lie below each of eight numbers.
LORA_AVX2 inline __m256i places4(const FourBitCode& code, const float* x, __m256 factor) {
  const auto scaled = _mm256_mul_ps(_mm256_loadu_ps(x), factor);
  const auto limited = _mm256_min_ps(_mm256_max_ps(scaled, _mm256_set1_ps(-1)), _mm256_set1_ps(1));
  auto places = _mm256_setzero_si256();
  for (const float bound : code.bounds) {
    const auto is_below = _mm256_cmp_ps(_mm256_set1_ps(bound), limited, _CMP_LT_OQ);
    places = _mm256_sub_epi32(places, _mm256_castps_si256(is_below));  // true is -1
  }
  return places;
}

/// Sixteen small integers as bytes.
LORA_AVX2 inline __m128i as_bytes(__m256i first, __m256i second) {
  const auto words = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xD8);
  return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

LORA_AVX2 inline void quantize4(const FourBitCode& code, const float* x, std::int64_t count, float factor,
                                std::uint8_t* codes) {
  const auto factors = _mm256_set1_ps(factor);
  const auto ascending = _mm_loadu_si128(reinterpret_cast<const __m128i*>(code.ascending));
  const auto high_and_low = _mm_set1_epi16(0x0110);  // pairs of bytes times 16 and 1
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16, codes += 8) {
    const auto places = as_bytes(places4(code, x + i, factors), places4(code, x + i + 8, factors));
    const auto bytes = _mm_maddubs_epi16(_mm_shuffle_epi8(ascending, places), high_and_low);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), _mm_packus_epi16(bytes, bytes));
  }
  plain::quantize4(code, x + i, count - i, factor, codes);
}

LORA_AVX2 inline __m256 values8(const std::int8_t* codes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
}

LORA_AVX2 inline void unpack8(const std::int8_t* codes, std::int64_t count, float absmax, float* out) {
  const auto scale = _mm256_set1_ps(absmax), per_int8 = _mm256_set1_ps(kPerInt8);
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_mul_ps(values8(codes + i), scale), per_int8));
  plain::unpack8(codes + i, count - i, absmax, out + i);
}

LORA_AVX2 inline float dot8(const std::int8_t* codes, std::int64_t count, const float* x) {
  auto a = _mm256_setzero_ps(), b = a, c = a, d = a;
  std::int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    a = _mm256_fmadd_ps(values8(codes + i), _mm256_loadu_ps(x + i), a);
    b = _mm256_fmadd_ps(values8(codes + i + 8), _mm256_loadu_ps(x + i + 8), b);
    c = _mm256_fmadd_ps(values8(codes + i + 16), _mm256_loadu_ps(x + i + 16), c);
    d = _mm256_fmadd_ps(values8(codes + i + 24), _mm256_loadu_ps(x + i + 24), d);
  }
  for (; i + 8 <= count; i += 8) a = _mm256_fmadd_ps(values8(codes + i), _mm256_loadu_ps(x + i), a);
  const auto sum = _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d));
  return sum_of(sum) + plain::dot8(codes + i, count - i, x + i);
}

LORA_AVX2 inline __m256i rounded8(const float* x, __m256 factor) {
  return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), factor));
}

LORA_AVX2 inline void quantize8(const float* x, std::int64_t count, float factor, std::int8_t* codes) {
  const auto factors = _mm256_set1_ps(factor);
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const auto bytes = as_bytes(rounded8(x + i, factors), rounded8(x + i + 8, factors));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), bytes);
  }
  plain::quantize8(x + i, count - i, factor, codes + i);
}

/// The two bytes that a number of bfloat16 has of its exponent, by how far that is below a row's largest: but for the
/// sign the upper byte, but for the fraction the lower one. Each twice, for the two halves of a register.
struct Exponents12 {
  __m256i upper, lower;
};

LORA_AVX2 inline Exponents12 exponents12(std::uint8_t largest) {
  const auto below = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, kNoExponent12);
  const auto differences = _mm_sub_epi8(_mm_set1_epi8(static_cast<char>(largest)), below);
  const auto exponents = _mm_andnot_si128(_mm_cmpeq_epi8(below, _mm_set1_epi8(kNoExponent12)), differences);
  const auto upper = _mm_and_si128(_mm_srli_epi16(exponents, 1), _mm_set1_epi8(0x7F));
  const auto lower = _mm_andnot_si128(_mm_set1_epi8(0x7F), _mm_slli_epi16(exponents, 7));
  return {_mm256_broadcastsi128_si256(upper), _mm256_broadcastsi128_si256(lower)};
}

/// Numbers of bfloat16, sixteen and sixteen.
struct Numbers12 {
  __m256i first, second;
};

/// Those of a row from the k-th on, which is even.
LORA_AVX2 inline Numbers12 numbers12(const Row12& row, std::int64_t k, const Exponents12& exponents) {
  const auto pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row.below + k / 2)));
  const auto below = _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), _mm256_set1_epi8(15));
  const auto codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row.codes + k));
  const auto fraction = _mm256_set1_epi8(0x7F);
  const auto upper = _mm256_or_si256(_mm256_andnot_si256(fraction, codes), _mm256_shuffle_epi8(exponents.upper, below));
  const auto lower = _mm256_or_si256(_mm256_and_si256(fraction, codes), _mm256_shuffle_epi8(exponents.lower, below));
  const auto even = _mm256_unpacklo_epi8(lower, upper), odd = _mm256_unpackhi_epi8(lower, upper);  // eights
  return {_mm256_permute2x128_si256(even, odd, 0x20), _mm256_permute2x128_si256(even, odd, 0x31)};
}

/// The first and the second eight of sixteen as floats.
LORA_AVX2 inline __m256 first_floats(__m256i numbers) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(numbers)), 16));
}
LORA_AVX2 inline __m256 second_floats(__m256i numbers) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(numbers, 1)), 16));
}

LORA_AVX2 inline void unpack12(const Row12& row, std::int64_t first, std::int64_t count, float* out) {
  const auto exponents = exponents12(row.largest);
  std::int64_t i = count > 0 ? first % 2 : 0;
  if (i == 1) plain::unpack12(row, first, 1, out);
  for (; i + 32 <= count; i += 32) {
    const auto numbers = numbers12(row, first + i, exponents);
    _mm256_storeu_ps(out + i, first_floats(numbers.first));
    _mm256_storeu_ps(out + i + 8, second_floats(numbers.first));
    _mm256_storeu_ps(out + i + 16, first_floats(numbers.second));
    _mm256_storeu_ps(out + i + 24, second_floats(numbers.second));
  }
  plain::unpack12(row, first + i, count - i, out + i);
}

LORA_AVX2 inline float dot12(const Row12& row, std::int64_t count, const float* x) {
  const auto exponents = exponents12(row.largest);
  auto a = _mm256_setzero_ps(), b = a, c = a, d = a;
  std::int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const auto numbers = numbers12(row, i, exponents);
    a = _mm256_fmadd_ps(first_floats(numbers.first), _mm256_loadu_ps(x + i), a);
    b = _mm256_fmadd_ps(second_floats(numbers.first), _mm256_loadu_ps(x + i + 8), b);
    c = _mm256_fmadd_ps(first_floats(numbers.second), _mm256_loadu_ps(x + i + 16), c);
    d = _mm256_fmadd_ps(second_floats(numbers.second), _mm256_loadu_ps(x + i + 24), d);
  }
  const auto sum = _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d));
  return sum_of(sum) + plain::dot12({row.codes + i, row.below + i / 2, row.largest}, count - i, x + i);
}

}  // namespace avx2
}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
#endif
