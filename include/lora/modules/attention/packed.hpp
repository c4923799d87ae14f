#pragma once

#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>

#include <lora/version.hpp>
#include <lora/weight/placeholder.hpp>

#include <vector>

// Weights that share their input are applied in one product where they lie one after the other in memory.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Whether `part` begins where `rows` rows of a tensor that begins with `first` end, and is of the same kind.
inline bool continues(const at::Tensor& first, int64_t rows, const at::Tensor& part) {
  if (!part.defined() || part.requires_grad() || !part.has_storage() || !part.is_contiguous()) return false;
  return share_memory(part, first) && part.scalar_type() == first.scalar_type() &&
         part.sizes().slice(1) == first.sizes().slice(1) &&
         part.storage_offset() == first.storage_offset() + rows * first.stride(0);
}

/// The tensor whose consecutive blocks of rows `parts` are, as a view. Undefined where they are not, and where one of
/// them is trained, for the view would not pass on its gradient.
inline at::Tensor stacked(const std::vector<at::Tensor>& parts) {
  const auto& first = parts.front();
  if (!first.defined() || !first.has_storage()) return {};
  auto sizes = first.sizes().vec();
  sizes[0] = 0;
  for (const auto& part : parts) {
    if (!continues(first, sizes[0], part)) return {};
    sizes[0] += part.size(0);
  }
  return first.as_strided(sizes, first.strides());
}

/// Gives the tensors, whose handles stay valid, one common memory, so that `stacked` finds them.
inline void stack(const std::vector<at::Tensor>& parts) {
  at::NoGradGuard no_grad;
  auto whole = at::cat(parts);
  int64_t row = 0;
  for (auto part : parts) {
    const auto rows = part.size(0);
    part.set_data(whole.narrow(0, row, rows).detach());
    row += rows;
  }
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
