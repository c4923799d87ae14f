#pragma once

#include <ATen/core/Tensor.h>

#include <lora/linkage.hpp>
#include <lora/version.hpp>

#include <cstdint>

// Products with a matrix of float32 numbers on a CPU. LibTorch computes them with MKL where it is built with it, and
// MKL has its AVX-512 kernels for Intel's processors only. oneDNN, which LibTorch has beside it for other things, has
// them for every processor: on others with AVX-512 it takes half of the time for the same arithmetic. It adds up in
// longer sums, so of 576 to 4096 products they are 3.9 to 5.8e-7 away from the exact ones, with MKL 2.5e-7 (root mean
// square, as a share of theirs). And of one row MKL's are those of the oldest processors there; ours read the matrix as
// fast as its memory gives it.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Whether large products of float32 are computed by oneDNN: from the start on processors with AVX-512 that are not
/// Intel's, under a LibTorch that has MKL and oneDNN, unless the program has switched that off
/// (`at::globalContext().setUserEnabledMkldnn(false)`).
LORA_INLINE bool takes_onednn();

/// Decides it for this process, for measurements and tests. Returns whether LibTorch has oneDNN; without it nothing is
/// changed.
LORA_INLINE bool take_onednn(bool taken);

/// Whether x M + b is computed by oneDNN, for x (..., k), an operand that is M (k, n), or its transpose where its
/// `inputs` are dimension 1, and b (n) or undefined: all are numbers of float32 on the CPU, and so many that the call,
/// or a kernel for a new shape, does not count; M gets no gradient; and nothing looks at single operators (autocast,
/// tracing, vmap, forward mode).
LORA_INLINE bool is_for_onednn(const at::Tensor& x, const at::Tensor& operand, const at::Tensor& bias, int64_t inputs);

/// The largest number up to `rows` (at least 1) that is a power of two, or three times one. oneDNN keeps a kernel for
/// each shape that it was asked for, a thousand in all, and LibTorch's memory grows by what is allocated between them:
/// so of all numbers of rows that a batch may have, it is asked for these.
inline int64_t regular_rows(int64_t rows) {
  int64_t power = 1;
  while (power <= rows / 2) power *= 2;
  return power + power / 2 <= rows ? power + power / 2 : power;
}

inline bool is_regular(int64_t rows) { return rows > 0 && regular_rows(rows) == rows; }

/// x M + b for x (N, k), M (k, n), b (n) or undefined, by oneDNN and without a gradient; where N is not regular, some
/// rows after the other, and the last few by LibTorch's choice.
LORA_INLINE at::Tensor onednn_mm(const at::Tensor& x, const at::Tensor& matrix, const at::Tensor& bias);

/// Whether the product of one row x (..., k) is computed by vectors of AVX2 or AVX-512 here: under the conditions
/// above, whoever made the processor, of matrices so large that a node of autograd does not count.
LORA_INLINE bool is_for_row_kernels(const at::Tensor& x, const at::Tensor& operand, const at::Tensor& bias,
                                    int64_t inputs);

/// Whether it is by one of the two.
inline bool is_faster_here(const at::Tensor& x, const at::Tensor& operand, const at::Tensor& bias, int64_t inputs) {
  return is_for_onednn(x, operand, bias, inputs) || is_for_row_kernels(x, operand, bias, inputs);
}

/// x M + b for x (N, k), M (k, n), b (n) or undefined for which that is true, without a gradient.
LORA_INLINE at::Tensor faster_mm(const at::Tensor& x, const at::Tensor& matrix, const at::Tensor& bias);

/// sum + x M for a `sum` (N, n), x (N, k) and M (k, n) for which `is_for_onednn` is true, as new memory.
LORA_INLINE at::Tensor onednn_plus(const at::Tensor& sum, const at::Tensor& x, const at::Tensor& matrix);

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <lora/system/parallel.hpp>
#include <lora/system/processor.hpp>
#include <lora/weight/key.hpp>
#include <lora/weight/one_row.hpp>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <optional>
#include <utility>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// LibTorch's ways to oneDNN for tensors as everybody has them.
struct OneDnn {
  /// act(x W^T + b), of which no activation is wanted, and x W^T + b + sum; none where LibTorch has no oneDNN, or other
  /// forms of them.
  std::optional<c10::OperatorHandle> product = found("", 6), sum = found("binary", 5);
  std::atomic<bool> is_taken{product && sum && has_slower_mkl()};

  static OneDnn& instance() {
    static OneDnn all;
    return all;
  }

  at::Tensor call(const std::optional<c10::OperatorHandle>& op, torch::jit::Stack stack) const {
    const BelowInterception below;
    const at::AutoDispatchBelowAutograd without_gradient;
    op->callBoxed(stack);
    return std::move(stack.front()).toTensor();
  }

 private:
  static std::optional<c10::OperatorHandle> found(const char* overload, size_t arguments) {
    if (!at::hasMKLDNN()) return std::nullopt;
    auto op = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", overload});
    const bool is_known = op && op->schema().arguments().size() == arguments && op->schema().returns().size() == 1;
    return is_known ? op : std::nullopt;
  }

  static bool has_slower_mkl() { return at::hasMKL() && has_avx512() && !is_by_intel(); }
};

LORA_INLINE bool takes_onednn() { return OneDnn::instance().is_taken && at::globalContext().userEnabledMkldnn(); }

LORA_INLINE bool take_onednn(bool taken) {
  auto& onednn = OneDnn::instance();
  if (!onednn.product || !onednn.sum) return false;
  onednn.is_taken = taken;
  return true;
}

/// Whether it is a matrix that fills its memory, or the transpose of one. For parts of larger ones oneDNN has no kernel
/// and is a thousand times slower.
inline bool is_dense_matrix(const at::Tensor& tensor) {
  const auto rows = tensor.stride(0), columns = tensor.stride(1);
  return (columns == 1 && rows == tensor.size(1)) || (rows == 1 && columns == tensor.size(0));
}

/// Whether a product is so large that the call does not count.
inline bool is_large(int64_t rows, int64_t numbers_of_matrix) {
  constexpr int64_t kLeastRows = 4, kLeastMultiplications = 1 << 21;
  return rows >= kLeastRows && rows * numbers_of_matrix >= kLeastMultiplications;
}

/// The conditions that both have beside their sizes; `x` is no nested tensor and has numbers.
inline bool is_plain_product(const at::Tensor& x, const at::Tensor& operand, const at::Tensor& bias, int64_t inputs) {
  if (!is_plain_float(x) || !is_plain_float(operand) || !is_dense_matrix(operand)) return false;
  if (bias.defined() && (bias.dim() != 1 || bias.size(0) != operand.size(1 - inputs) || !is_plain_float(bias)))
    return false;
  if (operand.requires_grad() && at::GradMode::is_enabled()) return false;
  return !at::autocast::is_autocast_enabled(at::kCPU) && !torch::jit::tracer::isTracing();
}

/// The rows of x (..., k) of a product with a matrix; 0 where they do not fit.
inline int64_t rows_of_product(const at::Tensor& x, const at::Tensor& operand, int64_t inputs) {
  if (operand.dim() != 2 || x.is_nested() || x.dim() < 2) return 0;
  return x.size(-1) == 0 || x.size(-1) != operand.size(inputs) ? 0 : x.numel() / x.size(-1);
}

LORA_INLINE bool is_for_onednn(const at::Tensor& x, const at::Tensor& operand, const at::Tensor& bias, int64_t inputs) {
  const auto rows = rows_of_product(x, operand, inputs);
  return rows > 0 && is_large(rows, operand.numel()) && takes_onednn() && is_plain_product(x, operand, bias, inputs);
}

LORA_INLINE bool is_for_row_kernels(const at::Tensor& x, const at::Tensor& operand, const at::Tensor& bias,
                                    int64_t inputs) {
  constexpr int64_t kLeast = 1 << 15;
  return rows_of_product(x, operand, inputs) == 1 && operand.numel() >= kLeast && has_avx2() &&
         is_plain_product(x, operand, bias, inputs);
}

/// y = x M + b of one row.
inline at::Tensor row_mm(const at::Tensor& x, const at::Tensor& matrix, const at::Tensor& bias) {
  constexpr int64_t kNumbersOfThread = 1 << 16;
  const at::AutoDispatchBelowAutograd without_gradient;
  const auto in = x.contiguous();
  const auto outputs = matrix.size(1);
  auto y = at::empty({1, outputs}, x.options());
  auto* to = y.mutable_data_ptr<float>();
  if (bias.defined()) {
    const auto b = bias.contiguous();
    std::copy_n(b.const_data_ptr<float>(), outputs, to);
  } else {
    std::fill_n(to, outputs, 0.0F);
  }
  const MatrixInMemory m(matrix);
  const auto grain = std::max<int64_t>(16, kNumbersOfThread / m.inputs);
  parallel_for(0, m.outputs, grain, [&](int64_t first, int64_t last) {
    add_row_product(m, in.const_data_ptr<float>(), /*scale=*/1, first, last, to);
  });
  return y;
}

LORA_INLINE at::Tensor onednn_mm(const at::Tensor& x, const at::Tensor& matrix, const at::Tensor& bias) {
  const auto& onednn = OneDnn::instance();
  const auto weight = matrix.t();
  const auto b = bias.defined() ? c10::IValue(bias) : c10::IValue();
  const auto of = [&](const at::Tensor& rows) {
    const auto no_numbers = c10::List<std::optional<at::Scalar>>();
    return onednn.call(onednn.product, {rows, weight, b, "none", no_numbers, c10::IValue()});
  };
  const auto in = x.stride(1) == 1 ? x : x.contiguous();
  const auto count = x.size(0);
  if (is_regular(count)) return of(in);
  const at::AutoDispatchBelowAutograd without_gradient;
  auto y = at::empty({count, matrix.size(1)}, x.options());
  int64_t first = 0;
  for (auto size = regular_rows(count); is_large(size, matrix.numel()); size = regular_rows(count - first)) {
    y.narrow(0, first, size).copy_(of(in.narrow(0, first, size)));
    first += size;
    if (first == count) return y;
  }
  auto last = y.narrow(0, first, count - first);
  const auto rows = in.narrow(0, first, count - first);
  bias.defined() ? at::addmm_out(last, bias, rows, matrix) : at::mm_out(last, rows, matrix);
  return y;
}

LORA_INLINE at::Tensor faster_mm(const at::Tensor& x, const at::Tensor& matrix, const at::Tensor& bias) {
  return x.size(0) == 1 ? row_mm(x, matrix, bias) : onednn_mm(x, matrix, bias);
}

LORA_INLINE at::Tensor onednn_plus(const at::Tensor& sum, const at::Tensor& x, const at::Tensor& matrix) {
  const auto& onednn = OneDnn::instance();
  return onednn.call(onednn.sum, {x, sum, matrix.t(), c10::IValue(), "add"});
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
