#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/TensorOptions.h>

#include <lora/options.hpp>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

// A method is the mathematics of one update, and nothing else: it knows no module, no file and no model. It is a plain
// struct M that offers
//
//   static constexpr MethodInfo info;                 what it is called, here and in PEFT's configuration
//   static std::vector<MethodField<M>> fields();      its trainable tensors, each with its name
//   LoRAOptions options;  double scaling;             both set before any of the following is called
//   void allocate(int64_t out, int64_t in, at::TensorOptions);   gives the tensors their shapes, without values
//   void initialize(const at::Tensor& weight);        gives them their first values; the layer starts as the frozen one
//   at::Tensor delta(const at::Tensor& weight) const; W' - W, (out, in), differentiable, in float at least
//   at::Tensor forward(const FrozenProduct&) const;   x W'^T + b from the product that the frozen layer computed
//
// and everything else (modules, attaching, merging, files, reports) works with it through `AnyMethod`.

namespace lora {

/// What a frozen linear layer computed, as a method sees it.
struct FrozenProduct {
  at::Tensor input;       ///< x (..., in)
  at::Tensor output;      ///< x W^T + b (..., out)
  at::Tensor weight;      ///< W (out, in)
  at::Tensor bias;        ///< b (out), undefined when `output` carries none
  bool training = false;  ///< whether dropout acts
};

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
  /// Allocates the tensors for a weight of shape (out, in); they require gradients and have no values yet.
  MethodOf(const LoRAOptions& options, int64_t out, int64_t in, const at::TensorOptions& tensor_options)
      : value(options) {
    value.allocate(out, in, tensor_options);
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

  std::shared_ptr<AnyMethod> make(const LoRAOptions& options, int64_t out, int64_t in,
                                  const at::TensorOptions& tensor_options) const {
    return make_(options, out, in, tensor_options);
  }

 private:
  template <class M>
  struct Type {};

  template <class M>
  explicit MethodKind(Type<M>)
      : info_(&M::info),
        make_([](const LoRAOptions& options, int64_t out, int64_t in,
                 const at::TensorOptions& tensor_options) -> std::shared_ptr<AnyMethod> {
          return std::make_shared<MethodOf<M>>(options, out, in, tensor_options);
        }) {}

  const MethodInfo* info_;
  std::shared_ptr<AnyMethod> (*make_)(const LoRAOptions&, int64_t, int64_t, const at::TensorOptions&);
};

/// The type in which an adapter of a `base` weight is kept: float for half precision and below, else the weight's own.
inline at::ScalarType adapter_dtype(at::ScalarType base) { return base == at::kDouble ? at::kDouble : at::kFloat; }

}  // namespace lora
