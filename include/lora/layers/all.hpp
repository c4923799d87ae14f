#pragma once

#include <lora/layers/adaptable.hpp>
#include <lora/layers/attention.hpp>
#include <lora/layers/convolution.hpp>
#include <lora/layers/embedding.hpp>
#include <lora/layers/linear.hpp>
#include <lora/layers/recurrent.hpp>
#include <lora/version.hpp>

#include <string>
#include <utility>

namespace lora {
inline namespace LORA_ABI {

/// The weights of one stock module that can be adapted, its children left aside; none where no kind of layer knows the
/// module. A new kind of layer is added here and nowhere else.
inline LayerWeights layer_weights(const std::string& name, torch::nn::Module& module) {
  for (auto* find : {&layers::find_linear, &layers::find_bilinear, &layers::find_embedding, &layers::find_embedding_bag,
                     &layers::find_convolution, &layers::find_attention, &layers::find_recurrent}) {
    auto found = (*find)(name, module);
    if (!found.empty()) return found;
  }
  return {};
}

}  // namespace LORA_ABI
}  // namespace lora
