// Directories as PEFT and its users leave them: what the configuration names in vain, names that begin in another way,
// and adapters of MultiheadAttention. The tensors of the file decide.
#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/files/json.hpp>
#include <lora/peft/checkpoint.hpp>

#include <fstream>
#include <iterator>

namespace {

using lora::LoadOptions;
using lora::LoRAConfig;
using nlohmann::ordered_json;
using testing::contains;
using Tensors = std::map<std::string, torch::Tensor>;

struct ClassifierImpl : torch::nn::Module {
  explicit ClassifierImpl(bool has_head = true) {
    torch::manual_seed(0);
    for (int i = 0; i < 2; ++i) layers->push_back(testing::Block());
    register_module("layers", layers);
    if (has_head) classifier = register_module("classifier", torch::nn::Linear(8, 3));
    to(testing::device());
  }
  torch::Tensor forward(torch::Tensor x) {
    for (const auto& layer : *layers) x = layer->as<testing::Block>()->forward(x);
    return classifier.is_empty() ? x : classifier(x);
  }
  torch::nn::ModuleList layers;
  torch::nn::Linear classifier{nullptr};
};
TORCH_MODULE(Classifier);

template <class Model>
torch::Tensor run(Model& model, const lora::Adapters& adapters) {
  torch::NoGradGuard no_grad;
  auto active = adapters.activate();
  return model->forward(torch::linspace(-1, 1, 2 * 3 * 8).view({2, 3, 8}).to(testing::device()));
}

std::string read_text(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

ordered_json read_config(const std::filesystem::path& directory) {
  return ordered_json::parse(read_text(directory / "adapter_config.json"));
}

/// Replaces fields of the configuration in a directory.
void patch(const std::filesystem::path& directory, const ordered_json& fields) {
  auto config = read_config(directory);
  for (const auto& [name, value] : fields.items()) config[name] = value;
  std::ofstream(directory / "adapter_config.json") << config.dump(2);
}

Tensors read_tensors(const std::filesystem::path& directory) {
  Tensors tensors;
  for (const auto& [key, tensor] : lora::read_safetensors(directory / "adapter_model.safetensors"))
    tensors[key] = tensor.clone();
  return tensors;
}

template <class Model>
lora::Adapters trained(Model& model, const LoRAConfig& config) {
  auto adapters = lora::attach(*model, config);
  testing::randomize(adapters.parameters());
  return adapters;
}

/// Ranks and alphas differ by layer, and a head is trained in full if there is one.
torch::Tensor save_reference(const std::filesystem::path& directory, bool has_head = true,
                             lora::MethodKind method = lora::LowRank()) {
  Classifier model(has_head);
  LoRAConfig config(2);
  config.alpha(6).target_modules({"q_proj", "v_proj"}).method(method);
  if (method.info().peft_type == "LORA") config.rank_pattern({{"v_proj", 3}}).alpha_pattern({{"layers.0.q_proj", 5}});
  if (has_head) config.modules_to_save({"classifier"});
  const auto adapters = trained(model, config);
  adapters.save(directory);
  return run(model, adapters);
}

}  // namespace

TEST_CASE("What a file names beside its tensors may be in no module here, and stays in the file") {
  struct Row {
    std::string name, fields, unmatched;
    bool has_head = true;
    lora::MethodKind method = lora::LowRank();
  };
  const auto row = GENERATE(values<Row>({
      {"heads of PEFT's SEQ_CLS", R"({"modules_to_save":["classifier","score"],"task_type":"SEQ_CLS"})",
       "\"score\" of modules_to_save"},
      {"the other one first, and twice", R"({"modules_to_save":["score","classifier","score"]})",
       "\"score\" of modules_to_save"},
      {"neither of them, and no tensor", R"({"modules_to_save":["classifier","score"],"task_type":"TOKEN_CLS"})",
       "\"classifier\" of modules_to_save", false},
      {"the same of a VeRA", R"({"modules_to_save":["classifier","score"]})", "\"score\" of modules_to_save", true,
       lora::VeRA()},
      {"the same of an IA3", R"({"modules_to_save":["classifier","score"]})", "\"score\" of modules_to_save", true,
       lora::IA3()},
      {"targets of several kinds of models", R"({"target_modules":["q_proj","v_proj","query","c_attn","w1"]})",
       "\"query\" of target_modules"},
      {"full names of other blocks", R"({"target_modules":["layers.2.q_proj","v_proj","q_proj"]})",
       "\"layers.2.q_proj\" of target_modules"},
      {"targets of an IA3", R"({"target_modules":["q_proj","v_proj","w0"],"feedforward_modules":["w0"]})",
       "\"w0\" of target_modules", true, lora::IA3()},
      {"excluded by a list", R"({"exclude_modules":["lm_head","vision_tower"]})", "\"lm_head\" of exclude_modules"},
      {"excluded by an expression", R"({"exclude_modules":".*vision.*"})", "\".*vision.*\" of exclude_modules"},
      {"ranks", R"({"rank_pattern":{"v_proj":3,"up_proj":8,"^layers\\.9\\..*":4}})", "\"up_proj\" of rank_pattern"},
      {"alphas", R"({"alpha_pattern":{"layers.0.q_proj":5,"down_proj":7}})", "\"down_proj\" of alpha_pattern"},
      {"more blocks", R"({"layers_to_transform":[0,1,31]})", "names layer 31"},
      {"more blocks of named lists", R"({"layers_to_transform":[0,1,2],"layers_pattern":["layers","h"]})",
       "names layer 2"},
      {"parameters", R"({"target_parameters":["experts.gate_up_proj"]})",
       "\"experts.gate_up_proj\" of target_parameters"},
  }));
  INFO(row.name);
  testing::TemporaryFolder folder, again;
  const auto expected = save_reference(folder.path(), row.has_head, row.method);
  patch(folder.path(), ordered_json::parse(row.fields));
  Classifier model(row.has_head), other(row.has_head), strict(row.has_head);
  lora::LoadReport report;
  const auto adapters = lora::load_adapter(*model, folder.path(), {}, &report);
  CHECK(report.empty());
  REQUIRE(!report.unmatched.empty());
  CHECK_THAT(report.unmatched.front(), contains(row.unmatched));
  CHECK(torch::equal(run(model, adapters), expected));

  adapters.save(again.path());
  auto before = read_config(folder.path()), after = read_config(again.path());
  const bool by_names = !before["layers_to_transform"].is_null();  // of which PEFT may understand something else
  const auto fields = ordered_json::parse(row.fields);
  for (const auto& item : fields.items()) {
    INFO(item.key());
    CHECK(after[item.key()] == (by_names ? ordered_json() : item.value()));
  }
  CHECK(read_text(again / "adapter_model.safetensors") == read_text(folder / "adapter_model.safetensors"));
  CHECK(torch::equal(run(other, lora::load_adapter(*other, again.path())), expected));

  // One's own configuration has to mean what it says.
  const auto config = lora::read_adapter_config(folder / "adapter_config.json");
  CHECK_THROWS_WITH(lora::attach(*strict, config), contains(row.unmatched));
}

TEST_CASE("Heads that PEFT trains for a task without being asked are in the file, or not") {
  const auto [task, head] = GENERATE(table<std::string, std::string>(
      {{"SEQ_CLS", "classifier"}, {"TOKEN_CLS", "classifier"}, {"SEQ_CLS", "score"}, {"QUESTION_ANS", "qa_outputs"}}));
  struct NetImpl : torch::nn::Module {
    explicit NetImpl(const std::string& head) {
      register_module("fc", torch::nn::Linear(4, 4));
      register_module(head, torch::nn::Linear(4, 2));
      to(testing::device());
    }
  };
  INFO(task << " " << head);
  testing::TemporaryFolder with, without;
  auto model = std::make_shared<NetImpl>(head), other = std::make_shared<NetImpl>(head);
  const auto saved = trained(model, LoRAConfig(2).target_modules({"fc"}).modules_to_save({head}));
  saved.save(with.path());
  patch(with.path(), {{"modules_to_save", nullptr}, {"task_type", task}});
  auto loaded = lora::load_adapter(*other, with.path());
  CHECK(loaded.config("default").modules_to_save() == std::vector<std::string>{head});
  for (const auto& item : saved.named_parameters()) CHECK(item.value().equal(loaded.named_parameters()[item.key()]));
  loaded.detach();
  trained(model, LoRAConfig(2).target_modules({"fc"}).task_type(task)).save(without.path());
  CHECK(lora::load_adapter(*other, without.path()).config("default").modules_to_save().empty());
}

TEST_CASE("An adapter may be nothing but modules that are trained in full, where it says so in PEFT's way") {
  testing::TemporaryFolder folder;
  Classifier model, other;
  const auto config = LoRAConfig(2).target_modules(lora::regex("dummy-target-modules")).modules_to_save({"classifier"});
  const auto adapters = trained(model, config);
  CHECK(adapters.targets().empty());
  adapters.save(folder.path());
  CHECK(read_tensors(folder.path()).size() == 2);
  auto loaded = lora::load_adapter(*other, folder.path());
  CHECK(torch::equal(run(other, loaded), run(model, adapters)));
  loaded.merge();
  CHECK(torch::equal(other->classifier->weight, adapters.named_parameters()["classifier.weight"]));
}

TEST_CASE("A tensor that is not read stays an error, which says what the configuration names in vain") {
  struct Row {
    std::string fields;
    std::vector<std::string> texts;
    bool has_head = true;
  };
  const auto row = GENERATE(values<Row>({
      {R"({"modules_to_save":["score"]})",
       {"unexpected: \n  \"base_model.model.classifier.bias\" [3]", "no module with parameters matches \"score\""}},
      {R"({"modules_to_save":["classifier","score"]})",
       {"unexpected: \"base_model.model.classifier.bias\"", "of the configuration: \n  no module"},
       false},
      {R"({"target_modules":["q_proj","v_prjo"]})",
       {"unexpected: \n  \"base_model.model.layers.0.v_proj.lora_A.weight\" [3, 8]",
        "no module matches \"v_prjo\" of target_modules; did you mean \"v_proj\""}},
      {R"({"exclude_modules":["layers.1.v_proj","w1"]})",
       {"unexpected: \"base_model.model.layers.1.v_proj.lora_A.weight\"", "\"w1\" of exclude_modules"}},
      {R"({"rank_pattern":{"v_prjo":3}})",
       {"is [3, 8], not [2, 8]", "no target matches \"v_prjo\" of rank_pattern; did you mean \"v_proj\""}},
      {R"({"target_modules":["query","value"],"modules_to_save":null})",
       {"no module matches \"query\" of target_modules"}},
      {R"({"target_modules":".*query","modules_to_save":null})",
       {"no module matches the regular expression \".*query\" of target_modules"}},
  }));
  INFO(row.fields);
  testing::TemporaryFolder folder;
  save_reference(folder.path());
  patch(folder.path(), ordered_json::parse(row.fields));
  Classifier model(row.has_head);
  const auto error = testing::error_of([&] { lora::load_adapter(*model, folder.path()); });
  for (const auto& text : row.texts) CHECK_THAT(error, contains(text));
  CHECK_THAT(error, contains(folder.path().string()));
  for (const auto& parameter : model->parameters()) CHECK(parameter.requires_grad());
}

TEST_CASE("A key_mapping that changes no name changes nothing else either") {
  testing::TemporaryFolder folder, again;
  const auto expected = save_reference(folder.path());
  patch(folder.path(), ordered_json::parse(R"({"modules_to_save":["classifier","score"],
      "rank_pattern":{"v_proj":3,"up_proj":8}, "target_modules":["q_proj","v_proj","c_attn"]})"));
  Classifier model, other;
  const auto adapters = lora::load_adapter(*model, folder.path(), LoadOptions().key_mapping({{"never", "there"}}));
  CHECK(torch::equal(run(model, adapters), expected));
  adapters.save(again.path());
  for (const auto* field : {"modules_to_save", "rank_pattern", "alpha_pattern", "target_modules"})
    CHECK(read_config(again.path())[field] == read_config(folder.path())[field]);
}

TEST_CASE("Where all names begin in another way, the error says what reads them, and that does") {
  struct Row {
    std::string theirs;  // in the file, in place of "base_model.model.layers."
    std::string hint;
    LoadOptions options;
    std::string targets = R"(["q_proj","v_proj"])";
  };
  const std::string mapping = "LoadOptions().key_mapping({{\"^";
  const auto row = GENERATE_COPY(values<Row>({
      {"layers.", "LoadOptions().prefix(\"\")", LoadOptions().prefix("")},
      {"model.layers.", "LoadOptions().prefix(\"model.\")", LoadOptions().prefix("model.")},
      {"base_model.model.model.layers.", "LoadOptions().prefix(\"base_model.model.model.\")",
       LoadOptions().prefix("base_model.model.model.")},
      {"base_model.model.h.", mapping + "h\\\\.\", \"layers.\"}})", LoadOptions().key_mapping({{"^h\\.", "layers."}})},
      {"base_model.model.", mapping + "\", \"layers.\"}})", LoadOptions().key_mapping({{"^", "layers."}})},
      {"base_model.model.model.layers.", mapping + "model\\\\.\", \"\"}})",
       LoadOptions().key_mapping({{"^model\\.", ""}}),
       R"(["model.layers.0.q_proj","model.layers.1.q_proj","model.layers.0.v_proj","model.layers.1.v_proj"])"},
      {"base_model.model.model.layers.", mapping + "model\\\\.\", \"\"}})",
       LoadOptions().key_mapping({{"^model\\.", ""}}), R"("model\\..*\\.[qv]_proj")"},
  }));
  INFO(row.theirs << " " << row.targets);
  testing::TemporaryFolder folder;
  const auto expected = save_reference(folder.path(), /*has_head=*/false);
  Tensors renamed;
  const std::string ours = "base_model.model.layers.";
  for (const auto& [key, tensor] : read_tensors(folder.path())) renamed[row.theirs + key.substr(ours.size())] = tensor;
  lora::write_safetensors(folder / "adapter_model.safetensors", renamed);
  auto fields = ordered_json::parse("{\"target_modules\":" + row.targets + "}");
  if (row.hint.find("layers.") != std::string::npos || row.targets.find("model") != std::string::npos)
    fields["alpha_pattern"] = {{"0.q_proj", 5}};  // that the mapping takes along
  patch(folder.path(), fields);
  Classifier model(false);
  CHECK_THROWS_WITH(lora::load_adapter(*model, folder.path()), contains(row.hint + " reads them"));
  CHECK(torch::equal(run(model, lora::load_adapter(*model, folder.path(), row.options)), expected));
}

TEST_CASE("Names with more than one difference get no advice") {
  testing::TemporaryFolder folder;
  save_reference(folder.path(), /*has_head=*/false);
  Tensors renamed;
  for (const auto& [key, tensor] : read_tensors(folder.path())) {
    const bool is_first = key.find(".0.") != std::string::npos;
    renamed[(is_first ? "base_model.model.a." : "base_model.model.b.") + key.substr(key.find("layers"))] = tensor;
  }
  lora::write_safetensors(folder / "adapter_model.safetensors", renamed);
  Classifier model(false);
  const auto error = testing::error_of([&] { lora::load_adapter(*model, folder.path()); });
  CHECK_THAT(error, contains("missing: \n  \"base_model.model.layers.0.q_proj.lora_A.weight\" [2, 8],\n  \"base"));
  CHECK_THAT(error, contains("(+2 more);\nunexpected: \n  \"base_model.model.a.layers.0.q_proj.lora_A.weight\""));
  CHECK(error.find("LoadOptions") == std::string::npos);
}

namespace {

struct AttentionNetImpl : torch::nn::Module {
  AttentionNetImpl() {
    torch::manual_seed(0);
    register_module("attn", attn);
    register_module("fc", fc);
    to(testing::device());
  }
  torch::Tensor forward(const torch::Tensor& x) { return fc(std::get<0>(attn(x, x, x))); }
  torch::nn::MultiheadAttention attn{torch::nn::MultiheadAttentionOptions(8, 2)};
  torch::nn::Linear fc{8, 4};
};
TORCH_MODULE(AttentionNet);

}  // namespace

TEST_CASE("An adapter of MultiheadAttention by a PEFT that counts out_proj twice is warned of") {
  const auto [version, targets, warns] = GENERATE(table<ordered_json, std::string, bool>({
      {"0.21.2", "attn", true},
      {"0.21.0", "attn", true},
      {"0.18.1", "attn", true},
      {"0.20.1.dev0@UNKNOWN", "attn", true},
      {nullptr, "attn", true},    // 0.15 to 0.17 do not write it
      {"0.14.0", "attn", false},  // had no such adapters
      {"0.22.0", "attn", false},
      {"1.0.0", "attn", false},
      {"unknown", "attn", false},
      {lora::detail::kPeftVersion, "attn", false},
      {"0.21.2", "fc", false},
      {"0.21.2", "out_proj", false},  // by itself, which PEFT does not use at all
  }));
  INFO(version << " " << targets);
  testing::TemporaryFolder folder;
  AttentionNet model, other;
  trained(model, LoRAConfig(2).alpha(6).target_modules({targets})).save(folder.path());
  CHECK(read_config(folder.path())["peft_version"] == lora::detail::kPeftVersion);
  patch(folder.path(), {{"peft_version", version}});
  testing::Warnings warnings;
  lora::load_adapter(*other, folder.path());
  REQUIRE(warnings.texts.size() == (warns ? 1 : 0));
  if (!warns) return;
  for (const auto* text : {"out_proj", "twice", "LoadOptions().out_proj_twice(true)", "attn"})
    CHECK_THAT(warnings.texts[0], contains(text));
  CHECK_THAT(warnings.texts[0], contains(version.is_null() ? "does not say" : version.get<std::string>()));
}

TEST_CASE("out_proj_twice computes what PEFT computes, and so does what is written then") {
  testing::TemporaryFolder folder, again;
  AttentionNet model, once, twice, third;
  const auto adapters =
      trained(model, LoRAConfig(2).alpha(6).target_modules({"attn", "fc"}).bias(lora::Bias::kAdaptedOnly));
  adapters.save(folder.path());
  patch(folder.path(), {{"peft_version", "0.21.2"}});
  const auto delta = [](const lora::Adapters& from, const std::string& layer) { return from.delta("default", layer); };
  {
    testing::Warnings warnings;
    const auto loaded = lora::load_adapter(*once, folder.path());
    CHECK(torch::equal(delta(loaded, "attn.out_proj"), delta(adapters, "attn.out_proj")));
  }
  testing::Warnings warnings;
  const auto loaded = lora::load_adapter(*twice, folder.path(), LoadOptions().out_proj_twice(true));
  for (const auto* layer : {"attn", "fc", "fc.bias", "attn.out_proj.bias"}) {
    INFO(layer);
    CHECK(torch::equal(delta(loaded, layer), delta(adapters, layer)));
  }
  CHECK(torch::equal(delta(loaded, "attn.out_proj"), 2 * delta(adapters, "attn.out_proj")));
  loaded.save(again.path());
  const auto last = lora::load_adapter(*third, again.path());
  CHECK(torch::equal(run(third, last), run(twice, loaded)));
  CHECK(warnings.texts.empty());
}
