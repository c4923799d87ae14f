#pragma once

#include <lora/version.hpp>

#include <cstdint>

namespace lora {
inline namespace LORA_ABI {

/// What an operator does with a weight. Of tied weights each kind of layer adapts only its own use.
enum class Use : uint8_t { kProduct = 1, kLookup = 2, kAny = 3 };

inline bool overlap(Use a, Use b) { return (static_cast<int>(a) & static_cast<int>(b)) != 0; }

}  // namespace LORA_ABI
}  // namespace lora
