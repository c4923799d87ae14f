// Any bytes as an adapter_config.json: either a CheckpointError, or a configuration that is the same after it was
// written and read again, and that a model can be asked for, which either has what it names or is an error.
#include <lora/adapters.hpp>
#include <lora/peft/config.hpp>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <algorithm>
#include <optional>

#include "memory_file.hpp"

namespace {

/// Layers with the names that the corpus uses.
struct Model : torch::nn::Module {
  Model() {
    for (int i = 0; i < 3; ++i) {
      auto layer = std::make_shared<torch::nn::Module>();
      for (const auto* name : {"q_proj", "v_proj"}) layer->register_module(name, torch::nn::Linear(4, 4));
      layers->push_back(layer);
    }
  }
  torch::nn::ModuleList layers = register_module("layers", torch::nn::ModuleList());
  torch::nn::Embedding embed_tokens = register_module("embed_tokens", torch::nn::Embedding(6, 4));
  torch::nn::Linear head = register_module("head", torch::nn::Linear(4, 6));
};

std::optional<lora::LoRAConfig> read(const std::filesystem::path& path) {
  try {
    return lora::read_adapter_config(path);
  } catch (const lora::CheckpointError&) {
    return std::nullopt;
  }
}

std::string written(const lora::LoRAConfig& config) { return lora::detail::PeftConfigWriter("output", config).text(); }

/// Ranks of which the tensors fit into memory; the others are a matter of the allocator.
bool is_small(const lora::LoRAConfig& config) {
  constexpr int64_t kMost = 1000;
  const auto& pattern = config.rank_pattern();
  const auto fits = [](const auto& item) { return item.second <= kMost; };
  return config.rank() <= kMost && std::all_of(pattern.begin(), pattern.end(), fits);
}

void select(const lora::LoRAConfig& config) {
  static const auto model = std::make_shared<Model>();
  static const lora::Adapters adapters(*model);
  try {
    adapters.plan(config);
  } catch (const c10::Error&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  struct Quiet : c10::WarningHandler {
    void process(const c10::Warning&) override {}
  };
  static Quiet quiet;
  c10::WarningUtils::set_warning_handler(&quiet);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  const fuzz::MemoryFile file(bytes, size);
  const auto config = read(file.path());
  if (!config) return 0;
  const auto text = written(*config);
  const fuzz::MemoryFile copy(text);
  const auto again = read(copy.path());
  fuzz::require(again.has_value(), "what is written can be read");
  fuzz::require(written(*again) == text, "reading and writing keep the configuration");
  if (is_small(*config)) select(*config);
  return 0;
}
