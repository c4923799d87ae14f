#pragma once

#include <lora/detail/interception.hpp>
#include <lora/layers/target.hpp>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace lora {

/// One layer of a model together with the count of forward passes that used its adapters.
struct AdaptedLayer {
  explicit AdaptedLayer(Target target) : target(std::move(target)) {}

  Target target;
  std::atomic<int64_t> uses{0};
};

/// While it lives, forward passes on this thread use the adapters it names; leaving it restores the thread exactly.
/// Made by `Adapters::activate`. Scopes nest: of several scopes of the same adapters the innermost decides, those of
/// different `Adapters` add up. Weights are looked up when the scope opens.
class [[nodiscard]] Activation {
 public:
  Activation(const void* owner, const std::vector<std::shared_ptr<AdaptedLayer>>& layers,
             std::vector<std::string> adapters)
      : adapters_(std::move(adapters)), table_(build(layers)), interception_(owner, table_) {}

 private:
  /// Applies the scope's adapters to the products with one layer's weight.
  class Handler final : public detail::ProductHandler {
   public:
    Handler(std::shared_ptr<AdaptedLayer> layer, const std::vector<std::string>& adapters)
        : layer_(std::move(layer)), adapters_(adapters) {}

    at::Tensor adapt(const at::Tensor& x, const at::Tensor& y, const at::Tensor& bias, detail::Rows rows) override {
      const auto& target = layer_->target;
      layer_->uses.fetch_add(1, std::memory_order_relaxed);
      const auto& weight = target.slot.read();
      FrozenProduct product{x, y, weight, bias, target.module->is_training()};
      if (rows.count == weight.size(0)) return target.site->forward(product, adapters_);
      return target.site->forward_rows(product, weight, rows.first, rows.count, adapters_);
    }

   private:
    std::shared_ptr<AdaptedLayer> layer_;
    const std::vector<std::string>& adapters_;
  };

  detail::WeightTable build(const std::vector<std::shared_ptr<AdaptedLayer>>& layers) {
    detail::WeightTable table;
    for (const auto& layer : layers) {
      const auto& site = *layer->target.site;
      if (std::none_of(adapters_.begin(), adapters_.end(), [&](auto& name) { return site.contains(name); })) continue;
      handlers_.push_back(std::make_unique<Handler>(layer, adapters_));
      table.add(layer->target.slot.read(), *handlers_.back());
    }
    return table;
  }

  std::vector<std::string> adapters_;
  std::vector<std::unique_ptr<Handler>> handlers_;
  detail::WeightTable table_;
  detail::Interception interception_;
};

}  // namespace lora
