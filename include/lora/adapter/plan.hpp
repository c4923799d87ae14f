#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include <lora/adapter/adapter.hpp>
#include <lora/model/index.hpp>
#include <lora/selection/selection.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Works out the adapter that a configuration means for a model: its parts, with tensors that have no values yet. The
/// sites are those of `index` where it has them; nothing is changed.
class Planner {
 public:
  Planner(const Model& model, const SiteIndex& index, const LoRAConfig& config, Unmatched unmatched = Unmatched())
      : model_(model), index_(index), config_(config), selection_(model, config, unmatched) {}

  Adapter run() {
    const BelowInterception below;
    adapter_.config = config_;
    for (auto& selected : selection_.run()) add(selected);
    share_tensors();
    const auto layers = adapter_.parts.size();
    const auto full = selection_.full();
    if (!full.empty()) find_layers();
    for (const auto& one : full) add(one, layers);
    for (size_t i = 0; i < layers; ++i) {
      const auto& part = adapter_.parts[i];
      if (part.method->changes_bias() && part.site->place().bias) adapter_.parts.push_back(bias_part(part));
    }
    return std::move(adapter_);
  }

 private:
  void add(Selection::Layer& selected) {
    auto site = known(selected.site);
    const auto weight = site->weight();
    const auto tensor_options = weight.options().dtype(adapter_dtype(weight.scalar_type())).requires_grad(false);
    auto method = config_.method().make(selected.options, site->name(), site->view().shape(), tensor_options);
    const auto name = site->name();
    adapter_.parts.push_back({AdapterPart::Role::kLayer, std::move(site), std::move(method), name,
                              selected.candidate.file_name, selected.module});
  }

  /// What is trained in full, with the values of the model, or zero.
  void add(const FullSelection::Full& full, size_t layers) {
    auto site = known(site_of(full.tensor));
    const auto original = detail::dequantized(site->pristine()).detach();
    const auto& name = full.tensor.place.name;
    if (full.biased.empty()) {
      const bool is_trained = !full.tensor.is_buffer && original.is_floating_point();
      return add_full(std::move(site), FullDelta(original.clone().requires_grad_(is_trained)), name, full.file_name);
    }
    const auto is_it = [&](const AdapterPart& part) { return part.site->name() == full.biased; };
    const auto end = adapter_.parts.begin() + static_cast<std::ptrdiff_t>(layers);
    const auto layer = std::find_if(adapter_.parts.begin(), end, is_it);
    const auto bias = at::zeros_like(original, adapter_dtype(original.scalar_type())).requires_grad_(true);
    add_full(std::move(site), FullDelta(bias, layer->method->scaling()), full.biased + ".lora_B.bias", full.file_name);
  }

  void add_full(std::shared_ptr<Site> site, FullDelta delta, const std::string& name, const std::string& file_name) {
    auto method = std::make_shared<MethodOf<FullDelta>>(std::move(delta));
    adapter_.parts.push_back({AdapterPart::Role::kFull, std::move(site), std::move(method), name, file_name, ""});
  }

  void find_layers() {
    for (const auto& part : model_.parts()) {
      for (const auto& weight : part.weights) layers_.emplace(weight.place.slot->place(), weight);
    }
  }

  /// The site of a tensor, as that of a layer's weight where it is one, so that other adapters can adapt the layer.
  std::shared_ptr<Site> site_of(const LayerWeight& tensor) const {
    const auto layer = layers_.find(tensor.place.slot->place());
    if (layer == layers_.end()) return tensor.site();
    auto weight = layer->second;
    weight.place.tied_to = tensor.place.tied_to;
    return weight.site();
  }

  /// The site as it is known from an earlier adapter, which knows what is merged.
  std::shared_ptr<Site> known(std::shared_ptr<Site> site) const {
    const auto found = index_.find(site->slot());
    if (!found) return site;
    const auto &wanted = site->view(), &view = found->view();
    TORCH_CHECK(wanted.part_rows() == view.part_rows() && wanted.chosen_parts() == view.chosen_parts(),
                "lora::Adapters: \"", found->name(),
                "\" is adapted already, with other parts (`fused`) than are asked for; "
                "all adapters of one layer have the same");
    return found;
  }

  /// Gives the methods one tensor for each that they share, as large as the largest of them needs it.
  void share_tensors() {
    std::map<std::string, at::Tensor> shared;
    for (int pass = 0; pass < 2; ++pass) {
      for (const auto& part : adapter_.parts) {
        for (const auto& item : part.method->tensors()) {
          if (!item.is_shared) continue;
          auto& common = shared[item.name];
          if (pass == 0) {
            common = common.defined() ? larger(common, *item.tensor) : *item.tensor;
          } else {
            *item.tensor = common;
          }
        }
      }
    }
  }

  static at::Tensor larger(const at::Tensor& a, const at::Tensor& b) {
    auto sizes = a.sizes().vec();
    for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = std::max(sizes[i], b.size(static_cast<int64_t>(i)));
    return a.sizes() == sizes ? a : at::empty(sizes, a.options()).requires_grad_(a.requires_grad());
  }

  const Model& model_;
  const SiteIndex& index_;
  const LoRAConfig& config_;
  Selection selection_;
  std::unordered_map<const void*, LayerWeight> layers_;
  Adapter adapter_{LoRAConfig(1), {}};
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
