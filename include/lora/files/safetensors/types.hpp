#pragma once

#include <ATen/core/Tensor.h>

#include <lora/system/libtorch.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// A tensor before its values are there.
struct TensorInfo {
  std::string name;
  at::ScalarType dtype;
  std::vector<int64_t> shape;
};

namespace detail {

/// How the format calls a type of LibTorch. A LibTorch element of F4 holds two values; shapes in a file count values.
struct SafetensorsType {
  std::string_view name;
  at::ScalarType dtype;
  int64_t values_per_element = 1;
};

/// The types of the format in its own order, in which a writer sorts. An older LibTorch lacks some: Undefined.
inline constexpr std::array<SafetensorsType, 20> kSafetensorsTypes = {{
    {"BOOL", at::kBool},
    {"F4", kFloat4<at::ScalarType>, 2},
    {"U8", at::kByte},
    {"I8", at::kChar},
    {"F8_E5M2", at::kFloat8_e5m2},
    {"F8_E4M3", at::kFloat8_e4m3fn},
    {"F8_E8M0", kFloat8Exponent<at::ScalarType>},
    {"F8_E4M3FNUZ", at::kFloat8_e4m3fnuz},
    {"F8_E5M2FNUZ", at::kFloat8_e5m2fnuz},
    {"I16", at::kShort},
    {"U16", at::kUInt16},
    {"F16", at::kHalf},
    {"BF16", at::kBFloat16},
    {"I32", at::kInt},
    {"U32", at::kUInt32},
    {"F32", at::kFloat},
    {"C64", at::kComplexFloat},
    {"F64", at::kDouble},
    {"I64", at::kLong},
    {"U64", at::kUInt64},
}};

/// Types of the format that no LibTorch has.
inline constexpr std::array<std::string_view, 2> kSafetensorsOtherTypes = {"F6_E2M3", "F6_E3M2"};

/// The entry of kSafetensorsTypes, of a type that this LibTorch has, for which `matches` holds, or null.
template <typename Predicate>
const SafetensorsType* find_safetensors_type(Predicate matches) {
  const auto fits = [&](const auto& type) { return type.dtype != at::ScalarType::Undefined && matches(type); };
  const auto* found = std::find_if(kSafetensorsTypes.begin(), kSafetensorsTypes.end(), fits);
  return found == kSafetensorsTypes.end() ? nullptr : found;
}

/// Where the values of a tensor lie, in bytes from the end of the header.
struct StoredTensor {
  TensorInfo info;
  int64_t begin = 0;
  int64_t end = 0;
};

/// What stands before the values: 8 bytes with the length of a JSON text (little-endian), then that text.
struct SafetensorsHeader {
  std::vector<StoredTensor> tensors;  // as they follow each other in the file
  std::map<std::string, std::string> metadata;
};

inline constexpr int64_t kSafetensorsLengthBytes = 8;
inline constexpr uint64_t kSafetensorsMaxHeader = 100'000'000;

/// Multiplies `product`; false, and nothing is changed, where it would exceed `most`.
inline bool multiply(uint64_t& product, uint64_t factor, uint64_t most) {
  if (factor != 0 && product > most / factor) return false;
  product *= factor;
  return true;
}

/// The bytes of a tensor; false for a shape that cannot be: neither the number of its values nor its strides may
/// overflow. An empty tensor has strides too, those of one with 1 in the place of each 0.
inline bool count_bytes(const TensorInfo& info, int64_t& bytes) {
  constexpr uint64_t kMost = std::numeric_limits<int64_t>::max();
  const auto& shape = info.shape;
  uint64_t values = 1, stride = 1;
  for (const auto size : shape) {
    if (size < 0 || !multiply(values, static_cast<uint64_t>(size), std::numeric_limits<uint64_t>::max())) return false;
  }
  for (size_t i = shape.size(); i > 1; --i) {
    if (!multiply(stride, static_cast<uint64_t>(std::max<int64_t>(shape[i - 1], 1)), kMost)) return false;
  }
  if (!multiply(values, c10::elementSize(info.dtype), kMost)) return false;
  bytes = static_cast<int64_t>(values);
  return true;
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
