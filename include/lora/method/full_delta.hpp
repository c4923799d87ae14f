#pragma once

#include <ATen/TensorOperators.h>

#include <lora/method/contract.hpp>
#include <lora/version.hpp>

#include <optional>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// Training in full: a tensor of its own that stands in for one of the model, or, with a scale, is added to it.
///
///   W' = V,   or   b' = b + s V
///
/// Shapes: V as the model's tensor, whatever that is: a matrix, a bias, a running statistic. It is what
/// `modules_to_save`, `bias` and `lora_bias` of a configuration mean, and is chosen by these.
struct FullDelta : Method {
  static constexpr MethodInfo info{"FullDelta", "", "", "", "", ""};

  FullDelta() = default;
  explicit FullDelta(at::Tensor of, std::optional<double> by = std::nullopt) : value(std::move(of)), scale(by) {
    scaling = by.value_or(1);
  }

  std::vector<MethodField<FullDelta>> fields() const {
    return {{"", &FullDelta::value, {}, "", /*is_trained=*/value.defined() && value.requires_grad()}};
  }

  void initialize(const Base& base) {
    if (scale) {
      value.zero_();
    } else {
      follow(base);
    }
  }

  bool follows() const { return !scale; }
  void follow(const Base& base) { value.copy_(base.layout(base.dense())); }

  at::Tensor delta(const Base& base) const {
    const auto weight = base.dense();
    const auto own = base.matrix(value);
    return scale ? *scale * own : own.to(weight.device()) - weight;
  }

  at::Tensor replacement(const at::Tensor& weight) const {
    return (scale ? weight + *scale * value : value).to(weight.scalar_type());
  }

  at::Tensor value;
  std::optional<double> scale;
};

}  // namespace LORA_ABI
}  // namespace lora
