#pragma once

#include <ATen/core/grad_mode.h>

#include <lora/adapter/report.hpp>
#include <lora/config.hpp>
#include <lora/intercept/kernels.hpp>
#include <lora/model/module_model.hpp>
#include <lora/selection/selection.hpp>
#include <lora/version.hpp>
#include <lora/weight/placeholder.hpp>
#include <lora/weight/quantized.hpp>
#include <lora/weight/rounding_error.hpp>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// Which weights of a model are held in few bits.
struct QuantizeOptions {
  /// The layers, by the rules of LoRAConfig. Default: every torch::nn::Linear whose weight no other layer shares.
  TORCH_ARG(ModuleSelector, target_modules) = all_linear;
  /// Layers that are left out. Default: none.
  TORCH_ARG(ModuleSelector, exclude_modules);
};

/// What became of them.
struct QuantizeReport {
  std::vector<std::string> layers;            ///< those whose weights are held in few bits now
  std::vector<std::string> shared;            ///< those that `all_linear` left out, since others share their weight
  int64_t bytes_before = 0, bytes_after = 0;  ///< memory of these weights
  double error = 0;                           ///< ||W_q - W|| / ||W|| over all of them
};

namespace detail {

/// The weights that the options mean; notes in the report what is left out.
inline std::vector<std::shared_ptr<Site>> quantizable(const Model& model, const QuantizeOptions& options,
                                                      QuantizeReport& report) {
  const auto& targets = options.target_modules();
  const auto config = LoRAConfig(1).target_modules(targets).exclude_modules(options.exclude_modules());
  auto sites = Selection(model, config).sites();
  if (!targets.is_all_linear()) return sites;
  const auto is_shared = [&](const std::shared_ptr<Site>& site) {
    if (site->place().tied_to.empty()) return false;
    report.shared.push_back(site->name());
    return true;
  };
  sites.erase(std::remove_if(sites.begin(), sites.end(), is_shared), sites.end());
  return sites;
}

}  // namespace detail

/// Holds weights of a model in few bits (QLoRA), in the place where they are: a weight becomes a tensor of the same
/// sizes without memory, whose numbers are found inside of scopes of `Adapters` and by the layers of this library, and
/// nowhere else; whatever else touches them throws a text that names the weight. Adapters are attached before or after.
///
///   lora::quantize(*model, lora::NF4().block_size(64), lora::QuantizeOptions().exclude_modules({"lm_head"}));
///   auto adapters = lora::attach(*model, lora::LoRAConfig(8).target_modules({"q_proj", "v_proj"}));
///
/// One weight is replaced after the other, so that a model takes at most one float tensor more than it does in few bits
/// and what is still in float. Moving, casting and cloning keep the weights so. Errors, with nothing changed: a
/// selection that matches nothing, a weight that is merged, has no matrix, or has numbers that are not finite.
/// Reference: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs".
inline QuantizeReport quantize(const Model& model, const Quantization& scheme, const QuantizeOptions& options = {}) {
  detail::register_kernels();
  const detail::BelowInterception below;
  at::NoGradGuard no_grad;
  QuantizeReport report;
  std::vector<std::shared_ptr<Site>> sites;
  for (auto& site : detail::quantizable(model, options, report)) {
    if (detail::is_quantized(site->weight())) continue;
    site->check_quantizable();
    sites.push_back(std::move(site));
  }
  detail::RoundingError error;
  for (const auto& site : sites) {
    auto weight = site->weight().detach();
    report.layers.push_back(site->name());
    report.bytes_before += detail::held_bytes(weight);
    site->quantize(scheme);
    report.bytes_after += detail::held_bytes(site->weight());
    error.add(weight, *detail::quantized(site->weight()));
  }
  report.error = error.relative();
  return report;
}
inline QuantizeReport quantize(torch::nn::Module& model, const Quantization& scheme,
                               const QuantizeOptions& options = {}) {
  return quantize(ModuleModel(model), scheme, options);
}

/// Gives every weight of a model that is held in few bits its numbers back, as far as these held them. Throws, with
/// nothing changed, where an adapter is merged into one.
inline void dequantize(const Model& model) {
  for (const auto& part : model.parts()) {
    for (const auto& weight : part.weights) weight.site()->dequantize();
    for (const auto& site : part.own) site->dequantize();
  }
}
inline void dequantize(torch::nn::Module& model) { dequantize(ModuleModel(model)); }

}  // namespace LORA_ABI
}  // namespace lora
