// Any bytes as an adapter_config.json: either a CheckpointError, or a configuration that is the same after it was
// written and read again. A model is asked for it, too: what comes of that is for other tests, memory is for this one.
#include <lora/adapters.hpp>
#include <lora/peft/config.hpp>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <algorithm>
#include <cctype>
#include <optional>
#include <string_view>
#include <tuple>

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

auto content(const lora::ModuleSelector& selector) {
  const auto* pattern = selector.pattern();
  return std::make_tuple(selector.is_all_linear(), pattern != nullptr, pattern != nullptr ? pattern->pattern : "",
                         selector.names() != nullptr ? *selector.names() : std::vector<std::string>());
}

auto content(const lora::LoRAConfig& c) {
  return std::make_tuple(c.method().info().name, c.rank(), c.alpha(), c.dropout(), c.rank_stabilized(), c.init(),
                         content(c.target_modules()), content(c.exclude_modules()), c.target_parameters(),
                         c.modules_to_save(), c.bias(), c.lora_bias(), c.layers_to_transform(), c.layers_pattern(),
                         c.rank_pattern(), c.alpha_pattern(), c.fan_in_fan_out(), c.base_model_name_or_path(),
                         c.task_type());
}

std::string written(const lora::LoRAConfig& config) { return lora::detail::PeftConfigWriter("output", config).text(); }

std::vector<std::string> expressions(const lora::LoRAConfig& config) {
  auto found = config.layers_pattern();
  for (const auto* selector : {&config.target_modules(), &config.exclude_modules()}) {
    if (selector->pattern() != nullptr) found.push_back(selector->pattern()->pattern);
  }
  for (const auto& item : config.rank_pattern()) found.push_back(item.first);
  for (const auto& item : config.alpha_pattern()) found.push_back(item.first);
  return found;
}

/// Whether a model can be asked: ranks of which the tensors fit into memory, and expressions that are matched in time.
/// As in Python, one with a back reference can take for ever; one with large numbers is a large automaton.
bool is_small(const lora::LoRAConfig& config) {
  constexpr int64_t kMostRank = 1000;
  constexpr size_t kMostRepetitions = 6, kMostDigits = 2;
  const auto fits = [](const auto& item) { return item.second <= kMostRank; };
  const auto& ranks = config.rank_pattern();
  if (config.rank() > kMostRank || !std::all_of(ranks.begin(), ranks.end(), fits)) return false;
  size_t repetitions = 0;
  for (const auto& expression : expressions(config)) {
    for (size_t i = 0; i < expression.size(); ++i) {
      if (std::string_view("*+?{").find(expression[i]) != std::string_view::npos) ++repetitions;
      if (expression[i] == '\\' && i + 1 < expression.size() && std::isdigit(expression[i + 1]) != 0) return false;
    }
    if (lora::detail::most_digits(expression) > kMostDigits) return false;
  }
  return repetitions <= kMostRepetitions;
}

void compile(const std::string& expression) {
  try {
    lora::detail::compile(expression, expression);
  } catch (const c10::ValueError&) {
  }
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
  fuzz::require(content(*again) == content(*config), "writing and reading keep the configuration");
  fuzz::require(written(*again) == text, "reading and writing keep the text");
  for (const auto& expression : expressions(*config)) compile(expression);
  if (is_small(*config)) select(*config);
  return 0;
}
