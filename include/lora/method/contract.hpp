#pragma once

#include <ATen/core/grad_mode.h>
#include <c10/core/TensorOptions.h>
#include <ATen/ops/empty.h>

#include <lora/method/term.hpp>
#include <lora/options.hpp>
#include <lora/version.hpp>

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

// A method is the mathematics of one update, and nothing else: it knows no module, no file and no model. It is a struct
// that inherits `Method` and offers
//
//   static constexpr MethodInfo info;                what it is called, here and in PEFT's configuration
//   std::vector<MethodField<M>> fields() const;      its tensors, as data: name, axes, trained or not, shared or not
//   void initialize(const Base& base);               their first values; the layer starts as the frozen one
//
// and what it does to a weight W (out, in), in one of two ways:
//
//   Term term(const Base& base) const;               W' = diag(gain) (W + scale B A) diag(input_gain)
//   at::Tensor delta(const Base& base) const;        W' - W, differentiable, for everything else
//
// Beside `delta` a method may have `at::Tensor forward(const Product&) const`, which computes x W'^T + b in a cheaper
// way than by forming W'. One whose first values are taken from W has `void follow(const Base&)`, which takes them anew
// when W gets other values before anything is trained. Further hooks are in `Method`. Everything else (modules,
// attaching, merging, several adapters, files, reports) works with the method through `AnyMethod`. A method of a user's
// own:
//
//   struct Shift : lora::Method {                    // W' = W + v 1^T
//     static constexpr lora::MethodInfo info{"Shift", "SHIFT"};
//     std::vector<lora::MethodField<Shift>> fields() const { return {{"shift_v", &Shift::v, {lora::kOut}}}; }
//     void initialize(const lora::Base&) { v.zero_(); }
//     at::Tensor delta(const lora::Base& base) const { return v.unsqueeze(-1).expand({-1, base.shape().in}); }
//     at::Tensor v;
//   };
//   lora::register_method(Shift());                  // for files; in the way of all_methods()

namespace lora {
inline namespace LORA_ABI {

/// One dimension of a method's tensor: the rank, the inputs or outputs of the weight, or a size of its own.
struct Axis {
  enum class Kind : uint8_t { kRank, kIn, kOut, kOwn };

  /* implicit */ constexpr Axis(int64_t own_size) : kind(Kind::kOwn), size(own_size) {}
  /* implicit */ constexpr Axis(Kind of_kind) : kind(of_kind), size(0) {}

  Kind kind;
  int64_t size;
};

inline constexpr Axis kRank{Axis::Kind::kRank}, kIn{Axis::Kind::kIn}, kOut{Axis::Kind::kOut};

/// How a method is named, and which options of LoRAConfig it has under which names in PEFT's configuration.
struct MethodInfo {
  std::string_view name;                             ///< "LowRank"
  std::string_view peft_type = "LORA";               ///< "peft_type" in adapter_config.json
  std::string_view peft_flag = {};                   ///< the boolean there that selects it, if any: "use_dora"
  std::string_view rank_name = "r";                  ///< of `rank`; empty for a method without
  std::string_view alpha_name = "lora_alpha";        ///< of `alpha`; empty for a method that is not scaled
  std::string_view dropout_name = "lora_dropout";    ///< of `dropout`; empty for a method without
  std::string_view init_name = "init_lora_weights";  ///< of the flag that says it started as usual
  int64_t peft_rank = 8;                             ///< PEFT's default for the rank
  /// The other options of LoRAConfig that PEFT's configuration of this type has, with blanks between them; empty for
  /// all that a LoRA has.
  std::string_view peft_fields = {};
};

/// One tensor of method M. For a batch of matrices each has one, unless it is shared.
template <class M>
struct MethodField {
  std::string_view name;              ///< "lora_A"
  at::Tensor M::*tensor;              ///< where it is
  std::vector<Axis> axes;             ///< {kRank, kIn}
  std::string_view file_suffix = "";  ///< what PEFT appends to the name in files: ".weight" or nothing
  bool is_trained = true;
  /// Whether all layers of an adapter have this one tensor, as large as the largest of them needs it.
  bool is_shared = false;
  /// Whether files hold it; what they do not hold is computed anew (`initialize_shared`).
  bool is_saved = true;
};

/// One option that a method M has of its own, and its name in PEFT's configuration.
template <class M>
struct MethodOption {
  std::string_view name;
  std::variant<bool M::*, int64_t M::*, double M::*, std::vector<std::string> M::*> value;
};

/// The value of such an option.
using OptionValue = std::variant<bool, int64_t, double, std::vector<std::string>>;

/// What every method has.
struct Method {
  LoRAOptions options = 8;  ///< rank, dropout and so on; set before the tensors are made
  MatrixShape shape;        ///< of the weight; likewise
  double scaling = 1;       ///< for reports, and for methods that are scaled by alpha / rank

  /// Whether `follow` is to be called, for a method that has it.
  bool follows() const { return true; }
};

/// One tensor of a method, whatever its type.
struct NamedTensor {
  std::string name;
  std::string file_name;  ///< name and suffix in PEFT's files
  at::Tensor* tensor;
  bool is_trained = true;
  bool is_shared = false;
  bool is_saved = true;
};

namespace detail {

template <class M, class = void>
struct HasTerm : std::false_type {};
template <class M>
struct HasTerm<M, std::void_t<decltype(std::declval<const M&>().term(std::declval<const Base&>()))>> : std::true_type {
};
template <class M, class = void>
struct HasForward : std::false_type {};
template <class M>
struct HasForward<M, std::void_t<decltype(std::declval<const M&>().forward(std::declval<const Product&>()))>>
    : std::true_type {};
template <class M, class = void>
struct HasBiasDelta : std::false_type {};
template <class M>
struct HasBiasDelta<M, std::void_t<decltype(std::declval<const M&>().bias_delta(at::Tensor()))>> : std::true_type {};
template <class M, class = void>
struct HasForLayer : std::false_type {};
template <class M>
struct HasForLayer<M, std::void_t<decltype(std::declval<const M&>().for_layer(std::string()))>> : std::true_type {};
template <class M, class = void>
struct HasSharedStart : std::false_type {};
template <class M>
struct HasSharedStart<M, std::void_t<decltype(std::declval<M&>().initialize_shared())>> : std::true_type {};
template <class M, class = void>
struct HasOptions : std::false_type {};
template <class M>
struct HasOptions<M, std::void_t<decltype(M::peft_options())>> : std::true_type {};
template <class M, class = void>
struct HasFollow : std::false_type {};
template <class M>
struct HasFollow<M, std::void_t<decltype(std::declval<M&>().follow(std::declval<const Base&>()))>> : std::true_type {};
template <class M, class = void>
struct HasReplacement : std::false_type {};
template <class M>
struct HasReplacement<M, std::void_t<decltype(std::declval<const M&>().replacement(at::Tensor()))>> : std::true_type {};

}  // namespace detail

/// A method whose type is not known: what an adapter holds.
class AnyMethod {
 public:
  virtual ~AnyMethod() = default;

  virtual const MethodInfo& info() const = 0;
  virtual const LoRAOptions& options() const = 0;
  virtual double scaling() const = 0;
  virtual std::vector<NamedTensor> tensors() = 0;
  /// What the names of its tensors begin with: "lora_".
  virtual std::string tensor_prefix() const = 0;
  virtual void initialize(const Base& base) = 0;
  /// Gives the shared tensors their first values.
  virtual void initialize_shared() = 0;
  /// Whether some of the first values are taken from the weight; and takes these anew.
  virtual bool follows() const = 0;
  virtual void follow(const Base& base) = 0;

  /// Whether its update is a term.
  virtual bool has_term() const = 0;
  virtual Term term(const Base& base) const = 0;
  /// W' - W, shaped like W.
  virtual at::Tensor delta(const Base& base) const = 0;
  /// Whether it computes x W'^T + b by itself.
  virtual bool has_forward() const = 0;
  virtual at::Tensor forward(const Product& product) const = 0;
  /// Whether it changes the bias of the layer, too; and b' - b.
  virtual bool changes_bias() const = 0;
  virtual at::Tensor bias_delta(const at::Tensor& bias) const = 0;
  /// Whether a tensor of its own stands in for the layer's, and that one, in the layout and type of `weight`.
  virtual bool replaces() const = 0;
  virtual at::Tensor replacement(const at::Tensor& weight) const = 0;

  /// The method's own options under PEFT's names.
  virtual std::vector<std::pair<std::string_view, OptionValue>> own_options() const = 0;
  /// Sets one of them; false where there is none of that name and type.
  virtual bool set_option(std::string_view name, const OptionValue& value) = 0;

  /// A method of the same kind and options of its own, with tensors that require gradients and have no values yet.
  virtual std::shared_ptr<AnyMethod> make(const LoRAOptions& options, const std::string& layer,
                                          const MatrixShape& shape, const at::TensorOptions& tensor_options) const = 0;
  virtual std::shared_ptr<AnyMethod> copy() const = 0;
};

/// `AnyMethod` for the method struct M; `value` is the struct itself.
template <class M>
class MethodOf final : public AnyMethod {
 public:
  explicit MethodOf(M method) : value(std::move(method)) {}

  /// With tensors for a weight of that shape.
  MethodOf(M prototype, const LoRAOptions& options, const MatrixShape& shape, const at::TensorOptions& tensor_options)
      : value(std::move(prototype)) {
    value.options = options;
    value.shape = shape;
    if (!M::info.alpha_name.empty()) value.scaling = options.scaling();
    for (auto& field : value.fields()) {
      at::DimVector sizes = field.is_shared ? at::DimVector() : shape.batch;
      for (const auto& axis : field.axes) sizes.push_back(size(axis));
      value.*field.tensor = at::empty(sizes, tensor_options).requires_grad_(field.is_trained);
    }
  }
  MethodOf(const LoRAOptions& options, const MatrixShape& shape, const at::TensorOptions& tensor_options)
      : MethodOf(M(), options, shape, tensor_options) {}

  const MethodInfo& info() const override { return M::info; }
  const LoRAOptions& options() const override { return value.options; }
  double scaling() const override { return value.scaling; }

  std::vector<NamedTensor> tensors() override {
    std::vector<NamedTensor> all;
    for (auto& field : value.fields()) {
      const std::string name(field.name);
      all.push_back({name, name + std::string(field.file_suffix), &(value.*field.tensor), field.is_trained,
                     field.is_shared, field.is_saved});
    }
    return all;
  }

  std::string tensor_prefix() const override {
    const auto fields = value.fields();
    const std::string name(fields.empty() ? "" : fields.front().name);
    return name.substr(0, name.find('_') + 1);
  }

  void initialize(const Base& base) override {
    at::NoGradGuard no_grad;
    value.initialize(base);
  }
  void initialize_shared() override {
    at::NoGradGuard no_grad;
    if constexpr (detail::HasSharedStart<M>::value) value.initialize_shared();
  }

  bool follows() const override { return detail::HasFollow<M>::value && value.follows(); }
  void follow(const Base& base) override {
    at::NoGradGuard no_grad;
    if constexpr (detail::HasFollow<M>::value) value.follow(base);
  }

  bool has_term() const override { return detail::HasTerm<M>::value; }
  Term term(const Base& base) const override {
    if constexpr (detail::HasTerm<M>::value) return value.term(base);
    TORCH_INTERNAL_ASSERT(false, "a method without terms was asked for one");
  }
  at::Tensor delta(const Base& base) const override {
    if constexpr (detail::HasTerm<M>::value) {
      return value.term(base).delta(base);
    } else {
      return value.delta(base);
    }
  }
  bool has_forward() const override { return detail::HasForward<M>::value; }
  at::Tensor forward(const Product& product) const override {
    if constexpr (detail::HasForward<M>::value) return value.forward(product);
    return {};
  }
  bool changes_bias() const override {
    if constexpr (detail::HasBiasDelta<M>::value) return value.changes_bias();
    return false;
  }
  at::Tensor bias_delta(const at::Tensor& bias) const override {
    if constexpr (detail::HasBiasDelta<M>::value) return value.bias_delta(bias);
    return {};
  }
  bool replaces() const override { return detail::HasReplacement<M>::value; }
  at::Tensor replacement(const at::Tensor& weight) const override {
    if constexpr (detail::HasReplacement<M>::value) return value.replacement(weight);
    return {};
  }

  std::vector<std::pair<std::string_view, OptionValue>> own_options() const override {
    std::vector<std::pair<std::string_view, OptionValue>> all;
    if constexpr (detail::HasOptions<M>::value) {
      for (const auto& option : M::peft_options())
        all.emplace_back(option.name,
                         std::visit([&](auto member) { return OptionValue(value.*member); }, option.value));
    }
    return all;
  }

  bool set_option(std::string_view name, const OptionValue& wanted) override {
    if constexpr (detail::HasOptions<M>::value) {
      for (const auto& option : M::peft_options()) {
        if (option.name == name)
          return std::visit([&](auto member) { return assign(value.*member, wanted); }, option.value);
      }
    }
    return false;
  }

  std::shared_ptr<AnyMethod> make(const LoRAOptions& options, const std::string& layer, const MatrixShape& shape,
                                  const at::TensorOptions& tensor_options) const override {
    auto prototype = value;
    if constexpr (detail::HasForLayer<M>::value) prototype = value.for_layer(layer);
    return std::make_shared<MethodOf>(std::move(prototype), options, shape, tensor_options);
  }
  std::shared_ptr<AnyMethod> copy() const override { return std::make_shared<MethodOf>(value); }

  M value;

 private:
  int64_t size(const Axis& axis) const {
    switch (axis.kind) {
      case Axis::Kind::kRank:
        return value.options.rank() / value.shape.rank_shares;
      case Axis::Kind::kIn:
        return value.shape.in;
      case Axis::Kind::kOut:
        return value.shape.out;
      default:
        return axis.size;
    }
  }

  /// Whole numbers are taken where real ones are wanted.
  template <class T>
  static bool assign(T& option, const OptionValue& wanted) {
    if (const auto* same = std::get_if<T>(&wanted)) return option = *same, true;
    if constexpr (std::is_same_v<T, double>) {
      if (const auto* whole = std::get_if<int64_t>(&wanted)) return option = static_cast<double>(*whole), true;
    }
    return false;
  }
};

/// A method as a value of a configuration: `LoRAConfig(8).method(lora::VeRA().d_initial(0.2))`. Its own options count;
/// rank, alpha and all else are the configuration's.
class MethodKind {
 public:
  template <class M, class = decltype(M::info)>
  /* implicit */ MethodKind(const M& prototype) : prototype_(std::make_shared<MethodOf<M>>(prototype)) {}
  explicit MethodKind(std::shared_ptr<const AnyMethod> prototype) : prototype_(std::move(prototype)) {}

  const MethodInfo& info() const { return prototype_->info(); }
  const AnyMethod& prototype() const { return *prototype_; }

  std::shared_ptr<AnyMethod> make(const LoRAOptions& options, const std::string& layer, const MatrixShape& shape,
                                  const at::TensorOptions& tensor_options) const {
    return prototype_->make(options, layer, shape, tensor_options);
  }

 private:
  std::shared_ptr<const AnyMethod> prototype_;
};

}  // namespace LORA_ABI
}  // namespace lora
