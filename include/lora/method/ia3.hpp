#pragma once

#include <ATen/TensorOperators.h>

#include <lora/method/contract.hpp>
#include <lora/selection/text.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <string>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// (IA)^3: learned factors, one for each output of a layer, or, in a feed-forward module, one for each input.
///
///   y = l * (x W^T + b),   or   y = (l * x) W^T + b
///
/// Shapes: W (out, in); l (out, 1) or (1, in), at first ones. There is no rank, no alpha and no dropout: those of a
/// configuration have no effect. The first form scales the bias of the layer, too.
/// Reference: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
/// Learning", section 3.3.
struct IA3 : Method {
  static constexpr MethodInfo info{"IA3",
                                   "IA3",
                                   "",
                                   "",
                                   "",
                                   "",
                                   "init_ia3_weights",
                                   8,
                                   "target_modules exclude_modules modules_to_save fan_in_fan_out"};

  /// The modules, by the rule for lists of names, whose inputs are scaled in place of their outputs. Default: none.
  IA3& feedforward_modules(std::vector<std::string> names) {
    feedforward_modules_ = std::move(names);
    return *this;
  }
  const std::vector<std::string>& feedforward_modules() const { return feedforward_modules_; }

  static std::vector<MethodOption<IA3>> peft_options() { return {{"feedforward_modules", &IA3::feedforward_modules_}}; }

  std::vector<MethodField<IA3>> fields() const {
    return {{"ia3_l", &IA3::ia3_l, is_feedforward ? std::vector<Axis>{1, kIn} : std::vector<Axis>{kOut, 1}}};
  }

  /// The method as a layer of that name has it.
  IA3 for_layer(const std::string& name) const {
    auto method = *this;
    method.is_feedforward = std::any_of(feedforward_modules_.begin(), feedforward_modules_.end(),
                                        [&](const auto& entry) { return detail::is_or_ends_with(name, entry); });
    return method;
  }

  void initialize(const Base& /*base*/) {
    TORCH_CHECK_VALUE(
        !is_feedforward || !shape.is_lookup,
        "lora::IA3: the inputs of an embedding are numbers of entries, which cannot be scaled; leave it out of "
        "feedforward_modules");
    ia3_l.fill_(1);
  }

  Term term(const Base& /*base*/) const {
    return is_feedforward ? Term{{}, {}, 1, {}, ia3_l.squeeze(-2)} : Term{{}, {}, 1, ia3_l.squeeze(-1)};
  }

  bool changes_bias() const { return !is_feedforward; }
  at::Tensor bias_delta(const at::Tensor& bias) const { return ia3_l.flatten() * bias - bias; }

  bool is_feedforward = false;
  at::Tensor ia3_l;

 private:
  std::vector<std::string> feedforward_modules_;
};

}  // namespace LORA_ABI
}  // namespace lora
