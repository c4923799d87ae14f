#pragma once

#include <lora/version.hpp>

#include <cstdint>
#include <string_view>
#include <type_traits>

// Where the versions of LibTorch that this library is tested with (cmake/LoraTorch.cmake names them) differ. Each is
// told by what is there, so that nothing here has to know a version.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Float4_e2m1fn_x2 and Float8_e8m0fnu, which LibTorch 2.6 lacks; Undefined where they are missing.
template <class Type, class = void>
inline constexpr Type kFloat4 = Type::Undefined;
template <class Type>
inline constexpr Type kFloat4<Type, std::void_t<decltype(Type::Float4_e2m1fn_x2)>> = Type::Float4_e2m1fn_x2;

template <class Type, class = void>
inline constexpr Type kFloat8Exponent = Type::Undefined;
template <class Type>
inline constexpr Type kFloat8Exponent<Type, std::void_t<decltype(Type::Float8_e8m0fnu)>> = Type::Float8_e8m0fnu;

/// The c10::DebugInfoKind of this name: since LibTorch 2.13 the address of the name, before a number out of a byte. Its
/// lower half is left to LibTorch; in the upper one versions of lora with another `name` get, as a rule, another
/// number.
template <class Kind>
Kind debug_info_kind(const std::string_view* name) {
  if constexpr (std::is_enum_v<Kind>) {
    uint32_t hash = 2166136261U;  // FNV-1a
    for (const char character : *name) hash = (hash ^ static_cast<unsigned char>(character)) * 16777619U;
    return static_cast<Kind>(128 + hash % 128);
  } else {
    return Kind(name);
  }
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
