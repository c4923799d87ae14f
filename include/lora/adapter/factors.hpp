#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/matmul.h>

#include <lora/method/low_rank.hpp>
#include <lora/version.hpp>

#include <algorithm>
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

  /// The first ones of S.
  Factors first(int64_t rank) const {
    const auto count = std::min(rank, s.size(-1));
    return {v.narrow(-2, 0, count), u.narrow(-1, 0, count) * s.narrow(-1, 0, count).unsqueeze(-2)};
  }
};

inline Spectrum spectrum(const at::Tensor& matrix) {
  const auto svd = at::linalg_svd(matrix, /*full_matrices=*/false);
  return {std::get<0>(svd), std::get<1>(svd), std::get<2>(svd)};
}

/// That of B A without forming it: with B = Q R and A^T = P T it is the one of R T^T, which has the size of the rank.
inline Spectrum spectrum(const Factors& factors) {
  const auto b = at::linalg_qr(factors.B), a = at::linalg_qr(factors.A.mT());
  const auto core = spectrum(at::matmul(std::get<1>(b), std::get<1>(a).mT()));
  return {at::matmul(std::get<0>(b), core.u), core.s, at::matmul(core.v, std::get<0>(a).mT())};
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

/// The rank of a matrix (out, in) but for what rounding leaves of it, the largest one of a batch. At least 1.
inline int64_t numerical_rank(const at::Tensor& singular_values, int64_t largest_size) {
  const double precision = singular_values.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                                        : std::numeric_limits<float>::epsilon();
  const auto rounding = singular_values.narrow(-1, 0, 1) * (precision * static_cast<double>(largest_size));
  const auto ranks = singular_values.gt(rounding).sum(-1);
  return std::max<int64_t>(1, ranks.max().item<int64_t>());
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
