#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/DimVector.h>
#include <ATen/ops/_has_compatible_shallow_copy_type.h>
#include <ATen/ops/stack.h>

#include <lora/intercept/copies.hpp>
#include <lora/intercept/operands.hpp>
#include <lora/intercept/scope.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <vector>

// Every use of an adapted weight that is no known product. Adapted weights, and the views of them, carry a dispatch key
// of their own, so that whatever is done with them comes here, and what is done with other tensors does not.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Whether an operator computes nothing and only looks at its operand in another way. What it returns carries the key
/// on. Views that give numbers another meaning are none here, since no part of W' could be named for them.
inline bool makes_view(const c10::OperatorHandle& op) {
  static constexpr std::array<std::string_view, 5> kOthers{"aten::view_as_real", "aten::view_as_complex", "aten::_conj",
                                                           "aten::_neg_view", "aten::resolve_conj"};
  const auto& name = op.operator_name();
  if (std::find(kOthers.begin(), kOthers.end(), name.name) != kOthers.end()) return false;
  if (name.name == "aten::view" && name.overload_name == "dtype") return false;
  bool any = false;
  for (const auto& argument : op.schema().arguments()) {
    if (argument.alias_info() == nullptr) continue;
    if (argument.alias_info()->isWrite()) return false;
    any = true;
  }
  return any;
}

/// Whether somebody detached the weight in a scope, of which the operand is a view: W' is a constant then. The key of
/// threads on the tensor says so; elsewhere it is on none.
inline bool is_detached(const at::Tensor& operand) { return operand.key_set().has(kInterceptionKey); }

inline void mark_detached(const at::Tensor& tensor) {
  auto& keys = tensor.unsafeGetTensorImpl()->*KeysOf::keys();
  keys = keys.add(kInterceptionKey);
}

/// W' in the place of an operand, for an operator that takes it whole.
inline at::Tensor stand_in(const at::Tensor& operand, const Updates& updates, const char* operation) {
  if (updates.empty()) return operand;
  if (const auto* update = with_rows(updates)) {
    TORCH_CHECK(
        false, "lora: ", operation, " takes the weight of \"", *update->rows.layer, "\" as one for all rows of ",
        "the batch, but in this scope rows have adapters of their own. Run the rows of each adapter in a scope ",
        "of that adapter alone, or leave the layer out of these adapters");
  }
  const auto adapted = adapted_operand(operand, updates);
  return is_detached(operand) ? adapted.detach() : adapted;
}

/// The same for a bias that an operator adds to `sum`, where rows of the batch have biases of their own: one for each
/// row, shaped so that it is added to it.
inline at::Tensor stand_in_rows(const at::Tensor& bias, const Updates& updates, const Update& in_rows,
                                const at::Tensor& sum) {
  check_one_batch(updates, in_rows);
  const auto& batch = *in_rows.rows.batch;
  const auto layout = in_rows.rows.layout(sum.sizes(), sum.dim() - 1);
  std::vector<at::Tensor> biases;
  for (size_t group = 0; group < batch.groups(); ++group)
    biases.push_back(adapted_operand(bias, of_group(updates, group)));
  at::DimVector sizes(static_cast<size_t>(sum.dim()), 1);
  sizes[static_cast<size_t>(layout.dim)] = sum.size(layout.dim);
  sizes.back() = bias.size(0);
  return at::stack(biases).index_select(0, batch.groups_of_entries(layout, sum.device())).view(sizes);
}

/// What stands in for a weight that an operator writes to: the adapter's own tensor, where there is one in its place.
inline at::Tensor written_operand(const at::Tensor& operand, const char* operation) {
  auto written = operand;
  for_each_match(operand, Use::kAny, operation, [&](const Scope& scope, const ActiveSite& active, const Part& part) {
    const auto& weight = active.base.weight();
    TORCH_CHECK(scope.set->rows() == nullptr, "lora: ", operation, " writes to the weight of \"", active.site->name(),
                "\" in a scope in which rows of the batch have adapters of their own");
    const bool replaces = !active.methods.empty() && active.methods.back().method->replaces();
    if (replaces)
      written = same_part(active.methods.back().method->replacement(weight), weight, operand, part);
    else
      scope.usage->record(*active.site, operation, /*adapted=*/false);
  });
  return written;
}

/// What a bias is added to by `op`; undefined where that does something else.
inline at::Tensor sum_with(const c10::OperatorHandle& op, const torch::jit::Stack& stack, const at::Tensor& bias) {
  const auto& name = op.operator_name();
  if ((name.name != "aten::add" && name.name != "aten::add_") || name.overload_name != "Tensor") return {};
  const auto& sum = torch::jit::peek(stack, 0, op.schema().arguments().size()).toTensor();
  return bias.dim() == 1 && sum.dim() > 1 && sum.size(-1) == bias.size(0) ? sum : at::Tensor();
}

/// Puts W' in the place of every operand that is an adapted weight, or a part of one.
inline void adapt_operands(const c10::OperatorHandle& op, torch::jit::Stack& stack, Use use) {
  const auto* name = op.operator_name().name.c_str();
  bool without_gradient = false;
  if (!at::GradMode::is_enabled()) {
    for_each_operand(op, stack, [&](const at::Tensor& operand, const c10::Argument& /*argument*/) {
      without_gradient = without_gradient || misses_gradient(operand);
      return operand;
    });
  }
  for_each_operand(op, stack, [&](const at::Tensor& operand, const c10::Argument& argument) {
    if (argument.alias_info() != nullptr && argument.alias_info()->isWrite()) return written_operand(operand, name);
    const auto updates = find_updates(operand, use, name, without_gradient);
    if (const auto* in_rows = with_rows(updates)) {
      if (const auto sum = sum_with(op, stack, operand); sum.defined())
        return stand_in_rows(operand, updates, *in_rows, sum);
    }
    return dequantized(stand_in(operand, updates, name));
  });
}

/// Whether the operator copies a weight that is held in few bits, as moving, casting or cloning a model does; then the
/// copy, which holds it so, too, is on the stack. In scopes copies have the numbers, since somebody may compute with
/// them.
inline bool copies_placeholder(const c10::OperatorHandle& op, torch::jit::Stack& stack) {
  const auto& arguments = op.schema().arguments();
  if (arguments.empty()) return false;
  const auto& first = torch::jit::peek(stack, 0, arguments.size());
  if (!first.isTensor() || !is_whole_placeholder(first.toTensor())) return false;
  const auto& name = op.operator_name().name;
  const bool moves = name == "aten::_to_copy";
  if (!moves && name != "aten::clone") return false;
  const auto tensor = first.toTensor();
  auto device = tensor.device();
  auto type = tensor.scalar_type();
  if (moves) {
    if (const auto& wanted = torch::jit::peek(stack, 1, arguments.size()); !wanted.isNone())
      type = wanted.toScalarType();
    if (const auto& wanted = torch::jit::peek(stack, 3, arguments.size()); !wanted.isNone()) device = wanted.toDevice();
  }
  const BelowInterception below;
  torch::jit::drop(stack, arguments.size());
  stack.emplace_back(moved(tensor, device, type, /*copies=*/true));
  return true;
}

/// Whether an operator gives its first operand other memory, as torch::load does.
inline bool replaces_memory(const c10::OperatorHandle& op) {
  const auto& name = op.operator_name().name;
  return name == "aten::set_" || name == "aten::resize_" || name == "aten::resize_as_";
}

/// The weight that an operator copies, as cloning a model does; undefined for any other operator.
inline at::Tensor copied_weight(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  const auto& name = op.operator_name().name;
  if (name != "aten::clone" && name != "aten::_to_copy") return {};
  return torch::jit::peek(stack, 0, op.schema().arguments().size()).toTensor();
}

/// The kernel of all operators for the key that weights carry.
inline void weight_kernel(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto* scopes = ActiveScopes::current();
  const bool in_scope = scopes != nullptr && !scopes->effective().empty();
  const auto copied = in_scope ? at::Tensor() : copied_weight(op, *stack);
  if (!in_scope && copies_placeholder(op, *stack)) {
    Copies::note(copied, stack->back().toTensor());
    return;
  }
  if (!in_scope || makes_view(op)) {
    op.redispatchBoxed(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, kWeightKey), stack);
    if (copied.defined()) Copies::note(copied, stack->back().toTensor());
    if (in_scope && op.operator_name().name == "aten::detach") mark_detached(stack->back().toTensor());
    return;
  }
  const BelowInterception below;
  if (replaces_memory(op)) check_memory_stays(torch::jit::peek(*stack, 0, op.schema().arguments().size()).toTensor());
  adapt_operands(op, *stack, Use::kAny);
  op.callBoxed(stack);
}

/// What `tensor.set_data(data)` asks before it gives a weight other data, as moving or casting a module does. Within a
/// scope these data would have been computed from W', which would so become the frozen weight.
inline bool replace_data_kernel(c10::DispatchKeySet keys, const at::Tensor& tensor, const at::Tensor& data) {
  if (!share_memory(data, tensor)) check_memory_stays(tensor);
  const auto* scopes = ActiveScopes::current();
  const bool in_scope = scopes != nullptr && !scopes->effective().empty();
  const auto* held = held_numbers(tensor);
  TORCH_CHECK(!in_scope || held == nullptr || is_quantized(data), "lora: the weight of ",
              held == nullptr ? "" : held->name,
              ", which is held in few bits, gets other data, as by moving or casting ",
              "a model, inside of a scope, where these would be its numbers; leave the scope first");
  if (is_quantized(data) && tensor.requires_grad()) tensor.requires_grad_(false);  // a copy of a layer forgets it
  return at::_ops::_has_compatible_shallow_copy_type::redispatch(
      keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, kWeightKey), tensor, data);
}

/// Operators that never need to come here: those that the key of the thread sees, and the most frequent views.
inline constexpr const char* kNotForWeights[] = {"t",
                                                 "transpose.int",
                                                 "permute",
                                                 "view",
                                                 "reshape",
                                                 "expand",
                                                 "narrow",
                                                 "slice.Tensor",
                                                 "select.int",
                                                 "unsqueeze",
                                                 "squeeze",
                                                 "squeeze.dim",
                                                 "chunk",
                                                 "split.Tensor",
                                                 "unflatten.int",
                                                 "alias",
                                                 "as_strided",
                                                 "set_data",
                                                 "requires_grad_",
                                                 "_version",
                                                 "is_leaf",
                                                 "output_nr",
                                                 "retain_grad",
                                                 "_fw_primal",
                                                 "conv1d",
                                                 "conv2d",
                                                 "conv3d",
                                                 "conv1d.padding",
                                                 "conv2d.padding",
                                                 "conv3d.padding",
                                                 "_convolution_mode",
                                                 "conv_transpose1d",
                                                 "conv_transpose2d.input",
                                                 "conv_transpose3d.input"};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
