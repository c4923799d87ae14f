// usage: combine_adapters DIRECTORY
// Loads the adapters a, b and c in DIRECTORY, and writes what it combines of them beside them, each kind into a folder
// of its name.
#include <torch/torch.h>

#include <iostream>
#include <lora/lora.hpp>

torch::nn::Sequential make_model() {
  torch::nn::Sequential model;
  model->push_back("fc", torch::nn::Linear(6, 6));
  model->push_back("table", torch::nn::Embedding(7, 6));
  model->push_back("conv", torch::nn::Conv2d(torch::nn::Conv2dOptions(4, 6, 3)));
  model->to(torch::kDouble);
  return model;
}

void combine(const std::filesystem::path& directory) {
  using lora::CombineKind;
  using lora::CombineOptions;
  const std::vector<std::pair<std::string, CombineOptions>> kinds{
      {"cat", CombineKind::kConcatenation},
      {"linear", CombineKind::kLinear},
      {"svd", CombineOptions(CombineKind::kSvd).rank(3)},
      {"ties total", CombineOptions(CombineKind::kTies).density(0.4)},
      {"ties frequency", CombineOptions(CombineKind::kTies).density(0.4).majority_sign(lora::MajoritySign::kFrequency)},
      {"ties svd", CombineOptions(CombineKind::kTies).density(0.4).rank(3)},
      {"magnitude_prune", CombineOptions(CombineKind::kMagnitudePrune).density(0.4)},
      {"dare_linear", CombineOptions(CombineKind::kDareLinear).density(0.4).seed(5)},
      {"dare_ties", CombineOptions(CombineKind::kDareTies).density(0.4).seed(5)},
  };
  auto model = make_model();
  lora::Adapters adapters(*model);
  for (auto name : {"a", "b", "c"}) adapters.load(name, directory / name);
  for (const auto& [name, options] : kinds) {
    adapters.combine(name, {{"a", 0.5}, {"b", 1.25}, {"c", -2}}, options);
    adapters.save(directory / name, name);
  }
}

int main(int argc, char** argv) {
  if (argc != 2) return std::cerr << "usage: combine_adapters DIRECTORY\n", 2;
  try {
    combine(argv[1]);
  } catch (const c10::Error& error) {
    return std::cerr << "error: " << error.what_without_backtrace() << "\n", 1;
  }
}
