// usage: select_targets CASES.json FOLDER
// For every case {"names": [...], "config": {...}} builds a model with a Linear of each name, reads the configuration
// as an adapter_config.json (written into FOLDER), and prints a line of JSON: the rank and the scaling of every adapted
// layer, or the error.
#include <torch/torch.h>

#include <fstream>
#include <iostream>
#include <lora/lora.hpp>
#include <nlohmann/json.hpp>

using json = nlohmann::ordered_json;  // the first pattern that matches counts

/// A module that is nothing but the parent of others.
struct Node : torch::nn::Module {
  void add(const std::string& name) {
    const auto dot = name.find('.');
    const auto head = name.substr(0, dot);
    if (dot == std::string::npos) {
      register_module(name, torch::nn::Linear(4, 4));
    } else {
      auto child = named_children().contains(head) ? std::dynamic_pointer_cast<Node>(named_children()[head])
                                                   : register_module(head, std::make_shared<Node>());
      child->add(name.substr(dot + 1));
    }
  }
};

json select(const json& item, const std::filesystem::path& config) {
  std::ofstream(config) << item["config"];
  auto model = std::make_shared<Node>();
  for (const auto& name : item["names"]) model->add(name);
  try {
    auto result = json::object();
    for (const auto& layer : lora::attach(*model, lora::read_adapter_config(config)).report().layers) {
      result[layer.name] = {layer.rank, layer.scaling};
    }
    return result;
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
}

int main(int argc, char** argv) {
  if (argc != 3) return std::cerr << "usage: select_targets CASES.json FOLDER\n", 2;
  json cases;
  std::ifstream(argv[1]) >> cases;
  for (const auto& item : cases) std::cout << select(item, std::filesystem::path(argv[2]) / "config.json") << "\n";
}
