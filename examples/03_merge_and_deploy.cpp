// Before deployment: save the adapter alone, fold it into the weights, and hand on a file that any LibTorch program
// reads without this library.
#include <torch/torch.h>

#include <filesystem>
#include <fmt/format.h>
#include <lora/lora.hpp>

using torch::nn::GELU, torch::nn::Linear, torch::nn::Sequential;

Sequential make_model() { return Sequential(Linear(256, 512), GELU(), Linear(512, 512), GELU(), Linear(512, 64)); }

int main() {
  torch::manual_seed(0);
  const std::filesystem::path folder = "merge_and_deploy";  // in the working directory
  std::filesystem::create_directories(folder);
  auto model = make_model();
  torch::save(model, (folder / "base.pt").string());

  // Train for a moment, so that there is something to merge.
  auto adapters = lora::attach(*model, lora::LoRAConfig(8).alpha(16).target_modules({"0", "2", "4"}));
  torch::optim::AdamW optimizer(adapters.parameters(), torch::optim::AdamWOptions(1e-2));
  auto x = torch::randn({32, 256}), target = torch::randn({32, 64});
  for (int step = 0; step < 20; ++step) {
    auto active = adapters.activate();
    auto loss = torch::mse_loss(model->forward(x), target);
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    if (step == 0 || step == 19) fmt::print("step {:2}   loss {:.4f}\n", step + 1, loss.item<double>());
  }

  // The adapter alone is small, and Python's PEFT reads it.
  adapters.save(folder / "adapter");
  fmt::print("base model {} bytes, adapter {} bytes\n", std::filesystem::file_size(folder / "base.pt"),
             std::filesystem::file_size(folder / "adapter" / "adapter_model.safetensors"));

  torch::NoGradGuard no_grad;
  torch::Tensor adapted;
  {
    auto active = adapters.activate();
    adapted = model->forward(x);
  }
  adapters.merge_and_unload();
  torch::save(model, (folder / "deployed.pt").string());

  auto deployed = make_model();
  torch::load(deployed, (folder / "deployed.pt").string());
  const auto deployed_distance = (deployed->forward(x) - adapted).abs().max().item<double>();
  fmt::print("largest |deployed - adapted| = {:.1e}\n", deployed_distance);

  // Or later, onto the base model: the adapter's directory says what it adapts and how.
  auto served = make_model();
  torch::load(served, (folder / "base.pt").string());
  auto loaded = lora::load_adapter(*served, folder / "adapter");
  loaded.merge();
  const auto distance = (served->forward(x) - adapted).abs().max().item<double>();
  fmt::print("largest |loaded and merged - adapted| = {:.1e}\n", distance);
  return deployed_distance < 1e-4 && distance < 1e-4 ? 0 : 1;
}
