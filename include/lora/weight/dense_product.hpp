#pragma once

#include <ATen/core/Tensor.h>

#include <lora/linkage.hpp>
#include <lora/version.hpp>

// Products with a matrix of float32 numbers on a CPU. LibTorch computes them with MKL where it is built with it, and
// MKL has its AVX-512 kernels for Intel's processors only. oneDNN, which LibTorch has beside it for other things, has
// them for every processor: on others with AVX-512 it takes half of the time for the same arithmetic.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Whether large products of float32 are computed by oneDNN: from the start on processors with AVX-512 that are not
/// Intel's, under a LibTorch that has MKL and oneDNN, unless the program has switched that off
/// (`at::globalContext().setUserEnabledMkldnn(false)`). Which of the two computes is seen in the last bits of a result.
LORA_INLINE bool takes_onednn();

/// Decides it for this process, for measurements and tests. Returns whether LibTorch has oneDNN; without it nothing is
/// changed.
LORA_INLINE bool take_onednn(bool taken);

/// Whether x M + b is computed by oneDNN, for x (..., k), an operand that is M (k, n), or its transpose where its
/// `inputs` are dimension 1, and b (n) or undefined: all are numbers of float32 on the CPU, and so many that the call,
/// or a kernel for a new shape, does not count; M gets no gradient; and nothing looks at single operators (autocast,
/// tracing, vmap, forward mode).
LORA_INLINE bool is_for_onednn(const at::Tensor& x, const at::Tensor& operand, const at::Tensor& bias, int64_t inputs);

/// x M + b for x (N, k), M (k, n), b (n) or undefined, by oneDNN and without a gradient.
LORA_INLINE at::Tensor onednn_mm(const at::Tensor& x, const at::Tensor& matrix, const at::Tensor& bias);

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/Context.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <atomic>
#include <cstddef>
#include <optional>
#include <utility>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// LibTorch's way to oneDNN for tensors as everybody has them: y = act(x W^T + b), of which no activation is wanted.
struct OneDnn {
  std::optional<c10::OperatorHandle> op = found();  ///< none where LibTorch has no oneDNN, or another form of it
  std::atomic<bool> is_taken{op.has_value() && has_slower_mkl()};

  static OneDnn& instance() {
    static OneDnn all;
    return all;
  }

 private:
  static std::optional<c10::OperatorHandle> found() {
    if (!at::hasMKLDNN()) return std::nullopt;
    auto op = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    constexpr size_t kArguments = 6;  // x, weight, bias, and of the activation its name, numbers and algorithm
    const bool is_known = op && op->schema().arguments().size() == kArguments && op->schema().returns().size() == 1;
    return is_known ? op : std::nullopt;
  }

  static bool has_slower_mkl() {
#if defined(__x86_64__) && defined(__GNUC__)
    return at::hasMKL() && !__builtin_cpu_is("intel") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
#else
    return false;
#endif
  }
};

LORA_INLINE bool takes_onednn() { return OneDnn::instance().is_taken && at::globalContext().userEnabledMkldnn(); }

LORA_INLINE bool take_onednn(bool taken) {
  auto& onednn = OneDnn::instance();
  if (!onednn.op) return false;
  onednn.is_taken = taken;
  return true;
}

/// Whether it is a float32 tensor in the memory of a CPU that nothing looks through (vmap, forward mode).
inline bool is_plain_float(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat && tensor.is_cpu() && tensor.layout() == at::kStrided &&
         !at::isTensorSubclassLike(tensor) && !tensor._fw_grad(0).defined();
}

/// Whether it is a matrix whose numbers lie one after the other in one of its dimensions, and not in the same place.
inline bool is_dense_matrix(const at::Tensor& tensor) {
  if (tensor.dim() != 2) return false;
  const auto rows = tensor.stride(0), columns = tensor.stride(1);
  return (columns == 1 && rows >= tensor.size(1)) || (rows == 1 && columns >= tensor.size(0));
}

LORA_INLINE bool is_for_onednn(const at::Tensor& x, const at::Tensor& operand, const at::Tensor& bias, int64_t inputs) {
  constexpr int64_t kLeastRows = 8, kLeastMultiplications = 1 << 22;
  if (operand.dim() != 2 || x.dim() < 2 || x.size(-1) == 0 || x.size(-1) != operand.size(inputs)) return false;
  const auto rows = x.numel() / x.size(-1);
  if (rows < kLeastRows || rows * operand.numel() < kLeastMultiplications || !takes_onednn()) return false;
  if (!is_plain_float(x) || !is_plain_float(operand) || !is_dense_matrix(operand)) return false;
  if (bias.defined() && (bias.dim() != 1 || bias.size(0) != operand.size(1 - inputs) || !is_plain_float(bias)))
    return false;
  if (operand.requires_grad() && at::GradMode::is_enabled()) return false;
  return !at::autocast::is_autocast_enabled(at::kCPU) && !torch::jit::tracer::isTracing();
}

LORA_INLINE at::Tensor onednn_mm(const at::Tensor& x, const at::Tensor& matrix, const at::Tensor& bias) {
  const at::AutoDispatchBelowAutograd below;
  const auto value = [](const at::Tensor& tensor) { return tensor.defined() ? c10::IValue(tensor) : c10::IValue(); };
  torch::jit::Stack stack{x.contiguous(), matrix.t(), value(bias), "none", c10::List<std::optional<at::Scalar>>(),
                          c10::IValue()};
  OneDnn::instance().op->callBoxed(stack);
  return std::move(stack.front()).toTensor();
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
