#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>

#include <lora/version.hpp>

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

// Which part of a weight an operand is. Operators see views of a weight: the transpose, a slice, one of the chunks of a
// packed projection; what they are is told by where they lie in its memory.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// How an operand lies in a weight.
struct Part {
  enum class Kind : uint8_t {
    kRows,            ///< some of its rows, as they lie in the weight; of other weights than matrices: all of it
    kTransposedRows,  ///< the same, transposed
    kOther            ///< something else
  };

  Kind kind = Kind::kOther;
  int64_t first = 0, count = 0;  ///< which rows
};

/// Whether two tensors have the same sizes and strides, where dimensions of size 1 may have any stride.
inline bool same_layout(at::IntArrayRef sizes, at::IntArrayRef strides, at::IntArrayRef other_sizes,
                        at::IntArrayRef other_strides) {
  if (sizes != other_sizes) return false;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] != 1 && strides[i] != other_strides[i]) return false;
  }
  return true;
}

/// The rows of a matrix of which an operand (rows, columns) with these strides consists; nothing where it is no such
/// block.
inline std::optional<std::pair<int64_t, int64_t>> row_block(const at::Tensor& weight, int64_t offset, int64_t rows,
                                                            int64_t columns, int64_t row_stride,
                                                            int64_t column_stride) {
  const auto stride = weight.stride(0);
  const bool fits = columns == weight.size(1) && (columns == 1 || column_stride == weight.stride(1)) &&
                    (rows == 1 || row_stride == stride);
  if (!fits || stride <= 0 || offset % stride != 0 || offset / stride + rows > weight.size(0)) return std::nullopt;
  return std::pair(offset / stride, rows);
}

/// Where a block with the strides of `weight` begins in it; nullopt when `operand` is no such block.
inline std::optional<std::vector<int64_t>> block_start(const at::Tensor& weight, const at::Tensor& operand) {
  const auto dimensions = static_cast<size_t>(weight.dim());
  if (operand.dim() != weight.dim()) return std::nullopt;
  std::vector<size_t> by_stride;  // of size 1 are any strides
  for (size_t i = 0; i < dimensions; ++i) {
    if (weight.sizes()[i] != 1) by_stride.push_back(i);
    if (weight.sizes()[i] == 1 && operand.sizes()[i] != 1) return std::nullopt;
  }
  std::sort(by_stride.begin(), by_stride.end(),
            [&](size_t a, size_t b) { return weight.strides()[a] > weight.strides()[b]; });
  auto rest = operand.storage_offset() - weight.storage_offset();
  std::vector<int64_t> start(dimensions);
  for (auto i : by_stride) {
    const auto stride = weight.strides()[i], size = operand.sizes()[i];
    if (stride == 0 || (size != 1 && operand.strides()[i] != stride)) return std::nullopt;
    start[i] = rest / stride;
    rest %= stride;
    if (start[i] + size > weight.sizes()[i]) return std::nullopt;
  }
  return rest == 0 ? std::optional(start) : std::nullopt;
}

/// Where the numbers of a tensor lie in its memory: places are written in digits, one for each dimension.
class Digits {
 public:
  explicit Digits(const at::Tensor& tensor) {
    for (int64_t i = 0; i < tensor.dim(); ++i) {
      if (tensor.size(i) != 1) digits_.push_back({tensor.stride(i), tensor.size(i)});
    }
    std::sort(digits_.begin(), digits_.end(), [](const auto& a, const auto& b) { return a.stride > b.stride; });
    int64_t places = 1;  // that the inner digits span
    for (auto digit = digits_.rbegin(); digit != digits_.rend(); ++digit) {
      is_unique_ = is_unique_ && digit->stride >= places;
      places += (digit->size - 1) * digit->stride;
    }
    for (auto i = digits_.size(); i-- > 1;) {
      auto &outer = digits_[i - 1], &inner = digits_[i];
      if (outer.stride != inner.stride * inner.size) continue;
      outer = {inner.stride, inner.size * outer.size};  // no gap between them: one digit
      digits_.erase(digits_.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }

  /// Whether every number of a tensor that begins `offset` places after this one is a number of this one.
  bool contain(const at::Tensor& other, int64_t offset) const {
    if (!is_unique_ || offset < 0) return false;
    std::vector<int64_t> last(digits_.size());  // the digits of its last number, as far as no digit overflows
    if (!add(offset, 1, last)) return false;
    for (int64_t i = 0; i < other.dim(); ++i) {
      if (other.size(i) > 1 && !add(other.stride(i), other.size(i) - 1, last)) return false;
    }
    return true;
  }

 private:
  struct Digit {
    int64_t stride, size;
  };

  bool add(int64_t step, int64_t times, std::vector<int64_t>& digits) const {
    for (size_t i = 0; i < digits_.size(); ++i) {
      digits[i] += step / digits_[i].stride * times;
      step %= digits_[i].stride;
      if (digits[i] >= digits_[i].size) return false;
    }
    return step == 0;
  }

  std::vector<Digit> digits_;
  bool is_unique_ = true;  // no two numbers in one place
};

/// Whether every number of `operand` is one of `weight`, in whatever order.
inline bool is_inside(const at::Tensor& weight, const at::Tensor& operand) {
  return Digits(weight).contain(operand, operand.storage_offset() - weight.storage_offset());
}

/// Whether `operand`, which shares the storage of `weight` and is no part of it, may have some of its numbers all the
/// same. Tensors that lie behind each other have none, and neither have those beside each other in the rows of a larger
/// matrix.
inline bool may_overlap(const at::Tensor& weight, const at::Tensor& operand) {
  if (weight.numel() == 0 || operand.numel() == 0 || operand.scalar_type() != weight.scalar_type()) return false;
  // The numbers of a tensor, without those of dimensions with a stride of at least `limit`: how many places they span.
  const auto span = [](const at::Tensor& tensor, int64_t limit) {
    int64_t places = 1;
    for (int64_t i = 0; i < tensor.dim(); ++i) {
      if (tensor.stride(i) < limit) places += (tensor.size(i) - 1) * tensor.stride(i);
    }
    return places;
  };
  constexpr auto kAll = std::numeric_limits<int64_t>::max();
  const auto offset = operand.storage_offset() - weight.storage_offset();
  if (offset >= span(weight, kAll) || offset + span(operand, kAll) <= 0) return false;
  int64_t pitch = 0;
  for (int64_t i = 0; i < weight.dim(); ++i) {
    if (weight.size(i) > 1) pitch = std::max(pitch, weight.stride(i));
  }
  if (pitch == 0) return true;
  for (int64_t i = 0; i < operand.dim(); ++i) {
    if (operand.size(i) > 1 && operand.stride(i) > pitch && operand.stride(i) % pitch != 0) return true;
  }
  const auto column = (offset % pitch + pitch) % pitch;
  return column < span(weight, pitch) || column + span(operand, pitch) > pitch;
}

/// All of a weight.
inline Part whole_part(const at::Tensor& weight) {
  return {Part::Kind::kRows, 0, weight.dim() == 0 ? 1 : weight.size(0)};
}

/// How `operand`, which shares the storage of `weight`, lies in it; nullopt when it lies elsewhere.
inline std::optional<Part> part_of(const at::Tensor& weight, const at::Tensor& operand) {
  using Kind = Part::Kind;
  const auto offset = operand.storage_offset() - weight.storage_offset();
  if (offset < 0 || operand.numel() == 0 || operand.scalar_type() != weight.scalar_type()) return std::nullopt;
  if (offset == 0 && same_layout(weight.sizes(), weight.strides(), operand.sizes(), operand.strides()))
    return whole_part(weight);
  if (weight.dim() == 2 && operand.dim() == 2) {
    const auto block = [&](int64_t rows, int64_t columns) {
      return row_block(weight, offset, operand.size(rows), operand.size(columns), operand.stride(rows),
                       operand.stride(columns));
    };
    if (const auto rows = block(0, 1)) return Part{Kind::kRows, rows->first, rows->second};
    if (const auto rows = block(1, 0)) return Part{Kind::kTransposedRows, rows->first, rows->second};
  }
  if (block_start(weight, operand) || is_inside(weight, operand)) return Part{};
  return std::nullopt;
}

/// The part of `whole`, which is shaped like `weight`, that `operand` is of `weight`.
inline at::Tensor same_part(const at::Tensor& whole, const at::Tensor& weight, const at::Tensor& operand,
                            const Part& part) {
  if (part.kind != Part::Kind::kOther) {
    const bool all = whole.dim() == 0 || part.count == whole.size(0);
    const auto rows = all ? whole : whole.narrow(0, part.first, part.count);
    return part.kind == Part::Kind::kRows ? rows : rows.t();
  }
  if (const auto start = block_start(weight, operand)) {
    auto block = whole;
    for (size_t i = 0; i < start->size(); ++i) {
      const auto dimension = static_cast<int64_t>(i);
      if (operand.size(dimension) != block.size(dimension))
        block = block.narrow(dimension, (*start)[i], operand.size(dimension));
    }
    return block;
  }
  // In memory as the weight is, so that the same strides find the same numbers.
  auto stored = whole;
  if (!same_layout(whole.sizes(), whole.strides(), weight.sizes(), weight.strides())) {
    stored = at::empty_strided(weight.sizes(), weight.strides(), whole.options());
    stored.copy_(whole);
  }
  const auto offset = stored.storage_offset() + operand.storage_offset() - weight.storage_offset();
  return stored.as_strided(operand.sizes(), operand.strides(), offset);
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
