#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_convolution.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_bag.h>
#include <ATen/ops/embedding_renorm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <lora/intercept/fused_attention.hpp>
#include <lora/intercept/weight_table.hpp>
#include <lora/version.hpp>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

// How the stock layers of an unchanged model are adapted: while a scope is active on a thread, a dispatch key that lies
// above autograd and autocast sends the operators that take weights here first. Every other operator falls through the
// key at no cost. An operator whose operand is an adapted weight is computed in one of two ways: a product with the
// whole weight gets the update of the method added; any other operator receives W' in place of W, or the same part of
// W'.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Hides the key while an operator that was seen here runs.
struct BelowInterception {
  c10::impl::ExcludeDispatchKeyGuard below{kInterceptionKey};
};

/// The operand with the updates of its matches added, or, with `drop`, of those whose dropout is not applied apart.
inline at::Tensor substituted(const at::Tensor& operand, const Matches& matches, bool skip_dropping,
                              bool drop_features) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::Tensor sum;
  for (const auto& match : matches) {
    if (skip_dropping && match.handler->dropout() > 0) continue;
    match.handler->count_use();
    auto delta = match.handler->delta(drop_features);
    if (!delta.defined()) continue;
    delta = same_part(delta, match.weight, operand);
    sum = sum.defined() ? sum + delta : delta;
  }
  return sum.defined() ? (operand.to(sum.scalar_type()) + sum).to(operand.scalar_type()) : operand;
}

/// An operator y = op(x, W, b) that is linear in x and in W. `run(x, operand, bias)` computes it; `whole` is how the
/// operand of a plain product lies in the weight.
template <class Run>
at::Tensor adapt_multiplication(const at::Tensor& operand, std::optional<Part> whole, const at::Tensor& x,
                                const at::Tensor& bias, bool in_backward_too, const Run& run) {
  const auto matches = find_matches(operand, Use::kProduct, in_backward_too);
  if (matches.empty()) return run(x, operand, bias);
  if (whole && matches.can_add(*whole, Use::kProduct)) {
    auto y = run(x, operand, bias);
    for (const auto& match : matches) y = match.handler->adapt(x, y, bias, {});
    return y;
  }
  auto y = run(x, substituted(operand, matches, /*skip_dropping=*/true, /*drop_features=*/false), bias);
  for (const auto& match : matches) {
    if (match.handler->dropout() == 0) continue;
    match.handler->count_use();
    auto delta = same_part(match.handler->delta(/*drop_features=*/false), match.weight, operand).to(y.scalar_type());
    y = y + run(at::dropout(x, match.handler->dropout(), /*train=*/true), delta, at::Tensor());
  }
  return y;
}

/// An operand of a product that may be a weight although it stands on the left.
inline at::Tensor left_operand(const at::Tensor& x, bool in_backward_too) {
  const auto matches = find_matches(x, Use::kProduct, in_backward_too);
  return matches.empty() ? x : substituted(x, matches, /*skip_dropping=*/false, /*drop_features=*/true);
}

inline at::Tensor linear_kernel(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  BelowInterception guard;
  return adapt_multiplication(weight, Part::kWhole, x, bias.value_or(at::Tensor()), true,
                              [](const at::Tensor& x, const at::Tensor& w, const at::Tensor& b) {
                                return at::linear(x, w, b.defined() ? std::optional<at::Tensor>(b) : std::nullopt);
                              });
}

inline at::Tensor addmm_kernel(const at::Tensor& bias, const at::Tensor& x, const at::Tensor& matrix,
                               const at::Scalar& beta, const at::Scalar& alpha) {
  BelowInterception guard;
  const bool is_plain = beta.equal(1) && alpha.equal(1);
  return adapt_multiplication(matrix, is_plain ? std::optional(Part::kTransposed) : std::nullopt, left_operand(x, true),
                              bias, true, [&](const at::Tensor& x, const at::Tensor& m, const at::Tensor& b) {
                                return b.defined() ? at::addmm(b, x, m, beta, alpha) : at::mm(x, m).mul(alpha);
                              });
}

inline at::Tensor matmul_kernel(const at::Tensor& x, const at::Tensor& matrix) {
  BelowInterception guard;
  return adapt_multiplication(
      matrix, Part::kTransposed, left_operand(x, true), {}, true,
      [](const at::Tensor& x, const at::Tensor& m, const at::Tensor& /*bias*/) { return at::matmul(x, m); });
}

/// Autograd's own backward multiplies with weights by at::mm, so only those of forward passes are adapted.
inline at::Tensor mm_kernel(const at::Tensor& x, const at::Tensor& matrix) {
  BelowInterception guard;
  return adapt_multiplication(
      matrix, Part::kTransposed, left_operand(x, false), {}, false,
      [](const at::Tensor& x, const at::Tensor& m, const at::Tensor& /*bias*/) { return at::mm(x, m); });
}

/// `run(x, weight, bias)` convolves.
template <class Run>
at::Tensor adapt_convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                             const Run& run) {
  BelowInterception guard;
  return adapt_multiplication(weight, std::nullopt, x, bias.value_or(at::Tensor()), true,
                              [&](const at::Tensor& x, const at::Tensor& w, const at::Tensor& b) {
                                return run(x, w, b.defined() ? std::optional<at::Tensor>(b) : std::nullopt);
                              });
}

inline at::Tensor convolution_kernel(const at::Tensor& x, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                                     at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                                     at::IntArrayRef output_padding, int64_t groups) {
  return adapt_convolution(x, weight, bias, [&](const auto& x, const auto& w, const auto& b) {
    return at::convolution(x, w, b, stride, padding, dilation, transposed, output_padding, groups);
  });
}

/// What the TorchScript tracer writes down for a convolution.
template <class... Flags>
at::Tensor traced_convolution_kernel(const at::Tensor& x, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                                     at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                                     at::IntArrayRef output_padding, int64_t groups, Flags... flags) {
  return adapt_convolution(x, weight, bias, [&](const auto& x, const auto& w, const auto& b) {
    return at::_convolution(x, w, b, stride, padding, dilation, transposed, output_padding, groups, flags...);
  });
}

/// The limit on the norm of its entries that the next lookup in an adapted table has to keep. A frozen table is not
/// changed, as a stock embedding with max_norm would do; what is looked up in W' is limited instead.
struct NormLimit {
  double max_norm, norm_type;

  /// Rows of `entries` (..., width), none longer than the limit; the factor is a constant for the gradient.
  at::Tensor apply(const at::Tensor& entries) const {
    const auto norm = at::linalg_vector_norm(entries.detach(), norm_type, {-1}, /*keepdim=*/true);
    return entries * (max_norm / (norm + 1e-7)).clamp_max(1);
  }

  static std::optional<NormLimit>& pending() {
    thread_local std::optional<NormLimit> limit;
    return limit;
  }
};

inline at::Tensor& embedding_renorm_kernel(at::Tensor& table, const at::Tensor& indices, double max_norm,
                                           double norm_type) {
  BelowInterception guard;
  if (find_matches(table, Use::kLookup, true).empty())
    return at::embedding_renorm_(table, indices, max_norm, norm_type);
  NormLimit::pending() = NormLimit{max_norm, norm_type};
  return table;
}

inline at::Tensor embedding_kernel(const at::Tensor& table, const at::Tensor& indices, int64_t padding_idx,
                                   bool scale_grad_by_freq, bool sparse) {
  BelowInterception guard;
  const auto matches = find_matches(table, Use::kLookup, true);
  if (matches.empty()) return at::embedding(table, indices, padding_idx, scale_grad_by_freq, sparse);
  const auto limit = std::exchange(NormLimit::pending(), std::nullopt);
  const auto lookup = [&](const at::Tensor& x, const at::Tensor& matrix) {
    return at::embedding(matrix.t(), x, padding_idx, scale_grad_by_freq, /*sparse=*/false);
  };
  at::Tensor entries;
  if (matches.can_add(Part::kWhole, Use::kLookup)) {
    entries = at::embedding(table, indices, padding_idx, scale_grad_by_freq, sparse);
    for (const auto& match : matches) entries = match.handler->adapt(indices, entries, {}, lookup);
  } else {
    entries = lookup(indices, substituted(table, matches, false, true).t());
  }
  return limit ? limit->apply(entries) : entries;
}

using BagOutput = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline BagOutput embedding_bag_kernel(const at::Tensor& table, const at::Tensor& indices, const at::Tensor& offsets,
                                      bool scale_grad_by_freq, int64_t mode, bool sparse,
                                      const std::optional<at::Tensor>& per_sample_weights, bool include_last_offset,
                                      std::optional<int64_t> padding_idx) {
  BelowInterception guard;
  const auto bag = [&](const at::Tensor& entries, bool sparse) {
    auto weights = per_sample_weights;
    if (weights && weights->defined()) weights = weights->to(entries.scalar_type());
    return at::embedding_bag(entries, indices, offsets, scale_grad_by_freq, mode, sparse, weights, include_last_offset,
                             padding_idx);
  };
  const auto matches = find_matches(table, Use::kLookup, true);
  if (matches.empty()) return bag(table, sparse);
  const auto limit = std::exchange(NormLimit::pending(), std::nullopt);
  constexpr int64_t kMax = 2;
  if (limit || mode == kMax || !matches.can_add(Part::kWhole, Use::kLookup)) {  // not linear in the entries
    auto entries = substituted(table, matches, false, true);
    return bag(limit ? limit->apply(entries) : entries, false);
  }
  auto output = bag(table, sparse);
  for (const auto& match : matches) {
    std::get<0>(output) = match.handler->adapt(indices, std::get<0>(output), {}, [&](auto&, const at::Tensor& matrix) {
      return std::get<0>(bag(matrix.t().contiguous(), false));
    });
  }
  return output;
}

inline BagOutput old_embedding_bag_kernel(const at::Tensor& table, const at::Tensor& indices, const at::Tensor& offsets,
                                          bool scale_grad_by_freq, int64_t mode, bool sparse,
                                          const std::optional<at::Tensor>& per_sample_weights,
                                          bool include_last_offset) {
  return embedding_bag_kernel(table, indices, offsets, scale_grad_by_freq, mode, sparse, per_sample_weights,
                              include_last_offset, std::nullopt);
}

/// Any other operator: puts W' in the place of every operand that is an adapted weight.
template <bool in_backward_too>
void substituting_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  BelowInterception guard;
  const auto substitute = [](const at::Tensor& operand) {
    const auto matches = find_matches(operand, Use::kProduct, in_backward_too);
    return matches.empty() ? operand : substituted(operand, matches, false, /*drop_features=*/true);
  };
  for_each_operand(op, *stack, substitute);
  op.callBoxed(stack);
}

/// A cast that TorchScript writes down where a function switches autocast on: W' is cast in place of W.
inline void cast_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  BelowInterception guard;
  const auto operand = torch::jit::peek(*stack, 0, op.schema().arguments().size()).toTensor();
  const auto matches = find_matches(operand, Use::kProduct, true);
  op.callBoxed(stack);
  const auto cast = stack->back().toTensor();
  if (matches.empty() || cast.is_alias_of(operand)) return;  // one that changes nothing is seen in the product
  stack->back() = substituted(operand, matches, false, /*drop_features=*/true).to(cast.scalar_type());
}

/// An operator without a derivative: where one is needed, `unfused` computes it from the stack in operators that have
/// one, whose weights are adapted in turn.
template <void (*unfused)(torch::jit::Stack&)>
void fused_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  bool adapted = false, needs_gradient = false, is_nested = false;
  for_each_operand(op, *stack, [&](const at::Tensor& operand) {
    if (!operand.defined()) return operand;
    adapted = adapted || !find_matches(operand, Use::kProduct, true).empty();
    needs_gradient = needs_gradient || operand.requires_grad();
    is_nested = is_nested || operand.is_nested();
    return operand;
  });
  if (!at::GradMode::is_enabled() || !(adapted || needs_gradient)) return substituting_kernel<true>(op, stack);
  TORCH_CHECK(!is_nested, "lora: ", op.operator_name(), " has no gradient for nested tensors, so nothing can be ",
              "trained through it. Run the module in training mode, or without gradient (torch::NoGradGuard), or ",
              "export it with enable_nested_tensor=False");
  unfused(*stack);
}

/// Operators that take weights in other ways than the kernels above.
inline constexpr const char* kWholeWeightOperators[] = {
    "bilinear",      "conv_tbc",       "lstm.input",    "lstm.data", "gru.input", "gru.data",      "rnn_tanh.input",
    "rnn_tanh.data", "rnn_relu.input", "rnn_relu.data", "lstm_cell", "gru_cell",  "rnn_tanh_cell", "rnn_relu_cell"};
/// Those that autograd's backward uses too.
inline constexpr const char* kProductOperators[] = {"bmm", "baddbmm", "addbmm", "mv", "addmv", "_grouped_mm"};

/// Registers a kernel for an operator, given as "name.overload", unless this LibTorch has none of that name.
template <c10::BoxedKernel::BoxedKernelFunction* kernel>
void register_boxed(torch::Library& library, const char* name) {
  const std::string text(name), base = text.substr(0, text.find('.'));
  const auto overload = base.size() < text.size() ? text.substr(base.size() + 1) : "";
  if (c10::Dispatcher::singleton().findSchema({"aten::" + base, overload}))
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<kernel>());
}

/// Registers the kernels once in the process. Only one fallback may be registered for a key, so it is done when the
/// first scope opens, not when a shared library is loaded; and it is visible, so that libraries with hidden symbols
/// share it.
__attribute__((visibility("default"))) inline void register_kernels() {
  static const auto libraries = [] {
    std::vector<torch::Library> made;
    made.emplace_back(torch::Library::IMPL, "_", kInterceptionKey, __FILE__, __LINE__);
    made.back().fallback(torch::CppFunction::makeFallthrough());
    made.emplace_back(torch::Library::IMPL, "_", kObservingKey, __FILE__, __LINE__);
    made.back().fallback(torch::CppFunction::makeFromBoxedFunction<&observing_kernel>());
    made.emplace_back(torch::Library::IMPL, "aten", kInterceptionKey, __FILE__, __LINE__);
    auto& aten = made.back();
    aten.impl("linear", &linear_kernel);
    aten.impl("addmm", &addmm_kernel);
    aten.impl("matmul", &matmul_kernel);
    aten.impl("mm", &mm_kernel);
    aten.impl("convolution", &convolution_kernel);
    aten.impl("_convolution", &traced_convolution_kernel<bool, bool, bool, bool>);
    aten.impl("_convolution.deprecated", &traced_convolution_kernel<bool, bool, bool>);
    aten.impl("embedding", &embedding_kernel);
    aten.impl("embedding_renorm_", &embedding_renorm_kernel);
    aten.impl("embedding_bag", &old_embedding_bag_kernel);
    aten.impl("embedding_bag.padding_idx", &embedding_bag_kernel);
    register_boxed<&cast_kernel>(aten, "_autocast_to_reduced_precision");
    register_boxed<&cast_kernel>(aten, "_autocast_to_full_precision");
    register_boxed<&fused_kernel<&unfused_attention>>(aten, "_native_multi_head_attention");
    register_boxed<&fused_kernel<&unfused_encoder_layer>>(aten, "_transformer_encoder_layer_fwd");
    for (const char* name : kWholeWeightOperators) register_boxed<&substituting_kernel<true>>(aten, name);
    for (const char* name : kProductOperators) register_boxed<&substituting_kernel<false>>(aten, name);
    return made;
  }();
  (void)libraries;
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
