#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <c10/util/Exception.h>
#include <c10/util/FunctionRef.h>

#include <lora/version.hpp>

#include <algorithm>
#include <cstdint>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// U with (H + damping)^-1 = U^T U: of H = V V^T, V an upper triangle, which turned about is a Cholesky factor, the
/// inverse of V.
inline at::Tensor inverse_root(const at::Tensor& moments) {
  constexpr int kTries = 8;
  const auto mean = moments.diagonal().mean();
  const auto turned = moments.flip({0, 1});
  const auto one = at::eye(moments.size(0), moments.options());
  double share = 0.01;
  for (int i = 0; i < kTries; ++i, share *= 10) {
    const auto [factor, info] = at::linalg_cholesky_ex(turned + one * (mean * share));
    if (info.item<int>() == 0) return at::linalg_solve_triangular(factor.flip({0, 1}), one, /*upper=*/true);
  }
  C10_THROW_ERROR(Error, c10::str("lora: the moments of inputs ", moments.sizes(), " have no inverse"));
}

/// Makes of the numbers (out) that an input multiplies what they are rounded to.
using RoundInput = c10::function_ref<at::Tensor(int64_t input, const at::Tensor& numbers)>;

/// Rounds the inputs (columns) of W (out, in) one after the other so that the sum of |(W_q - W) x|^2 over all x that
/// were seen is small. The largest inputs come first, and what rounding one loses is made up by those that are not
/// rounded yet: with H = sum of x x^T + damping, in that order, H^-1 = U^T U, U an upper triangle, and q_j what `round`
/// makes of column j,
///
///   w_k -= U_jk (w_j - q_j) / U_jj   for k > j
///
/// `weight_t` is W^T (in, out), of floats. The damping is a hundredth of the mean of H's diagonal, and more where H is
/// no matrix of squares to rounding. Reference: Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for
/// Generative Pre-trained Transformers".
inline void round_in_turn(const at::Tensor& weight_t, const at::Tensor& moments, RoundInput round) {
  constexpr int64_t kBlock = 64;
  const auto inputs = weight_t.size(0);
  const auto order = moments.diagonal().argsort(/*stable=*/true, /*dim=*/0, /*descending=*/true);
  const auto root = inverse_root(moments.index_select(0, order).index_select(1, order));
  const auto steps = root.diagonal().cpu().contiguous(), inputs_in_order = order.cpu().contiguous();
  const auto* input = inputs_in_order.const_data_ptr<int64_t>();
  const auto* step = steps.const_data_ptr<float>();
  auto rest = weight_t.index_select(0, order);
  for (int64_t first = 0; first < inputs; first += kBlock) {
    const auto count = std::min(kBlock, inputs - first), end = first + count;
    const auto lost = at::empty({count, rest.size(1)}, rest.options());
    for (auto i = first; i < end; ++i) {
      const auto numbers = rest.select(0, i);
      const auto error = lost.select(0, i - first);
      error.copy_((numbers - round(input[i], numbers)).div_(step[i]));
      if (const auto left = end - i - 1; left > 0)
        rest.narrow(0, i + 1, left).addr_(root.select(0, i).narrow(0, i + 1, left), error, /*beta=*/1, /*alpha=*/-1);
    }
    if (end < inputs) {  // what is further off is made up for the whole block at once
      const auto across = root.narrow(0, first, count).narrow(1, end, inputs - end);
      rest.narrow(0, end, inputs - end).addmm_(across.t(), lost, /*beta=*/1, /*alpha=*/-1);
    }
  }
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
