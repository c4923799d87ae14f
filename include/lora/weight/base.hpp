#pragma once

#include <ATen/core/Tensor.h>

#include <lora/version.hpp>
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
  /// A tensor in the layout of the layer's weight as such a matrix, and the other way.
  virtual at::Tensor matrix(const at::Tensor& weight) const = 0;
  virtual at::Tensor layout(const at::Tensor& matrix) const = 0;
  /// The memory that it takes.
  virtual int64_t nbytes() const = 0;
};

/// A weight that is there as a tensor of numbers, in the layout of its layer.
class DenseBase final : public Base {
 public:
  DenseBase(at::Tensor weight, std::shared_ptr<const MatrixView> view)
      : weight_(std::move(weight)), view_(std::move(view)) {}
  /// A weight that has something merged into it; methods see the values that it has without that.
  DenseBase(at::Tensor weight, at::Tensor pristine, std::shared_ptr<const MatrixView> view)
      : weight_(std::move(weight)), pristine_(std::move(pristine)), view_(std::move(view)) {}
  /// A matrix (out, in), or a batch of them.
  explicit DenseBase(const at::Tensor& matrix)
      : DenseBase(matrix, std::make_shared<const MatrixView>(MatrixView::plain(matrix.sizes()))) {}

  const MatrixShape& shape() const override { return view_->shape(); }
  at::ScalarType dtype() const override { return weight_.scalar_type(); }
  at::Tensor dense() const override { return view_->matrix(is_merged() ? pristine_ : weight_); }
  at::Tensor matrix(const at::Tensor& weight) const override { return view_->matrix(weight); }
  at::Tensor layout(const at::Tensor& matrix) const override { return view_->weight(matrix); }
  int64_t nbytes() const override { return static_cast<int64_t>(weight_.nbytes()); }

  /// The tensor itself, which operators see.
  const at::Tensor& weight() const { return weight_; }
  bool is_merged() const { return pristine_.defined(); }
  const MatrixView& view() const { return *view_; }

 private:
  at::Tensor weight_, pristine_;
  std::shared_ptr<const MatrixView> view_;
};

}  // namespace LORA_ABI
}  // namespace lora
