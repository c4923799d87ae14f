#pragma once

#include <torch/nn/modules/rnn.h>

#include <lora/layers/layer_weight.hpp>
#include <lora/version.hpp>

#include <string>

namespace lora {
inline namespace LORA_ABI {
namespace layers {

/// The weight matrices of an RNN, LSTM or GRU, of all its layers and directions, or of one of their cells: input to
/// hidden (gates * hidden, in), hidden to hidden (gates * hidden, hidden), and the projection of an LSTM that has one.
/// They are adapted together and named after their parameters: "encoder.weight_ih_l0".
inline LayerWeights find_recurrent(const std::string& name, torch::nn::Module& module) {
  const char* kind = module.as<torch::nn::RNNImpl>() != nullptr        ? "RNN"
                     : module.as<torch::nn::LSTMImpl>() != nullptr     ? "LSTM"
                     : module.as<torch::nn::GRUImpl>() != nullptr      ? "GRU"
                     : module.as<torch::nn::RNNCellImpl>() != nullptr  ? "RNNCell"
                     : module.as<torch::nn::LSTMCellImpl>() != nullptr ? "LSTMCell"
                     : module.as<torch::nn::GRUCellImpl>() != nullptr  ? "GRUCell"
                                                                       : nullptr;
  if (kind == nullptr) return {};
  LayerWeights found;
  for (const auto& item : module.named_parameters(/*recurse=*/false)) {
    if (item.value().dim() != 2) continue;  // a bias
    found.push_back(registered_weight(name + "." + item.key(), kind, module, item.value()));
  }
  return found;
}

}  // namespace layers
}  // namespace LORA_ABI
}  // namespace lora
