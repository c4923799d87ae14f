#pragma once

#include <lora/method/contract.hpp>
#include <lora/version.hpp>

#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// The place of a low-rank update in a graph that was made once: the update's numbers, its rank up to that of the place
/// and its scale are all in tensors, so that another update is another content of the same tensors (`HotSwap`).
///
///   W' = W + s B A,   s a tensor
///
/// Shapes: W (out, in); A (rank, in); B (out, rank); s of no dimension, or one for each matrix of a batch. An update of
/// a smaller rank is filled up with zeros. All start at zero, and nothing is trained.
struct Swappable : Method {
  static constexpr MethodInfo info{"Swappable", "HOT_SWAP", {}, "r", {}, {}, {}};

  std::vector<MethodField<Swappable>> fields() const {
    return {{"lora_A", &Swappable::lora_A, {kRank, kIn}, ".weight", /*is_trained=*/false},
            {"lora_B", &Swappable::lora_B, {kOut, kRank}, ".weight", /*is_trained=*/false},
            {"lora_scale", &Swappable::lora_scale, {}, "", /*is_trained=*/false}};
  }

  void initialize(const Base& /*base*/) {
    lora_A.zero_();
    lora_B.zero_();
    lora_scale.zero_();
  }

  /// The scale goes to B, the smaller of what it could be multiplied with.
  Term term(const Base& /*base*/) const { return {lora_A, lora_B * lora_scale.unsqueeze(-1).unsqueeze(-1)}; }

  at::Tensor lora_A, lora_B, lora_scale;
};

}  // namespace LORA_ABI
}  // namespace lora
