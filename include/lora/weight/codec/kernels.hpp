#pragma once

#include <lora/system/processor.hpp>
#include <lora/weight/codec/avx2.hpp>
#include <lora/weight/codec/avx512.hpp>
#include <lora/weight/codec/plain.hpp>
#include <lora/version.hpp>

#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The functions of `plain`, or of those beside it that use what some processors have.
struct CodecKernels {
  const char* name;
  decltype(&plain::scales) scales;
  decltype(&plain::unpack4) unpack4;
  decltype(&plain::dot4) dot4;
  decltype(&plain::largest) largest;
  decltype(&plain::quantize4) quantize4;
  decltype(&plain::unpack8) unpack8;
  decltype(&plain::dot8) dot8;
  decltype(&plain::quantize8) quantize8;
  decltype(&plain::unpack12) unpack12;
  decltype(&plain::dot12) dot12;
};

/// All that this processor can run, the fastest first.
inline std::vector<CodecKernels> runnable_codec_kernels() {
  std::vector<CodecKernels> kernels;
#if defined(LORA_AVX512)
  if (has_avx512())
    kernels.push_back({"AVX-512", avx512::scales, avx512::unpack4, avx512::dot4, avx512::largest, avx512::quantize4,
                       avx512::unpack8, avx512::dot8, avx512::quantize8, avx512::unpack12, avx512::dot12});
#endif
#if defined(LORA_AVX2)
  if (has_avx2())
    kernels.push_back({"AVX2", avx2::scales, avx2::unpack4, avx2::dot4, avx2::largest, avx2::quantize4, avx2::unpack8,
                       avx2::dot8, avx2::quantize8, avx2::unpack12, avx2::dot12});
#endif
  kernels.push_back({"plain", plain::scales, plain::unpack4, plain::dot4, plain::largest, plain::quantize4,
                     plain::unpack8, plain::dot8, plain::quantize8, plain::unpack12, plain::dot12});
  return kernels;
}

/// The largest absolute value of numbers; nothing where not all of them are finite.
inline std::optional<float> finite_absmax(const CodecKernels& kernels, const float* numbers, std::int64_t count) {
  constexpr std::uint32_t kInfinity = 0x7F800000;
  const auto bits = kernels.largest(numbers, count);
  if (bits >= kInfinity) return std::nullopt;
  float largest = 0;
  std::memcpy(&largest, &bits, sizeof(largest));
  return largest;
}

/// The fastest that this processor can run.
inline const CodecKernels& codec_kernels() {
  static const CodecKernels fastest = runnable_codec_kernels().front();
  return fastest;
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
