#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <c10/core/TensorOptions.h>

#include <lora/options.hpp>
#include <lora/version.hpp>

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

// A method is the mathematics of one update, and nothing else: it knows no module, no file and no model. It is a plain
// struct M that offers
//
//   static constexpr MethodInfo info;                 what it is called, here and in PEFT's configuration
//   static std::vector<MethodField<M>> fields();      its trainable tensors, each with its name
//   LoRAOptions options;  double scaling;             both set before any of the following is called
//   void allocate(const MatrixShape&, at::TensorOptions);   gives the tensors their shapes, without values
//   void initialize(const at::Tensor& weight);        gives them their first values; the layer starts as the frozen one
//   at::Tensor delta(const at::Tensor& weight) const; W' - W, shaped like W, differentiable, in float at least
//   at::Tensor forward(const FrozenProduct&) const;   x W'^T + b from the product that the frozen layer computed
//
// where W is a matrix (out, in), or a batch of them for which `forward` is never asked. Whatever a layer's weight looks
// like in memory, here it is a matrix; and everything else (modules, attaching, merging, files, reports) works with the
// method through `AnyMethod`.

namespace lora {
inline namespace LORA_ABI {

/// The shape in which a method sees a weight: a matrix whose rows are outputs, or a batch of such matrices.
struct MatrixShape {
  at::DimVector batch;  ///< empty for one matrix; else how many, e.g. the groups of a convolution
  int64_t out = 0, in = 0;
  int64_t rank_shares = 1;  ///< among how many matrices a rank is divided; 1: each has the whole rank
  bool is_lookup = false;   ///< whether inputs are numbers of columns (an embedding) and not vectors

  /// The sizes of a tensor that has a matrix (rows, columns) for each matrix of the weight.
  at::DimVector with(int64_t rows, int64_t columns) const {
    auto sizes = batch;
    sizes.append({rows, columns});
    return sizes;
  }
};

/// What a frozen layer computed that multiplies its input with its weight, as a method sees it.
struct FrozenProduct {
  at::Tensor input;       ///< x (..., in), or the numbers of the columns that are looked up
  at::Tensor output;      ///< x W^T + b (..., out)
  at::Tensor weight;      ///< W (out, in)
  at::Tensor bias;        ///< b (out), undefined when `output` carries none
  bool training = false;  ///< whether dropout acts
  /// How the layer computes x M^T (..., n) for a matrix M (n, in); empty for at::linear.
  std::function<at::Tensor(const at::Tensor& x, const at::Tensor& matrix)> multiply = {};

  at::Tensor times(const at::Tensor& x, const at::Tensor& matrix) const {
    if (multiply) return multiply(x, matrix);
    return x.dim() == 2 ? at::mm(x, matrix.t()) : at::linear(x, matrix);
  }
};

/// `tensor.to(type)`, without the call where there is nothing to do: for small products calls are what costs.
inline at::Tensor in_type(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

/// How a method is named.
struct MethodInfo {
  std::string_view name;                ///< "LowRank"
  std::string_view peft_type = "LORA";  ///< "peft_type" in adapter_config.json
  std::string_view peft_flag = {};      ///< the boolean in adapter_config.json that selects it, if any: "use_dora"
};

/// One trainable tensor of method M.
template <class M>
struct MethodField {
  std::string_view name;         ///< "lora_A"
  at::Tensor M::*tensor;         ///< where it is
  std::string_view file_suffix;  ///< what PEFT appends to the name in files: ".weight" or nothing
};

/// One trainable tensor of a method, whatever its type.
struct NamedTensor {
  std::string name;
  std::string file_name;  ///< name and suffix in PEFT's files
  at::Tensor* tensor;
};

/// A method whose type is not known: what a site holds.
class AnyMethod {
 public:
  virtual ~AnyMethod() = default;
  virtual const MethodInfo& info() const = 0;
  virtual const LoRAOptions& options() const = 0;
  virtual double scaling() const = 0;
  virtual void initialize(const at::Tensor& weight) = 0;
  virtual at::Tensor delta(const at::Tensor& weight) const = 0;
  virtual at::Tensor forward(const FrozenProduct& product) const = 0;
  virtual std::vector<NamedTensor> tensors() = 0;
};

/// `AnyMethod` for the method struct M; `value` is the struct itself.
template <class M>
class MethodOf final : public AnyMethod {
 public:
  /// Allocates the tensors for a weight of that shape; they require gradients and have no values yet.
  MethodOf(const LoRAOptions& options, const MatrixShape& shape, const at::TensorOptions& tensor_options)
      : value(options) {
    value.allocate(shape, tensor_options);
    for (auto& field : M::fields()) (value.*field.tensor).requires_grad_(true);
  }

  const MethodInfo& info() const override { return M::info; }
  const LoRAOptions& options() const override { return value.options; }
  double scaling() const override { return value.scaling; }
  void initialize(const at::Tensor& weight) override { value.initialize(weight); }
  at::Tensor delta(const at::Tensor& weight) const override { return value.delta(weight); }
  at::Tensor forward(const FrozenProduct& product) const override { return value.forward(product); }

  std::vector<NamedTensor> tensors() override {
    std::vector<NamedTensor> all;
    for (auto& field : M::fields()) {
      const std::string name(field.name);
      all.push_back({name, name + std::string(field.file_suffix), &(value.*field.tensor)});
    }
    return all;
  }

  M value;
};

/// A method as a value of a configuration: `LoRAConfig(8).method(lora::DoRA())`. Only its type counts; rank, alpha and
/// all else are the configuration's.
class MethodKind {
 public:
  template <class M, class = decltype(M::info)>
  /* implicit */ MethodKind(const M&) : MethodKind(Type<M>()) {}

  template <class M>
  static MethodKind of() {
    return MethodKind(Type<M>());
  }

  const MethodInfo& info() const { return *info_; }

  std::shared_ptr<AnyMethod> make(const LoRAOptions& options, const MatrixShape& shape,
                                  const at::TensorOptions& tensor_options) const {
    return make_(options, shape, tensor_options);
  }

 private:
  template <class M>
  struct Type {};

  template <class M>
  explicit MethodKind(Type<M>)
      : info_(&M::info),
        make_([](const LoRAOptions& options, const MatrixShape& shape,
                 const at::TensorOptions& tensor_options) -> std::shared_ptr<AnyMethod> {
          return std::make_shared<MethodOf<M>>(options, shape, tensor_options);
        }) {}

  const MethodInfo* info_;
  std::shared_ptr<AnyMethod> (*make_)(const LoRAOptions&, const MatrixShape&, const at::TensorOptions&);
};

/// The type in which an adapter of a `base` weight is kept: float for half precision and below, else the weight's own.
inline at::ScalarType adapter_dtype(at::ScalarType base) { return base == at::kDouble ? at::kDouble : at::kFloat; }

}  // namespace LORA_ABI
}  // namespace lora
