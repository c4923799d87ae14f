// Which weights a configuration selects: the rules of PEFT, and what is said when an entry matches nothing.
#include "support/models.hpp"

#include <lora/attach.hpp>

using lora::LoRAConfig;
using Names = std::vector<std::string>;

namespace {

Names targets(const LoRAConfig& config) {
  testing::Stack model;
  return lora::attach(*model, config).targets();
}

std::string repeated(const std::string& text, int count) {
  std::string all;
  for (int i = 0; i < count; ++i) all += text;
  return all;
}

std::string error(const LoRAConfig& config) {
  testing::Stack model;
  auto text = testing::error_of([&] { lora::attach(*model, config); });
  for (const auto& parameter : model->parameters()) CHECK(parameter.requires_grad());  // nothing was changed
  return text;
}

}  // namespace

TEST_CASE("Targets are selected by name, by regular expression, or all linear layers") {
  const auto [config, expected] = GENERATE(table<LoRAConfig, Names>({
      {LoRAConfig(2).target_modules({"q_proj"}), {"layers.0.q_proj", "layers.1.q_proj", "layers.2.q_proj"}},
      {LoRAConfig(2).target_modules({"1.q_proj", "lm_head"}), {"layers.1.q_proj", "lm_head"}},
      {LoRAConfig(2).target_modules({"layers.2.o_proj"}), {"layers.2.o_proj"}},
      {LoRAConfig(2).target_modules(lora::regex(".*[01]\\.(q|v)_proj")),
       {"layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj"}},
      {LoRAConfig(2).target_modules(lora::regex("lm_.*")), {"lm_head"}},  // the whole name, not a part of it
      {LoRAConfig(2).target_modules({"q_proj", "lm_head"}).exclude_modules({"lm_head", "1.q_proj"}),
       {"layers.0.q_proj", "layers.2.q_proj"}},
      {LoRAConfig(2).target_modules({"q_proj"}).exclude_modules(lora::regex(".*[12].*")), {"layers.0.q_proj"}},
      {LoRAConfig(2).target_modules({"q_proj"}).layers_to_transform({0, 2}), {"layers.0.q_proj", "layers.2.q_proj"}},
      {LoRAConfig(2).target_modules({"k_proj"}).layers_to_transform({1}).layers_pattern({"blocks", "layers"}),
       {"layers.1.k_proj"}},
      // An exact name is adapted whatever layers_to_transform says.
      {LoRAConfig(2).target_modules({"layers.0.k_proj", "q_proj"}).layers_to_transform({1}),
       {"layers.0.k_proj", "layers.1.q_proj"}},
  }));
  CHECK(targets(config) == expected);
}

TEST_CASE("All linear layers are 4 x 3 + 1 here") {
  CHECK(targets(LoRAConfig(2).target_modules(lora::all_linear)).size() == 13);
}

TEST_CASE("Patterns give layers other ranks and alphas, and the first match counts") {
  testing::Stack model;
  auto adapters = lora::attach(*model, LoRAConfig(2)
                                           .alpha(8)
                                           .target_modules({"q_proj", "o_proj"})
                                           .rank_pattern({{"layers\\.1\\..*", 4}, {"o_proj", 3}})
                                           .alpha_pattern({{"^layers\\.0\\.o_proj", 6}, {"o_proj", 2}}));
  auto parameters = adapters.named_parameters();
  const auto [layer, rank, scaling] = GENERATE(table<std::string, int64_t, double>({
      {"layers.0.q_proj", 2, 4.0},
      {"layers.0.o_proj", 3, 2.0},
      {"layers.1.q_proj", 4, 2.0},
      {"layers.1.o_proj", 4, 0.5},
      {"layers.2.o_proj", 3, 2.0 / 3},
  }));
  CHECK(parameters[layer + ".lora_A"].size(0) == rank);
  CHECK(parameters[layer + ".lora_B"].size(1) == rank);
  CHECK(adapters.scaling(layer) == testing::Approx(scaling));
}

TEST_CASE("What matches nothing is an error that names it, the nearest names and what there is") {
  const auto [config, text] = GENERATE(table<LoRAConfig, std::string>({
      {LoRAConfig(2), "target_modules is empty"},
      {LoRAConfig(2).target_modules({"q_proj", "w_prok"}),
       "no module matches \"w_prok\" of target_modules; did you mean"},
      {LoRAConfig(2).target_modules({"lm_haed"}), "did you mean \"lm_head\"?"},
      {LoRAConfig(2).target_modules({"transformer"}), "layers.0.k_proj, layers.0.v_proj, layers.0.o_proj"},
      {LoRAConfig(2).target_modules({"proj"}), "\"proj\""},  // no boundary before "proj"
      {LoRAConfig(2).target_modules({"layers"}), "\"layers\" is a torch::nn::ModuleListImpl, which has no weight"},
      {LoRAConfig(2).target_modules(lora::regex("q_proj")), "the regular expression \"q_proj\""},
      {LoRAConfig(2).target_modules(lora::regex("[")), "\"[\" is not a regular expression"},
      {LoRAConfig(2).target_modules(lora::regex(std::string(201, '(') + std::string(201, ')'))),
       "may have 10000 characters, 200 brackets in each other and numbers of 9 digits, but \"" + std::string(60, '(') +
           "...\" has 402, 201 and 0"},
      {LoRAConfig(2).target_modules(lora::regex(std::string(10001, 'a'))), "...\" has 10001, 0 and 0"},
      {LoRAConfig(2).target_modules(lora::regex(repeated("(\\)", 201) + std::string(201, ')'))), "has 804, 201 and 0"},
      {LoRAConfig(2).target_modules(lora::regex(repeated("\\(", 300))), "no module matches the regular expression"},
      {LoRAConfig(2).target_modules(lora::regex("a{2,1234567890}\\1")), "...\" has 17, 0 and 10"},
      {LoRAConfig(2).target_modules(lora::regex("(a)\\12345678901")), "...\" has 15, 1 and 11"},
      {LoRAConfig(2).target_modules({"q_proj"}).rank_pattern({{std::string(100000, '['), 3}}), "has 100009, 1 and 0"},
      {LoRAConfig(2).target_modules({"q_proj"}).exclude_modules({"lm_haed"}), "\"lm_haed\" of exclude_modules"},
      {LoRAConfig(2).target_modules({"q_proj"}).exclude_modules({"q_proj"}), "leave none of the targets"},
      {LoRAConfig(2).target_modules({"q_proj"}).layers_to_transform({1, 9}), "layer 9"},
      {LoRAConfig(2).target_modules(lora::all_linear).layers_to_transform({1}), "needs target_modules as a list"},
      {LoRAConfig(2).target_modules({"q_proj"}).layers_pattern({"layers"}), "layers_pattern needs layers_to_transform"},
      {LoRAConfig(2).target_modules({"q_proj"}).rank_pattern({{"qproj", 4}}), "\"qproj\" of rank_pattern"},
      {LoRAConfig(2).target_modules({"q_proj"}).alpha_pattern({{"k_proj", 4}}), "\"k_proj\" of alpha_pattern"},
      {LoRAConfig(2).target_modules({"q_proj"}).rank_pattern({{"q_proj", 0}}), "rank has to be at least 1, but got 0"},
      {LoRAConfig(0).target_modules({"q_proj"}), "rank has to be at least 1, but got 0"},
  }));
  CHECK_THAT(error(config), testing::contains(text));
}

TEST_CASE("Of two layers with one weight neither can be adapted alone, since their products look the same") {
  torch::nn::Sequential model(torch::nn::Linear(4, 4), torch::nn::Linear(4, 4));
  model->ptr(1)->as<torch::nn::Linear>()->weight = model->ptr(0)->as<torch::nn::Linear>()->weight;
  CHECK_THROWS_WITH(lora::attach(*model, LoRAConfig(2).target_modules({"0"})),
                    testing::contains("\"0\" and \"1\" share one weight"));
}
