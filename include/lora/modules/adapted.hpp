#pragma once

#include <torch/nn/cloneable.h>

#include <lora/adapter/merge.hpp>
#include <lora/functional.hpp>
#include <lora/intercept/in_scope.hpp>
#include <lora/layers/adaptable.hpp>
#include <lora/layers/layer_weight.hpp>
#include <lora/method/bias_update.hpp>
#include <lora/method/low_rank.hpp>
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
///   options                                with `adapter()`, the LoRAOptions
///   static constexpr const char* kName = "LoRALinear", *kKind = "Linear";
///   void describe(LayerWeight&) const;     how its weight is seen as a matrix, and what the layer does with it
///
/// calls `build` from `reset`, and `adapt` from `forward`. The layer's own adapter acts in every forward pass. Inside a
/// scope of `Adapters` that has this layer, the scope decides instead; and what is merged is in the weight and not
/// added again. Merging leaves a layer that was wrapped as it is, and writes into the weight of one that was built from
/// sizes.
template <class Derived, class Method>
class AdaptedModule : public torch::nn::Cloneable<Derived>, public AdaptableModule {
 public:
  /// The name of the layer's own adapter.
  static constexpr const char* kAdapter = "default";

  /// Folds the update into `weight`; the weight as it was is kept. Throws, with nothing changed, when it is not finite.
  void merge() {
    TORCH_CHECK(!is_merged(), "lora::merge: this ", Derived::kName, " is merged already");
    detail::merge(mergings());
  }

  /// Brings back the weight from before `merge`, bit by bit.
  void unmerge() {
    TORCH_CHECK(is_merged(), "lora::unmerge: this ", Derived::kName, " is not merged");
    std::vector<std::shared_ptr<Site>> sites;
    for (const auto& merging : mergings()) sites.push_back(merging.site);
    detail::unmerge(sites);
  }

  bool is_merged() const { return site_->is_merged(); }

  /// What merging would fold in, and where: the weight, and the bias where the method changes that.
  std::vector<detail::Merging> mergings() const {
    std::vector<detail::Merging> all{{site_, {{kAdapter, method_}}}};
    if (changes_bias()) {
      auto update = std::make_shared<MethodOf<detail::BiasUpdate>>(detail::BiasUpdate(method_));
      all.push_back({site_->bias_site(), {{kAdapter, std::move(update)}}});
    }
    return all;
  }

  /// Copies the layer; the copy is frozen and merged where this one is.
  std::shared_ptr<torch::nn::Module> clone(const std::optional<torch::Device>& device = std::nullopt) const override {
    auto copy = torch::nn::Cloneable<Derived>::clone(device);
    AdaptedModule& layer = *copy->template as<Derived>();
    layer.method().scaling = method().scaling;
    const auto from = mergings();
    auto to = layer.mergings();
    for (size_t i = 0; i < from.size(); ++i) to[i].site->copy_merged(*from[i].site, std::move(to[i].methods));
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

  /// The layer as `Adapters` see it; who holds it holds the layer.
  std::vector<std::shared_ptr<Site>> own_sites() override {
    const auto self = this->weak_from_this().lock();
    return {self ? std::shared_ptr<Site>(self, site_.get()) : site_};
  }

  /// The update W' - W, shaped like the weight, in the type of the adapter.
  at::Tensor delta() const {
    const detail::BelowInterception below;
    return site_->view().weight(method_->delta(site_->base()));
  }

  /// The method with its tensors.
  Method& method() const { return method_->value; }
  /// s: alpha / rank.
  double scaling() const { return method().scaling; }
  at::Tensor& lora_A() const { return method().lora_A; }
  at::Tensor& lora_B() const { return method().lora_B; }

  /// LibTorch copies a model by assigning to its layers copies that it lets go of then; so the site, which leads to the
  /// tensors of this very object, is made anew.
  AdaptedModule(const AdaptedModule& other)
      : torch::nn::Cloneable<Derived>(other), AdaptableModule(other), weight(other.weight), bias(other.bias) {
    take_adapter(other);
  }
  AdaptedModule& operator=(const AdaptedModule& other) {
    torch::nn::Cloneable<Derived>::operator=(other);
    weight = other.weight;
    bias = other.bias;
    take_adapter(other);
    return *this;
  }

  at::Tensor weight, bias;

 protected:
  AdaptedModule() = default;

  /// Registers the frozen tensors and a new, uninitialized adapter for them. `is_shared`: whether they are those of a
  /// layer that is wrapped.
  void build(const at::Tensor& frozen_weight, const at::Tensor& frozen_bias, const Method& prototype, bool is_shared) {
    TORCH_CHECK(!detail::is_quantized(frozen_weight) || detail::is_whole_placeholder(frozen_weight),
                "lora::", Derived::kName,
                ": the weight is a part of one that is held in few bits; wrap the layer first, and hold ",
                "the weights of this one in few bits then");
    frozen_weight.requires_grad_(false);
    if (frozen_bias.defined()) frozen_bias.requires_grad_(false);
    weight = this->register_parameter("weight", frozen_weight, /*requires_grad=*/false);
    bias = this->register_parameter("bias", frozen_bias, /*requires_grad=*/false);
    is_shared_ = is_shared;
    site_ = make_site();
    method_ = std::make_shared<MethodOf<Method>>(prototype, derived().options.adapter(), site_->view().shape(),
                                                 weight.options().dtype(adapter_dtype(weight.scalar_type())));
    for (const auto& item : method_->tensors()) {
      *item.tensor = item.is_trained ? this->register_parameter(item.name, *item.tensor)
                                     : this->register_buffer(item.name, *item.tensor);
    }
    site_->set_own(method_);
  }

  /// Starts the adapter anew.
  void initialize_adapter() {
    method_->initialize_shared();
    method_->initialize(site_->base());
  }

  /// y = op(x, W') + b', with the layer's own update where it acts.
  at::Tensor adapt(const at::Tensor& x, Product::Run op, Product::Times times, bool adds = true,
                   Product::Form form = Product::Form::kOther) const {
    if (detail::is_in_scope(weight)) return op(x, weight, bias);  // which the scope intercepts
    if (!is_active()) return Product{x, weight, bias, op, times, adds, form}.frozen();
    const auto base = own_base();
    return adapted_product({x, weight, own_bias(), op, times, adds, form}, own_update(base));
  }

 public:
  /// Whether the layer's own update is to be added: not within a scope that has this layer, and not once it is merged.
  bool acts() const { return is_active() && !detail::is_in_scope(weight); }
  /// Whether the update can be one of several in a product with more weights than this layer's.
  bool joins_products() const { return method_->has_term() && !method_->changes_bias(); }
  /// W as the method sees it, b', and the update itself, for products that are larger than this layer's.
  WeightBase own_base() const { return site_->base(weight); }
  at::Tensor own_bias() const {
    return changes_bias() ? bias + in_type(method_->bias_delta(bias), bias.scalar_type()) : bias;
  }
  Update own_update(const WeightBase& base) const {
    return {method_.get(), &base, detail::whole_part(weight), this->is_training()};
  }

 private:
  /// Whether the layer's own update acts outside of scopes: until it is merged, or its place is taken.
  bool is_active() const { return site_->own() == method_ && !site_->is_in(method_.get()); }
  bool changes_bias() const { return bias.defined() && method_->changes_bias(); }

  const Derived& derived() const { return static_cast<const Derived&>(*this); }

  std::shared_ptr<detail::WeightSlot> slot(at::Tensor& tensor, const char* name) {
    return std::make_shared<detail::MemberSlot>(*this, tensor, name, is_shared_, /*keeps_owner=*/false);
  }

  void take_adapter(const AdaptedModule& other) {
    method_ = other.method_;
    is_shared_ = other.is_shared_;
    if (other.site_) site_ = other.site_->at(slot(weight, "weight"), bias.defined() ? slot(bias, "bias") : nullptr);
  }

  std::shared_ptr<Site> make_site() {
    LayerWeight described;
    described.place = {Derived::kName, Derived::kName, Derived::kKind, slot(weight, "weight")};
    if (bias.defined()) described.place.bias = slot(bias, "bias");
    derived().describe(described);
    return described.site();
  }

  std::shared_ptr<MethodOf<Method>> method_;
  std::shared_ptr<Site> site_;
  bool is_shared_ = false;
};

}  // namespace LORA_ABI
}  // namespace lora
