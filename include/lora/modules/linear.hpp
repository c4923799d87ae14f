#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/functional/linear.h>
#include <torch/nn/init.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <lora/merge.hpp>
#include <lora/method/all.hpp>

namespace lora {

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
class LoRALinearImpl : public torch::nn::Cloneable<LoRALinearImpl<Method>> {
 public:
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
    build(base->weight, base->bias);
    method().initialize(weight);
  }

  void reset() override {
    options.adapter().validate("lora::LoRALinear");
    const auto in = options.in_features(), out = options.out_features();
    TORCH_CHECK_VALUE(in > 0 && out > 0,
                      "lora::LoRALinear: in_features and out_features have to be at least 1, but got ", in, " and ",
                      out);
    const auto like = weight.defined() ? weight.options().requires_grad(false) : at::TensorOptions();
    build(torch::empty({out, in}, like), options.bias() ? torch::empty({out}, like) : at::Tensor());
  }

  /// Fills weight and bias as torch::nn::Linear does, and starts the adapter anew.
  void reset_parameters() {
    torch::nn::init::kaiming_uniform_(weight, std::sqrt(5));
    const auto bound = 1 / std::sqrt(static_cast<double>(options.in_features()));
    if (bias.defined()) torch::nn::init::uniform_(bias, -bound, bound);
    method().initialize(weight);
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
    auto output = torch::nn::functional::linear(input, weight, bias);
    return site_->forward({input, output, weight, bias, this->is_training(), {}}, {kAdapter});
  }

  /// Folds the update into `weight`; the weight as it was is kept. Throws, with nothing changed, when it is not finite.
  void merge() {
    TORCH_CHECK(!is_merged(), "lora::merge: this LoRALinear is merged already");
    detail::merge({target()}, {kAdapter});
  }

  /// Brings back the weight from before `merge`, bit by bit.
  void unmerge() {
    TORCH_CHECK(is_merged(), "lora::unmerge: this LoRALinear is not merged");
    detail::unmerge({target()});
  }

  bool is_merged() const { return site_->is_merged(); }

  /// Copies the layer; the copy is frozen and merged where this one is.
  std::shared_ptr<torch::nn::Module> clone(const std::optional<torch::Device>& device = std::nullopt) const override {
    auto copy = torch::nn::Cloneable<LoRALinearImpl>::clone(device);
    auto& layer = *copy->template as<LoRALinearImpl>();
    layer.method().scaling = method().scaling;
    layer.site_->copy_merged(*site_, *layer.target().slot);
    return copy;
  }

  /// Writes the layer as any module is written. Throws when it is merged: the file would hold the merged weight and the
  /// adapter too, and whoever loads it would add the update a second time.
  void save(torch::serialize::OutputArchive& archive) const override {
    TORCH_CHECK(!is_merged(), "lora::LoRALinear: a merged layer cannot be saved; unmerge it first");
    torch::nn::Module::save(archive);
  }
  void load(torch::serialize::InputArchive& archive) override {
    TORCH_CHECK(!is_merged(), "lora::LoRALinear: nothing can be loaded into a merged layer; unmerge it first");
    torch::nn::Module::load(archive);
  }

  /// The method with its tensors.
  Method& method() const { return method_->value; }
  /// s: alpha / rank.
  double scaling() const { return method().scaling; }
  at::Tensor& lora_A() const { return method().lora_A; }
  at::Tensor& lora_B() const { return method().lora_B; }

  LoRALinearOptions options;
  at::Tensor weight, bias;

 private:
  static constexpr const char* kAdapter = "default";

  /// Registers the frozen tensors and a new, uninitialized adapter for them.
  void build(const at::Tensor& frozen_weight, const at::Tensor& frozen_bias) {
    frozen_weight.requires_grad_(false);
    if (frozen_bias.defined()) frozen_bias.requires_grad_(false);
    weight = this->register_parameter("weight", frozen_weight, /*requires_grad=*/false);
    bias = this->register_parameter("bias", frozen_bias, /*requires_grad=*/false);
    const auto view = MatrixView::plain(weight.sizes());
    method_ = std::make_shared<MethodOf<Method>>(options.adapter(), view.shape(),
                                                 weight.options().dtype(adapter_dtype(weight.scalar_type())));
    for (const auto& item : method_->tensors()) *item.tensor = this->register_parameter(item.name, *item.tensor);
    site_ = std::make_shared<Site>(view);
    site_->add(kAdapter, method_);
  }

  Target target() {
    auto slot = std::make_shared<detail::MemberSlot>(*this, weight, "weight");
    return {"LoRALinear", "", "Linear", {}, std::move(slot), site_};
  }

  std::shared_ptr<MethodOf<Method>> method_;
  std::shared_ptr<Site> site_;
};

/// Holder of `LoRALinearImpl`, like those of LibTorch: `LoRALinear<>` as a member, `LoRALinear layer(base, options)`.
template <class Method = LowRank>
class LoRALinear : public torch::nn::ModuleHolder<LoRALinearImpl<Method>> {
 public:
  using Impl = LoRALinearImpl<Method>;
  using torch::nn::ModuleHolder<Impl>::ModuleHolder;
};

LoRALinear(torch::nn::Linear, LoRAOptions)->LoRALinear<>;

}  // namespace lora
