#pragma once

#include <torch/nn/functional/linear.h>
#include <torch/nn/init.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <lora/modules/adapted.hpp>
#include <lora/version.hpp>

namespace lora {
inline namespace LORA_ABI {

/// Options of a `LoRALinear` that is built from sizes.
struct LoRALinearOptions {
  LoRALinearOptions(int64_t in_features, int64_t out_features, LoRAOptions adapter)
      : in_features_(in_features), out_features_(out_features), adapter_(std::move(adapter)) {}

  /// Size of the last dimension of the input.
  TORCH_ARG(int64_t, in_features);
  /// Size of the last dimension of the output.
  TORCH_ARG(int64_t, out_features);
  /// Rank, alpha, dropout and so on.
  TORCH_ARG(LoRAOptions, adapter);
  /// Whether the frozen layer has a bias. Default: true.
  TORCH_ARG(bool, bias) = true;
};

/// A linear layer with frozen weight and bias and a trainable update, by default a low-rank one:
///
///   y = x W^T + b + (alpha / rank) dropout(x) A^T B^T
///
/// Shapes: input (..., in_features) -> output (..., out_features); weight W (out_features, in_features) and bias b
/// (out_features) frozen, under the names of torch::nn::Linear; lora_A (rank, in_features); lora_B (out_features,
/// rank), zero at first. `Method` is another update, e.g. `LoRALinear<DoRA>`. Errors: c10::ValueError for options out
/// of range; c10::Error when merged twice or when an update is not finite. Reference: Hu et al. 2021, "LoRA: Low-Rank
/// Adaptation of Large Language Models", eq. 3.
template <class Method = LowRank>
class LoRALinearImpl : public AdaptedModule<LoRALinearImpl<Method>, Method> {
 public:
  static constexpr const char *kName = "LoRALinear", *kKind = "Linear";

  /// A new layer, initialized as torch::nn::Linear is.
  explicit LoRALinearImpl(LoRALinearOptions options_) : options(std::move(options_)) {
    reset();
    reset_parameters();
  }

  /// Wraps `base`: weight and bias are shared with it, not copied, and frozen from now on.
  LoRALinearImpl(torch::nn::Linear base, LoRAOptions adapter)
      : options(LoRALinearOptions(base->options.in_features(), base->options.out_features(), std::move(adapter))
                    .bias(base->bias.defined())) {
    options.adapter().validate("lora::LoRALinear");  // before anything of `base` is frozen
    this->build(base->weight, base->bias, Method(), /*is_shared=*/true);
    this->initialize_adapter();
  }

  void reset() override {
    options.adapter().validate("lora::LoRALinear");
    const auto in = options.in_features(), out = options.out_features();
    TORCH_CHECK_VALUE(in > 0 && out > 0,
                      "lora::LoRALinear: in_features and out_features have to be at least 1, but got ", in, " and ",
                      out);
    const auto like = weight.defined() ? weight.options().requires_grad(false) : at::TensorOptions();
    this->build(torch::empty({out, in}, like), options.bias() ? torch::empty({out}, like) : at::Tensor(), Method(),
                /*is_shared=*/false);
  }

  /// Fills weight and bias as torch::nn::Linear does, and starts the adapter anew.
  void reset_parameters() {
    torch::nn::init::kaiming_uniform_(weight, std::sqrt(5));
    const auto bound = 1 / std::sqrt(static_cast<double>(options.in_features()));
    if (bias.defined()) torch::nn::init::uniform_(bias, -bound, bound);
    this->initialize_adapter();
  }

  void pretty_print(std::ostream& stream) const override {
    stream << std::boolalpha << "lora::LoRALinear<" << Method::info.name << ">(in_features=" << options.in_features()
           << ", out_features=" << options.out_features() << ", bias=" << options.bias()
           << ", rank=" << options.adapter().rank() << ", alpha=" << options.adapter().alpha() << ")";
  }

  at::Tensor forward(const at::Tensor& input) {
    TORCH_CHECK(input.dim() > 0 && input.size(-1) == options.in_features(),
                "lora::LoRALinear: the last dimension of the input has to be ", options.in_features(),
                ", but the input has shape ", input.sizes());
    return this->adapt(
        input,
        [](const at::Tensor& x, const at::Tensor& w, const at::Tensor& b) {
          return torch::nn::functional::linear(x, w, b);
        },
        linear_times, /*adds=*/true, Product::Form::kRows);
  }

  void describe(LayerWeight& /*weight*/) const {}  // (out, in), as it is

  using AdaptedModule<LoRALinearImpl, Method>::weight;
  using AdaptedModule<LoRALinearImpl, Method>::bias;

  LoRALinearOptions options;
};

/// Holder of `LoRALinearImpl`, like those of LibTorch: `LoRALinear<>` as a member, `LoRALinear layer(base, options)`.
template <class Method = LowRank>
class LoRALinear : public torch::nn::ModuleHolder<LoRALinearImpl<Method>> {
 public:
  using Impl = LoRALinearImpl<Method>;
  using torch::nn::ModuleHolder<Impl>::ModuleHolder;
};

LoRALinear(torch::nn::Linear, LoRAOptions)->LoRALinear<>;

}  // namespace LORA_ABI
}  // namespace lora
