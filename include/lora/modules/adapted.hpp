#pragma once

#include <torch/nn/cloneable.h>

#include <lora/layers/adaptable.hpp>
#include <lora/adapter/merge.hpp>
#include <lora/method/all.hpp>
#include <lora/version.hpp>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// What all layers written with the library have in common: a frozen weight and bias, one adapter of their own, and the
/// verbs of merging. `Derived` offers
///
///   options                         with `adapter()`, the LoRAOptions
///   static constexpr const char* kName = "LoRALinear", *kKind = "Linear";
///   static constexpr detail::Use kUse;    what the layer does with its weight
///   MatrixView view() const;              how its weight is seen as a matrix
///   FileLayout files() const;             how its adapter is kept in files
///
/// and calls `build` from `reset`. The layer's own adapter acts in every forward pass. Inside a scope of `Adapters`
/// that has this layer, the scope decides instead; and what is merged is in the weight and not added again.
template <class Derived, class Method>
class AdaptedModule : public torch::nn::Cloneable<Derived>, public AdaptableModule {
 public:
  /// The name of the layer's own adapter.
  static constexpr const char* kAdapter = "default";

  /// Folds the update into `weight`; the weight as it was is kept. Throws, with nothing changed, when it is not finite.
  void merge() {
    TORCH_CHECK(!is_merged(), "lora::merge: this ", Derived::kName, " is merged already");
    detail::merge(targets(Derived::kName), {kAdapter});
  }

  /// Brings back the weight from before `merge`, bit by bit.
  void unmerge() {
    TORCH_CHECK(is_merged(), "lora::unmerge: this ", Derived::kName, " is not merged");
    detail::unmerge(targets(Derived::kName));
  }

  bool is_merged() const { return site_->is_merged(); }

  /// Copies the layer; the copy is frozen and merged where this one is.
  std::shared_ptr<torch::nn::Module> clone(const std::optional<torch::Device>& device = std::nullopt) const override {
    auto copy = torch::nn::Cloneable<Derived>::clone(device);
    AdaptedModule& layer = *copy->template as<Derived>();
    layer.method().scaling = method().scaling;
    layer.site_->copy_merged(*site_, detail::MemberSlot(layer, layer.weight, "weight"));
    return copy;
  }

  /// Writes the layer as any module is written. Throws when it is merged: the file would hold the merged weight and the
  /// adapter too, and whoever loads it would add the update a second time.
  void save(torch::serialize::OutputArchive& archive) const override {
    TORCH_CHECK(!is_merged(), "lora::", Derived::kName, ": a merged layer cannot be saved; unmerge it first");
    torch::nn::Module::save(archive);
  }
  void load(torch::serialize::InputArchive& archive) override {
    TORCH_CHECK(!is_merged(), "lora::", Derived::kName,
                ": nothing can be loaded into a merged layer; unmerge it first");
    torch::nn::Module::load(archive);
  }

  /// The layer as `Adapters` see it, under the name that it has in a model.
  std::vector<Target> targets(const std::string& name) override {
    auto slot = std::make_shared<detail::MemberSlot>(*this, weight, "weight");
    const auto self = this->weak_from_this().lock();
    const auto training = [self, layer = this] { return layer->is_training(); };
    return {{name, name, Derived::kKind, training, std::move(slot), site_, Derived::kUse, derived().files()}};
  }

  /// The method with its tensors.
  Method& method() const { return method_->value; }
  /// s: alpha / rank.
  double scaling() const { return method().scaling; }
  at::Tensor& lora_A() const { return method().lora_A; }
  at::Tensor& lora_B() const { return method().lora_B; }

  at::Tensor weight, bias;

 protected:
  /// Registers the frozen tensors and a new, uninitialized adapter for them.
  void build(const at::Tensor& frozen_weight, const at::Tensor& frozen_bias) {
    frozen_weight.requires_grad_(false);
    if (frozen_bias.defined()) frozen_bias.requires_grad_(false);
    weight = this->register_parameter("weight", frozen_weight, /*requires_grad=*/false);
    bias = this->register_parameter("bias", frozen_bias, /*requires_grad=*/false);
    site_ = std::make_shared<Site>(derived().view());
    method_ = std::make_shared<MethodOf<Method>>(derived().options.adapter(), site_->view().shape(),
                                                 weight.options().dtype(adapter_dtype(weight.scalar_type())));
    for (const auto& item : method_->tensors()) *item.tensor = this->register_parameter(item.name, *item.tensor);
    site_->add(kAdapter, method_);
  }

  /// Starts the adapter anew.
  void initialize_adapter() { method().initialize(site_->view().matrix(weight)); }

  /// Whether the layer's own adapter is to be added to what the frozen layer computed.
  bool adds_own() const { return site_->contains(kAdapter) && !is_merged() && !detail::is_in_scope(weight); }

  /// x W'^T + b from x W^T + b.
  at::Tensor add_own(const at::Tensor& x, const at::Tensor& y,
                     std::function<at::Tensor(const at::Tensor&, const at::Tensor&)> multiply = {}) const {
    if (!adds_own()) return y;
    return site_->forward({x, y, site_->view().matrix(weight), bias, this->is_training(), std::move(multiply)},
                          {kAdapter});
  }

  /// W' - W of the layer's own adapter, in the layout of the weight.
  at::Tensor own_delta() const { return site_->delta(weight, {kAdapter}, /*dropout=*/false); }

 private:
  const Derived& derived() const { return static_cast<const Derived&>(*this); }

  std::shared_ptr<MethodOf<Method>> method_;
  std::shared_ptr<Site> site_;
};

}  // namespace LORA_ABI
}  // namespace lora
