#pragma once

#include <lora/version.hpp>

#include <cstdint>
#include <string>

namespace lora {
inline namespace LORA_ABI {

/// One operator that a weight was given to.
struct WeightUse {
  std::string layer;      ///< the name of the layer
  std::string operation;  ///< "aten::linear"
  bool adapted = false;   ///< whether it computed with the adapters
  int64_t count = 0;      ///< how often
};

}  // namespace LORA_ABI
}  // namespace lora
