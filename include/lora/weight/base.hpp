#pragma once

#include <ATen/core/Tensor.h>

#include <lora/version.hpp>
#include <lora/weight/placeholder.hpp>
#include <lora/weight/frozen_product.hpp>
#include <lora/weight/updated_norms.hpp>
#include <lora/weight/view.hpp>

#include <memory>
#include <utility>

namespace lora {
inline namespace LORA_ABI {

/// How a frozen weight is held, as methods see it: a matrix (out, in), or a batch of them.
class Base {
 public:
  virtual ~Base() = default;
  virtual const MatrixShape& shape() const = 0;
  virtual at::ScalarType dtype() const = 0;
  /// W (out, in) or (batch, out, in).
  virtual at::Tensor dense() const = 0;
  /// The norm of each row of W + s B A (out) or (batch, out), which is not formed, for A (..., rank, in) and
  /// B (..., out, rank) of one type, and in that type; without a gradient.
  virtual at::Tensor updated_norms(const at::Tensor& A, const at::Tensor& B, double scale) const {
    return detail::updated_norms(dense().to(A.scalar_type()), A, B, scale);
  }
  /// A tensor in the layout of the layer's weight as such a matrix, and the other way.
  virtual at::Tensor matrix(const at::Tensor& weight) const = 0;
  virtual at::Tensor layout(const at::Tensor& matrix) const = 0;
  /// The memory that it takes.
  virtual int64_t nbytes() const = 0;
};

/// A weight that is a tensor of its layer, in the layout of that; its numbers are in it, or held in few bits.
class WeightBase final : public Base {
 public:
  WeightBase(at::Tensor weight, std::shared_ptr<const MatrixView> view)
      : weight_(std::move(weight)), view_(std::move(view)) {}
  /// A weight that has something merged into it; methods see the values that it has without that.
  WeightBase(at::Tensor weight, at::Tensor pristine, std::shared_ptr<const MatrixView> view)
      : weight_(std::move(weight)), pristine_(std::move(pristine)), view_(std::move(view)) {}
  /// A matrix (out, in), or a batch of them.
  explicit WeightBase(const at::Tensor& matrix)
      : WeightBase(matrix, std::make_shared<const MatrixView>(MatrixView::plain(matrix.sizes()))) {}

  const MatrixShape& shape() const override { return view_->shape(); }
  at::ScalarType dtype() const override { return weight_.scalar_type(); }
  at::Tensor dense() const override { return view_->matrix(detail::dequantized(is_merged() ? pristine_ : weight_)); }
  at::Tensor updated_norms(const at::Tensor& A, const at::Tensor& B, double scale) const override {
    if (!is_held_matrix() || A.dim() != 2) return Base::updated_norms(A, B, scale);
    const auto squares = detail::held_numbers(weight_)->row_squares().to(A.scalar_type());
    return detail::updated_norms(detail::quantized_mm_value(A, weight_.t(), {}), squares, A, B, scale);
  }
  at::Tensor matrix(const at::Tensor& weight) const override { return view_->matrix(weight); }
  at::Tensor layout(const at::Tensor& matrix) const override { return view_->weight(matrix); }
  int64_t nbytes() const override { return detail::held_bytes(weight_); }

  /// The tensor itself, which operators see.
  const at::Tensor& weight() const { return weight_; }
  bool is_merged() const { return pristine_.defined(); }
  const MatrixView& view() const { return *view_; }

 private:
  bool is_held_matrix() const {
    return !is_merged() && weight_.dim() == 2 && view_->is_plain() && detail::is_whole_placeholder(weight_);
  }

  at::Tensor weight_, pristine_;
  std::shared_ptr<const MatrixView> view_;
};

}  // namespace LORA_ABI
}  // namespace lora
