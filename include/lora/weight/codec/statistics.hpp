#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/nan_to_num.h>

#include <lora/weight/codec/plain.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <utility>

// Double quantization: the scales of blocks, in 8 bits each.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The dynamic 8 bit type of Dettmers 2015: in each of seven decades below 1 twice as many numbers as in the decade
/// below it, halfway between numbers that are evenly spaced; with either sign; and 0 and 1. Ascending.
inline std::array<float, 256> make_dynamic_map() {
  std::array<float, 256> map{};
  constexpr float powers[] = {1e-6F, 1e-5F, 1e-4F, 1e-3F, 1e-2F, 1e-1F, 1.0F};
  size_t size = 0;
  map[size++] = 0;
  map[size++] = 1;
  for (int decade = 0; decade < 7; ++decade) {
    const int count = 1 << decade;
    // From 0.1 to 1, counted from the nearer end. In double, where it is exact, so that it is rounded once.
    const double step = (1.0F - 0.1F) / static_cast<float>(count);
    const auto boundary = [&](int i) {
      return static_cast<float>(i < (count + 1) / 2 ? 0.1F + step * i : 1.0 - step * (count - i));
    };
    for (int i = 0; i < count; ++i) {
      const float mean = (boundary(i) + boundary(i + 1)) / 2;
      map[size++] = powers[decade] * mean;
      map[size++] = -powers[decade] * mean;
    }
  }
  std::sort(map.begin(), map.end());
  return map;
}

inline const std::array<float, 256>& dynamic_map() {
  static const auto map = make_dynamic_map();
  return map;
}

/// The same as a tensor, which all weights have in common.
inline const at::Tensor& dynamic_map_tensor() {
  static const auto tensor = [] {
    auto numbers = at::empty({256}, at::kFloat);
    std::copy(dynamic_map().begin(), dynamic_map().end(), numbers.mutable_data_ptr<float>());
    return numbers;
  }();
  return tensor;
}

/// Codes of numbers in [-1, 1], of which 65,536 are told apart, as the library of bitsandbytes does on the CPU.
inline std::array<std::uint8_t, 65536> make_dynamic_codes() {
  std::array<std::uint8_t, 65536> codes{};
  const auto& map = dynamic_map();
  size_t code = 0;
  for (size_t i = 0; i < codes.size(); ++i) {
    const float value = static_cast<float>(2 * i) / 65535.0F - 1.0F;
    while (code < 255 && value > (map[code] + map[code + 1]) * 0.5F) ++code;
    codes[i] = static_cast<std::uint8_t>(code);
  }
  return codes;
}

inline const std::array<std::uint8_t, 65536>& dynamic_codes() {
  static const auto codes = make_dynamic_codes();
  return codes;
}

/// Quantizes finite numbers in blocks of 256 into codes, and the largest absolute value of each block.
inline void quantize_statistics(const float* numbers, std::int64_t count, std::uint8_t* codes, float* absmax) {
  for (std::int64_t first = 0; first < count; first += kNestedBlockSize) {
    const auto last = std::min(count, first + kNestedBlockSize);
    float most = 0;
    for (auto i = first; i < last; ++i) most = std::max(most, std::abs(numbers[i]));
    *absmax++ = most;
    const float factor = 1.0F / most;
    for (auto i = first; i < last; ++i) {
      // No number where all are zero, or where the factor is infinite and this one is zero: that counts as -1.
      const float scaled = numbers[i] * factor;
      const float limited = std::isnan(scaled) ? -1.0F : std::min(std::max(scaled, -1.0F), 1.0F);
      const double from_zero = (limited + 1.0F) * 0.5F;
      const auto place = static_cast<float>(from_zero * 65535.0 + 0.5);  // exact until here, so it is rounded once
      codes[i] = dynamic_codes()[static_cast<size_t>(place)];
    }
  }
}

/// The numbers in rows of `columns`, with zeros at the end.
inline at::Tensor in_rows(const at::Tensor& numbers, int64_t columns) {
  const auto rest = numbers.numel() % columns;
  return (rest == 0 ? numbers : at::constant_pad_nd(numbers, {0, columns - rest})).view({-1, columns});
}

/// What `quantize_statistics` makes, by operators that any device has: codes and largest values.
inline std::pair<at::Tensor, at::Tensor> quantized_statistics(const at::Tensor& numbers) {
  const auto rows = in_rows(numbers, kNestedBlockSize);
  auto absmax = rows.abs().amax(1);
  const auto scaled = rows * absmax.reciprocal().unsqueeze(1);
  const auto from_zero = (at::nan_to_num(scaled, -1).clamp(-1, 1) + 1) * 0.5;
  const auto places = (from_zero.to(at::kDouble) * 65535.0 + 0.5).to(at::kFloat).to(at::kLong);
  auto table = at::empty({65536}, at::kByte);
  std::copy(dynamic_codes().begin(), dynamic_codes().end(), table.mutable_data_ptr<std::uint8_t>());
  auto codes = table.to(numbers.device()).index_select(0, places.view({-1})).narrow(0, 0, numbers.numel());
  return {codes.contiguous(), absmax};
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
