#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/isfinite.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <lora/version.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// How many numbers an operator that works on many of them gives to a thread, at least.
constexpr int64_t kNumbersPerThread = 32768;

/// Refuses what cannot be packed because of its type.
inline void check_can_be_packed(const char* who, const at::Tensor& weight) {
  TORCH_CHECK(weight.defined(), who, ": the weight is undefined");
  const auto type = weight.scalar_type();
  TORCH_CHECK_TYPE(weight.layout() == at::kStrided &&
                       (type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16),
                   who, ": a weight has to be a dense tensor of Float, Double, Half or BFloat16 to be packed, but got ",
                   weight.layout(), " ", type, " ", weight.sizes());
  TORCH_CHECK(weight.numel() > 0, who, ": the weight ", weight.sizes(), " has no numbers that could be packed");
}

/// The numbers of the weight in float, one after the other.
inline at::Tensor numbers_of(const at::Tensor& weight) {
  return weight.detach().to(at::kFloat).contiguous().view({-1});
}

/// The first of the numbers of a weight at which `is_so` is true, and where it is, in words.
inline std::string first_in_words(const at::Tensor& weight, const at::Tensor& is_so) {
  const auto first = is_so.nonzero().select(0, 0).to(at::kLong).contiguous();
  const std::vector<int64_t> place(first.const_data_ptr<int64_t>(), first.const_data_ptr<int64_t>() + first.numel());
  auto value = weight;
  for (const auto index : place) value = value.select(0, index);
  return c10::str("the first of them ", value.item<double>(), " at ", at::IntArrayRef(place));
}

/// Throws for a weight of which not all numbers are finite once they are in float.
[[noreturn]] inline void refuse_not_finite(const char* who, const at::Tensor& weight) {
  const auto values = weight.detach().to(at::kCPU);
  const auto is_infinite = at::isfinite(values.to(at::kFloat)).logical_not();
  TORCH_CHECK_VALUE(false, who, ": ", is_infinite.sum().item<int64_t>(), " of the ", weight.numel(),
                    " numbers of the weight ", weight.sizes(), " are not finite in float, ",
                    first_in_words(values, is_infinite),
                    "; only finite numbers can be packed: mend the weight (torch::nan_to_num), or leave it as it is");
}

/// The rows of a tensor as a matrix; one without dimensions is one row.
inline int64_t rows_of(at::IntArrayRef sizes) { return sizes.empty() ? 1 : sizes.front(); }

/// Checks one of the tensors that a packed weight consists of; they are contiguous, and on one device.
inline void check_part(const char* who, const char* name, const at::Tensor& part, at::ScalarType type, int64_t numel,
                       at::Device device) {
  TORCH_CHECK(part.defined(), who, ": ", name, " of a packed weight is undefined");
  TORCH_CHECK(part.scalar_type() == type && part.numel() == numel && part.is_contiguous() && part.device() == device,
              who, ": ", name, " of this packed weight has to be ", type, " of ", numel, " numbers, contiguous, on ",
              device, ", but is ", part.scalar_type(), " ", part.sizes(), " with strides ", part.strides(), " on ",
              part.device());
}

/// Refuses what is not there to be read by the CPU.
inline void check_range(const char* who, const char* what, int64_t first, int64_t count, int64_t all,
                        at::Device device) {
  TORCH_CHECK(device.is_cpu(), who, " reads weights on the CPU, but this one is on ", device,
              "; use dense(), or to(torch::kCPU)");
  TORCH_CHECK(first >= 0 && count >= 0 && first <= all && count <= all - first, who, ": there are ", all, " ", what,
              ", but ", count, " from ", first, " on are asked for");
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
