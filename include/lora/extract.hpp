#pragma once

#include <lora/adapters.hpp>
#include <lora/linkage.hpp>
#include <lora/version.hpp>

#include <map>
#include <string>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// How ranks are chosen when an adapter is extracted.
struct ExtractOptions {
  /// Gives each layer the smallest rank that keeps this share, in (0, 1], of the energy ||W_tuned - W||^2, in place of
  /// the ranks of the configuration. As in PEFT's convert_to_lora. Default: the ranks of the configuration.
  TORCH_ARG(std::optional<double>, energy) = std::nullopt;
};

/// What an extracted adapter keeps of the fine-tuned weights, and what it leaves out.
struct ExtractReport {
  struct Layer {
    std::string name;
    int64_t rank;
    double energy;  ///< ||s B A||^2 / ||W_tuned - W||^2; 1 where nothing changed
  };

  std::vector<Layer> layers;
  /// Names of the model's tensors that differ in the fine-tuned model and that the adapter does not hold: biases and
  /// norms, for example, and whatever is no target. `modules_to_save`, `bias` and `lora_bias` take them in.
  std::vector<std::string> left_out;
};

/// The adapter that comes nearest to a full fine-tune of a model. Of each layer that `config` selects, the difference
/// is cut off after the largest singular values, which is the best matrix of that rank:
///
///   W_tuned - W = U S V^T,   A = V_r^T,   B = U_r S_r / s
///
/// Shapes: as for `LowRank`; where the rank exceeds what the layer has, the rest is zero. `finetuned` are the tensors
/// of the other model under the names that they have in this one, as `read_safetensors` gives them. What
/// `modules_to_save` and `bias` name is taken over as it is, and `lora_bias` holds the differences of the adapted
/// layers' biases. The model is adapted as by `attach`, and otherwise as it was.
///
///   auto adapters = lora::extract(*base, lora::read_safetensors("tuned.safetensors"),
///                                 lora::LoRAConfig(16).target_modules(lora::all_linear));
///   adapters.save("adapter");
///
/// Errors: c10::Error that names a tensor which is missing, of another shape or not finite; for another method than
/// LowRank; for an energy out of (0, 1]; and those of `attach`. The model is unchanged then.
/// Reference: Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
LORA_INLINE Adapters extract(torch::nn::Module& base, const std::map<std::string, at::Tensor>& finetuned,
                             const LoRAConfig& config, const ExtractOptions& options = {},
                             ExtractReport* report = nullptr);

/// The same for a model of the same structure.
LORA_INLINE Adapters extract(torch::nn::Module& base, torch::nn::Module& finetuned, const LoRAConfig& config,
                             const ExtractOptions& options = {}, ExtractReport* report = nullptr);

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/core/grad_mode.h>

#include <lora/adapter/factors.hpp>
#include <lora/weight/finite.hpp>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

namespace lora {
inline namespace LORA_ABI {

namespace detail {

/// Fills a planned adapter with the best approximation of a fine-tuned model.
class Extraction {
 public:
  Extraction(const Model& model, const std::map<std::string, at::Tensor>& finetuned, const ExtractOptions& options)
      : model_tensors_(model.tensors()), finetuned_(finetuned), options_(options) {
    const auto energy = options.energy().value_or(1);
    TORCH_CHECK_VALUE(energy > 0 && energy <= 1, "lora::extract: energy has to be in (0, 1], but got ", energy);
  }

  /// The difference of one layer's weights as far as an adapter takes it, all of its singular values, and the energy of
  /// all of it.
  struct Difference {
    Factors update;
    at::Tensor s;
    double total;
  };

  std::vector<Difference> factorize(const Adapter& plan) {
    at::NoGradGuard no_grad;
    std::vector<Difference> differences;
    for (const auto& part : plan.parts) {
      if (part.role == AdapterPart::Role::kLayer) differences.push_back(factorized(part));
    }
    return differences;
  }

  /// The configuration with the ranks that keep enough energy. The layers of one module have one rank in files.
  LoRAConfig with_ranks(const Adapter& plan, const std::vector<Difference>& differences) const {
    std::map<std::string, int64_t> ranks;
    for (size_t i = 0; i < differences.size(); ++i) {
      const auto shares = plan.parts[i].site->view().shape().rank_shares;
      auto& rank = ranks[plan.parts[i].module];
      rank = std::max(rank, rank_for_energy(differences[i].s, *options_.energy()) * shares);
    }
    auto config = plan.config;
    for (const auto& layer : plan.parts) {
      if (layer.role != AdapterPart::Role::kLayer) continue;
      const auto rank = ranks.extract(layer.module);  // once for each module
      if (rank.empty()) continue;
      const auto& planned = layer.method->options();
      note_options(config, layer.module, LoRAOptions(planned).rank(rank.mapped()), planned);
    }
    return config;
  }

  ExtractReport fill(Adapter& plan, const std::vector<Difference>& differences) {
    at::NoGradGuard no_grad;
    for (size_t i = 0; i < differences.size(); ++i) fill(plan.parts[i], differences[i]);
    for (auto& part : plan.parts) {
      if (part.role == AdapterPart::Role::kFull) fill_full(part);
    }
    for (const auto& tensor : model_tensors_) {
      const bool is_held = std::find(held_.begin(), held_.end(), tensor.place.name) != held_.end();
      if (!is_held && differs(tensor)) report_.left_out.push_back(tensor.place.name);
    }
    return std::move(report_);
  }

 private:
  Difference factorized(const AdapterPart& layer) {
    const auto& [name, weight] = tensor_of(*layer.site);
    held_.push_back(name);
    const auto type = adapter_dtype(weight.scalar_type());
    const auto difference = tuned(name, weight.sizes()).to(weight.device(), type) - weight.to(type);
    check_finite(name, difference);
    const auto& view = layer.site->view();
    const auto matrix = view.matrix(difference);
    const auto lost = energy(difference - view.weight(matrix));  // of parts that are not adapted
    if (lost > 0) report_.left_out.push_back(name);
    const auto svd = spectrum(matrix);
    const auto [a, b] =
        svd.first(options_.energy() ? rank_for_energy(svd.s, *options_.energy()) : layer.method->options().rank());
    return {{a.clone(), b}, svd.s, energy(svd.s) + lost};  // without the rest of V
  }

  void fill(AdapterPart& layer, const Difference& difference) {
    auto* method = dynamic_cast<MethodOf<LowRank>*>(layer.method.get());
    TORCH_CHECK(method != nullptr, "lora::extract: a difference of weights is extracted as LowRank, not as ",
                layer.method->info().name);
    TORCH_CHECK_VALUE(method->scaling() != 0, "lora::extract: alpha is 0, with which no adapter changes anything");
    set_update(method->value, difference.update);
    const auto rank = std::min(method->value.lora_A.size(-2), difference.update.rank());
    const auto kept = energy(difference.s.narrow(-1, 0, rank));
    report_.layers.push_back(
        {layer.site->name(), method->options().rank(), difference.total > 0 ? kept / difference.total : 1});
  }

  void fill_full(AdapterPart& part) {
    const auto& name = part.changed();
    auto& full = static_cast<MethodOf<FullDelta>&>(*part.method).value;
    held_.push_back(name);
    const auto wanted = tuned(name, full.value.sizes());
    check_finite(name, wanted);
    if (full.scale) {
      const auto type = full.value.options();
      full.value.copy_((wanted.to(type) - part.site->weight().to(type)) / *full.scale);
    } else {
      full.value.copy_(wanted);
    }
  }

  static void check_finite(const std::string& name, const at::Tensor& tensor) {
    TORCH_CHECK(!tensor.is_floating_point() || detail::is_finite(tensor), "lora::extract: \"", name,
                "\" is not finite (NaN or infinity) in one of the two models");
  }

  /// That of a matrix, or the same from its singular values.
  static double energy(const at::Tensor& values) { return values.to(at::kDouble).square().sum().item<double>(); }

  /// The model's tensor that a target adapts; of tied ones that of the target's own module.
  std::pair<std::string, at::Tensor> tensor_of(const Site& site) const {
    const auto weight = site.weight();
    const Place* found = nullptr;
    for (const auto& tensor : model_tensors_) {
      const auto& place = tensor.place;
      if (!place.slot->read().is_same(weight)) continue;
      const bool is_own = place.name == site.name() || place.name.rfind(site.name() + ".", 0) == 0;
      if (found == nullptr || is_own) found = &place;
    }
    TORCH_INTERNAL_ASSERT(found != nullptr, site.name());
    return {found->name, dequantized(weight)};
  }

  at::Tensor tuned(const std::string& name, at::IntArrayRef sizes) const {
    const auto found = finetuned_.find(name);
    TORCH_CHECK(found != finetuned_.end(), "lora::extract: the fine-tuned model has no \"", name, "\";",
                did_you_mean(name, names()), " It has ", finetuned_.size(), " tensors");
    TORCH_CHECK(found->second.sizes() == sizes, "lora::extract: \"", name, "\" is ", sizes, " in the model, but ",
                found->second.sizes(), " in the fine-tuned one");
    return dequantized(found->second);
  }

  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const auto& item : finetuned_) names.push_back(item.first);
    return names;
  }

  bool differs(const LayerWeight& tensor) const {
    const auto found = finetuned_.find(tensor.place.name);
    if (found == finetuned_.end()) return false;
    const auto own = tensor.place.slot->read();
    if (found->second.sizes() != own.sizes()) return true;
    return !dequantized(found->second).to(own.device(), own.scalar_type()).equal(dequantized(own));
  }

  const LayerWeights model_tensors_;
  const std::map<std::string, at::Tensor>& finetuned_;
  const ExtractOptions options_;
  std::vector<std::string> held_;
  ExtractReport report_;
};

}  // namespace detail

LORA_INLINE Adapters extract(torch::nn::Module& base, const std::map<std::string, at::Tensor>& finetuned,
                             const LoRAConfig& config, const ExtractOptions& options, ExtractReport* report) {
  const auto model = std::make_shared<ModuleModel>(base);
  Adapters adapters(model);
  auto plan = adapters.plan(config);
  detail::Extraction extraction(*model, finetuned, options);
  const auto differences = extraction.factorize(plan);
  if (options.energy()) plan = adapters.plan(extraction.with_ranks(plan, differences));
  auto found = extraction.fill(plan, differences);
  adapters.add("default", std::move(plan));
  if (report != nullptr) *report = std::move(found);
  return adapters;
}

LORA_INLINE Adapters extract(torch::nn::Module& base, torch::nn::Module& finetuned, const LoRAConfig& config,
                             const ExtractOptions& options, ExtractReport* report) {
  std::map<std::string, at::Tensor> tensors;
  for (const auto& tensor : ModuleModel(finetuned).tensors())
    tensors.emplace(tensor.place.name, tensor.place.slot->read());
  return extract(base, tensors, config, options, report);
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
