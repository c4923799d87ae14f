#pragma once

#include <lora/version.hpp>

#include <string>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// An adapter by its name, with a factor for its update.
struct WeightedAdapter {
  std::string name;
  double weight = 1;
};

/// Several at once, whose updates add up: sum of weight_i * (W'_i - W).
using WeightedAdapters = std::vector<WeightedAdapter>;

}  // namespace LORA_ABI
}  // namespace lora
