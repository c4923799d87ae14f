#pragma once

#include <ATen/core/Tensor.h>

#include <lora/linkage.hpp>
#include <lora/version.hpp>
#include <lora/weight/dense_product.hpp>
#include <lora/weight/placeholder.hpp>

// Products with a frozen weight that are not LibTorch's own. Of one that is held in few bits the numbers are there only
// while they are needed: a panel of them, small enough for the cache, is written out and multiplied with, and then the
// next one. Of one in float32 they are computed in another way where that is faster.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// x M + b for x (N, k) and a view M (k, n) of a quantized weight, in the type of x, without a gradient.
LORA_INLINE at::Tensor quantized_mm_value(const at::Tensor& x, const at::Tensor& operand, const at::Tensor& bias);

/// x M for x (N, k) and any matrix M (k, n), held in few bits or not; of a product that is not LibTorch's own, M gets
/// no gradient.
LORA_INLINE at::Tensor matrix_product(const at::Tensor& x, const at::Tensor& matrix);

/// sum + x M for such a product and a `sum` (N, n) of its type that nobody else holds, without a gradient: in its
/// memory, unless new memory is faster.
LORA_INLINE at::Tensor plus_matrix_product(const at::Tensor& sum, const at::Tensor& x, const at::Tensor& matrix);

/// Throws where a weight that has its numbers would not multiply with such an input, either.
LORA_INLINE void check_type(const at::Tensor& x, const at::Tensor& operand);

/// Whether a product with an operand that has its numbers is nevertheless computed here; `inputs` as in
/// `is_for_onednn`.
inline bool is_computed_here(const at::Tensor& x, const at::Tensor& operand, const at::Tensor& bias, int64_t inputs) {
  return is_quantized(operand) || is_faster_here(x, operand, bias, inputs);
}

/// x M + b for x (..., k), a matrix M (k, n) for which the above is true, and b that broadcasts to the product, or
/// undefined. With a quantized weight under autocast in its type.
LORA_INLINE at::Tensor frozen_linear(const at::Tensor& input, const at::Tensor& operand, const at::Tensor& bias);

/// The entries of a quantized table (entries, width) at `indices` (...), shaped (..., width).
LORA_INLINE at::Tensor quantized_entries(const at::Tensor& table, const at::Tensor& indices);

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/ExpandUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <lora/system/parallel.hpp>
#include <lora/weight/key.hpp>
#include <lora/weight/optional.hpp>
#include <lora/weight/plain.hpp>

#include <algorithm>
#include <functional>
#include <numeric>
#include <optional>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// For so few rows of x each product is computed from the few bits themselves.
inline constexpr int64_t kFewRows = 2;

/// The part of a bias that is added to `count` columns of a product.
inline at::Tensor columns_of(const at::Tensor& bias, int64_t first, int64_t count) {
  return bias.dim() == 0 || bias.size(-1) == 1 ? bias : bias.narrow(-1, first, count);
}

/// y = x M + b for x (N, k), where `columns(out, first, count, numbers)` writes the columns [first, first + count) of M
/// (k, n) to `out`, the memory of `numbers`, and gives them as a matrix (k, count). Each number of y is written once.
template <class Columns>
at::Tensor in_panels(const at::Tensor& x, int64_t outputs, int64_t width, const at::Tensor& bias,
                     const Columns& columns) {
  auto y = at::empty({x.size(0), outputs}, x.options());
  const auto numbers = at::empty({x.size(1) * std::min(width, outputs)}, x.options().dtype(at::kFloat));
  for (int64_t first = 0; first < outputs; first += width) {
    const auto count = std::min(width, outputs - first);
    const auto panel = columns(numbers.mutable_data_ptr<float>(), first, count, numbers).to(x.scalar_type());
    auto out = y.narrow(1, first, count);
    if (const auto b = bias.defined() ? columns_of(bias, first, count) : bias; is_for_onednn(x, panel, b, 0)) {
      out.copy_(onednn_mm(x, panel, b));
    } else {
      b.defined() ? at::addmm_out(out, b, x, panel) : at::mm_out(out, x, panel);
    }
  }
  return y;
}

/// y (N, count) = x (N, columns) W^T + b for rows W of a weight on the CPU.
inline at::Tensor times_transposed_rows(const at::Tensor& x, const HeldRows& rows, const at::Tensor& bias) {
  if (x.size(0) <= kFewRows && x.scalar_type() == at::kFloat && rows.weight->sizes().size() == 2) {
    auto y = at::empty({x.size(0), rows.count}, x.options());
    const auto in = x.contiguous();
    for (int64_t i = 0; i < x.size(0); ++i)
      rows.weight->dot_rows(rows.first, rows.count, in.const_data_ptr<float>() + i * rows.columns,
                            y.mutable_data_ptr<float>() + i * rows.count);
    return bias.defined() ? y.add_(bias) : y;
  }
  const auto height = std::max<int64_t>(1, kPanel / std::max<int64_t>(1, rows.columns));
  return in_panels(x, rows.count, height, bias, [&](float* out, int64_t row, int64_t count, const at::Tensor& numbers) {
    rows.weight->unpack((rows.first + row) * rows.columns, count * rows.columns, out);
    return numbers.narrow(0, 0, count * rows.columns).view({count, rows.columns}).t();
  });
}

/// The same product as `times_rows`, as a sum over panels of rows.
inline at::Tensor sum_over_rows(const at::Tensor& x, const HeldRows& rows, const at::Tensor& bias) {
  const auto height = std::max<int64_t>(1, kPanel / rows.columns);
  const auto numbers = at::empty({height, rows.columns}, x.options().dtype(at::kFloat));
  auto y = at::zeros({x.size(0), rows.columns}, x.options());
  for (int64_t first = 0; first < rows.count; first += height) {
    const auto count = std::min(height, rows.count - first);
    rows.weight->unpack((rows.first + first) * rows.columns, count * rows.columns, numbers.mutable_data_ptr<float>());
    const auto panel = numbers.narrow(0, 0, count).to(x.scalar_type()), some = x.narrow(1, first, count);
    y = is_regular(x.size(0)) && is_for_onednn(some, panel, {}, 0) ? onednn_plus(y, some, panel)
                                                                   : y.addmm_(some, panel);
  }
  return bias.defined() ? y.add_(bias) : y;
}

/// y (N, columns) = x (N, count) W + b for rows W of a weight on the CPU.
inline at::Tensor times_rows(const at::Tensor& x, const HeldRows& rows, const at::Tensor& bias) {
  constexpr int64_t kMultiple = 64;  // of what codes share in most schemes
  const bool is_wide = x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble;  // halves are rounded once
  // As of a head, of which a panel has so few columns that products with it are slow.
  if (is_wide && rows.columns > kMultiple && rows.count * kMultiple > kPanel) return sum_over_rows(x, rows, bias);
  const auto fitting = kPanel / std::max<int64_t>(1, rows.count) / kMultiple * kMultiple;
  const auto width = std::max(kMultiple, fitting);
  return in_panels(x, rows.columns, width, bias,
                   [&](float* out, int64_t column, int64_t count, const at::Tensor& numbers) {
                     if (count == rows.columns) {
                       rows.weight->unpack(rows.first * rows.columns, rows.count * count, out);
                     } else {
                       parallel_for(0, rows.count, /*grain_size=*/16, [&](int64_t begin, int64_t end) {
                         for (auto row = begin; row < end; ++row)
                           rows.weight->unpack((rows.first + row) * rows.columns + column, count, out + row * count);
                       });
                     }
                     return numbers.narrow(0, 0, rows.count * count).view({rows.count, count});
                   });
}

LORA_INLINE at::Tensor quantized_mm_value(const at::Tensor& x, const at::Tensor& operand, const at::Tensor& bias) {
  const auto rows = x.device() == at::kCPU ? held_rows(operand) : std::nullopt;
  if (!rows) {
    const auto matrix = dequantized(operand).to(x.scalar_type());
    return bias.defined() ? at::addmm(bias, x, matrix) : at::mm(x, matrix);
  }
  return rows->is_transposed ? times_transposed_rows(x, *rows, bias) : times_rows(x, *rows, bias);
}

/// x M + b as a node of autograd, which keeps for backward nothing but M: dx = dy M^T, db = sum of dy.
class FrozenMm : public torch::autograd::Function<FrozenMm> {
 public:
  static at::Tensor compute(const at::Tensor& x, const at::Tensor& operand, const at::Tensor& bias = {}) {
    const bool has_gradient = x.requires_grad() || (bias.defined() && bias.requires_grad());
    if (!has_gradient || !at::GradMode::is_enabled()) return value(x, operand, bias);
    return apply(x, operand, optional(bias));
  }

  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& operand,
                            const std::optional<at::Tensor>& bias) {
    context->save_for_backward({operand});
    context->saved_data["bias"] = bias ? std::optional<std::vector<int64_t>>(bias->sizes().vec()) : std::nullopt;
    return value(x, operand, bias.value_or(at::Tensor()));
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const BelowInterception below;
    const auto& g = gradients[0];
    const auto operand = context->get_saved_variables()[0];
    at::Tensor dx, db;
    if (context->needs_input_grad(0)) dx = matrix_product(g.contiguous(), operand.t());
    const auto& bias = context->saved_data["bias"];
    if (!bias.isNone() && context->needs_input_grad(2)) db = at::sum_to(g, bias.toIntVector());
    return {dx, at::Tensor(), db};
  }

 private:
  static at::Tensor value(const at::Tensor& x, const at::Tensor& operand, const at::Tensor& bias) {
    return is_quantized(operand) ? quantized_mm_value(x, operand, bias) : faster_mm(x, operand, bias);
  }
};

LORA_INLINE at::Tensor matrix_product(const at::Tensor& x, const at::Tensor& matrix) {
  return is_computed_here(x, matrix, {}, /*inputs=*/0) ? FrozenMm::compute(x, matrix) : x.mm(matrix);
}

LORA_INLINE at::Tensor plus_matrix_product(const at::Tensor& sum, const at::Tensor& x, const at::Tensor& matrix) {
  const bool is_held = is_quantized(matrix);
  if (!is_held && is_for_onednn(x, matrix, {}, /*inputs=*/0) && is_regular(x.size(0)))
    return onednn_plus(sum, x, matrix);
  return is_held || is_faster_here(x, matrix, {}, 0) ? sum.add_(matrix_product(x, matrix)) : sum.addmm_(x, matrix);
}

LORA_INLINE void check_type(const at::Tensor& x, const at::Tensor& operand) {
  if (!is_quantized(operand) || x.scalar_type() == operand.scalar_type()) return;
  if (!at::isFloatingType(x.scalar_type())) return;  // numbers of entries
  TORCH_CHECK(at::autocast::is_autocast_enabled(x.device().type()), "lora: the input is of the type ", x.scalar_type(),
              ", but the weight ", held_numbers(operand)->name,
              ", which is held in few bits, stands for one of the type ", operand.scalar_type(),
              "; cast the input, or the model");
}

LORA_INLINE at::Tensor frozen_linear(const at::Tensor& input, const at::Tensor& operand, const at::Tensor& bias) {
  const auto device = input.device().type();
  const bool casts = at::autocast::is_autocast_enabled(device) && input.scalar_type() != at::kDouble;
  const auto type = casts ? at::autocast::get_autocast_dtype(device) : input.scalar_type();
  const auto x = input.to(type), b = bias.defined() ? bias.to(type) : bias;
  // What is traced has to be operators: the numbers become a constant of the graph.
  const bool is_recorded = torch::jit::tracer::isTracing() || !is_plain(x);
  if (is_recorded || operand.dim() != 2) {
    const auto y = at::matmul(x, dequantized(operand).to(type));
    return b.defined() ? y + b : y;
  }
  TORCH_CHECK(at::isFloatingType(x.scalar_type()) && x.dim() > 0 && x.size(-1) == operand.size(0),
              "lora: a product of an input of type ", x.scalar_type(), " and shape ", x.sizes(),
              " and a quantized matrix of shape ", operand.sizes(), ", which do not fit");
  if (x.dim() == 2) return FrozenMm::compute(x, operand, b);
  const auto rows = std::accumulate(x.sizes().begin(), x.sizes().end() - 1, int64_t{1}, std::multiplies<>());
  auto sizes = x.sizes().vec();
  sizes.back() = operand.size(1);
  return FrozenMm::compute(x.reshape({rows, x.size(-1)}), operand, b).view(sizes);
}

LORA_INLINE at::Tensor quantized_entries(const at::Tensor& table, const at::Tensor& indices) {
  auto sizes = indices.sizes().vec();
  sizes.push_back(table.size(1));
  const bool is_here = table.device() == at::kCPU && indices.device() == at::kCPU && !torch::jit::tracer::isTracing();
  const auto held = is_here ? held_rows(table) : std::nullopt;
  const bool are_integers = at::isIntegralType(indices.scalar_type(), /*includeBool=*/false);
  if (!held || held->is_transposed || !are_integers)  // what does not fit is refused there
    return dequantized(table).index_select(0, indices.flatten()).view(sizes);
  const auto rows = *held;
  const auto wanted = indices.to(at::kLong).contiguous();
  const auto* numbers = wanted.const_data_ptr<int64_t>();
  auto entries = at::empty(sizes, table.options().dtype(at::kFloat).requires_grad(false));
  auto* out = entries.mutable_data_ptr<float>();
  const auto columns = rows.columns;
  constexpr int64_t kGrain = 1 << 15;  // numbers
  parallel_for(0, wanted.numel(), std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns)),
               [&](int64_t begin, int64_t end) {
                 for (auto i = begin; i < end; ++i) {
                   TORCH_CHECK_INDEX(numbers[i] >= 0 && numbers[i] < rows.count, "lora: index ", numbers[i],
                                     " is looked up in a table of ", rows.count, " entries");
                   rows.weight->unpack((rows.first + numbers[i]) * columns, columns, out + i * columns);
                 }
               });
  return entries.to(table.scalar_type());
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
