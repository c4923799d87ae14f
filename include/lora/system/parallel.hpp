#pragma once

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty.h>

#include <lora/version.hpp>

#include <algorithm>
#include <cstdint>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// at::parallel_for on LibTorch's own threads. That one is compiled along with the program, and has several threads
/// only where that is compiled for OpenMP; and then those of another OpenMP beside LibTorch's. Here the loop is in
/// LibTorch, which calls `work(first, last)` for parts of [begin, end) of at least `grain` each.
template <class Work>
void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain, const Work& work) {
  if (begin >= end) return;
  const auto most = (end - begin) / std::max<std::int64_t>(grain, 1);
  const auto parts = std::min<std::int64_t>(most, at::get_num_threads());
  if (parts <= 1 || at::in_parallel_region()) return work(begin, end);
  const auto size = (end - begin + parts - 1) / parts;
  auto numbers = at::empty({parts}, at::kByte);  // its places are the numbers of the parts
  const auto* base = static_cast<const char*>(numbers.data_ptr());
  auto loop = at::TensorIterator::nullary_op(numbers);
  // In the form for two dimensions, of which this has one: GCC warns of what LibTorch makes of the other form.
  loop.for_each(
      [&](char** places, const std::int64_t* /*strides*/, std::int64_t count, std::int64_t /*one*/) {
        for (auto part = places[0] - base; count > 0; --count, ++part) {
          const auto first = begin + part * size;
          if (first < end) work(first, std::min(first + size, end));
        }
      },
      /*grain_size=*/1);
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
