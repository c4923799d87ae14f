#pragma once

#include <c10/util/Exception.h>
#include <torch/arg.h>

#include <lora/version.hpp>

#include <cstdint>
#include <optional>

namespace lora {
inline namespace LORA_ABI {

/// How the updates delta_i of several adapters become one; w_i are their weights. All of it acts on the updates
/// themselves, and so on adapters of any ranks, alphas and methods.
enum class CombineKind : uint8_t {
  /// sum_i w_i delta_i, exactly: the ranks side by side, so that the rank is their sum. Where a method has no low-rank
  /// form (DoRA, IA3), the sum as a matrix, whose rank is the smaller one of its sizes.
  kConcatenation,
  /// The same sum with the smallest rank that holds it: adapters with common directions have less than the sum of their
  /// ranks. (PEFT's "linear" sums A and B apart, which is another update.)
  kLinear,
  /// The best approximation of the same sum with a given rank or energy.
  kSvd,
  /// Each delta_i keeps its largest entries, signs are elected, and each entry is the mean of those w_i delta_i that
  /// have the elected sign. Signs are those of delta_i, before the weights, as in PEFT.
  kTies,
  /// Each delta_i keeps a random choice of entries, divided by the density; the weighted sum of these.
  kDareLinear,
  /// The same choice, and then the election and the mean of TIES.
  kDareTies,
  /// Each delta_i keeps its largest entries; the weighted sum of these.
  kMagnitudePrune
};

/// How the sign of an entry is elected, when updates disagree.
enum class MajoritySign : uint8_t {
  kTotal,     ///< the sign of the sum of the updates
  kFrequency  ///< the sign that more of them have
};

/// `CombineOptions(CombineKind::kTies).density(0.2)`.
struct CombineOptions {
  CombineOptions() = default;
  /* implicit */ CombineOptions(CombineKind kind) : kind_(kind) {}

  /// Default: the exact sum.
  TORCH_ARG(CombineKind, kind) = CombineKind::kConcatenation;
  /// The rank of every layer, by singular values; of a convolution with groups rounded up to a multiple of these.
  /// Layers have it even where less would do. Not for kConcatenation. Default: as large as nothing is lost.
  TORCH_ARG(std::optional<int64_t>, rank) = std::nullopt;
  /// The share, in (0, 1], of the energy ||update||^2 that every layer keeps, with the smallest rank for it; together
  /// with `rank` at most that. Not for kConcatenation. Default: all.
  TORCH_ARG(std::optional<double>, energy) = std::nullopt;
  /// The share, in (0, 1], of the entries of each update that are kept: floor(density * entries) of the largest, or
  /// each with this probability. Needed by the kinds that prune, and only there.
  TORCH_ARG(std::optional<double>, density) = std::nullopt;
  /// How kTies and kDareTies elect signs. Default: by the sum.
  TORCH_ARG(MajoritySign, majority_sign) = MajoritySign::kTotal;
  /// Of DARE's choice, which then is the same one every time, on every device; that of PEFT's functions on a CPU.
  /// Default: LibTorch's generator of the CPU decides (`torch::manual_seed`).
  TORCH_ARG(std::optional<uint64_t>, seed) = std::nullopt;

 public:
  bool prunes() const { return kind_ >= CombineKind::kTies; }

  /// Throws c10::ValueError when an option is out of its range, missing or of another kind.
  void validate() const {
    TORCH_CHECK_VALUE(!rank_ || *rank_ > 0, "lora::combine: rank has to be at least 1, but got ", rank_.value_or(0));
    check_share("energy", energy_);
    check_share("density", density_);
    TORCH_CHECK_VALUE(density_.has_value() == prunes(), "lora::combine: density ",
                      prunes() ? "has to be given for a kind that prunes"
                               : "is for kTies, kDareLinear, kDareTies and kMagnitudePrune");
    const bool cuts = rank_ || energy_;
    TORCH_CHECK_VALUE(kind_ != CombineKind::kConcatenation || !cuts,
                      "lora::combine: a concatenation keeps all ranks; kSvd has one by rank or energy");
    TORCH_CHECK_VALUE(kind_ != CombineKind::kSvd || cuts, "lora::combine: kSvd needs a rank or an energy");
  }

 private:
  static void check_share(const char* name, const std::optional<double>& share) {
    TORCH_CHECK_VALUE(!share || (*share > 0 && *share <= 1), "lora::combine: ", name, " has to be in (0, 1], but got ",
                      share.value_or(0));
  }
};

}  // namespace LORA_ABI
}  // namespace lora
