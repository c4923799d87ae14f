#pragma once

#include <lora/layers/adaptable.hpp>
#include <lora/layers/attention.hpp>
#include <lora/layers/convolution.hpp>
#include <lora/layers/embedding.hpp>
#include <lora/layers/linear.hpp>
#include <lora/layers/recurrent.hpp>
#include <lora/version.hpp>

namespace lora {
inline namespace LORA_ABI {

/// The weights of one module that can be adapted, its children left aside; none where no kind of layer knows the
/// module. A new kind of layer is added here and nowhere else.
inline std::vector<Target> adaptable_weights(const std::string& name,
                                             const std::shared_ptr<torch::nn::Module>& module) {
  for (auto* find :
       {&layers::find_adaptable, &layers::find_linear, &layers::find_bilinear, &layers::find_embedding,
        &layers::find_embedding_bag, &layers::find_convolution, &layers::find_attention, &layers::find_recurrent}) {
    auto targets = (*find)(name, module);
    if (!targets.empty()) return targets;
  }
  return {};
}

}  // namespace LORA_ABI
}  // namespace lora
