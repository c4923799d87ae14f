#pragma once

#include <lora/linkage.hpp>
#include <lora/method/dora.hpp>
#include <lora/method/ia3.hpp>
#include <lora/method/low_rank.hpp>
#include <lora/method/vera.hpp>
#include <lora/version.hpp>

#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// Every method of the library; the first one is the default.
LORA_INLINE const std::vector<MethodKind>& all_methods();

/// Makes a method of a user's own known to the readers of adapter files. Called once, before files are read, and not
/// beside other threads that do. Throws c10::ValueError when its name, or its type and flag in files, are taken.
LORA_INLINE void register_method(const MethodKind& method);

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// A new method of the library is added here and nowhere else.
inline std::vector<MethodKind>& method_list() {
  static std::vector<MethodKind> methods{LowRank(), DoRA(), VeRA(), IA3()};
  return methods;
}

}  // namespace detail

LORA_INLINE const std::vector<MethodKind>& all_methods() { return detail::method_list(); }

LORA_INLINE void register_method(const MethodKind& method) {
  for (const auto& known : all_methods()) {
    const auto &a = known.info(), &b = method.info();
    TORCH_CHECK_VALUE(a.name != b.name && (a.peft_type != b.peft_type || a.peft_flag != b.peft_flag),
                      "lora::register_method: \"", b.name, "\" (peft_type \"", b.peft_type, "\", flag \"", b.peft_flag,
                      "\") cannot be told from the method \"", a.name, "\" that is known already");
  }
  detail::method_list().push_back(method);
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
