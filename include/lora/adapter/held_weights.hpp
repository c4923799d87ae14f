#pragma once

#include <lora/adapter/adapter.hpp>
#include <lora/adapter/loftq.hpp>
#include <lora/adapter/merge.hpp>
#include <lora/config.hpp>
#include <lora/intercept/scope.hpp>
#include <lora/version.hpp>
#include <lora/weight/rounding_error.hpp>

#include <memory>
#include <set>
#include <utility>
#include <vector>

// Weights that are going to be held in few bits. All of them are packed before any is changed, so that what fails
// leaves a model as it was.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// A weight, and what it is going to be held as.
struct HeldWeight {
  std::shared_ptr<Site> site;
  std::shared_ptr<const QuantizedWeight> packed;
};

using HeldWeights = std::vector<HeldWeight>;

inline void hold(const HeldWeights& weights) {
  for (const auto& [site, packed] : weights) site->hold(packed);
}

/// One weight. Throws as `Site::packed` does, and inside of a scope that adapts it.
inline HeldWeight packed(std::shared_ptr<Site> site, const Quantization& scheme, const SeenInputs* seen = nullptr) {
  check_memory_stays(site->weight());
  auto weight = site->packed(scheme, seen);
  return {std::move(site), std::move(weight)};
}

/// Those of the layers that an adapter adapts, and that have their numbers.
inline HeldWeights packed(const Adapter& adapter, const Quantization& scheme) {
  HeldWeights weights;
  for (const auto& part : adapter.parts) {
    if (part.role == AdapterPart::Role::kLayer && !part.site->is_held()) weights.push_back(packed(part.site, scheme));
  }
  return weights;
}

/// Throws for steps of LoftQ that a configuration cannot mean.
inline void check_loftq(const LoRAConfig& config) {
  const auto steps = config.loftq();
  TORCH_CHECK_VALUE(steps >= 0, "lora::LoRAConfig: loftq has to be at least 0, but got ", steps);
  TORCH_CHECK_VALUE(steps == 0 || config.quantize(),
                    "lora::LoRAConfig: loftq starts with what few bits lose, and needs ", "`quantize`");
  TORCH_CHECK_VALUE(steps == 0 || config.alpha() != 0, "lora::LoRAConfig: loftq cannot start an update that alpha = 0 ",
                    "takes away");
}

/// The same layers, of which LoftQ starts A and B.
inline HeldWeights packed_by_loftq(const Adapter& adapter, const Quantization& scheme) {
  HeldWeights weights;
  for (const auto& part : adapter.parts) {
    if (part.role != AdapterPart::Role::kLayer) continue;
    auto& method = loftq_method(part);
    const auto& site = part.site;
    TORCH_CHECK(!site->is_held(), "lora::LoRAConfig: loftq starts with the numbers of the weights, but those of \"",
                site->name(), "\" are held in few bits already");
    check_memory_stays(site->weight());
    site->check_quantizable();
    weights.push_back({site, loftq(*site, method, scheme, adapter.config.loftq())});
  }
  return weights;
}

/// The layers of an adapter with its updates merged in; what that loses is added to `error`. Where they are merged
/// already, as they are. Throws, too, for what is merged beside the layers, when its update is not finite.
inline HeldWeights packed_merged(const std::vector<Merging>& all, const Adapter& adapter, const Quantization& scheme,
                                 RoundingError& error) {
  std::set<const Site*> layers;
  for (const auto& part : adapter.parts) {
    if (part.role == AdapterPart::Role::kLayer) layers.insert(part.site.get());
  }
  HeldWeights weights;
  for (const auto& [site, methods] : all) {
    const auto weight = site->weight().detach();
    const auto values = site->is_merged() ? weight : site->merged(weight, methods);
    if (layers.count(site.get()) == 0) continue;
    check_memory_stays(weight);
    weights.push_back({site, scheme.pack(values, site->name())});
    error.add(values, *weights.back().packed);
  }
  return weights;
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
