#include "support/testing.hpp"

#include <lora/peft/config.hpp>

#include <fstream>
#include <iterator>

namespace {

using lora::LoRAConfig;
using lora::read_adapter_config;
using lora::write_adapter_config;
using testing::contains;

std::string read_text(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// Writes texts to one file and reads the configuration in it.
class ConfigFile {
 public:
  std::filesystem::path path() const { return folder_ / "adapter_config.json"; }

  LoRAConfig read(const std::string& text) const {
    std::ofstream(path(), std::ios::binary) << text;
    return read_adapter_config(path());
  }
  /// The fields besides those that every file needs.
  LoRAConfig with(const std::string& fields) const {
    return read(R"({"peft_type":"LORA","target_modules":["q"],)" + fields + "}");
  }
  std::string error(const std::string& fields) const {
    return testing::error_of([&] { with(fields); });
  }

 private:
  testing::TemporaryFolder folder_;
};

}  // namespace

TEST_CASE("write_adapter_config writes every field as PEFT 0.21 does", "[peft_config]") {
  testing::TemporaryFolder folder;
  write_adapter_config(folder / "c", LoRAConfig(2)
                                         .alpha(4)
                                         .dropout(0.05)
                                         .method(lora::DoRA())
                                         .target_modules({"fc1", "fc2"})
                                         .rank_pattern({{"fc2", 3}, {"a\\.fc", 5}})
                                         .alpha_pattern({{"fc1", 1.5}})
                                         .task_type("CAUSAL_LM"));
  // What PEFT 0.21.2 writes for the same values, but for the start of A, and the order of its sets and of the patterns.
  CHECK(read_text(folder / "c") == R"({
  "alora_invocation_tokens": null,
  "alpha_pattern": {
    "fc1": 1.5
  },
  "arrow_config": null,
  "auto_mapping": null,
  "base_model_name_or_path": null,
  "bias": "none",
  "corda_config": null,
  "ensure_weight_tying": false,
  "eva_config": null,
  "exclude_modules": null,
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_lora_weights": "gaussian",
  "kasa_config": null,
  "layer_replication": null,
  "layers_pattern": null,
  "layers_to_transform": null,
  "loftq_config": {},
  "lora_alpha": 4,
  "lora_bias": false,
  "lora_dropout": 0.05,
  "lora_ga_config": null,
  "megatron_config": null,
  "megatron_core": "megatron.core",
  "modules_to_save": null,
  "monteclora_config": null,
  "peft_type": "LORA",
  "peft_version": "0.21.2@lora",
  "qalora_group_size": 16,
  "r": 2,
  "rank_pattern": {
    "fc2": 3,
    "a\\.fc": 5
  },
  "revision": null,
  "target_modules": [
    "fc1",
    "fc2"
  ],
  "target_parameters": null,
  "task_type": "CAUSAL_LM",
  "trainable_token_indices": null,
  "use_bdlora": null,
  "use_dora": true,
  "use_qalora": false,
  "use_rslora": false,
  "velora_config": null
})");
}

TEST_CASE("a configuration survives the file", "[peft_config]") {
  testing::TemporaryFolder folder;
  const auto round_trip = [&](const LoRAConfig& config) {
    write_adapter_config(folder / "c", config);
    return read_adapter_config(folder / "c");
  };
  const auto config = round_trip(LoRAConfig(3)
                                     .alpha(7.5)
                                     .dropout(0.25)
                                     .rank_stabilized(true)
                                     .init(lora::Init::kKaiming)
                                     .method(lora::DoRA())
                                     .target_modules({"q_proj", "caf\xc3\xa9"})
                                     .exclude_modules({"layers.0"})
                                     .layers_to_transform({1, 3})
                                     .layers_pattern({"layers", "h"})
                                     .rank_pattern({{"z", 3}, {"a", 5}})
                                     .alpha_pattern({{"z", 0.5}, {"a", 12}})
                                     .fan_in_fan_out(true)
                                     .base_model_name_or_path("some/model"));
  CHECK(config.rank() == 3);
  CHECK(config.alpha() == 7.5);
  CHECK(config.dropout() == 0.25);
  CHECK(config.rank_stabilized());
  CHECK(config.init() == lora::Init::kKaiming);
  CHECK(config.method().info().name == "DoRA");
  CHECK(*config.target_modules().names() == std::vector<std::string>{"q_proj", "caf\xc3\xa9"});
  CHECK(*config.exclude_modules().names() == std::vector<std::string>{"layers.0"});
  CHECK(config.layers_to_transform() == std::vector<int64_t>{1, 3});
  CHECK(config.layers_pattern() == std::vector<std::string>{"layers", "h"});
  CHECK(config.rank_pattern() ==
        std::vector<std::pair<std::string, int64_t>>{{"z", 3}, {"a", 5}});  // first match counts
  CHECK(config.alpha_pattern() == std::vector<std::pair<std::string, double>>{{"z", 0.5}, {"a", 12.0}});
  CHECK(config.fan_in_fan_out());
  CHECK(config.base_model_name_or_path() == "some/model");
  CHECK(config.task_type().empty());

  const auto other =
      round_trip(LoRAConfig(2).target_modules(lora::regex("h\\.[01]")).exclude_modules(lora::regex("x.*")));
  CHECK(other.target_modules().pattern()->pattern == "h\\.[01]");
  CHECK(other.exclude_modules().pattern()->pattern == "x.*");
  CHECK(other.method().info().name == "LowRank");
  CHECK(other.init() == lora::Init::kGaussian);
  CHECK(round_trip(LoRAConfig(2).target_modules(lora::all_linear)).target_modules().is_all_linear());
  const auto full = round_trip(LoRAConfig(2)
                                   .target_modules({"q"})
                                   .target_parameters({"experts.up"})
                                   .modules_to_save({"head", "norm"})
                                   .bias(lora::Bias::kAdaptedOnly));
  CHECK(full.target_parameters() == std::vector<std::string>{"experts.up"});
  CHECK(full.modules_to_save() == std::vector<std::string>{"head", "norm"});
  CHECK(full.bias() == lora::Bias::kAdaptedOnly);
  CHECK(round_trip(LoRAConfig(2).target_modules({"q"}).bias(lora::Bias::kAll)).bias() == lora::Bias::kAll);
}

TEST_CASE("no target module is written as an empty list, since PEFT chooses some itself for null", "[peft_config]") {
  testing::TemporaryFolder folder;
  write_adapter_config(folder / "c", LoRAConfig(3).target_parameters({"experts.up"}));
  CHECK_THAT(read_text(folder / "c"), testing::contains("\"target_modules\": [],"));
  CHECK(read_adapter_config(folder / "c").target_modules().empty());
}

TEST_CASE("read_adapter_config takes PEFT's defaults and all its spellings", "[peft_config]") {
  ConfigFile file;
  const auto config = file.read(R"({"peft_type": "LORA", "target_modules": "All-Linear"})");
  CHECK(config.rank() == 8);
  CHECK(config.alpha() == 8);
  CHECK(config.dropout() == 0);
  CHECK(!config.rank_stabilized());
  CHECK(config.target_modules().is_all_linear());
  CHECK(config.exclude_modules().empty());
  CHECK(config.init() == lora::Init::kKaiming);

  CHECK(file.with(R"("r": 4.0, "lora_alpha": 5.65)").rank() == 4);
  CHECK(file.with(R"("layers_to_transform": 3)").layers_to_transform() == std::vector<int64_t>{3});
  CHECK(file.with(R"("layers_pattern": "h")").layers_pattern() == std::vector<std::string>{"h"});
  CHECK(file.with(R"("init_lora_weights": "gaussian")").init() == lora::Init::kGaussian);
  CHECK(file.with(R"("init_lora_weights": "gaussian", "lora_bias": true)").init() == lora::Init::kKaiming);
  CHECK(file.with(R"("use_dora": false, "r": null)").method().info().name == "LowRank");
  const auto init = GENERATE("true", "false", "\"eva\"", "\"orthogonal\"", "\"mica\"");
  CHECK(file.with(std::string("\"init_lora_weights\":") + init).init() == lora::Init::kKaiming);
}

TEST_CASE("read_adapter_config refuses what would change the result", "[peft_config]") {
  ConfigFile file;
  const auto [field, value] = GENERATE(table<std::string, std::string>({
      {"alora_invocation_tokens", "[1,2]"},
      {"arrow_config", R"({"top_k":3})"},
      {"ensure_weight_tying", "true"},
      {"init_lora_weights", "\"pissa\""},
      {"init_lora_weights", "\"pissa_niter_16\""},
      {"init_lora_weights", "\"olora\""},
      {"init_lora_weights", "\"corda\""},
      {"init_lora_weights", "\"loftq\""},
      {"init_lora_weights", "\"lora_ga\""},
      {"init_lora_weights", "\"unheard_of\""},
      {"kasa_config", R"({"beta":0.1})"},
      {"layer_replication", "[[0,4]]"},
      {"megatron_config", R"({"a":1})"},
      {"trainable_token_indices", "[7]"},
      {"use_bdlora", R"({"nblocks":2})"},
      {"use_qalora", "true"},
  }));
  const auto error = file.error("\"" + field + "\":" + value);
  CHECK_THAT(error, contains("adapter_config.json: \"" + field + "\" is " + value));
}

TEST_CASE("read_adapter_config takes what is switched off or changes nothing", "[peft_config]") {
  ConfigFile file;
  testing::Warnings warnings;
  file.with(R"("bias":"none","modules_to_save":[],"target_parameters":[],"trainable_token_indices":null,)"
            R"("use_qalora":false,"qalora_group_size":4,"auto_mapping":{"a":"b"},"revision":"main",)"
            R"("eva_config":{"rho":2.0},"megatron_core":"x","inference_mode":false,"runtime_config":{},)"
            R"("peft_version":"0.17.0","loftq_config":{})");
  CHECK(warnings.texts.empty());

  file.with(R"("velora_config":{"scale":1.0})");
  REQUIRE(warnings.texts.size() == 1);
  CHECK_THAT(warnings.texts.back(), contains("\"velora_config\" changes how PEFT trains"));
  file.with(R"("next_year":1,"and_after":null)");
  CHECK_THAT(warnings.texts.back(),
             contains("adapter_config.json: unknown fields are ignored: \"next_year\", \"and_after\""));
}

TEST_CASE("read_adapter_config says which field is wrong", "[peft_config]") {
  ConfigFile file;
  const auto [fields, expected] = GENERATE(table<std::string, std::string>({
      {R"("r":0)", "rank has to be at least 1, but got 0"},
      {R"("r":2.5)", "\"r\" has to hold whole numbers, but r is 2.5"},
      {R"("r":"8")", "\"r\" has to be given by numbers, but there is \"8\""},
      {R"("lora_alpha":[1])", "\"lora_alpha\" has to be given by numbers"},
      {R"("lora_dropout":1.5)", "dropout has to be in [0, 1), but got 1.5"},
      {R"("use_rslora":1)", "\"use_rslora\" has to be true or false, but is 1"},
      {R"("rank_pattern":[2])", "\"rank_pattern\" has to be an object"},
      {R"("rank_pattern":{"a":2.5})", "\"rank_pattern\" has to hold whole numbers, but a is 2.5"},
      {R"("rank_pattern":{"a":-1})", "rank has to be at least 1, but got -1"},
      {R"("alpha_pattern":{"a":"x"})", "\"alpha_pattern\" has to be given by numbers"},
      {R"("layers_to_transform":["a"])", "\"layers_to_transform\" has to be given by numbers"},
      {R"("layers_pattern":3)", "\"layers_pattern\" has to be a list of strings"},
      {R"("exclude_modules":[1])", "\"exclude_modules\" has to be a list of strings"},
      {R"("bias":"some")", "\"bias\" has to be \"none\", \"all\" or \"lora_only\", but is \"some\""},
      {R"("modules_to_save":[1])", "\"modules_to_save\" has to be a list of strings"},
      {R"("task_type":1)", "\"task_type\" has to be a string"},
      {R"("r":1,"r":2)", "the key \"r\" appears twice"},
  }));
  const auto error = file.error(fields);
  CHECK_THAT(error, contains(expected));
  CHECK_THAT(error, contains(file.path().string() + ": "));
}

TEST_CASE("read_adapter_config refuses files of another kind", "[peft_config]") {
  ConfigFile file;
  const auto error = [&](const std::string& text) { return testing::error_of([&] { file.read(text); }); };
  CHECK_THAT(error(""), contains("is not valid JSON"));
  CHECK_THAT(error("[]"), contains("has to hold one JSON object, but holds array"));
  CHECK_THAT(error(R"({"model_type":"llama"})"), contains("\"peft_type\" is missing"));
  CHECK_THAT(error(R"({"peft_type":"PROMPT_TUNING"})"),
             contains("\"peft_type\" is \"PROMPT_TUNING\", but known here are \"LORA\""));
  CHECK_THAT(error(R"({"peft_type":"LORA"})"), contains("\"target_modules\" has to name the adapted modules"));
  CHECK_THAT(testing::error_of([] { read_adapter_config("none/c.json"); }), contains("none/c.json: cannot be opened"));
  CHECK_THAT(testing::error_of([] { write_adapter_config("none/c.json", LoRAConfig(2).target_modules({"a"})); }),
             contains("none/c.json: cannot be created"));
  CHECK_THAT(testing::error_of([&] { write_adapter_config(file.path(), LoRAConfig(2).target_modules({"\xff"})); }),
             contains("adapter_config.json: cannot be written: a name in the configuration is not valid UTF-8"));
}

TEST_CASE("Fields that PEFT has for another type only are named in a warning, and change nothing") {
  testing::TemporaryFolder folder;
  const auto [type, field, is_known] = GENERATE(table<std::string, std::string, bool>({
      {"VERA", R"("exclude_modules": ["fc2"])", false},
      {"VERA", R"("rank_pattern": {"fc1": 2})", false},
      {"VERA", R"("d_initial": 0.5)", true},
      {"IA3", R"("bias": "all")", false},
      {"IA3", R"("feedforward_modules": ["fc1"])", true},
  }));
  std::ofstream(folder / "adapter_config.json")
      << R"({"target_modules": ["fc1", "fc2"], "peft_type": ")" << type << "\", " << field << "}";
  testing::Warnings warnings;
  const auto config = lora::read_adapter_config(folder / "adapter_config.json");
  CHECK(warnings.texts.size() == (is_known ? 0 : 1));
  CHECK(config.exclude_modules().empty());
  CHECK(config.rank_pattern().empty());
  CHECK(config.bias() == lora::Bias::kNone);
  lora::write_adapter_config(folder / "again.json", config);
  CHECK(lora::read_adapter_config(folder / "again.json").method().info().peft_type == type);
}
