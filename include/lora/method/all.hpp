#pragma once

#include <lora/method/dora.hpp>
#include <lora/method/low_rank.hpp>
#include <lora/version.hpp>

namespace lora {
inline namespace LORA_ABI {

/// Every method of the library; the first one is the default. A new method is added here and nowhere else.
inline const std::vector<MethodKind>& all_methods() {
  static const std::vector<MethodKind> methods{MethodKind::of<LowRank>(), MethodKind::of<DoRA>()};
  return methods;
}

}  // namespace LORA_ABI
}  // namespace lora
