// Small models of stock layers, as users write them.
#pragma once

#include "support/testing.hpp"

namespace testing {

/// Two typed members and a list of blocks; all weights have biases, and dropout is off.
struct BlockImpl : torch::nn::Module {
  BlockImpl() {
    for (auto name : {"q_proj", "k_proj", "v_proj", "o_proj"}) register_module(name, torch::nn::Linear(8, 8));
  }
  torch::Tensor forward(torch::Tensor x) {
    for (const auto& child : children()) x = x + child->as<torch::nn::Linear>()->forward(x).tanh();
    return x;
  }
};
TORCH_MODULE(Block);

/// `layers.N.{q,k,v,o}_proj` and an untied `lm_head` without a bias.
struct StackImpl : torch::nn::Module {
  explicit StackImpl(int64_t depth = 3) {
    for (int64_t layer = 0; layer < depth; ++layer) layers->push_back(Block());
    register_module("layers", layers);
    register_module("lm_head", lm_head);
    to(device());
  }
  torch::Tensor forward(torch::Tensor x) {
    for (const auto& layer : *layers) x = layer->as<Block>()->forward(x);
    return lm_head(x);
  }
  torch::nn::ModuleList layers;
  torch::nn::Linear lm_head{torch::nn::LinearOptions(8, 6).bias(false)};
};
TORCH_MODULE(Stack);

/// An embedding of ten entries and a head that is tied to it.
struct TiedImpl : torch::nn::Module {
  TiedImpl() {
    head->weight = tokens->weight;
    to(device());
  }
  torch::Tensor forward(const torch::Tensor& ids) { return head(tokens(ids).tanh()); }
  torch::nn::Embedding tokens = register_module("tokens", torch::nn::Embedding(10, 4));
  torch::nn::Linear head = register_module("head", torch::nn::Linear(torch::nn::LinearOptions(4, 10).bias(false)));
};
TORCH_MODULE(Tied);

/// Fills every tensor with small random numbers, so that no update is zero.
inline void randomize(const std::vector<torch::Tensor>& tensors, double deviation = 0.2) {
  torch::NoGradGuard no_grad;
  for (auto tensor : tensors) tensor.add_(torch::randn_like(tensor) * deviation);
}

}  // namespace testing
