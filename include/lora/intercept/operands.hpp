#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <lora/version.hpp>

#include <utility>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Calls `visit(tensor, argument) -> tensor` for every tensor among the operands of an operator, alone, optional or in
/// a list, and puts what it returns in its place.
template <class Visit>
void for_each_operand(const c10::OperatorHandle& op, torch::jit::Stack& stack, const Visit& visit) {
  const auto& arguments = op.schema().arguments();
  auto operand = stack.end() - static_cast<std::ptrdiff_t>(arguments.size());
  for (const auto& argument : arguments) {
    if (operand->isTensor()) {
      if (operand->toTensor().defined()) *operand = visit(operand->toTensor(), argument);
    } else if (operand->isTensorList() || operand->isOptionalTensorList()) {
      const bool is_optional = operand->isOptionalTensorList();
      if (is_optional) {
        auto list = operand->toOptionalTensorList();
        for (size_t i = 0; i < list.size(); ++i) {
          const std::optional<at::Tensor> item = list.get(i);
          if (item && item->defined()) list.set(i, visit(*item, argument));
        }
      } else {
        auto list = operand->toTensorVector();
        for (auto& item : list) {
          if (item.defined()) item = visit(item, argument);
        }
        *operand = std::move(list);
      }
    }
    ++operand;
  }
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
