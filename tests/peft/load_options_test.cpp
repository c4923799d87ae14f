// Adapters for models whose names differ, adapters that fit in part, other types, several adapters in one directory,
// and files of older PEFT.
#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/peft/checkpoint.hpp>

#include <fstream>

namespace {

using lora::LoadOptions;
using testing::contains;

/// The same layers under a Python model's names and under others.
struct NamedImpl : torch::nn::Module {
  explicit NamedImpl(const std::string& blocks, const std::string& projection) {
    torch::manual_seed(0);
    for (int layer = 0; layer < 2; ++layer) list->push_back(torch::nn::Linear(6, 6));
    auto inner = register_module(blocks, std::make_shared<torch::nn::Module>());
    for (int layer = 0; layer < 2; ++layer) {
      auto block = inner->register_module(std::to_string(layer), std::make_shared<torch::nn::Module>());
      block->register_module(projection, list[layer]->as<torch::nn::Linear>()->shared_from_this());
    }
    to(testing::device());
  }
  torch::Tensor forward(torch::Tensor x) {
    for (const auto& layer : *list) x = layer->as<torch::nn::Linear>()->forward(x).tanh();
    return x;
  }
  torch::nn::ModuleList list;
};

torch::Tensor input() {
  torch::manual_seed(5);
  return torch::randn({2, 3, 6}, testing::device());
}

/// Saves an adapter of the Python-named model and returns what it computes with it.
torch::Tensor save_reference(const std::filesystem::path& directory) {
  auto model = std::make_shared<NamedImpl>("layers", "q_proj");
  auto adapters = lora::attach(*model, lora::LoRAConfig(2)
                                           .alpha(6)
                                           .target_modules({"q_proj"})
                                           .rank_pattern({{"layers.1.q_proj", 3}})
                                           .alpha_pattern({{"layers.0.q_proj", 5}}));
  testing::randomize(adapters.parameters());
  adapters.save(directory);
  auto active = adapters.activate();
  return model->forward(input());
}

template <class Model>
torch::Tensor run(Model& model, const lora::Adapters& adapters) {
  auto active = adapters.activate();
  return model->forward(input());
}

}  // namespace

TEST_CASE("key_mapping loads into a model with other names, ranks and alphas included") {
  testing::TemporaryFolder folder;
  auto expected = save_reference(folder.path());
  auto model = std::make_shared<NamedImpl>("blocks", "query");
  CHECK_THROWS_WITH(lora::load_adapter(*model, folder.path()), contains("q_proj"));
  const LoadOptions options =
      LoadOptions().key_mapping({{"^layers\\.(\\d+)\\.q_proj", "blocks.$1.query"}, {"q_proj", "never"}});
  auto adapters = lora::load_adapter(*model, folder.path(), options);
  CHECK(adapters.targets() == std::vector<std::string>{"blocks.0.query", "blocks.1.query"});
  CHECK(adapters.scaling("blocks.0.query") == 2.5);
  CHECK(adapters.scaling("blocks.1.query") == 2);
  CHECK(testing::distance(run(model, adapters), expected) < 1e-6);
  CHECK_THROWS_WITH(lora::load_adapter(*model, folder.path(), LoadOptions().key_mapping({{"\\d+", "9"}})),
                    contains("key_mapping gives two tensors the name"));
  CHECK_THROWS_WITH(lora::load_adapter(*model, folder.path(), LoadOptions().key_mapping({{"(", ""}})),
                    contains("\"(\""));
}

TEST_CASE("A file without PEFT's prefix is read when that is said") {
  testing::TemporaryFolder folder;
  auto expected = save_reference(folder.path());
  std::map<std::string, torch::Tensor> renamed;
  for (const auto& [key, tensor] : lora::read_safetensors(folder / "adapter_model.safetensors"))
    renamed["model." + key.substr(std::string("base_model.model.").size())] = tensor.clone();
  lora::write_safetensors(folder / "adapter_model.safetensors", renamed);
  auto model = std::make_shared<NamedImpl>("layers", "q_proj");
  CHECK_THROWS_WITH(lora::load_adapter(*model, folder.path()), contains("unexpected: \n  \"model.layers.0.q_proj"));
  auto adapters = lora::load_adapter(*model, folder.path(), LoadOptions().prefix("model."));
  CHECK(testing::distance(run(model, adapters), expected) < 1e-6);
}

TEST_CASE("What does not fit is an error, or is named and left out") {
  testing::TemporaryFolder folder;
  save_reference(folder.path());
  auto tensors = lora::read_safetensors(folder / "adapter_model.safetensors");
  const std::string first = "base_model.model.layers.0.q_proj.", second = "base_model.model.layers.1.q_proj.";
  std::map<std::string, torch::Tensor> changed;
  for (const auto& [key, tensor] : tensors) changed[key] = tensor.clone();
  changed.erase(first + "lora_B.weight");
  changed["base_model.model.layers.7.q_proj.lora_A.weight"] = torch::ones({2, 6});
  changed[second + "lora_A.weight"] = torch::ones({4, 6});
  lora::write_safetensors(folder / "adapter_model.safetensors", changed);
  auto model = std::make_shared<NamedImpl>("layers", "q_proj");
  auto error = testing::error_of([&] { lora::load_adapter(*model, folder.path()); });
  for (auto text : {"missing: \"base_model.model.layers.0.q_proj.lora_B.weight\" [6, 2]",
                    "unexpected: \"base_model.model.layers.7.q_proj.lora_A.weight\"",
                    "layers.1.q_proj.lora_A.weight\" is [4, 6], not [3, 6]"})
    CHECK_THAT(error, contains(text));
  for (const auto& parameter : model->parameters()) CHECK(parameter.requires_grad());

  lora::LoadReport report;
  auto adapters = lora::load_adapter(*model, folder.path(), LoadOptions().strict(false), &report);
  CHECK((report.missing.size() == 1 && report.unexpected.size() == 1 && report.misshapen.size() == 1));
  auto named = adapters.named_parameters();
  CHECK(testing::distance(named["layers.0.q_proj.lora_A"], changed[first + "lora_A.weight"]) == 0);
  CHECK(testing::distance(named["layers.1.q_proj.lora_B"], changed[second + "lora_B.weight"]) == 0);
  CHECK(named["layers.0.q_proj.lora_B"].eq(0).all().item<bool>());
  CHECK(named["layers.1.q_proj.lora_A"].isfinite().all().item<bool>());
}

TEST_CASE("What only has the wrong shape keeps the values an adapter starts with") {
  testing::TemporaryFolder folder;
  save_reference(folder.path());
  std::map<std::string, torch::Tensor> changed;
  for (const auto& [key, tensor] : lora::read_safetensors(folder / "adapter_model.safetensors"))
    changed[key] = key.find("lora_B") == key.npos ? tensor.clone() : torch::ones({1, 1});
  lora::write_safetensors(folder / "adapter_model.safetensors", changed);
  auto model = std::make_shared<NamedImpl>("layers", "q_proj");
  lora::LoadReport report;
  auto adapters = lora::load_adapter(*model, folder.path(), LoadOptions().strict(false), &report);
  CHECK((report.missing.empty() && report.misshapen.size() == 2));
  for (const auto& item : adapters.named_parameters()) {
    const bool is_b = item.key().find("lora_B") != std::string::npos;
    CHECK(item.value().eq(0).all().item<bool>() == is_b);
  }
}

TEST_CASE("key_mapping finds modules that were trained in full, and parameters") {
  struct MixImpl : torch::nn::Module {
    MixImpl(const std::string& experts, const std::string& head) {
      torch::manual_seed(0);
      auto inner = register_module(experts, std::make_shared<torch::nn::Module>());
      for (auto name : {"up", "down"}) inner->register_parameter(name, torch::randn({2, 6, 6}));
      for (const auto& name : {std::string("fc"), head}) register_module(name, torch::nn::Linear(6, 6));
      to(testing::device());
    }
  };
  testing::TemporaryFolder folder;
  auto python = std::make_shared<MixImpl>("experts", "classifier"), here = std::make_shared<MixImpl>("moe", "head");
  auto config = lora::LoRAConfig(2).alpha(6).target_modules({"fc"}).target_parameters({"experts.up", "experts.down"});
  config.modules_to_save({"classifier"}).rank_pattern({{"experts.up", 3}}).bias(lora::Bias::kAdaptedOnly);
  auto saved = lora::attach(*python, config);
  testing::randomize(saved.parameters());
  saved.save(folder.path());
  auto options = LoadOptions().key_mapping({{"^experts", "moe"}, {"^classifier", "head"}});
  auto loaded = lora::load_adapter(*here, folder.path(), options);
  CHECK(loaded.targets() == std::vector<std::string>{"fc", "moe.down", "moe.up"});
  saved.merge();
  loaded.merge();
  auto expected = python->named_parameters(), found = here->named_parameters();
  for (const auto& [theirs, ours] :
       std::vector<std::pair<std::string, std::string>>{{"experts.up", "moe.up"},
                                                        {"experts.down", "moe.down"},
                                                        {"fc.weight", "fc.weight"},
                                                        {"fc.bias", "fc.bias"},
                                                        {"classifier.weight", "head.weight"},
                                                        {"classifier.bias", "head.bias"}}) {
    INFO(theirs);
    CHECK(torch::equal(expected[theirs], found[ours]));
  }
  loaded.detach();
  config.modules_to_save({"missing"});
  lora::write_adapter_config(folder / "adapter_config.json", config);
  CHECK_THROWS_WITH(lora::load_adapter(*here, folder.path(), options), contains("\"missing\" of modules_to_save"));
  config.target_parameters({"up"});
  lora::write_adapter_config(folder / "adapter_config.json", config);
  CHECK_THROWS_WITH(lora::load_adapter(*here, folder.path(), options), contains("target_parameters has \"up\""));
}

TEST_CASE("Tensors take the type of an attached adapter, that of the file, or the one asked for") {
  testing::TemporaryFolder folder;
  auto expected = save_reference(folder.path());
  std::map<std::string, torch::Tensor> halves;
  for (const auto& [key, tensor] : lora::read_safetensors(folder / "adapter_model.safetensors"))
    halves[key] = tensor.to(torch::kBFloat16);
  lora::write_safetensors(folder / "adapter_model.safetensors", halves);
  const auto [options, type] =
      GENERATE(table<LoadOptions, torch::ScalarType>({{LoadOptions(), torch::kFloat},
                                                      {LoadOptions().keep_dtype(true), torch::kBFloat16},
                                                      {LoadOptions().dtype(torch::kDouble), torch::kDouble}}));
  auto model = std::make_shared<NamedImpl>("layers", "q_proj");
  auto adapters = lora::load_adapter(*model, folder.path(), options);
  for (const auto& parameter : adapters.parameters()) {
    CHECK(parameter.scalar_type() == type);
    CHECK(parameter.requires_grad());
  }
  CHECK(testing::distance(run(model, adapters), expected) < 0.05);
}

TEST_CASE("Several adapters lie in one directory as PEFT lays them out") {
  testing::TemporaryFolder folder;
  auto model = std::make_shared<NamedImpl>("layers", "q_proj");
  lora::Adapters adapters(*model);
  for (auto name : {"default", "french", "poet"}) adapters.add(name, lora::LoRAConfig(2).target_modules({"q_proj"}));
  testing::randomize(adapters.parameters());
  adapters.save_all(folder.path());
  CHECK(std::filesystem::exists(folder / "french/adapter_model.safetensors"));
  auto other = std::make_shared<NamedImpl>("layers", "q_proj");
  auto loaded = lora::load_adapters(*other, folder.path());
  CHECK(loaded.names() == adapters.names());
  for (const auto& item : adapters.named_parameters())
    CHECK(torch::equal(loaded.named_parameters()[item.key()], item.value()));
  std::ofstream(folder / "poet/adapter_config.json") << "{";
  auto untouched = std::make_shared<NamedImpl>("layers", "q_proj");
  CHECK_THROWS_WITH(lora::load_adapters(*untouched, folder.path()), contains("poet"));
  for (const auto& parameter : untouched->parameters()) CHECK(parameter.requires_grad());
  testing::TemporaryFolder empty;
  CHECK_THROWS_WITH(lora::load_adapters(*model, empty.path()), contains("holds no adapter_config.json"));
}

TEST_CASE("adapter_model.bin of older PEFT is read when it is a plain dictionary of tensors, and nothing else is") {
  testing::TemporaryFolder folder;
  auto expected = save_reference(folder.path());
  c10::Dict<std::string, torch::Tensor> dictionary;
  for (const auto& [key, tensor] : lora::read_safetensors(folder / "adapter_model.safetensors"))
    dictionary.insert(key, tensor.clone());
  std::filesystem::remove(folder / "adapter_model.safetensors");
  const auto write = [&](const c10::IValue& value) {
    const auto bytes = torch::pickle_save(value);
    std::ofstream(folder / "adapter_model.bin", std::ios::binary)
        .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  };
  write(dictionary);
  auto model = std::make_shared<NamedImpl>("layers", "q_proj");
  auto adapters = lora::load_adapter(*model, folder.path());
  CHECK(testing::distance(run(model, adapters), expected) < 1e-6);
  adapters.detach();
  write(c10::IValue(std::vector<int64_t>{1, 2}));
  CHECK_THROWS_WITH(lora::load_adapter(*model, folder.path()), contains("has to hold a dictionary of tensors"));
  std::ofstream(folder / "adapter_model.bin") << "\x80\x02}q\x01.";
  CHECK_THROWS_WITH(lora::load_adapter(*model, folder.path()),
                    contains("is no dictionary of tensors written by torch.save"));
}
