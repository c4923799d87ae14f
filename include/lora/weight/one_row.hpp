#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <lora/version.hpp>
#include <lora/weight/plain.hpp>
#include <lora/weight/row_kernels.hpp>

#include <algorithm>
#include <cstdint>

// The products of thin_product.hpp for one row of a batch, in float32 on a CPU: there a call of a library that is made
// for large matrices would be most of what they cost.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

inline bool is_plain_float(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat && tensor.is_cpu() && is_plain(tensor);
}

/// A factor (rank, features) in memory, of which the features of each rank lie together, as in A, or the ranks of each
/// feature, as in the transpose of B.
struct FactorInMemory {
  explicit FactorInMemory(const at::Tensor& factor)
      : rank(factor.size(0)),
        features(factor.size(1)),
        is_by_rank(factor.stride(1) == 1),
        rows{factor.const_data_ptr<float>(), factor.stride(is_by_rank ? 0 : 1), is_by_rank ? rank : features} {}

  int64_t rank, features;
  bool is_by_rank;
  RowsInMemory rows;
};

/// Whether products of a factor (rank, features) and one row, as a row or as a column, are computed here.
inline bool is_for_one_row(const at::Tensor& factor, const at::Tensor& one) {
  constexpr int64_t kMost = 1 << 17;  // numbers; of more, several threads may have some each
  const auto lies_together = [&](int64_t dim) { return one.size(dim) == 1 || one.stride(dim) == 1; };
  return factor.numel() > 0 && factor.numel() <= kMost && (factor.stride(1) == 1 || factor.stride(0) == 1) &&
         lies_together(0) && lies_together(1) && is_plain_float(factor) && is_plain_float(one);
}

/// M x (rank, 1) for a factor M (rank, features), x (features, 1).
inline at::Tensor product_with_one(const at::Tensor& factor, const at::Tensor& x) {
  const FactorInMemory m(factor);
  auto product = at::empty({m.rank, 1}, factor.options());
  const auto* in = x.const_data_ptr<float>();
  auto* out = product.mutable_data_ptr<float>();
  std::fill_n(out, m.rank, 0.0F);
  if (m.is_by_rank) {
    row_kernels().add_dots(m.rows, in, m.features, out);
    return product;
  }
  int64_t i = 0;
  for (; i + plain::kFour <= m.rank; i += plain::kFour) {  // of so few the sums are in registers
    plain::Four even = {}, odd = {};
    for (int64_t k = 0; k < m.features; ++k) (k % 2 == 0 ? even : odd) += in[k] * plain::load_four(m.rows.row(k) + i);
    even += odd;
    plain::store(even, out + i);
  }
  for (; i < m.rank; ++i) {
    for (int64_t k = 0; k < m.features; ++k) out[i] += in[k] * m.rows.row(k)[i];
  }
  return product;
}

/// sum (1, features) += scale c M for c (1, rank), a factor M (rank, features).
inline void add_product_with_one(const at::Tensor& sum, const at::Tensor& c, const at::Tensor& factor, double scale) {
  const FactorInMemory m(factor);
  const auto* in = c.const_data_ptr<float>();
  const auto by = static_cast<float>(scale);
  auto* out = sum.mutable_data_ptr<float>();
  if (m.is_by_rank) return row_kernels().add_rows(m.rows, in, by, m.features, out);
  for (int64_t k = 0; k < m.features; ++k) out[k] += by * plain::dot(m.rows.row(k), in, m.rank);
}

/// scale a b for a (rank, 1), b (1, features), in memory as `like` is, which has the result's shape.
inline at::Tensor outer_product(const at::Tensor& like, const at::Tensor& a, const at::Tensor& b, double scale) {
  const bool is_by_rank = like.stride(1) == 1;
  const auto &rows = is_by_rank ? a : b, &columns = is_by_rank ? b : a;
  auto product = at::empty({rows.numel(), columns.numel()}, like.options());
  const auto *of_row = rows.const_data_ptr<float>(), *of_column = columns.const_data_ptr<float>();
  const auto width = columns.numel();
  auto* out = product.mutable_data_ptr<float>();
  for (int64_t i = 0; i < rows.numel(); ++i, out += width) {
    const auto factor = static_cast<float>(scale) * of_row[i];
    int64_t k = 0;
    for (; k + plain::kFour <= width; k += plain::kFour)
      plain::store(factor * plain::load_four(of_column + k), out + k);
    for (; k < width; ++k) out[k] = factor * of_column[k];
  }
  return is_by_rank ? product : product.t();
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
