#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/custom_function.h>

#include <lora/method/term.hpp>
#include <lora/version.hpp>
#include <lora/weight/key.hpp>

#include <optional>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// A product with low-rank updates as one node of autograd, which owns the frozen product:
///
///   y = x M^T + b,   y[:, at_i : at_i + n_i] += s_i (x A_i^T) B_i^T
///
/// Shapes: x (N, in); M (out, in); b (out) or undefined; A_i (rank_i, in); B_i (n_i, rank_i). All of one type. M gets
/// no gradient. With g = dL/dy, g_i its columns of update i, S_i = A_i x^T and G_i = B_i^T g_i^T:
///
///   dx = g M + sum_i s_i G_i^T A_i,   dA_i = s_i G_i x,   dB_i = s_i g_i^T S_i^T,   db = sum of g over N
///
/// What is kept for backward is S_i (rank_i, N) beside the operands. Updates are added in place, scales are folded into
/// the products, and of a skinny product that orientation is taken in which its long side is a row.
class LowRankLinear : public torch::autograd::Function<LowRankLinear> {
 public:
  struct Slice {
    at::Tensor A, B;
    double scale;
    int64_t at;  ///< the first output that it acts on
  };
  using Slices = std::vector<Slice>;

  static at::Tensor compute(const Product& product, const at::Tensor& x, const Slices& slices) {
    const auto needs_gradient = [](const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); };
    bool needs_any = needs_gradient(x) || needs_gradient(product.bias);
    for (const auto& slice : slices) needs_any = needs_any || needs_gradient(slice.A) || needs_gradient(slice.B);
    if (!needs_any || !at::GradMode::is_enabled()) return add_all(product, x, slices, /*kept=*/nullptr);
    torch::autograd::variable_list factors;
    for (const auto& slice : slices) factors.insert(factors.end(), {slice.A, slice.B});
    const auto bias = product.bias.defined() ? std::optional<at::Tensor>(product.bias) : std::nullopt;
    return apply(x, bias, at::TensorList(factors), &product, &slices);
  }

  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x,
                            const std::optional<at::Tensor>& /*bias*/, at::TensorList factors, const Product* product,
                            const Slices* slices) {
    torch::autograd::variable_list kept{x, product->operand};
    kept.insert(kept.end(), factors.begin(), factors.end());
    auto y = add_all(*product, x, *slices, &kept);
    context->save_for_backward(std::move(kept));
    std::vector<double> scales;
    std::vector<int64_t> places;
    for (const auto& slice : *slices) {
      scales.push_back(slice.scale);
      places.push_back(slice.at);
    }
    context->saved_data = {{"scales", std::move(scales)},
                           {"places", std::move(places)},
                           {"columns", product->form == Product::Form::kColumns},
                           {"bias", product->bias.defined()}};
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const BelowInterception below;  // the frozen matrix is meant, also where the pass runs inside of a scope
    const auto kept = context->get_saved_variables();
    const auto scales = context->saved_data["scales"].toDoubleVector();
    const auto places = context->saved_data["places"].toIntVector();
    const auto& x = kept[0];
    const auto matrix = context->saved_data["columns"].toBool() ? kept[1].t() : kept[1];
    const auto g = gradients[0].is_contiguous() ? gradients[0] : gradients[0].contiguous();
    const bool is_differentiated = at::GradMode::is_enabled();

    const auto count = scales.size();
    torch::autograd::variable_list all(2 + 2 * count + 2);  // x, b, factors; and two that are no tensors
    const bool wants_x = context->needs_input_grad(0), has_bias = context->saved_data["bias"].toBool();
    const size_t first = has_bias ? 2 : 1;  // of the factors' edges; without a bias there is none for it
    if (wants_x) all[0] = g.mm(matrix);
    if (has_bias && context->needs_input_grad(1)) all[1] = g.sum(0);
    for (size_t i = 0; i < count; ++i) {
      const auto &A = kept[2 + 2 * i], &B = kept[3 + 2 * i];
      const auto own = g.size(1) == B.size(0) ? g : g.narrow(1, places[i], B.size(0));
      auto &dx = all[0], &dA = all[2 + 2 * i], &dB = all[3 + 2 * i];
      if (is_differentiated) {
        const auto G = own.mm(B) * scales[i];
        if (wants_x) dx = dx + G.mm(A);
        dA = G.t().mm(x);
        dB = own.t().mm(x.mm(A.t())) * scales[i];
        continue;
      }
      const auto G = B.t().mm(own.t());
      if (wants_x) dx.addmm_(G.t(), A, /*beta=*/1, scales[i]);
      if (context->needs_input_grad(first + 2 * i)) dA = at::addmm(A, G, x, /*beta=*/0, scales[i]);
      if (context->needs_input_grad(first + 2 * i + 1)) {
        const auto& S = kept[2 + 2 * count + i];
        dB = at::addmm(B.t(), S, own, /*beta=*/0, scales[i]).t();
      }
    }
    return all;
  }

 private:
  /// y; and every S_i at the end of `kept`, if that is given.
  static at::Tensor add_all(const Product& product, const at::Tensor& x, const Slices& slices,
                            torch::autograd::variable_list* kept) {
    auto y = product.run(x, product.operand, product.bias);
    for (const auto& slice : slices) {
      const auto S = slice.A.mm(x.t());
      auto own = y.size(1) == slice.B.size(0) ? y : y.narrow(1, slice.at, slice.B.size(0));
      own.addmm_(S.t(), slice.B.t(), /*beta=*/1, slice.scale);
      if (kept != nullptr) kept->push_back(S);
    }
    return y;
  }
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
