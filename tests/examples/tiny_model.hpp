// Models of a few hundred parameters with random weights, for tests of the programs around them.
#pragma once

#include "support/testing.hpp"

#include "model.hpp"

namespace testing {

inline gpt::LanguageModel tiny_model(gpt::Architecture architecture, uint64_t seed = 1) {
  gpt::ModelConfig config;
  config.architecture = architecture;
  config.vocab_size = 23;
  config.hidden_size = 16;
  config.intermediate_size = 24;
  config.num_layers = 2;
  config.num_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 4;
  config.max_positions = 64;
  auto model = gpt::make_model(config);
  torch::manual_seed(seed);
  for (auto& parameter : model->parameters()) parameter.set_data(0.5 * torch::randn(parameter.sizes()));
  model->to(device());
  return model;
}

inline gpt::LanguageModel tiny_llama(uint64_t seed = 1) { return tiny_model(gpt::Architecture::kLlama, seed); }

}  // namespace testing
