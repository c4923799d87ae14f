// Tables of the model in an adapter's file: PEFT writes them along where tokens were added before training, and where
// they are adapted.
#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/files/json.hpp>
#include <lora/peft/checkpoint.hpp>
#include <lora/torchscript.hpp>

#include <fstream>
#include <iterator>

namespace {

using lora::LoadOptions;
using lora::LoRAConfig;
using testing::contains;
using Tensors = std::map<std::string, torch::Tensor>;

constexpr int64_t kTokens = 6, kAdded = 2;

enum class Tie : uint8_t { kNone, kMember, kMemory };

struct LanguageImpl : torch::nn::Module {
  LanguageImpl(int64_t tokens, Tie tie) : embed_tokens(tokens, 4), lm_head(head_options(tokens, tie)) {
    torch::manual_seed(0);
    register_module("embed_tokens", embed_tokens);
    register_module("fc", fc);
    register_module("lm_head", lm_head);
    torch::NoGradGuard no_grad;
    for (auto& parameter : parameters()) {  // the first rows do not depend on how many there are
      auto seeded = torch::Generator(at::detail::createCPUGenerator(parameter.dim()));
      auto values = torch::randn({100, 4}, seeded);
      parameter.copy_(parameter.dim() == 2 ? values.slice(0, 0, parameter.size(0))
                                           : values.select(1, 0).slice(0, 0, parameter.size(0)));
      if (parameter.size(0) > kTokens) parameter.slice(0, kTokens).add_(1);
    }
    if (tie == Tie::kMember) lm_head->weight = embed_tokens->weight;
    if (tie == Tie::kMemory) lm_head->weight.set_data(embed_tokens->weight.data());
    to(testing::device());
    if (tie == Tie::kMemory) lm_head->weight.set_data(embed_tokens->weight.data());
  }
  static torch::nn::LinearOptions head_options(int64_t tokens, Tie tie) {
    return torch::nn::LinearOptions(4, tokens).bias(tie == Tie::kNone);
  }
  torch::Tensor forward(const torch::Tensor& ids) { return lm_head(fc(embed_tokens(ids)).tanh()); }

  torch::nn::Embedding embed_tokens;
  torch::nn::Linear fc{4, 4}, lm_head;
};
TORCH_MODULE(Language);

torch::Tensor ids() { return torch::arange(kTokens + kAdded, torch::kLong).to(testing::device()); }

template <class Model>
torch::Tensor run(Model& model, const lora::Adapters& adapters) {
  torch::NoGradGuard no_grad;
  auto active = adapters.activate();
  return model->forward(ids());
}

Tensors read_tensors(const std::filesystem::path& directory) {
  Tensors tensors;
  for (const auto& [key, tensor] : lora::read_safetensors(directory / "adapter_model.safetensors"))
    tensors[key] = tensor.clone();
  return tensors;
}

void write_tensors(const std::filesystem::path& directory, const Tensors& tensors) {
  lora::write_safetensors(directory / "adapter_model.safetensors", tensors, {{"format", "pt"}});
}

/// The adapter of `grown` as PEFT writes it: with the tables of embedding and head, under the names that they have
/// where they are adapted and where they are not.
lora::Adapters save_grown(Language& grown, const LoRAConfig& config, const std::filesystem::path& directory) {
  auto adapters = lora::attach(*grown, config);
  testing::randomize(adapters.parameters());
  adapters.save(directory);
  auto tensors = read_tensors(directory);
  for (const auto* layer : {"embed_tokens", "lm_head"}) {
    const auto name = "base_model.model." + std::string(layer);
    const bool is_full = tensors.count(name + ".weight") > 0;
    const bool is_adapted = tensors.lower_bound(name + ".lora_") != tensors.lower_bound(name + ".lora_z");
    if (is_full) continue;
    const auto middle = is_adapted ? ".base_layer" : "";
    const auto module = grown->named_modules()[layer];
    for (const auto& item : module->named_parameters(false)) {
      const auto* head = module->as<torch::nn::Linear>();
      const auto& value = item.key() == "weight" && head != nullptr ? head->weight : item.value();
      tensors[name + middle + "." + item.key()] = value.detach().cpu().clone();
    }
  }
  write_tensors(directory, tensors);
  return adapters;
}

LoRAConfig config_of(std::vector<std::string> targets, std::vector<std::string> saved = {}) {
  return LoRAConfig(2).alpha(6).target_modules(std::move(targets)).modules_to_save(std::move(saved));
}

std::string read_text(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

struct Row {
  std::string name;
  LoRAConfig config = LoRAConfig(2);
  Tie tie = Tie::kNone;
};

auto rows() {
  const std::vector<std::string> fc{"fc"}, both{"embed_tokens", "lm_head"};
  return std::vector<Row>{
      {"beside the adapter", config_of(fc)},
      {"beside the adapter, tied", config_of(fc), Tie::kMember},
      {"beside the adapter, tied by their memory", config_of(fc), Tie::kMemory},
      {"adapted embedding", config_of({"embed_tokens", "fc"})},
      {"adapted head", config_of({"lm_head"})},
      {"adapted embedding and head", config_of(both)},
      {"adapted embedding, tied", config_of({"embed_tokens"}), Tie::kMember},
      {"trained in full", config_of(fc, both)},
      {"one of them trained in full", config_of(fc, {"lm_head"})},
  };
}

}  // namespace

TEST_CASE("Tables with more rows are an error that says so, or the model's from then on") {
  const auto row = GENERATE(from_range(rows()));
  INFO(row.name);
  testing::TemporaryFolder folder, again;
  Language grown(kTokens + kAdded, row.tie), model(kTokens, row.tie), third(kTokens, row.tie);
  const auto adapters = save_grown(grown, row.config, folder.path());
  const auto expected = run(grown, adapters);

  const auto error = testing::error_of([&] { lora::load_adapter(*model, folder.path()); });
  for (const auto* text : {"2 rows more than the model's", "tokens", "LoadOptions().take_tables(true)"})
    CHECK_THAT(error, contains(text));
  CHECK(model->embed_tokens->weight.size(0) == kTokens);

  const auto table = model->embed_tokens->weight;
  const auto options = LoadOptions().take_tables(true);
  auto loaded = lora::load_adapter(*model, folder.path(), options);
  CHECK(testing::distance(run(model, loaded), expected) < 1e-6);
  CHECK(model->embed_tokens->weight.is_same(table));
  CHECK(model->embed_tokens->weight.sizes() == torch::IntArrayRef({kTokens + kAdded, 4}));
  CHECK(model->embed_tokens->options.num_embeddings() == kTokens + kAdded);
  CHECK(model->lm_head->options.out_features() == kTokens + kAdded);
  CHECK(!table.requires_grad());
  if (row.tie == Tie::kMember) CHECK(model->lm_head->weight.is_same(table));
  if (row.tie == Tie::kMemory) CHECK(model->lm_head->weight.is_alias_of(table));
  const bool is_full = !row.config.modules_to_save().empty();
  torch::NoGradGuard no_grad;  // outside of a scope
  if (!is_full) CHECK(testing::distance(model->forward(ids()), grown->forward(ids())) == 0);

  loaded.save(again.path());
  CHECK(read_text(again / "adapter_model.safetensors") == read_text(folder / "adapter_model.safetensors"));
  CHECK(testing::distance(run(third, lora::load_adapter(*third, again.path(), options)), expected) < 1e-6);

  loaded.merge();
  CHECK(testing::distance(model->forward(ids()), expected) < 1e-5);
  loaded.save(again.path());  // the tables as they are without the adapter
  CHECK(read_text(again / "adapter_model.safetensors") == read_text(folder / "adapter_model.safetensors"));
  loaded.detach();
  CHECK((table.requires_grad() && table.size(0) == kTokens + kAdded));
}

TEST_CASE("Tables that are the model's are no error and stay in the file") {
  const auto row = GENERATE(from_range(rows()));
  INFO(row.name);
  testing::TemporaryFolder folder, again;
  Language grown(kTokens + kAdded, row.tie), model(kTokens + kAdded, row.tie);
  const auto expected = run(grown, save_grown(grown, row.config, folder.path()));
  for (const bool takes : {false, true}) {
    lora::LoadReport report;
    auto loaded = lora::load_adapter(*model, folder.path(), LoadOptions().take_tables(takes), &report);
    CHECK(report.empty());
    CHECK(torch::equal(run(model, loaded), expected));
    loaded.save(again.path());
    CHECK(read_text(again / "adapter_model.safetensors") == read_text(folder / "adapter_model.safetensors"));
    loaded.detach();
  }
}

TEST_CASE("What is taken over is given back when loading fails") {
  const auto row = GENERATE(from_range(rows()));
  INFO(row.name);
  testing::TemporaryFolder folder;
  Language grown(kTokens + kAdded, row.tie), model(kTokens, row.tie);
  save_grown(grown, row.config, folder.path());
  auto tensors = read_tensors(folder.path());
  tensors["base_model.model.other.weight"] = torch::ones({1});
  write_tensors(folder.path(), tensors);
  std::vector<torch::Tensor> before;
  const auto parameters = model->parameters();
  for (const auto& parameter : parameters) before.push_back(parameter.detach().clone());
  CHECK_THROWS_WITH(lora::load_adapter(*model, folder.path(), LoadOptions().take_tables(true)),
                    contains("unexpected: \"base_model.model.other.weight\" [1]"));
  for (size_t i = 0; i < parameters.size(); ++i) {
    CHECK(model->parameters()[i].is_same(parameters[i]));
    CHECK(torch::equal(parameters[i], before[i]));
    CHECK(parameters[i].requires_grad());
  }
  CHECK(model->embed_tokens->options.num_embeddings() == kTokens);
  CHECK(model->lm_head->options.out_features() == kTokens);
  if (row.tie != Tie::kNone) CHECK(model->lm_head->weight.is_alias_of(model->embed_tokens->weight));
}

TEST_CASE("A table that the model cannot take is an error") {
  testing::TemporaryFolder folder;
  Language grown(kTokens + kAdded, Tie::kMember);
  save_grown(grown, config_of({"fc"}), folder.path());
  auto tensors = read_tensors(folder.path());
  auto& embedding = tensors.at("base_model.model.embed_tokens.weight");
  const auto options = LoadOptions().take_tables(true);
  SECTION("fewer rows") {
    Language larger(kTokens + kAdded + 1, Tie::kMember);
    const auto error = testing::error_of([&] { lora::load_adapter(*larger, folder.path(), options); });
    CHECK_THAT(error,
               contains("embed_tokens.weight\" [8, 4] (a frozen weight, and not the model's own, which is [9, 4])"));
    CHECK(error.find("take_tables") == error.npos);
  }
  SECTION("other columns") {
    embedding = torch::ones({kTokens + kAdded, 5});
    write_tensors(folder.path(), tensors);
    Language model(kTokens, Tie::kNone);
    CHECK_THROWS_WITH(lora::load_adapter(*model, folder.path(), options), contains("embed_tokens.weight\" [8, 5]"));
  }
  SECTION("two that differ where the model has one") {
    embedding.add_(1);
    write_tensors(folder.path(), tensors);
    Language model(kTokens, Tie::kMember);
    CHECK_THROWS_WITH(lora::load_adapter(*model, folder.path(), options),
                      contains("holds two tables that differ, of which one is \"lm_head.weight\""));
    CHECK(model->embed_tokens->weight.size(0) == kTokens);
  }
  SECTION("one that is adapted") {
    Language model(kTokens, Tie::kMember);
    auto adapters = lora::attach(*model, config_of({"embed_tokens"}));
    CHECK_THROWS_WITH(adapters.load("second", folder.path(), options), contains("the adapter \"default\" uses it"));
    CHECK(model->embed_tokens->weight.size(0) == kTokens);
  }
  SECTION("not one that was adapted before") {
    Language model(kTokens, Tie::kMember);
    lora::attach(*model, config_of({"embed_tokens", "fc"})).detach();
    const auto loaded = lora::load_adapter(*model, folder.path(), options);
    CHECK(testing::distance(run(model, loaded), run(grown, lora::load_adapter(*grown, folder.path()))) < 1e-6);
  }
  SECTION("a layer that is no table") {
    tensors["base_model.model.fc.base_layer.weight"] = torch::ones({5, 4});
    write_tensors(folder.path(), tensors);
    Language model(kTokens + kAdded, Tie::kMember);
    CHECK_THROWS_WITH(lora::load_adapter(*model, folder.path()), contains("fc.base_layer.weight\" [5, 4]"));
  }
}

TEST_CASE("A table of as many rows with other values is an error, or taken over") {
  testing::TemporaryFolder folder;
  Language grown(kTokens + kAdded, Tie::kNone), model(kTokens + kAdded, Tie::kNone);
  const auto expected = run(grown, save_grown(grown, config_of({"fc"}), folder.path()));
  {
    torch::NoGradGuard no_grad;  // rows that somebody else drew
    model->embed_tokens->weight.slice(0, kTokens).normal_();
    model->lm_head->weight.slice(0, kTokens).normal_();
  }
  CHECK_THROWS_WITH(lora::load_adapter(*model, folder.path()),
                    contains("if tokens were added before training, the table has their rows"));
  const auto loaded = lora::load_adapter(*model, folder.path(), LoadOptions().take_tables(true));
  CHECK(testing::distance(run(model, loaded), expected) < 1e-6);
}

TEST_CASE("Tables are compared as they are without what is merged") {
  testing::TemporaryFolder folder, again;
  Language grown(kTokens, Tie::kNone), model(kTokens, Tie::kNone);
  save_grown(grown, config_of({"fc"}), folder.path());
  auto adapters = lora::attach(*model, config_of({"embed_tokens"}, {"lm_head"}));
  testing::randomize(adapters.parameters());
  adapters.merge();
  CHECK(testing::distance(model->embed_tokens->weight, grown->embed_tokens->weight) > 0.1);
  adapters.load("second", folder.path());
  adapters.save(again.path(), "second");
  CHECK(read_text(again / "adapter_model.safetensors") == read_text(folder / "adapter_model.safetensors"));
}

TEST_CASE("A model in half precision takes a table over in its own type") {
  testing::TemporaryFolder folder;
  Language grown(kTokens + kAdded, Tie::kMember), model(kTokens, Tie::kMember);
  save_grown(grown, config_of({"fc"}), folder.path());
  model->to(torch::kBFloat16);
  model->lm_head->weight = model->embed_tokens->weight;
  const auto loaded = lora::load_adapter(*model, folder.path(), LoadOptions().take_tables(true));
  CHECK(model->embed_tokens->weight.scalar_type() == torch::kBFloat16);
  CHECK(torch::equal(model->embed_tokens->weight, grown->embed_tokens->weight.to(torch::kBFloat16)));
}

TEST_CASE("A TorchScript module takes tables over") {
  testing::TemporaryFolder folder;
  Language grown(kTokens + kAdded, Tie::kNone), stock(kTokens, Tie::kNone);
  const auto expected = run(grown, save_grown(grown, config_of({"fc", "embed_tokens"}), folder.path()));
  torch::jit::Module model("Language");
  const auto add = [&](const char* name, const torch::nn::Module& from, const char* code) {
    torch::jit::Module module(std::string(name) == "embed_tokens" ? "Embedding" : "Linear");
    module.register_attribute("training", c10::BoolType::get(), true);
    for (const auto& item : from.named_parameters(false))
      module.register_parameter(item.key(), item.value().detach().clone(), /*is_buffer=*/false);
    module.define(code);
    model.register_module(name, module);
  };
  add("embed_tokens", *stock->embed_tokens, "def forward(self, ids):\n  return torch.embedding(self.weight, ids)\n");
  add("fc", *stock->fc, "def forward(self, x):\n  return torch.linear(x, self.weight, self.bias)\n");
  add("lm_head", *stock->lm_head, "def forward(self, x):\n  return torch.linear(x, self.weight, self.bias)\n");
  model.define(
      "def forward(self, ids):\n"
      "  return self.lm_head.forward(torch.tanh(self.fc.forward(self.embed_tokens.forward(ids))))\n");
  lora::Adapters adapters(std::make_shared<lora::ScriptModel>(model));
  CHECK_THROWS_WITH(adapters.load("default", folder.path()), contains("take_tables"));
  adapters.load("default", folder.path(), LoadOptions().take_tables(true));
  torch::NoGradGuard no_grad;
  auto active = adapters.activate();
  CHECK(testing::distance(model.forward({ids()}).toTensor(), expected) < 1e-6);
}
