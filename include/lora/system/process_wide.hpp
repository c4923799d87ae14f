#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/function_schema.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/jit_type.h>
#include <c10/util/Exception.h>

#include <lora/version.hpp>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The object of type T that all shared libraries of one process have in common which are built with this version of
/// the headers. It is made by who asks first, and never destroyed; functions that it points to are that library's,
/// which has to stay loaded. Where two ask at once, one T may be made that nobody gets. T has a name, `T::kName`, of
/// its own.
///
/// Static variables would not do: of libraries that hide their symbols, or are loaded apart from each other and built
/// by clang, each has its own. All have one LibTorch. So the address is kept there, as the default of the argument of
/// an operator that is never called.
template <class T>
T& process_wide() {
  static T& one = []() -> T& {
    auto& dispatcher = c10::Dispatcher::singleton();
    const auto name = std::string("lora_" LORA_ABI_NAME "::") + T::kName;
    const auto found = [&]() -> T* {
      const auto op = dispatcher.findSchema({name, ""});
      return op ? reinterpret_cast<T*>(op->schema().arguments().front().default_value()->toInt()) : nullptr;
    };
    if (auto* there = found()) return *there;
    struct Held {
      T object;
      std::optional<c10::RegistrationHandleRAII> registration;
    };
    try {
      auto made = std::make_unique<Held>();
      const auto address = static_cast<int64_t>(reinterpret_cast<std::intptr_t>(&made->object));
      c10::Argument argument("address", c10::IntType::get(), std::nullopt, c10::IValue(address));
      c10::FunctionSchema schema(name, "", {std::move(argument)}, {});
      made->registration.emplace(dispatcher.registerDef(std::move(schema), __FILE__));
      return made.release()->object;
    } catch (const c10::Error&) {  // a thread of another library may have been faster
      auto* there = found();
      if (there == nullptr) throw;
      return *there;
    }
  }();
  return one;
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
