#pragma once

#include <ATen/core/grad_mode.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/api/include/torch/ordered_dict.h>

#include <lora/version.hpp>
#include <lora/weight/slot.hpp>
#include <lora/weight/view.hpp>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// One adaptable weight W: the named adapters on it, and the only implementation of merging.
///
/// A site does not know where its weight lives; whoever owns it (a module, or an attached model) passes the slot.
/// Merging computes W' = W + sum of the updates in float (double for double weights), rounds once to the type of W, and
/// puts W' in place of W, which is kept as it is: unmerging brings back the very same tensor.
class Site {
 public:
  explicit Site(MatrixView view) : view_(std::move(view)) {}

  /// How the weight is seen as a matrix.
  const MatrixView& view() const { return view_; }

  void add(const std::string& adapter, std::shared_ptr<AnyMethod> method) {
    methods_.insert(adapter, std::move(method));
  }
  void remove(const std::string& adapter) { methods_.erase(adapter); }
  bool contains(const std::string& adapter) const { return methods_.contains(adapter); }
  AnyMethod& at(const std::string& adapter) const { return *methods_[adapter]; }

  /// The tensors of all adapters.
  std::vector<at::Tensor> tensors() const {
    std::vector<at::Tensor> all;
    for (const auto& method : methods_) {
      for (const auto& item : method.value()->tensors()) all.push_back(*item.tensor);
    }
    return all;
  }

  /// The output of the frozen layer with the updates of `adapters` added; those that are merged, or that are not on
  /// this weight, change nothing.
  at::Tensor forward(const FrozenProduct& product, const std::vector<std::string>& adapters) const {
    auto output = product.output;
    int64_t applied = 0;
    for (const auto& adapter : adapters) {
      const auto* method = acting(adapter);
      if (method == nullptr) continue;
      auto updated = method->forward(product);
      output = applied++ == 0 ? updated : output + (updated - product.output);
    }
    return output;
  }

  /// W' - W in the layout of the weight and the type of the adapters, for operators that take a weight whole; undefined
  /// when none of `adapters` acts. With `dropout`, whole input features are dropped, each with the adapter's
  /// probability: A diag(mask / (1 - p)) in place of A.
  at::Tensor delta(const at::Tensor& weight, const std::vector<std::string>& adapters, bool dropout) const {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    at::Tensor sum;
    for (const auto& adapter : adapters) {
      const auto* method = acting(adapter);
      if (method == nullptr) continue;
      auto delta = method->delta(view_.matrix(weight));
      const auto probability = method->options().dropout();
      if (dropout && probability > 0 && !view_.shape().is_lookup)
        delta = delta * at::dropout(at::ones({view_.shape().in}, delta.options()), probability, /*train=*/true);
      sum = sum.defined() ? sum + delta : delta;
    }
    return sum.defined() ? view_.weight(sum) : sum;
  }

  /// The largest probability of dropout among `adapters`, 0 when none acts.
  double dropout(const std::vector<std::string>& adapters) const {
    double largest = 0;
    for (const auto& adapter : adapters) {
      if (const auto* method = acting(adapter)) largest = std::max(largest, method->options().dropout());
    }
    return view_.shape().is_lookup ? 0 : largest;
  }

  /// W' for `adapters`, not put in place. Throws, naming `layer`, when an update or W' is not finite.
  at::Tensor merged_weight(const at::Tensor& weight, const std::vector<std::string>& adapters,
                           const std::string& layer) const {
    at::NoGradGuard no_grad;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    auto sum = weight.to(adapter_dtype(weight.scalar_type()));
    for (const auto& adapter : adapters) {
      if (!contains(adapter)) continue;
      auto delta = at(adapter).delta(view_.matrix(weight));
      check_finite(delta, layer, "the update of adapter \"" + adapter + "\" is not finite (NaN or infinity)");
      sum = sum + view_.weight(delta);
    }
    auto merged = sum.to(weight.scalar_type());
    check_finite(merged, layer, "the merged weight does not fit into its type, or the weight itself is not finite");
    return merged;
  }

  bool is_merged() const { return merged_.has_value(); }

  /// Puts `merged` in place of the weight in `slot`, which is kept for `unmerge`.
  void merge(const detail::WeightSlot& slot, at::Tensor merged, std::vector<std::string> adapters) {
    auto pristine = slot.handles();
    slot.set({merged, merged});
    merged_ = Merged{std::move(pristine), std::move(merged), std::move(adapters)};
  }

  /// Whether the slot still holds what `merge` put there.
  bool can_unmerge(const detail::WeightSlot& slot) const { return slot.holds(merged_->weight); }

  /// Puts the kept weight back. When the module was moved to another device or type meanwhile, the weight follows.
  void unmerge(const detail::WeightSlot& slot) {
    detail::put_back(slot, merged_->pristine);
    merged_.reset();
  }

  /// Forgets the kept weight, but for its requires_grad: what is merged stays for good.
  void keep_merged(const detail::WeightSlot& slot) {
    slot.keep(merged_->pristine);
    merged_.reset();
  }

  /// The weight as it is without any merged update, also of a model that was moved since it was merged.
  at::Tensor pristine(const detail::WeightSlot& slot) const {
    const auto weight = slot.read();
    return merged_ ? merged_->pristine.member.to(weight.device(), weight.scalar_type()) : weight;
  }

  /// Takes over from `other` that the weight in `slot`, a copy of the other's, is a merged one.
  void copy_merged(const Site& other, const detail::WeightSlot& slot) {
    at::NoGradGuard no_grad;
    if (!other.merged_) return;
    auto pristine = other.merged_->pristine.member.to(slot.read().device(), slot.read().scalar_type(), false, true);
    merged_ = Merged{{pristine, pristine}, slot.read(), other.merged_->adapters};
  }

 private:
  struct Merged {
    detail::WeightSlot::Handles pristine;
    at::Tensor weight;
    std::vector<std::string> adapters;
  };

  /// The adapter's method, unless it is not on this weight or is in it already.
  const AnyMethod* acting(const std::string& adapter) const {
    const auto* method = methods_.find(adapter);
    const auto is_in = [&](const Merged& merged) {
      return std::find(merged.adapters.begin(), merged.adapters.end(), adapter) != merged.adapters.end();
    };
    return method == nullptr || (merged_ && is_in(*merged_)) ? nullptr : method->get();
  }

  static void check_finite(const at::Tensor& tensor, const std::string& layer, const std::string& what) {
    TORCH_CHECK(at::isfinite(tensor).all().item<bool>(), "lora::merge: ", layer, ": ", what, "; nothing was merged");
  }

  MatrixView view_;
  torch::OrderedDict<std::string, std::shared_ptr<AnyMethod>> methods_;
  std::optional<Merged> merged_;
};

}  // namespace LORA_ABI
}  // namespace lora
