// Links with functions of each header whose bodies lora::compiled has, and sees that they work.
#include <torch/script.h>
#include <torch/torch.h>

#include <lora/lora.hpp>
#include <lora/train/cross_entropy.hpp>

#include <filesystem>
#include <sstream>
#include <stdexcept>
#include <string>

#if LORA_BODIES
#error "the bodies are to be those of the library"
#endif

namespace {

struct Net : torch::nn::Module {
  torch::Tensor forward(const torch::Tensor& x) { return down(torch::relu(up(x))); }
  torch::nn::Linear up{register_module("up", torch::nn::Linear(4, 8))};
  torch::nn::Linear down{register_module("down", torch::nn::Linear(8, 4))};
};

void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

}  // namespace

/// Holds the linear layers of a model in int8, and gives it the numbers that this has. In the other source file.
void through_few_bits(torch::nn::Module& model, const std::filesystem::path& file);

int main() {
  torch::manual_seed(0);
  const auto folder = std::filesystem::current_path() / "every_part_files";
  std::filesystem::remove_all(folder);
  Net net;
  const auto x = torch::randn({3, 4});
  const auto base = net.forward(x);
  auto adapters = lora::attach(net, lora::LoRAConfig(2).alpha(3).target_modules({"up", "down"}));
  torch::optim::SGD optimizer(adapters.parameters(), 0.5);
  for (int step = 0; step < 3; ++step) {
    auto active = adapters.activate();
    optimizer.zero_grad();
    net.forward(x).square().sum().backward();
    optimizer.step();
  }
  const auto computed = [&](const std::string& name) {
    auto active = adapters.activate(name);
    return net.forward(x);
  };
  const auto trained = computed("default");
  require(!torch::allclose(trained, base), "training");
  std::ostringstream report;
  report << adapters.report();
  require(report.str().find("parameters are trainable") != std::string::npos, "report");
  adapters.save(folder / "default");
  adapters.save_merged(folder / "merged.safetensors");
  adapters.load("loaded", folder / "default");
  require(torch::equal(computed("loaded"), trained), "files");
  adapters.combine("twice", {{"loaded", 2.0}});
  {
    auto active = adapters.activate({"loaded", "", "twice"});
    const auto rows = net.forward(x);
    require(torch::allclose(rows[0], trained[0]) && torch::allclose(rows[1], base[1]), "rows");
    require(!torch::allclose(rows[2], trained[2]), "combination");
  }
  adapters.remove("twice");
  adapters.remove("loaded");
  require(adapters.diagnose([&] { net.forward(x); }).size() == 2, "uses");
  const auto compiled = lora::trace(net, lora::LoRAConfig(4).target_modules({"up", "down"}), {x},
                                    [&](const std::vector<at::Tensor>& in) { return net.forward(in[0]); });
  lora::HotSwap(compiled).put(adapters, "default");
  require(torch::allclose(torch::jit::Module(compiled).forward({x}).toTensor(), trained, 1e-4, 1e-5), "hot swap");
  auto scripted = compiled.attr("model").toModule();
  lora::load_adapter(scripted, folder / "default").detach();
  adapters.detach();
  require(torch::equal(net.forward(x), base), "detach");

  lora::LoRALinear layer(net.up, lora::LoRAOptions(2).alpha(3));
  layer->lora_B().detach().normal_();
  const auto adapted = layer->forward(x);
  require(!torch::allclose(adapted, net.up(x)), "modules");
  layer->merge();
  require(torch::allclose(layer->forward(x), adapted, 1e-4, 1e-5), "merging");
  layer->unmerge();
  require(torch::equal(layer->forward(x), adapted), "unmerging");
  torch::nn::Sequential modules(layer);
  require(lora::adapters_of(*modules).config("default").method().info().name == lora::all_methods().front().info().name,
          "methods");

  lora::AdapterPool pool(net, lora::AdapterPoolOptions(folder));
  {
    auto active = pool.activate("default");
    require(torch::equal(net.forward(x), trained), "pool");
  }
  const auto finetuned = lora::read_safetensors(folder / "merged.safetensors");
  Net other;
  torch::NoGradGuard no_grad;
  for (auto& item : net.named_parameters()) other.named_parameters()[item.key()].copy_(item.value());
  auto extracted = lora::extract(other, finetuned, lora::LoRAConfig(2).target_modules({"up", "down"}));
  {
    auto active = extracted.activate();
    require(torch::allclose(other.forward(x), trained, 1e-3, 1e-4), "extract");
  }
  extracted.save(folder / "extracted");
  lora::subtract_start(folder / "extracted", folder / "extracted", folder / "difference");
  require(lora::read_adapter_config(folder / "difference" / "adapter_config.json").rank() == 4, "convert");
  extracted.merge_and_unload();
  const auto merged = other.forward(x);
  require(torch::allclose(merged, trained, 1e-3, 1e-4), "merging for good");
  through_few_bits(other, folder / "int8.safetensors");
  const auto rounded = other.forward(x);
  const auto lost = ((rounded - merged).norm() / merged.norm()).item<double>();
  require(lost > 1e-6 && lost < 0.03, ("few bits: " + std::to_string(lost)).c_str());
  std::filesystem::remove_all(folder);
}
