#pragma once

#include <lora/version.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Sixteen numbers in [-1, 1] that 4 bits stand for.
struct FourBitCode {
  const char* name;            // "NF4"
  const char* in_files;        // as files of bitsandbytes name it: "nf4"
  float values[16];            // of each nibble
  std::uint8_t ascending[16];  // the nibbles, by value
  float bounds[15];            // halfway between neighbours; n of them lie below what is of the n-th value
};

constexpr FourBitCode with_bounds(FourBitCode code) {
  for (int i = 0; i < 15; ++i)
    code.bounds[i] = (code.values[code.ascending[i]] + code.values[code.ascending[i + 1]]) / 2;
  return code;
}

/// Quantiles of the normal distribution, Dettmers et al. 2023.
inline constexpr FourBitCode kNF4 = with_bounds(
    {"NF4",
     "nf4",
     {-1.0F, -0.6961928009986877F, -0.5250730514526367F, -0.39491748809814453F, -0.28444138169288635F,
      -0.18477343022823334F, -0.09105003625154495F, 0.0F, 0.07958029955625534F, 0.16093020141124725F,
      0.24611230194568634F, 0.33791524171829224F, 0.44070982933044434F, 0.5626170039176941F, 0.7229568362236023F, 1.0F},
     {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
     {}});

/// A sign, two bits of exponent and one of fraction, in twelfths. There are two zeros.
inline constexpr FourBitCode kFP4 =
    with_bounds({"FP4",
                 "fp4",
                 {0.0F, 0.0625F / 12, 8.0F / 12, 1.0F, 4.0F / 12, 6.0F / 12, 2.0F / 12, 3.0F / 12, 0.0F, -0.0625F / 12,
                  -8.0F / 12, -1.0F, -4.0F / 12, -6.0F / 12, -2.0F / 12, -3.0F / 12},
                 {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3},
                 {}});

/// Of how many blocks of 4 bit numbers the scales share one scale, where they are quantized themselves.
constexpr std::int64_t kNestedBlockSize = 256;

/// The scales of blocks: numbers, or codes of 8 bits where they are double quantized.
struct BlockScales {
  const float* absmax = nullptr;
  const std::uint8_t* codes = nullptr;  // scale of block b: map[codes[b]] * nested_absmax[b / 256] + offset
  const float* map = nullptr;           // 256 numbers
  const float* nested_absmax = nullptr;
  float offset = 0;
};

/// 1 / 127 as bitsandbytes has it: a number of 8 bits is code * absmax * this.
constexpr float kPerInt8 = 7.874015718698502e-3F;

/// A row of numbers of bfloat16, which are a sign, 8 bits of exponent and 7 of fraction, in 12 bits each.
struct Row12 {
  const std::uint8_t* codes;  // sign and fraction
  const std::uint8_t* below;  // how far the exponent is below `largest`, the first of two in a byte in its lower half
  std::uint8_t largest;       // exponent of the row
};

/// Of `Row12::below`: the exponent is zero.
constexpr std::uint8_t kNoExponent12 = 15;

/// Numbers to multiply with: high[k] and low[k] with those in the halves of the k-th byte, counted from the first whole
/// one. Where the numbers start in the middle of a byte, low[-1] belongs to the first.
struct Factors4 {
  const float* high;
  const float* low;
};

/// The numbers of [first, last) that are in whole blocks; others lie before them, in one block, and behind, in one.
struct WholeBlocks {
  std::int64_t first;
  std::int64_t last;
};

/// The work on numbers of few bits without instructions that not every processor has. What uses some has the same
/// results to the bit, but for the sums of products.
namespace plain {

/// The scales of the blocks [first, first + count), which have codes.
inline void scales(const BlockScales& blocks, std::int64_t first, std::int64_t count, float* out) {
  for (std::int64_t b = first; b < first + count; ++b) {
    // Kept from becoming one instruction with the sum, which rounds in another way.
    const volatile float product = blocks.map[blocks.codes[b]] * blocks.nested_absmax[b / kNestedBlockSize];
    *out++ = product + blocks.offset;
  }
}

/// The value of number `i`: the high half of a byte comes first.
inline float value4(const std::uint8_t* codes, const float* values, std::int64_t i) {
  return values[(codes[i / 2] >> (i % 2 == 0 ? 4 : 0)) & 15];
}

/// The numbers [first, last). `scales` starts with that of the block of `first`; blocks have 2 ^ block_bits numbers.
inline void unpack4(const std::uint8_t* codes, const float* values, int block_bits, const float* scales,
                    std::int64_t first, std::int64_t last, float* out) {
  for (auto i = first; i < last; ++scales) {
    const auto end = std::min(last, ((i >> block_bits) + 1) << block_bits);
    float scaled[16];
    for (int code = 0; code < 16; ++code) scaled[code] = values[code] * *scales;
    if (i % 2 != 0) *out++ = value4(codes, scaled, i++);
    for (; i + 1 < end; i += 2) {
      const int byte = codes[i / 2];
      *out++ = scaled[byte >> 4];
      *out++ = scaled[byte & 15];
    }
    if (i < end) *out++ = value4(codes, scaled, i++);
  }
}

/// The product of a first number that is the second half of a byte; steps over it.
inline float dot4_odd(const std::uint8_t* codes, const float* values, std::int64_t& first, std::int64_t last,
                      const Factors4& x) {
  if (first % 2 == 0 || first == last) return 0;
  return value4(codes, values, first++) * x.low[-1];
}

/// Sum of the products of numbers inside of one block with x, without its scale; x steps over whole bytes.
inline float dot4_in_block(const std::uint8_t* codes, const float* values, std::int64_t first, std::int64_t last,
                           Factors4& x) {
  float low = dot4_odd(codes, values, first, last, x), high = 0;
  for (; first + 1 < last; first += 2) {
    const int byte = codes[first / 2];
    high += values[byte >> 4] * *x.high++;
    low += values[byte & 15] * *x.low++;
  }
  if (first < last) high += value4(codes, values, first) * *x.high;
  return high + low;
}

inline WholeBlocks whole_blocks(std::int64_t first, std::int64_t last, int block_bits) {
  const auto size = std::int64_t{1} << block_bits;
  const auto from = std::min(last, (first + size - 1) & -size);
  return {from, std::max(from, last & -size)};
}

/// Sum of the products of the numbers [first, last) with x.
inline float dot4(const std::uint8_t* codes, const float* values, int block_bits, const float* scales,
                  std::int64_t first, std::int64_t last, Factors4 x) {
  float sum = 0;
  for (auto i = first; i < last; ++scales) {
    const auto end = std::min(last, ((i >> block_bits) + 1) << block_bits);
    sum += dot4_in_block(codes, values, i, end, x) * *scales;
    i = end;
  }
  return sum;
}

/// The bits of the largest absolute value; those of infinity or more when not all are finite.
inline std::uint32_t largest(const float* x, std::int64_t count) {
  std::uint32_t most = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, x + i, sizeof(bits));
    most = std::max(most, bits & 0x7FFFFFFFU);
  }
  return most;
}

/// Among sixteen values, that which is nearest to x * factor, as its nibble.
inline int nearest4(const FourBitCode& code, float x, float factor) {
  const float scaled = std::min(std::max(x * factor, -1.0F), 1.0F);
  int place = 0;
  for (const float bound : code.bounds) place += bound < scaled ? 1 : 0;
  return code.ascending[place];
}

/// The bytes of numbers of one block. Of an odd count the last nibble is that of zero.
inline void quantize4(const FourBitCode& code, const float* x, std::int64_t count, float factor, std::uint8_t* codes) {
  std::int64_t i = 0;
  for (; i + 1 < count; i += 2)
    *codes++ = static_cast<std::uint8_t>(nearest4(code, x[i], factor) << 4 | nearest4(code, x[i + 1], factor));
  if (i < count) *codes = static_cast<std::uint8_t>(nearest4(code, x[i], factor) << 4 | nearest4(code, 0.0F, factor));
}

inline void unpack8(const std::int8_t* codes, std::int64_t count, float absmax, float* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(codes[i]) * absmax * kPerInt8;
}

/// Sum of the products of the codes with x.
inline float dot8(const std::int8_t* codes, std::int64_t count, const float* x) {
  float even = 0, odd = 0;
  std::int64_t i = 0;
  for (; i + 1 < count; i += 2) {
    even += static_cast<float>(codes[i]) * x[i];
    odd += static_cast<float>(codes[i + 1]) * x[i + 1];
  }
  if (i < count) even += static_cast<float>(codes[i]) * x[i];
  return even + odd;
}

/// x * factor, rounded; halves to the even neighbour.
inline void quantize8(const float* x, std::int64_t count, float factor, std::int8_t* codes) {
  for (std::int64_t i = 0; i < count; ++i) codes[i] = static_cast<std::int8_t>(std::nearbyint(x[i] * factor));
}

/// The exponent of a row that so many below its largest stand for.
inline std::uint8_t exponent12(std::uint8_t largest, unsigned below) {
  return below == kNoExponent12 ? std::uint8_t{0} : static_cast<std::uint8_t>(largest - below);
}

inline float number12(const Row12& row, std::int64_t k) {
  const std::uint32_t code = row.codes[k], below = row.below[k / 2] >> (k % 2 * 4) & 15U;
  const std::uint32_t exponent = exponent12(row.largest, below);
  const std::uint32_t bits = (code & 0x80U) << 24U | exponent << 23U | (code & 0x7FU) << 16U;
  float number = 0;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

/// The numbers [first, first + count) of the row.
inline void unpack12(const Row12& row, std::int64_t first, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = number12(row, first + i);
}

/// The sum of the products of the row's first numbers with x.
inline float dot12(const Row12& row, std::int64_t count, const float* x) {
  float even = 0, odd = 0;
  std::int64_t i = 0;
  for (; i + 1 < count; i += 2) {
    even += number12(row, i) * x[i];
    odd += number12(row, i + 1) * x[i + 1];
  }
  if (i < count) even += number12(row, i) * x[i];
  return even + odd;
}

}  // namespace plain
}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
