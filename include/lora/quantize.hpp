#pragma once

#include <lora/config.hpp>
#include <lora/fwd.hpp>
#include <lora/linkage.hpp>
#include <lora/model/model.hpp>
#include <lora/version.hpp>
#include <lora/weight/quantized.hpp>

#include <functional>
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
  /// Parameters, by the rules of LoRAConfig: matrices, or experts. Default: none.
  TORCH_ARG(std::vector<std::string>, target_parameters);
  /// Forward passes over some of what the model is used for, in the mode that it is to be used in. With them the codes
  /// of NF4 and FP4 are chosen so that layers change least what they make of such inputs (`SeenInputs`), with scales
  /// and files as before. The model has its numbers while they run, and they take the square of its inputs' number in
  /// floats for each layer. Default: none, each number becomes the nearest of the sixteen.
  TORCH_ARG(std::function<void()>, calibration);
};

/// What became of them.
struct QuantizeReport {
  std::vector<std::string> layers;            ///< those whose weights are held in few bits now
  std::vector<std::string> shared;            ///< those that `all_linear` left out, since others share their weight
  int64_t bytes_before = 0, bytes_after = 0;  ///< memory of these weights
  double error = 0;                           ///< ||W_q - W|| / ||W|| over all; a calibration makes it larger
  /// Those whose former numbers somebody else has still, e.g. other parts of a packed weight, so that their memory is
  /// not free; it is among `bytes_after`.
  std::vector<std::string> kept_elsewhere;
  /// With a calibration: those whose numbers became the nearest ones nevertheless, since the passes did not multiply
  /// with the weight as a whole.
  std::vector<std::string> uncalibrated;
};

/// Holds weights of a model in few bits (QLoRA), in the place where they are: a weight becomes a tensor of the same
/// sizes without memory, whose numbers are found inside of scopes of `Adapters` and by the layers of this library, and
/// nowhere else; whatever else touches them throws a text that names the weight. Adapters are attached before or after.
///
///   lora::quantize(*model, lora::NF4().block_size(64), lora::QuantizeOptions().exclude_modules({"lm_head"}));
///   auto adapters = lora::attach(*model, lora::LoRAConfig(8).target_modules({"q_proj", "v_proj"}));
///
/// A few rows of what it is used for make up for most of what rounding loses:
///
///   lora::quantize(*model, lora::NF4(), lora::QuantizeOptions().calibration([&] { model->forward(rows); }));
///
/// All of them are packed before any is replaced; `load_quantized` packs a file as it reads it. Moving, casting and
/// cloning keep the weights so. It changes weights, and needs the model for itself. Errors, with nothing changed: a
/// selection that matches nothing, a weight that is merged, has no matrix, or has numbers that are not finite, too
/// large for the scheme, or none of those that it has (Lossless); inside of a scope that adapts one; a calibration for
/// a scheme that takes none (Int8, Lossless), or one that reaches no layer. References: Dettmers et al. 2023, "QLoRA:
/// Efficient Finetuning of Quantized LLMs"; Frantar et al. 2023, "GPTQ".
LORA_INLINE QuantizeReport quantize(const Model& model, const Quantization& scheme,
                                    const QuantizeOptions& options = {});
LORA_INLINE QuantizeReport quantize(torch::nn::Module& model, const Quantization& scheme,
                                    const QuantizeOptions& options = {});

/// Gives every weight of a model that is held in few bits its numbers back, as far as these held them. Throws, with
/// nothing changed, where an adapter is merged into one, and inside of a scope that adapts one.
LORA_INLINE void dequantize(const Model& model);
LORA_INLINE void dequantize(torch::nn::Module& model);

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/core/grad_mode.h>

#include <lora/adapter/held_weights.hpp>
#include <lora/adapter/input_observer.hpp>
#include <lora/intercept/kernels.hpp>
#include <lora/model/module_model.hpp>
#include <lora/selection/selection.hpp>
#include <lora/weight/finite.hpp>
#include <lora/weight/placeholder.hpp>
#include <lora/weight/rounding_error.hpp>

#include <algorithm>
#include <memory>
#include <optional>
#include <set>
#include <utility>

namespace lora {
inline namespace LORA_ABI {

namespace detail {

/// The weights that the options mean; notes in the report what is left out.
inline std::vector<std::shared_ptr<Site>> quantizable(const Model& model, const QuantizeOptions& options,
                                                      QuantizeReport& report) {
  const auto& targets = options.target_modules();
  const auto config = LoRAConfig(1)
                          .target_modules(targets)
                          .exclude_modules(options.exclude_modules())
                          .target_parameters(options.target_parameters());
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

/// Those of them that have their numbers; of layers with one weight the first.
inline std::vector<std::shared_ptr<Site>> to_pack(const Model& model, const QuantizeOptions& options,
                                                  QuantizeReport& report) {
  const BelowInterception below;
  std::set<const c10::TensorImpl*> seen;
  auto sites = quantizable(model, options, report);
  const auto is_done = [&](const std::shared_ptr<Site>& site) {
    const auto weight = site->weight();
    return is_quantized(weight) || !seen.insert(weight.unsafeGetTensorImpl()).second;
  };
  sites.erase(std::remove_if(sites.begin(), sites.end(), is_done), sites.end());
  return sites;
}

/// What the passes of the options multiply each of the weights with; nothing without passes.
inline std::vector<std::optional<SeenInputs>> calibrate(const std::vector<std::shared_ptr<Site>>& sites,
                                                        const Quantization& scheme, const QuantizeOptions& options,
                                                        QuantizeReport& report) {
  const auto& passes = options.calibration();
  if (!passes || sites.empty()) return std::vector<std::optional<SeenInputs>>(sites.size());
  TORCH_CHECK_VALUE(scheme.sees_inputs(), "lora::quantize: this scheme rounds every number by itself, and a ",
                    "calibration has no effect on it; NF4 and FP4 take one");
  for (const auto& site : sites) {
    check_memory_stays(site->weight());
    site->check_quantizable();
  }
  auto seen = observe_inputs(sites, passes);
  for (size_t i = 0; i < sites.size(); ++i) {
    if (!seen[i]) report.uncalibrated.push_back(sites[i]->name());
    TORCH_CHECK_VALUE(!seen[i] || detail::is_finite(seen[i]->moments), "lora::quantize: in the passes of ",
                      "the calibration the inputs of ", sites[i]->name(),
                      " are not finite, or too large to be squared");
  }
  TORCH_CHECK_VALUE(report.uncalibrated.size() < sites.size(),
                    "lora::quantize: the passes of the calibration multiplied ",
                    "with none of the weights as a whole: ", list(report.uncalibrated));
  return seen;
}

/// Where the numbers of a layer lay.
struct FormerMemory {
  std::string layer;
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
};

/// Notes a weight that is about to be held in few bits.
inline void note(const std::string& layer, const at::Tensor& weight, const QuantizedWeight& packed,
                 std::vector<FormerMemory>& former, QuantizeReport& report) {
  report.layers.push_back(layer);
  report.bytes_before += held_bytes(weight);
  report.bytes_after += packed.nbytes();
  if (!is_quantized(weight)) former.push_back({layer, weight.storage().getWeakStorageImpl()});
}

/// Notes the memory that was not freed.
inline void note_held_elsewhere(const std::vector<FormerMemory>& former, QuantizeReport& report) {
  std::set<const c10::StorageImpl*> counted;
  for (const auto& [name, storage] : former) {
    const auto alive = storage.lock();
    if (!alive) continue;
    report.kept_elsewhere.push_back(name);
    if (counted.insert(alive.get()).second) report.bytes_after += static_cast<int64_t>(alive->nbytes());
  }
}

}  // namespace detail

LORA_INLINE QuantizeReport quantize(const Model& model, const Quantization& scheme, const QuantizeOptions& options) {
  detail::register_kernels();
  at::NoGradGuard no_grad;
  QuantizeReport report;
  const auto sites = detail::to_pack(model, options, report);
  auto seen = detail::calibrate(sites, scheme, options, report);
  const detail::BelowInterception below;
  detail::RoundingError error;
  detail::HeldWeights held;
  for (size_t i = 0; i < sites.size(); ++i) {
    held.push_back(detail::packed(sites[i], scheme, seen[i] ? &*seen[i] : nullptr));
    seen[i].reset();  // large
    error.add(sites[i]->weight().detach(), *held.back().packed);
  }
  std::vector<detail::FormerMemory> former;
  for (const auto& [site, packed] : held) detail::note(site->name(), site->weight(), *packed, former, report);
  detail::hold(held);
  detail::note_held_elsewhere(former, report);
  report.error = error.relative();
  return report;
}

LORA_INLINE QuantizeReport quantize(torch::nn::Module& model, const Quantization& scheme,
                                    const QuantizeOptions& options) {
  return quantize(ModuleModel(model), scheme, options);
}

LORA_INLINE void dequantize(const Model& model) {
  const detail::BelowInterception below;
  at::NoGradGuard no_grad;
  const auto tensors = model.tensors();
  for (const auto& tensor : tensors) {
    const auto weight = tensor.place.slot->read();
    if (!weight.defined()) continue;
    TORCH_CHECK(!detail::MergedWeight::was_held(weight), "lora::dequantize: ", tensor.place.name,
                " has an adapter merged into it; unmerge it first");
    if (detail::is_quantized(weight)) detail::check_memory_stays(weight);
  }
  for (const auto& tensor : tensors) {
    const auto handles = tensor.place.slot->handles();
    if (detail::is_quantized(handles.member)) detail::release(handles, detail::dequantized(handles.member));
  }
}

LORA_INLINE void dequantize(torch::nn::Module& model) { dequantize(ModuleModel(model)); }

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
