// The language models of this folder, and the choice between them.
#pragma once

#include <memory>

#include "gpt2.hpp"
#include "llama.hpp"

namespace gpt {

/// The model that a configuration describes, without weights: every parameter is NaN until a checkpoint is loaded.
inline LanguageModel make_model(const ModelConfig& config) {
  if (config.architecture == Architecture::kGPT2) return std::make_shared<GPT2Impl>(config);
  return std::make_shared<LlamaImpl>(config);
}

}  // namespace gpt
