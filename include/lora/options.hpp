#pragma once

#include <c10/util/Exception.h>

#include <lora/version.hpp>

#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>

/// One option of a class template that chains: `Self& name(T)` sets it, `const T& name() const` reads it.
/// (LibTorch's TORCH_ARG returns the class it is written in; options that several classes share need the derived one.)
#define LORA_ARG(T, name)                                  \
 public:                                                   \
  Self& name(T value) {                                    \
    this->name##_ = std::move(value);                      \
    return static_cast<Self&>(*this);                      \
  }                                                        \
  const T& name() const noexcept { return this->name##_; } \
                                                           \
 private:                                                  \
  T name##_

namespace lora {
inline namespace LORA_ABI {

/// How the trainable tensors of an adapter start. Whatever the choice, the adapted layer starts as the frozen one.
enum class Init {
  kGaussian,  ///< A from a normal distribution (`init_std`), B zero: Hu et al. 2021.
  kKaiming,   ///< A uniform in +-1/sqrt(in_features), B zero: the default of Python's PEFT.
};

/// The options of one adapter on one layer, shared by `LoRAOptions` (one layer) and `LoRAConfig` (a whole model).
template <class Self>
class BasicOptions {
  /// Rank r of the update. At least 1.
  LORA_ARG(int64_t, rank);
  /// Numerator of the scaling: alpha / rank. Default: 8, as in PEFT.
  LORA_ARG(double, alpha) = 8;
  /// Probability with which each element of the adapter's input is zeroed in training mode; in [0, 1). Default: 0.
  LORA_ARG(double, dropout) = 0;
  /// Scales by alpha / sqrt(rank) instead (Kalajdzievski 2023, "rsLoRA"). Default: false.
  LORA_ARG(bool, rank_stabilized) = false;
  /// How A and B start. Default: Gaussian.
  LORA_ARG(Init, init) = Init::kGaussian;
  /// Standard deviation of a Gaussian A. Default: 1 / rank.
  LORA_ARG(std::optional<double>, init_std);

 public:
  /// s in W + s B A: alpha / rank, or alpha / sqrt(rank) when rank-stabilized.
  double scaling() const {
    const auto r = static_cast<double>(rank_);
    return alpha_ / (rank_stabilized_ ? std::sqrt(r) : r);
  }

  /// Throws c10::ValueError, with `who` in front, when an option is out of its range.
  void validate(const char* who) const {
    TORCH_CHECK_VALUE(rank_ > 0, who, ": rank has to be at least 1, but got ", rank_);
    TORCH_CHECK_VALUE(std::isfinite(alpha_), who, ": alpha has to be a finite number, but got ", alpha_);
    TORCH_CHECK_VALUE(dropout_ >= 0 && dropout_ < 1, who, ": dropout has to be in [0, 1), but got ", dropout_);
    TORCH_CHECK_VALUE(!init_std_ || (*init_std_ > 0 && std::isfinite(*init_std_)), who,
                      ": init_std has to be a positive number, but got ", init_std_.value_or(0));
  }

 protected:
  explicit BasicOptions(int64_t rank) : rank_(rank) {}
};

/// Options of one adapted layer: `LoRAOptions(8).alpha(16).dropout(0.05)`.
class LoRAOptions : public BasicOptions<LoRAOptions> {
 public:
  /* implicit */ LoRAOptions(int64_t rank) : BasicOptions(rank) {}

  /// Takes over what another class of options says about a layer.
  template <class Other>
  explicit LoRAOptions(const BasicOptions<Other>& other) : BasicOptions(other.rank()) {
    alpha(other.alpha()).dropout(other.dropout()).rank_stabilized(other.rank_stabilized());
    init(other.init()).init_std(other.init_std());
  }
};

}  // namespace LORA_ABI
}  // namespace lora
