#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/maximum.h>

#include <lora/method/low_rank.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

// Updates of low rank as products, and the ranks that hold them.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The update B A: A (rank, in) and B (out, rank), or a batch of each.
struct Factors {
  at::Tensor A, B;

  int64_t rank() const { return A.size(-2); }
};

/// The sum of several, exactly: their ranks side by side.
inline Factors concatenated(const std::vector<Factors>& all) {
  std::vector<at::Tensor> a, b;
  for (const auto& factors : all) {
    a.push_back(factors.A);
    b.push_back(factors.B);
  }
  return {at::cat(a, -2), at::cat(b, -1)};
}

/// A matrix (out, in) bit by bit: times an identity of its smaller size.
inline Factors whole(const at::Tensor& matrix) {
  const auto size = std::min(matrix.size(-1), matrix.size(-2));
  auto sizes = matrix.sizes().vec();
  sizes[sizes.size() - 1] = sizes[sizes.size() - 2] = size;
  const auto identity = at::eye(size, matrix.options()).expand(sizes);
  return matrix.size(-2) <= matrix.size(-1) ? Factors{matrix, identity} : Factors{identity, matrix};
}

/// U (out, n), S (n) and V^T (n, in) of a matrix U S V^T, the largest of S first.
struct Spectrum {
  at::Tensor u, s, v;
  at::Tensor magnitude;  ///< of what it was computed from, on which its rounding depends

  /// The first ones of S.
  Factors first(int64_t rank) const {
    const auto count = std::min(rank, s.size(-1));
    return {v.narrow(-2, 0, count), u.narrow(-1, 0, count) * s.narrow(-1, 0, count).unsqueeze(-2)};
  }

  /// How many of S are more than what rounding leaves, the most of a batch. At least 1.
  int64_t numerical_rank() const {
    const double epsilon =
        s.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
    const auto size = static_cast<double>(std::max(u.size(-2), v.size(-1)));
    const auto ranks = s.gt(magnitude.unsqueeze(-1) * (8 * epsilon * std::sqrt(size))).sum(-1);
    return std::max<int64_t>(1, ranks.max().item<int64_t>());
  }
};

inline Spectrum spectrum(const at::Tensor& matrix) {
  const auto svd = at::linalg_svd(matrix, /*full_matrices=*/false);
  const auto& s = std::get<1>(svd);
  return {std::get<0>(svd), s, std::get<2>(svd), s.select(-1, 0)};
}

/// That of B A without forming it: with B = Q R and A^T = P T it is the one of R T^T, which has the size of the rank.
inline Spectrum spectrum(const Factors& factors) {
  const auto b = at::linalg_qr(factors.B), a = at::linalg_qr(factors.A.mT());
  const auto core = spectrum(at::matmul(std::get<1>(b), std::get<1>(a).mT()));
  const auto norm = [](const at::Tensor& matrix) { return at::linalg_vector_norm(matrix, 2, {-2, -1}); };
  const auto magnitude = norm(factors.B) * norm(factors.A) / static_cast<double>(factors.rank());  // of one rank
  return {at::matmul(std::get<0>(b), core.u), core.s, at::matmul(core.v, std::get<0>(a).mT()),
          at::maximum(magnitude, core.magnitude)};
}

/// The smallest rank that keeps a share, in (0, 1], of the energy of singular values: the sum of their squares. The
/// matrices of a batch have one rank. At least 1.
inline int64_t rank_for_energy(const at::Tensor& singular_values, double share) {
  auto energies = singular_values.to(at::kDouble).square();
  if (energies.dim() > 1) energies = energies.flatten(0, -2).sum(0);
  const auto kept = energies.cumsum(0);
  const auto enough = kept.ge(share * kept[-1]);
  return std::min(enough.logical_not().sum().item<int64_t>() + 1, kept.size(0));
}

/// Gives a method the update `factors`; the ranks that it has and they do not are zero.
inline void set_update(LowRank& method, const Factors& factors) {
  const auto rank = std::min(method.lora_A.size(-2), factors.rank());
  method.lora_A.zero_().narrow(-2, 0, rank).copy_(factors.A.narrow(-2, 0, rank));
  method.lora_B.zero_().narrow(-1, 0, rank).copy_(factors.B.narrow(-1, 0, rank) / method.scaling);
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
