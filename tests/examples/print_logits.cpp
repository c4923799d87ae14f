// usage: print_logits MODEL_DIR IDS.safetensors LOGITS.safetensors [SAVE_DIR | --adapter ADAPTER_DIR]
// Runs a model on the tensor "ids" (B, T) and writes "ids" and its "logits" (B, T, V); with SAVE_DIR it also saves the
// model there, with --adapter it runs with that adapter. logits_live.py compares them with Python's transformers,
// peft/finetune_live.py with peft.
#include <torch/torch.h>

#include <exception>
#include <iostream>
#include <optional>
#include <string>

#include <lora/lora.hpp>
#include <lora/peft/checkpoint.hpp>

#include "../../examples/finetune_gpt/checkpoint.hpp"

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr
        << "usage: print_logits MODEL_DIR IDS.safetensors LOGITS.safetensors [SAVE_DIR | --adapter ADAPTER_DIR]\n";
    return 2;
  }
  try {
    torch::NoGradGuard no_grad;
    auto model = gpt::load_model(argv[1], torch::kFloat, torch::kCPU);
    const auto ids = lora::read_safetensors(argv[2]).at("ids");
    const bool has_adapter = argc > 5 && std::string(argv[4]) == "--adapter";
    std::optional<lora::Adapters> adapters;
    if (has_adapter) adapters = lora::load_adapter(*model, argv[5]);
    const auto logits = [&] {
      if (!adapters) return model->forward(ids);
      auto active = adapters->activate();
      model->eval();
      return model->forward(ids);
    }();
    lora::write_safetensors(argv[3], {{"ids", ids}, {"logits", logits}});
    if (argc > 4 && !has_adapter) gpt::save_model(*model, argv[1], argv[4]);
  } catch (const c10::Error& error) {
    std::cerr << "print_logits: " << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "print_logits: " << error.what() << "\n";
    return 1;
  }
}
