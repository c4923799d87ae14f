#pragma once

#include <lora/layers/attention.hpp>
#include <lora/layers/linear.hpp>

namespace lora {

/// The weights of one module that can be adapted, its children left aside; none where no kind of layer knows the
/// module. A new kind of layer is added here and nowhere else.
inline std::vector<Target> adaptable_weights(const std::string& name,
                                             const std::shared_ptr<torch::nn::Module>& module) {
  for (auto* find : {&layers::find_linear, &layers::find_attention}) {
    auto targets = (*find)(name, module);
    if (!targets.empty()) return targets;
  }
  return {};
}

}  // namespace lora
