// What memory do the weights of a large model take in 4 bits, and what does a step of training on them take? A Llama of
// the shapes of Llama-3.1-8B, by the model code of examples/finetune_gpt, with random weights that are quantized one
// after the other as they are drawn; adapters on q_proj and v_proj; one step of 1 x TOKENS tokens.
//
//   llama_8b [LAYERS] [TOKENS] [bfloat16|float32]      32 64 bfloat16
//
// Linear layers are held in NF4. With bfloat16 the embedding and the head are of that type, and so is all that is
// computed; with float32 both are held in NF4, too. Full size takes 7 GB of memory.
#include <torch/torch.h>

#include <lora/lora.hpp>

#include <fmt/format.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "llama.hpp"
#include "progress.hpp"
#include "weight_format.hpp"

namespace {

gpt::ModelConfig llama_8b(int64_t layers) {
  gpt::ModelConfig config;
  config.vocab_size = 128256;
  config.hidden_size = 4096;
  config.intermediate_size = 14336;
  config.num_layers = layers;
  config.num_heads = 32;
  config.num_key_value_heads = 8;
  config.head_dim = 128;
  config.max_positions = 131072;
  config.rope.scaling = gpt::RopeScaling::kLlama3;
  config.rope.theta = 500000;
  config.rope.factor = 8;
  return config;
}

/// Numbers of the size that models start training with; norms pass their input on.
gpt::LanguageModel random_model(const gpt::ModelConfig& config, const gpt::WeightFormat& format) {
  auto model = std::make_shared<gpt::LlamaImpl>(config);
  const auto parameters = model->named_parameters();
  torch::NoGradGuard no_grad;
  gpt::fill_weights(*model, format, [&](const std::string& name) {
    const auto sizes = parameters[name].sizes();
    auto numbers = sizes.size() == 1 ? torch::ones(sizes) : torch::empty(sizes).normal_(0, 0.02);
    return numbers.to(format.dtype);
  });
  return model;
}

void print_memory(const char* when, double seconds) {
  fmt::print("{:<28} {:>8.1f} s   {:.2f} GB in memory, {:.2f} GB at most so far\n", when, seconds,
             static_cast<double>(gpt::memory_in_use(torch::kCPU)) / 1e9,
             static_cast<double>(gpt::peak_memory(torch::kCPU)) / 1e9);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t layers = argc > 1 ? std::atoll(argv[1]) : 32, tokens = argc > 2 ? std::atoll(argv[2]) : 64;
  const std::string dtype = argc > 3 ? argv[3] : "bfloat16";
  if (layers < 1 || tokens < 2 || (dtype != "bfloat16" && dtype != "float32")) {
    fmt::print(stderr, "usage: llama_8b [LAYERS] [TOKENS] [bfloat16|float32]\n");
    return 2;
  }
  const auto format = dtype == "bfloat16" ? gpt::WeightFormat(torch::kBFloat16, "nf4", "none")
                                          : gpt::WeightFormat(torch::kFloat, "nf4", "nf4");
  torch::manual_seed(0);
  print_memory("LibTorch", 0);
  gpt::Stopwatch watch;
  auto model = random_model(llama_8b(layers), format);
  auto adapters = lora::attach(*model, lora::LoRAConfig(8).alpha(16).target_modules({"q_proj", "v_proj"}));
  print_memory("model and adapters", watch.seconds());
  const auto report = adapters.report();
  fmt::print("{:.3f} billion parameters take {}; {:.1f} million are trained; {} threads\n",
             static_cast<double>(report.base) / 1e9, gpt::weight_memory(report),
             static_cast<double>(report.trainable) / 1e6, torch::get_num_threads());

  torch::optim::AdamW optimizer(adapters.parameters(), torch::optim::AdamWOptions(1e-3));
  const auto ids = torch::randint(model->config.vocab_size, {1, tokens + 1}, torch::kLong);
  model->train();
  watch = {};
  auto active = adapters.activate();
  const auto logits = model->forward(ids.narrow(1, 0, tokens)).squeeze(0).to(torch::kFloat);
  const auto loss = torch::nn::functional::cross_entropy(logits, ids[0].narrow(0, 1, tokens));
  print_memory("forward", watch.seconds());
  watch = {};
  loss.backward();
  print_memory("backward", watch.seconds());
  watch = {};
  double square = 0;
  for (const auto& parameter : adapters.parameters())
    square += parameter.grad().defined() ? parameter.grad().square().sum().item<double>() : 0;
  optimizer.step();
  print_memory("AdamW", watch.seconds());
  const auto value = loss.item<double>(), norm = std::sqrt(square);
  fmt::print("loss {:.4f}, gradient norm {:.4g}\n", value, norm);
  return std::isfinite(value) && std::isfinite(norm) && norm > 0 ? 0 : 1;
}
