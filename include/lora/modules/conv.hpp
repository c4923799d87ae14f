#pragma once

#include <ATen/ops/convolution.h>
#include <ATen/ops/pad.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/pimpl.h>

#include <lora/modules/adapted.hpp>
#include <lora/version.hpp>
#include <lora/weight/optional.hpp>

#include <array>
#include <string>
#include <variant>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

template <size_t D>
using StockConv = std::conditional_t<D == 1, torch::nn::Conv1dImpl,
                                     std::conditional_t<D == 2, torch::nn::Conv2dImpl, torch::nn::Conv3dImpl>>;

/// What a stock convolution computes, for any kernel.
template <size_t D>
class Convolution {
 public:
  explicit Convolution(const torch::nn::ConvOptions<D>& options)
      : stride_(*options.stride()), dilation_(*options.dilation()), groups_(options.groups()) {
    for (size_t i = 0; i < D; ++i) {
      const auto total = dilation_[i] * ((*options.kernel_size())[i] - 1);  // what keeps the size
      if (std::holds_alternative<torch::enumtype::kSame>(options.padding())) {
        before_[i] = total / 2;
        after_[i] = total - before_[i];
      } else if (const auto* padding = std::get_if<torch::ExpandingArray<D>>(&options.padding())) {
        before_[i] = after_[i] = (**padding)[i];
      }
    }
    if (std::holds_alternative<torch::enumtype::kReflect>(options.padding_mode())) mode_ = "reflect";
    if (std::holds_alternative<torch::enumtype::kReplicate>(options.padding_mode())) mode_ = "replicate";
    if (std::holds_alternative<torch::enumtype::kCircular>(options.padding_mode())) mode_ = "circular";
  }

  /// conv(x, kernel) + bias for x (batch, in, ...), or (in, ...); the bias may be undefined.
  at::Tensor run(const at::Tensor& x, const at::Tensor& kernel, const at::Tensor& bias) const {
    if (x.dim() == D + 1) return run(x.unsqueeze(0), kernel, bias).squeeze(0);
    const bool inside = before_ == after_ && std::string(mode_) == "constant";  // the operator can pad
    static constexpr std::array<int64_t, D> none{};
    return at::convolution(inside ? x : padded(x), kernel, detail::optional(bias), stride_, inside ? before_ : none,
                           dilation_, /*transposed=*/false, none, groups_);
  }

 private:
  at::Tensor padded(const at::Tensor& x) const {
    std::vector<int64_t> sides;  // of the last dimension first
    for (size_t i = D; i-- > 0;) sides.insert(sides.end(), {before_[i], after_[i]});
    return at::pad(x, sides, mode_);
  }

  std::array<int64_t, D> stride_, dilation_, before_{}, after_{};
  int64_t groups_;
  const char* mode_ = "constant";
};

}  // namespace detail

/// Options of a LoRAConv1d, 2d or 3d: those of the frozen layer, and those of its adapter.
template <size_t D>
struct LoRAConvOptions {
  LoRAConvOptions(torch::nn::ConvOptions<D> conv, LoRAOptions adapter)
      : conv_(std::move(conv)), adapter_(std::move(adapter)) {}

  /// Channels, kernel, stride, padding and its mode, dilation, groups, bias.
  TORCH_ARG(torch::nn::ConvOptions<D>, conv);
  /// Rank, alpha, dropout and so on. The rank has to be a multiple of the groups, among which it is divided.
  TORCH_ARG(LoRAOptions, adapter);
};

/// A convolution with frozen kernel and bias and a trainable update, by default a low-rank one:
///
///   y = conv(x, W) + b + conv(dropout(x), (alpha / rank) B A)
///
/// Shapes: input (batch, in, ...) -> output (batch, out, ...) as for the stock layer; W (out, in / groups, k...) is a
/// matrix (out / groups, in / groups * k) for each group, A (rank / groups, in / groups * k) and B (out / groups, rank
/// / groups); with more than one group, A and B have a first dimension for them. The update is a convolution with the
/// same stride, padding, dilation and groups, so merged equals unmerged for all of them. Without dropout there is one
/// convolution, with W'. In PEFT's files A is (rank, in, k...) and B (out, rank / groups, 1...). Errors: as for
/// LoRALinear. Reference: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3.
template <size_t D, class Method = LowRank>
class LoRAConvImpl : public AdaptedModule<LoRAConvImpl<D, Method>, Method> {
 public:
  static constexpr const char* kName = D == 1 ? "LoRAConv1d" : D == 2 ? "LoRAConv2d" : "LoRAConv3d";
  static constexpr const char* kKind = D == 1 ? "Conv1d" : D == 2 ? "Conv2d" : "Conv3d";

  /// A new layer, initialized as the stock one is.
  explicit LoRAConvImpl(LoRAConvOptions<D> options_) : options(std::move(options_)) { reset(); }
  LoRAConvImpl(torch::nn::ConvOptions<D> conv, LoRAOptions adapter)
      : LoRAConvImpl(LoRAConvOptions<D>(std::move(conv), std::move(adapter))) {}

  /// Wraps `base`, a torch::nn::Conv1d, 2d or 3d: kernel and bias are shared, not copied, and frozen from now on.
  LoRAConvImpl(torch::nn::ModuleHolder<detail::StockConv<D>> base, LoRAOptions adapter)
      : options(options_of(base->options), std::move(adapter)) {
    validate();
    this->build(base->weight, base->bias, Method(), /*is_shared=*/true);
    this->initialize_adapter();
  }

  void reset() override {
    validate();
    const auto like = weight.defined() ? weight.options().requires_grad(false) : at::TensorOptions();
    detail::StockConv<D> fresh(options.conv());  // has the values a stock layer starts with
    fresh.to(like.device(), c10::typeMetaToScalarType(like.dtype()));
    this->build(fresh.weight.detach(), fresh.bias.defined() ? fresh.bias.detach() : at::Tensor(), Method(),
                /*is_shared=*/false);
    this->initialize_adapter();
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "lora::" << kName << "<" << Method::info.name << ">(in_channels=" << options.conv().in_channels()
           << ", out_channels=" << options.conv().out_channels() << ", kernel_size=" << options.conv().kernel_size()
           << ", groups=" << options.conv().groups() << ", rank=" << options.adapter().rank()
           << ", alpha=" << options.adapter().alpha() << ")";
  }

  at::Tensor forward(const at::Tensor& input) {
    const detail::Convolution<D> frozen(options.conv());
    const auto run = [&](const at::Tensor& x, const at::Tensor& kernel, const at::Tensor& b) {
      return frozen.run(x, kernel, b);
    };
    return this->adapt(input, run, linear_times, /*adds=*/false);
  }

  void describe(LayerWeight& described) const {
    described.form = LayerWeight::Form::kKernel;
    described.groups = options.conv().groups();
  }

  using AdaptedModule<LoRAConvImpl, Method>::weight;
  using AdaptedModule<LoRAConvImpl, Method>::bias;

  LoRAConvOptions<D> options;

 private:
  static torch::nn::ConvOptions<D> options_of(const torch::nn::detail::ConvNdOptions<D>& stock) {
    return torch::nn::ConvOptions<D>(stock.in_channels(), stock.out_channels(), stock.kernel_size())
        .stride(stock.stride())
        .padding(stock.padding())
        .dilation(stock.dilation())
        .groups(stock.groups())
        .bias(stock.bias())
        .padding_mode(stock.padding_mode());
  }

  void validate() const {
    options.adapter().validate((std::string("lora::") + kName).c_str());
    const auto rank = options.adapter().rank(), groups = options.conv().groups();
    TORCH_CHECK_VALUE(groups > 0 && rank % groups == 0, "lora::", kName, ": the rank is divided among the groups, so ",
                      "it has to be a multiple of their number, but rank is ", rank, " and groups ", groups);
  }
};

#define LORA_CONV(D)                                                                            \
  template <class Method = LowRank>                                                             \
  class LoRAConv##D##d : public torch::nn::ModuleHolder<LoRAConvImpl<D, Method>> {              \
   public:                                                                                      \
    using Impl = LoRAConvImpl<D, Method>;                                                       \
    using torch::nn::ModuleHolder<Impl>::ModuleHolder;                                          \
  };                                                                                            \
  LoRAConv##D##d(torch::nn::ModuleHolder<detail::StockConv<D>>, LoRAOptions)->LoRAConv##D##d<>; \
  LoRAConv##D##d(torch::nn::ConvOptions<D>, LoRAOptions)->LoRAConv##D##d<>

/// Holders of `LoRAConvImpl` for one, two and three dimensions.
LORA_CONV(1);
LORA_CONV(2);
LORA_CONV(3);
#undef LORA_CONV

}  // namespace LORA_ABI
}  // namespace lora
