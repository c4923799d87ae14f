#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>

#include <lora/linkage.hpp>
#include <lora/version.hpp>

#include <cstdint>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// Which sixteen numbers the 4 bits stand for.
enum class FourBitType {
  kNF4,  ///< Quantiles of the normal distribution: Dettmers et al. 2023, "QLoRA".
  kFP4,  ///< Floating point of a sign, two bits of exponent and one of fraction.
};

/// A tensor in 4 bits a number, as bitsandbytes 0.50 has it on the CPU, bit for bit. The numbers, in the order of a
/// contiguous tensor, lie in blocks, the last of which may be shorter; in a block
///
///   number = value[code] * absmax    code: the nearest of the sixteen values to number / absmax
///
/// with the block's largest absolute value. Double quantized, that is held in 8 bits:
///
///   absmax = nested_map[code of 8 bits] * nested_absmax + offset    offset: the mean of all absmax
///
/// with nested_absmax of 256 blocks together. A number takes 4 + 32 / block_size bits; double quantized
/// 4 + 8 / block_size + 32 / (256 block_size), that is 4.127 in blocks of 64.
struct FourBitTensor {
  FourBitType type = FourBitType::kNF4;
  std::vector<int64_t> sizes;
  int64_t block_size = 64;
  at::Tensor codes;          ///< Byte (ceil(numel / 2)); of two numbers the first in the high half.
  at::Tensor absmax;         ///< Float (ceil(numel / block_size)); Byte, the codes of 8 bits, when double quantized.
  at::Tensor nested_absmax;  ///< Float (ceil(blocks / 256)); undefined unless double quantized.
  at::Tensor nested_map;     ///< Float (256), what the 8 bits stand for; undefined unless double quantized.
  float offset = 0;          ///< Zero unless double quantized.

  bool double_quantized() const { return nested_absmax.defined(); }
  int64_t numel() const { return c10::multiply_integers(sizes); }

  /// Throws c10::Error, with `who` in front, when the tensors do not fit each other.
  void validate(const char* who) const;
};

namespace detail {

inline bool is_block_size(int64_t size) { return size >= 32 && size <= 4096 && (size & (size - 1)) == 0; }

inline void check_block_size(const char* who, int64_t size) {
  TORCH_CHECK_VALUE(is_block_size(size), who,
                    ": block_size has to be 32, 64, 128, 256, 512, 1024, 2048 or 4096, but got ", size);
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <lora/weight/codec/input.hpp>
#include <lora/weight/codec/plain.hpp>

#include <algorithm>

namespace lora {
inline namespace LORA_ABI {

LORA_INLINE void FourBitTensor::validate(const char* who) const {
  detail::check_block_size(who, block_size);
  TORCH_CHECK(std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size > 0; }), who,
              ": the sizes of a packed weight are ", at::IntArrayRef(sizes), ", but each has to be at least 1");
  const auto blocks = (numel() + block_size - 1) / block_size;
  TORCH_CHECK(codes.defined(), who, ": codes of a packed weight is undefined");
  const auto device = codes.device();
  detail::check_part(who, "codes", codes, at::kByte, (numel() + 1) / 2, device);
  detail::check_part(who, "absmax", absmax, double_quantized() ? at::kByte : at::kFloat, blocks, device);
  if (!double_quantized()) return;
  const auto nested_blocks = (blocks + detail::kNestedBlockSize - 1) / detail::kNestedBlockSize;
  detail::check_part(who, "nested_absmax", nested_absmax, at::kFloat, nested_blocks, device);
  detail::check_part(who, "nested_map", nested_map, at::kFloat, 256, device);
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
