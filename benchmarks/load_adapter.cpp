// usage: load_adapter MODEL_DIR ADAPTER_DIR COUNT
// Loads an adapter into a model COUNT times, each time under another name and beside all the others, and prints the
// microseconds of each in a line. load_vs_peft.py runs it.
#include <torch/torch.h>

#include <lora/lora.hpp>

#include <iostream>
#include <string>

#include "checkpoint.hpp"
#include "timing.hpp"

int main(int argc, char** argv) {
  if (argc != 4) return std::cerr << "usage: load_adapter MODEL_DIR ADAPTER_DIR COUNT\n", 2;
  const auto model = gpt::load_model(argv[1], torch::kFloat, torch::kCPU);
  auto adapters = lora::load_adapter(*model, argv[2]);  // in peft, too, one comes with the model
  const int count = std::stoi(argv[3]);
  for (int i = 0; i < count; ++i) {
    std::cout << microseconds([&] { adapters.load("adapter_" + std::to_string(i), argv[2]); }) << "\n";
  }
}
