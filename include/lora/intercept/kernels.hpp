#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_convolution.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_bag.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/embedding_renorm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <lora/functional.hpp>
#include <lora/intercept/fused_attention.hpp>
#include <lora/intercept/in_scope.hpp>
#include <lora/intercept/scope.hpp>
#include <lora/intercept/weight_kernel.hpp>
#include <lora/layers/norm_limit.hpp>
#include <lora/system/process_wide.hpp>
#include <lora/version.hpp>
#include <lora/weight/optional.hpp>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

// How the stock layers of an unchanged model are adapted: while a scope is active on a thread, a dispatch key that lies
// above autograd and autocast sends the operators that take weights here first. Every other operator falls through the
// key at no cost. A product with rows of a weight is computed with the updates of these rows; any other operator
// receives W' in place of W, or the same part of W'.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// An operand that is no factor of a product, e.g. a bias, or that stands where factors are not looked for: W' where it
/// is a weight. Told by the key that weights carry, which costs other tensors nothing.
inline at::Tensor adapted_value(const at::Tensor& operand, const char* operation) {
  if (!operand.defined() || !is_marked(operand)) return operand;
  return dequantized(stand_in(operand, find_updates(operand, Use::kAny, operation), operation));
}

inline at::Tensor adapted_value(const std::optional<at::Tensor>& operand, const char* operation) {
  return operand ? adapted_value(*operand, operation) : at::Tensor();
}

/// An operator y = op(x, W) + b that is linear in x and in W, with its updates. `kind` is how the operand has to lie in
/// W for updates to be added to y; nothing where that cannot be.
template <class Run>
at::Tensor adapt_product(const char* operation, const at::Tensor& x, const at::Tensor& operand,
                         const std::optional<at::Tensor>& bias, std::optional<Part::Kind> kind, const Run& run) {
  const auto form = kind == Part::Kind::kRows             ? Product::Form::kRows
                    : kind == Part::Kind::kTransposedRows ? Product::Form::kColumns
                                                          : Product::Form::kOther;
  const BelowInterception below;
  const auto updates = find_updates(operand, Use::kProduct, operation, misses_gradient(x));
  if (updates.empty()) {
    note_passed(operand);
    note_input(x, kind ? x.dim() - 1 : 1);  // of a convolution only the first
  }
  const bool has_bias = bias.has_value() && bias->defined(), is_marked_bias = has_bias && is_marked(*bias);
  const auto of_bias = is_marked_bias ? find_updates(*bias, Use::kAny, operation) : Updates();
  const auto compute = [&](const at::Tensor& in, const Updates& acting, const Updates& on_bias) {
    const auto b = has_bias ? dequantized(stand_in(*bias, on_bias, operation)) : at::Tensor();
    if (acting.empty() || is_detached(operand))
      return Product{in, stand_in(operand, acting, operation), b, run, linear_times, /*adds=*/false, form}.frozen();
    // A table is the transpose of its matrix.
    const auto is_added = [&](const Update& u) { return u.part.kind == kind && !u.base->shape().is_lookup; };
    const bool adds = std::all_of(acting.begin(), acting.end(), is_added);
    return adapted_product({in, operand, b, run, linear_times, adds, form}, acting);
  };
  const auto left = adapted_value(x, operation);
  const auto* bias_in_rows = with_rows(of_bias);
  if (bias_in_rows == nullptr && !is_detached(operand)) return compute(left, updates, of_bias);
  const auto* in_rows = with_rows(updates);
  if (in_rows == nullptr) in_rows = bias_in_rows;
  if (in_rows == nullptr) return compute(left, updates, of_bias);
  check_one_batch(updates, *in_rows);
  check_one_batch(of_bias, *in_rows);
  return by_groups(left, *in_rows, [&](const at::Tensor& in, size_t group) {
    return compute(in, of_group(updates, group), of_group(of_bias, group));
  });
}

inline at::Tensor linear_kernel(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  return adapt_product("aten::linear", x, weight, bias, Part::Kind::kRows,
                       [](const auto& in, const auto& w, const auto& b) { return at::linear(in, w, optional(b)); });
}

inline at::Tensor addmm_kernel(const at::Tensor& bias, const at::Tensor& x, const at::Tensor& matrix,
                               const at::Scalar& beta, const at::Scalar& alpha) {
  const bool is_plain = beta.equal(1) && alpha.equal(1);
  if (bias.dim() > 1 && are_in_rows())  // it has rows of its own
    return at::add(adapted_value(bias, "aten::addmm") * beta, at::matmul(x, matrix), alpha);
  return adapt_product("aten::addmm", x, matrix, bias,
                       is_plain ? std::optional(Part::Kind::kTransposedRows) : std::nullopt,
                       [&](const auto& in, const auto& m, const auto& b) {
                         if (b.defined()) return at::addmm(b, in, m, beta, alpha);
                         return is_plain ? at::mm(in, m) : at::mm(in, m).mul(alpha);
                       });
}

inline at::Tensor matmul_kernel(const at::Tensor& x, const at::Tensor& matrix) {
  return adapt_product("aten::matmul", x, matrix, std::nullopt, Part::Kind::kTransposedRows,
                       [](const auto& in, const auto& m, const auto& /*bias*/) { return at::matmul(in, m); });
}

inline at::Tensor mm_kernel(const at::Tensor& x, const at::Tensor& matrix) {
  return adapt_product("aten::mm", x, matrix, std::nullopt, Part::Kind::kTransposedRows,
                       [](const auto& in, const auto& m, const auto& /*bias*/) { return at::mm(in, m); });
}

inline at::Tensor convolution_kernel(const at::Tensor& x, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                                     at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                                     at::IntArrayRef output_padding, int64_t groups) {
  return adapt_product(
      "aten::convolution", x, weight, bias, std::nullopt, [&](const auto& in, const auto& w, const auto& b) {
        return at::convolution(in, w, optional(b), stride, padding, dilation, transposed, output_padding, groups);
      });
}

/// Whether all of them are on tables, whose entries are looked up, and on no weight that is used in any way.
inline bool are_lookups(const Updates& updates) {
  return std::all_of(updates.begin(), updates.end(), [](const Update& u) { return u.base->shape().is_lookup; });
}

/// What the TorchScript tracer writes down for a convolution.
template <class... Flags>
at::Tensor traced_convolution_kernel(const at::Tensor& x, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                                     at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                                     at::IntArrayRef output_padding, int64_t groups, Flags... flags) {
  return adapt_product("aten::_convolution", x, weight, bias, std::nullopt,
                       [&](const auto& in, const auto& w, const auto& b) {
                         return at::_convolution(in, w, optional(b), stride, padding, dilation, transposed,
                                                 output_padding, groups, flags...);
                       });
}

inline at::Tensor& embedding_renorm_kernel(at::Tensor& table, const at::Tensor& indices, double max_norm,
                                           double norm_type) {
  const BelowInterception below;
  bool adapted = false, replaced = false;
  for_each_match(table, Use::kLookup, "aten::embedding_renorm_",
                 [&](const Scope&, const ActiveSite& active, const Part&) {
                   adapted = true;
                   replaced = !active.methods.empty() && active.methods.back().method->replaces();
                 });
  if (!adapted) return at::embedding_renorm_(table, indices, max_norm, norm_type);
  auto written = replaced ? written_operand(table, "aten::embedding_renorm_") : at::Tensor();
  if (replaced) {
    at::embedding_renorm_(written, indices, max_norm, norm_type);
  } else {
    PendingLimit::set(table, indices, {max_norm, norm_type});
  }
  return table;
}

inline at::Tensor embedding_kernel(const at::Tensor& table, const at::Tensor& indices, int64_t padding_idx,
                                   bool scale_grad_by_freq, bool sparse) {
  const BelowInterception below;
  const auto updates = find_updates(table, Use::kLookup, "aten::embedding");
  if (updates.empty()) {
    look_for_copy(table);
    note_input(indices, indices.dim());
  }
  const auto look_up = [&](const at::Tensor& i, const at::Tensor& entries, const at::Tensor& /*bias*/) {
    return at::embedding(entries, i, padding_idx, scale_grad_by_freq, sparse && entries.is_same(table));
  };
  const auto times = [&](const at::Tensor& i, const at::Tensor& matrix) { return look_up(i, matrix.t(), {}); };
  const Product product{indices, table, {}, look_up, times, are_lookups(updates), Product::Form::kEntries};
  if (updates.empty()) return product.frozen();
  const auto limit = PendingLimit::take(table, indices);
  const auto entries = is_detached(table) ? look_up(indices, stand_in(table, updates, "aten::embedding"), {})
                                          : adapted_product(product, updates);
  return limit ? limit->apply(entries) : entries;
}

using BagOutput = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline BagOutput embedding_bag_kernel(const at::Tensor& table, const at::Tensor& indices, const at::Tensor& offsets,
                                      bool scale_grad_by_freq, int64_t mode, bool sparse,
                                      const std::optional<at::Tensor>& per_sample_weights, bool include_last_offset,
                                      std::optional<int64_t> padding_idx) {
  const BelowInterception below;
  const auto bag = [&](const at::Tensor& entries) {
    auto weights = per_sample_weights;
    if (weights && weights->defined()) weights = weights->to(entries.scalar_type());
    return at::embedding_bag(entries, indices, offsets, scale_grad_by_freq, mode, sparse && entries.is_same(table),
                             weights, include_last_offset, padding_idx);
  };
  constexpr auto kName = "aten::embedding_bag";
  const auto updates = find_updates(table, Use::kLookup, kName);
  if (updates.empty()) {
    look_for_copy(table);
    return bag(dequantized(table));
  }
  const auto limit = PendingLimit::take(table, indices);
  if (limit) return bag(limit->apply(stand_in(table, updates, kName)));
  if (is_detached(table) || with_rows(updates) != nullptr) return bag(stand_in(table, updates, kName));
  BagOutput output;  // of the operator itself; what is beside the entries is the same for all of them
  const auto look_up = [&](const at::Tensor& /*i*/, const at::Tensor& entries, const at::Tensor& /*bias*/) {
    output = bag(entries);
    return std::get<0>(output);
  };
  const auto times = [&](const at::Tensor& /*i*/, const at::Tensor& matrix) {
    return std::get<0>(bag(matrix.t().contiguous()));
  };
  constexpr int64_t kMax = 2;  // not linear in the entries
  const auto entries =
      adapted_product({indices, table, {}, look_up, times, mode != kMax && are_lookups(updates)}, updates);
  std::get<0>(output) = entries;
  return output;
}

inline BagOutput old_embedding_bag_kernel(const at::Tensor& table, const at::Tensor& indices, const at::Tensor& offsets,
                                          bool scale_grad_by_freq, int64_t mode, bool sparse,
                                          const std::optional<at::Tensor>& per_sample_weights,
                                          bool include_last_offset) {
  return embedding_bag_kernel(table, indices, offsets, scale_grad_by_freq, mode, sparse, per_sample_weights,
                              include_last_offset, std::nullopt);
}

/// Any other operator of which it is known that it takes weights.
inline void substituting_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const BelowInterception below;
  adapt_operands(op, *stack, Use::kProduct);
  op.callBoxed(stack);
}

/// A cast that TorchScript writes down where a function switches autocast on: W' is cast in place of W.
inline void cast_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const BelowInterception below;
  auto& first = torch::jit::peek(*stack, 0, op.schema().arguments().size());
  const auto operand = first.toTensor();
  const bool is_held = is_whole_placeholder(operand);
  // Of one that is held in few bits the type is asked for, and the product goes on with the bits.
  first = is_held ? at::empty({0}, operand.options()) : dequantized(operand);
  op.callBoxed(stack);
  if (is_held) stack->back() = moved(operand, operand.device(), stack->back().toTensor().scalar_type());
  const auto cast = stack->back().toTensor();
  if (share_memory(cast, operand)) return;  // one that changes nothing is seen in the product
  const auto* name = op.operator_name().name.c_str();
  const auto updates = find_updates(operand, Use::kProduct, name);
  if (!updates.empty()) stack->back() = stand_in(operand, updates, name).to(cast.scalar_type());
}

/// An operator without a derivative: where one is needed, `unfused` computes it from the stack in operators that have
/// one, whose weights are adapted in turn.
template <void (*unfused)(torch::jit::Stack&)>
void fused_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  bool adapted = false, needs_gradient = false, is_nested = false;
  for_each_operand(op, *stack, [&](const at::Tensor& operand, const c10::Argument&) {
    adapted = adapted || is_in_scope(operand);
    needs_gradient = needs_gradient || operand.requires_grad();
    is_nested = is_nested || operand.is_nested();
    return operand;
  });
  const bool is_fused = !at::GradMode::is_enabled() && !(adapted && are_in_rows());
  if (is_fused || !(adapted || needs_gradient)) return substituting_kernel(op, stack);
  TORCH_CHECK(!is_nested, "lora: ", op.operator_name(), " has no gradient for nested tensors, so nothing can be ",
              "trained through it. Run the module in training mode, or without gradient (torch::NoGradGuard), or ",
              "export it with enable_nested_tensor=False");
  unfused(*stack);
}

/// Operators that take weights in other ways than the kernels above.
inline constexpr const char* kWholeWeightOperators[] = {
    "bilinear",      "conv_tbc",       "lstm.input",    "lstm.data", "gru.input", "gru.data",      "rnn_tanh.input",
    "rnn_tanh.data", "rnn_relu.input", "rnn_relu.data", "lstm_cell", "gru_cell",  "rnn_tanh_cell", "rnn_relu_cell",
    "bmm",           "baddbmm",        "addbmm",        "mv",        "addmv",     "_grouped_mm"};

/// The libraries through which kernels are registered; they stay for as long as the process.
class Registration {
 public:
  Registration() {
    check_unclaimed(kInterceptionKey);
    check_unclaimed(kWeightKey);
    fallback(kInterceptionKey, torch::CppFunction::makeFallthrough());
    fallback(kWeightKey, torch::CppFunction::makeFromBoxedFunction<&weight_kernel>());
    auto& thread = implementations(kInterceptionKey);
    auto& weights = implementations(kWeightKey);
    const auto take = [&](const char* name, auto kernel) {
      if (!exists(name)) return;  // in this LibTorch
      thread.impl(name, std::move(kernel));
      weights.impl(name, torch::CppFunction::makeFallthrough());
    };
    take("linear", &linear_kernel);
    take("addmm", &addmm_kernel);
    take("matmul", &matmul_kernel);
    take("mm", &mm_kernel);
    take("convolution", &convolution_kernel);
    take("_convolution", &traced_convolution_kernel<bool, bool, bool, bool>);
    take("_convolution.deprecated", &traced_convolution_kernel<bool, bool, bool>);
    take("embedding", &embedding_kernel);
    take("embedding_renorm_", &embedding_renorm_kernel);
    take("embedding_bag", &old_embedding_bag_kernel);
    take("embedding_bag.padding_idx", &embedding_bag_kernel);
    take("_autocast_to_reduced_precision", boxed<&cast_kernel>());
    take("_autocast_to_full_precision", boxed<&cast_kernel>());
    take("_native_multi_head_attention", boxed<&fused_kernel<&unfused_attention>>());
    take("_transformer_encoder_layer_fwd", boxed<&fused_kernel<&unfused_encoder_layer>>());
    for (const char* name : kWholeWeightOperators) take(name, boxed<&substituting_kernel>());
    weights.impl("_has_compatible_shallow_copy_type", &replace_data_kernel);
    for (const char* name : kNotForWeights) {
      if (exists(name)) weights.impl(name, torch::CppFunction::makeFallthrough());
    }
  }

 private:
  /// A key has one fallback in a process. Another one is that of a library that was built with another version of these
  /// headers, whose scopes this one knows nothing of.
  static void check_unclaimed(c10::DispatchKey key) {
    TORCH_CHECK(!c10::Dispatcher::singleton().hasBackendFallbackForDispatchKey(key), "lora: another version of this ",
                "library, or other code, has the dispatch key ", c10::toString(key), " in this process; build all ",
                "shared libraries with one version of lora, or give this one keys of its own (LORA_DISPATCH_KEY, ",
                "LORA_WEIGHT_DISPATCH_KEY)");
  }

  template <c10::BoxedKernel::BoxedKernelFunction* kernel>
  static torch::CppFunction boxed() {
    return torch::CppFunction::makeFromBoxedFunction<kernel>();
  }

  void fallback(c10::DispatchKey key, torch::CppFunction kernel) {
    libraries_.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "_", key, __FILE__, __LINE__));
    libraries_.back()->fallback(std::move(kernel));
  }

  torch::Library& implementations(c10::DispatchKey key) {
    libraries_.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "aten", key, __FILE__, __LINE__));
    return *libraries_.back();
  }

  static bool exists(const char* name) {
    const std::string text(name), base = text.substr(0, text.find('.'));
    const auto overload = base.size() < text.size() ? text.substr(base.size() + 1) : "";
    return c10::Dispatcher::singleton().findSchema({"aten::" + base, overload}).has_value();
  }

  std::vector<std::unique_ptr<torch::Library>> libraries_;
};

struct RegisteredKernels {
  static constexpr const char* kName = "kernels_" LORA_KEY_NAMES;
  std::once_flag once;  // of all libraries: who is second waits, and does not find half of them
  std::unique_ptr<Registration> made;
};

/// Registers the kernels once in the process. Only one fallback may be registered for a key, so it is done when the
/// first adapter is added, not when a shared library is loaded.
inline void register_kernels() {
  auto& kernels = process_wide<RegisteredKernels>();
  std::call_once(kernels.once, [&] { kernels.made = std::make_unique<Registration>(); });
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
