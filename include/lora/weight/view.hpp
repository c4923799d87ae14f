#pragma once

#include <ATen/core/Tensor.h>

#include <lora/linkage.hpp>
#include <lora/version.hpp>
#include <lora/weight/shape.hpp>

#include <numeric>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// How the weight of a kind of layer is seen as a matrix (out, in), or as a batch of them, and back. Both ways are
/// differentiable. One formula serves all: split dimensions, permute them, join them.
class MatrixView {
 public:
  /// (out, in) or (batch, out, in), as a linear layer keeps it.
  static MatrixView plain(at::IntArrayRef sizes) { return MatrixView(sizes, sizes, identity(sizes.size()), 0); }

  /// (in, out) or (batch, in, out).
  static MatrixView transposed(at::IntArrayRef sizes) {
    auto order = identity(sizes.size());
    std::swap(order[sizes.size() - 1], order[sizes.size() - 2]);
    return MatrixView(sizes, sizes, order, 0);
  }

  /// The table (entries, width) of an embedding: W = table^T, and an input x is the number of a column.
  static MatrixView lookup(at::IntArrayRef sizes) {
    auto view = transposed(sizes);
    view.shape_.is_lookup = true;
    return view;
  }

  /// (out, ...): one row for each output, everything else joined.
  static MatrixView rows(at::IntArrayRef sizes) { return MatrixView(sizes, sizes, identity(sizes.size()), 1); }

  /// The kernel (out, in / groups, ...) of a convolution, or (in, out / groups, ...) of a transposed one. Each group is
  /// a matrix of its own, and the rank is divided among them.
  static MatrixView kernel(at::IntArrayRef sizes, int64_t groups, bool is_transposed);

  /// Some of the projections that a weight (out, in) is made of, one below the other: a batch of as many matrices, each
  /// as large as the largest part of the weight, the smaller ones filled up with zeros.
  static MatrixView parts(at::IntArrayRef sizes, const std::vector<int64_t>& rows, const std::vector<bool>& chosen);

  /// A tensor that is no matrix, as it is: a bias, or whatever is trained in full.
  static MatrixView none(at::IntArrayRef sizes) {
    MatrixView view;
    view.sizes_ = sizes;
    return view;
  }

  /// The rows of each projection, and which of them are chosen; empty unless made by `parts`.
  const std::vector<int64_t>& part_rows() const { return rows_; }
  const std::vector<bool>& chosen_parts() const { return chosen_; }

  /// Whether the matrix is the weight as it is.
  bool is_plain() const { return is_plain_; }
  /// What a method sees.
  const MatrixShape& shape() const { return shape_; }

  /// The weight as a matrix.
  at::Tensor matrix(const at::Tensor& weight) const;

  /// A matrix in the layout of the weight.
  at::Tensor weight(const at::Tensor& matrix) const;

 private:
  MatrixView() : is_plain_(true) {}

  /// Splits `sizes` into `split`, permutes by `order`, and joins what follows the first `leading` dimensions; 0 joins
  /// nothing.
  MatrixView(at::IntArrayRef sizes, at::IntArrayRef split, at::DimVector order, size_t leading)
      : sizes_(sizes), split_(split), order_(std::move(order)), inverse_(order_.size()) {
    for (size_t i = 0; i < order_.size(); ++i) {
      inverse_[static_cast<size_t>(order_[i])] = static_cast<int64_t>(i);
      permuted_.push_back(split_[static_cast<size_t>(order_[i])]);
    }
    joined_ = permuted_;
    if (leading > 0) {
      joined_.resize(leading);
      joined_.push_back(1);
      for (size_t i = leading; i < permuted_.size(); ++i) joined_.back() *= permuted_[i];
    }
    is_plain_ = joined_ == sizes_ && order_ == identity(order_.size());
    shape_.out = joined_[joined_.size() - 2];
    shape_.in = joined_.back();
    shape_.batch.assign(joined_.begin(), joined_.end() - 2);
  }

  at::Tensor stacked_parts(const at::Tensor& weight) const;

  at::Tensor joined_parts(const at::Tensor& matrices) const;

  void drop_batch() {
    joined_.erase(joined_.begin());
    shape_.batch.clear();
  }

  static at::DimVector identity(size_t dimensions) {
    at::DimVector order(dimensions);
    std::iota(order.begin(), order.end(), 0);
    return order;
  }

  at::DimVector sizes_, split_, order_, inverse_, permuted_, joined_;
  std::vector<int64_t> rows_;  // of the parts, where there are some
  std::vector<bool> chosen_;
  bool is_plain_ = false;
  MatrixShape shape_;
};

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace lora {
inline namespace LORA_ABI {

LORA_INLINE MatrixView MatrixView::kernel(at::IntArrayRef sizes, int64_t groups, bool is_transposed) {
  auto split = sizes.vec();
  split[0] /= groups;
  split.insert(split.begin(), groups);
  auto order = identity(split.size());
  if (is_transposed) std::swap(order[1], order[2]);
  MatrixView view(sizes, split, order, 2);
  view.shape_.rank_shares = groups;
  if (groups == 1) view.drop_batch();
  return view;
}

LORA_INLINE MatrixView MatrixView::parts(at::IntArrayRef sizes, const std::vector<int64_t>& rows,
                                         const std::vector<bool>& chosen) {
  auto view = plain(sizes);
  view.is_plain_ = false;
  view.rows_ = rows;
  view.chosen_ = chosen;
  view.shape_.out = *std::max_element(rows.begin(), rows.end());
  view.shape_.batch = {std::count(chosen.begin(), chosen.end(), true)};
  return view;
}

LORA_INLINE at::Tensor MatrixView::matrix(const at::Tensor& weight) const {
  if (!rows_.empty()) return stacked_parts(weight);
  return is_plain_ ? weight : weight.reshape(split_).permute(order_).reshape(joined_);
}

LORA_INLINE at::Tensor MatrixView::weight(const at::Tensor& matrix) const {
  if (!rows_.empty()) return joined_parts(matrix);
  return is_plain_ ? matrix : matrix.reshape(permuted_).permute(inverse_).reshape(sizes_);
}

LORA_INLINE at::Tensor MatrixView::stacked_parts(const at::Tensor& weight) const {
  std::vector<at::Tensor> parts;
  int64_t first = 0;
  for (size_t i = 0; i < rows_.size(); first += rows_[i++]) {
    if (!chosen_[i]) continue;
    parts.push_back(at::constant_pad_nd(weight.narrow(0, first, rows_[i]), {0, 0, 0, shape_.out - rows_[i]}));
  }
  return at::stack(parts);
}

LORA_INLINE at::Tensor MatrixView::joined_parts(const at::Tensor& matrices) const {
  std::vector<at::Tensor> parts;
  int64_t next = 0;
  for (size_t i = 0; i < rows_.size(); ++i) {
    parts.push_back(chosen_[i] ? matrices.select(0, next++).narrow(0, 0, rows_[i])
                               : at::zeros({rows_[i], shape_.in}, matrices.options().requires_grad(false)));
  }
  return at::cat(parts);
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
