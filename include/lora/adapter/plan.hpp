#pragma once

#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <lora/config.hpp>
#include <lora/selection/text.hpp>
#include <lora/model/module_model.hpp>
#include <lora/version.hpp>

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// A parameter of the model that an adapter trains in full, or a buffer that goes with one. The model keeps its own;
/// in a scope, and when merged, the adapter's stands in for it.
struct FullTensor {
  ModelTensor place;                             ///< in the model
  std::string name;                              ///< among the adapter's tensors
  std::string file_name;                         ///< in PEFT's files
  at::Tensor value;                              ///< the adapter's own
  std::optional<double> scaling = std::nullopt;  ///< s, where `value` is b in bias + s b (`lora_bias`)

  /// What stands in for `original`, differentiable.
  at::Tensor substitute(const at::Tensor& original) const {
    return (scaling ? original + *scaling * value : value).to(original.scalar_type());
  }
};

/// An adapter that is worked out for a model but not part of it yet: its layers and its tensors, without values.
struct AdapterPlan {
  struct Layer {
    Target target;
    std::shared_ptr<AnyMethod> method;
    std::string module;  ///< by whose name it has its rank and alpha; that of the target, but for parts of a module
  };

  LoRAConfig config;
  std::vector<Layer> layers;
  std::vector<FullTensor> full;  ///< for modules_to_save and biases; with the values of the model, or zero

  /// Gives every tensor its first values.
  void initialize() {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    for (auto& layer : layers) {
      const auto& site = *layer.target.site;
      layer.method->initialize(site.view().matrix(site.pristine(*layer.target.slot)));
    }
  }
};

namespace detail {

/// Writes down the rank and alpha of one layer, where they differ from those that `config` gives it so far.
inline void note_options(LoRAConfig& config, const std::string& layer, const LoRAOptions& options,
                         const LoRAOptions& so_far) {
  const auto pattern = escaped(layer);
  auto ranks = config.rank_pattern();
  auto alphas = config.alpha_pattern();  // of which the first that matches counts
  if (options.rank() != so_far.rank()) ranks.insert(ranks.begin(), {"^" + pattern, options.rank()});
  if (options.alpha() != so_far.alpha()) alphas.insert(alphas.begin(), {"^" + pattern, options.alpha()});
  config.rank_pattern(std::move(ranks)).alpha_pattern(std::move(alphas));
}

inline MethodKind kind_named(std::string_view name) {
  for (const auto& kind : all_methods()) {
    if (kind.info().name == name) return kind;
  }
  TORCH_CHECK(false, "lora::adapters_of: ", name, " is not one of lora::all_methods()");
}

}  // namespace detail

}  // namespace LORA_ABI
}  // namespace lora
