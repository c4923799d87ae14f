// Models whose weights are held in few bits, beside the same models with the numbers that these bits hold.
#include "examples/model_folder.hpp"

#include <lora/lora.hpp>

#include "../../examples/sweep/peak_memory.hpp"
#include "sampling.hpp"
#include "trainer.hpp"

namespace {

using testing::contains;
using testing::distance;
using testing::error_of;

/// Rounds the weights that the format holds in few bits.
gpt::LanguageModel rounded(gpt::LanguageModel model, const gpt::WeightFormat& format) {
  torch::NoGradGuard no_grad;
  for (auto& [name, parameter] : gpt::detail::stored_parameters(*model)) {
    const bool is_table =
        name == "lm_head.weight" || name == "model.embed_tokens.weight" || name == "transformer.wte.weight";
    const bool is_other = parameter.dim() == 1 || name == "transformer.wpe.weight";
    const auto& scheme = is_table ? format.tables : format.layers;
    if (!is_other && scheme) parameter.set_data(scheme->pack(parameter)->dense());
  }
  return model;
}

/// The memory of all parameters.
int64_t bytes_of(gpt::LanguageModelImpl& model) {
  lora::Adapters adapters(model);
  adapters.prepare();
  return adapters.report().base_bytes;
}

const gpt::Example kExample{{1, 2, 3, 4, 5, 6, 7}, {2, 3, 4, 5, 6, 7, 8}};

}  // namespace

TEST_CASE("a model in few bits is the model with the numbers that they hold") {
  const std::string kind = GENERATE("llama", "llama tied", "llama biased", "gpt2");
  const std::string layers = GENERATE("nf4", "fp4", "int8", "lossless", "none");
  const std::string tables = GENERATE("none", "int8", "lossless");
  if (layers == "none" && tables == "none") return;
  INFO(kind << ", layers " << layers << ", tables " << tables);
  // Without GPT-2's dropout, which each of the two would draw anew.
  const nlohmann::json no_dropout{{"attn_pdrop", 0.0}, {"resid_pdrop", 0.0}, {"embd_pdrop", 0.0}};
  testing::ModelFolder folder(testing::changed(testing::config_json(kind), no_dropout));
  for (auto& item : folder.weights) item.second = item.second.to(torch::kBFloat16);
  folder.write();
  const gpt::WeightFormat format(torch::kFloat, layers, tables);
  auto model = gpt::load_model(folder.path(), format, torch::kCPU);
  auto expected = rounded(folder.load(), format);
  const auto ids = testing::random_ids(2, 9);
  CHECK_THAT(error_of([&] { model->forward(ids); }), contains("is held in") && contains("activate"));
  for (const auto& parameter : model->parameters()) CHECK_FALSE(parameter.requires_grad());
  CHECK(model->is_tied() == expected->is_tied());
  CHECK(!model->is_training());
  {
    const lora::Adapters none(*model);
    auto base = none.activate("");
    torch::NoGradGuard no_grad;
    CHECK(distance(model->forward(ids), expected->forward(ids)) < 1e-4);
  }

  const std::vector<std::string> targets{kind == "gpt2" ? "c_attn" : "q_proj"};
  auto config = lora::LoRAConfig(2).alpha(4).target_modules(targets).fan_in_fan_out(kind == "gpt2");
  auto adapters = lora::attach(*model, config), beside = lora::attach(*expected, config);
  const auto tensors = beside.named_parameters();
  {
    torch::NoGradGuard no_grad;
    for (auto& item : adapters.named_parameters())  // B, too, without which neither s B A nor dL/dA shows
      tensors[item.key()].copy_(item.value().normal_(0, 0.2));
  }
  gpt::TrainingOptions options;
  options.warmup = 0;
  options.learning_rate = 0.05;
  gpt::Trainer trainer(*model, adapters, options), other(*expected, beside, options);
  const auto batch = gpt::collate({&kExample});
  const auto before = trainer.evaluate({batch});
  CHECK(before == testing::Approx(other.evaluate({batch})).epsilon(1e-4));
  CHECK(trainer.step({batch}).gradient_norm == testing::Approx(other.step({batch}).gradient_norm).epsilon(1e-3));
  for (int i = 0; i < 12; ++i) trainer.step({batch});
  CHECK(trainer.evaluate({batch}) < before - 0.1);

  auto active = adapters.activate();
  gpt::SamplingOptions sampling;
  sampling.temperature = 0;
  sampling.max_new_tokens = 5;
  const auto said = gpt::generate(*model, {1, 2, 3}, sampling, {});
  CHECK(said.size() == 5);
  torch::NoGradGuard no_grad;
  auto text = std::vector<int64_t>{1, 2, 3};
  for (const auto token : said) {
    const auto scores = model->forward(torch::tensor(text, torch::kLong).unsqueeze(0))[0][-1];
    CHECK(scores[token].item<float>() > scores.max().item<float>() - 1e-4);
    text.push_back(token);
  }
}

TEST_CASE("loading in few bits takes one float tensor more than what stays") {
  const bool is_llama = GENERATE(true, false);
  const int64_t width = 256, inner = 2048;
  const auto config =
      is_llama ? testing::changed(testing::kLlamaJson,
                                  {{"hidden_size", width}, {"intermediate_size", inner}, {"num_attention_heads", 4}})
               : testing::changed(testing::kGPT2Json, {{"n_embd", width}, {"n_inner", inner}, {"n_head", 4}});
  testing::ModelFolder folder(config);
  for (auto& item : folder.weights) item.second = item.second.to(torch::kBFloat16);
  folder.write();
  folder.weights.clear();
  sweep::PeakMemory memory;
  const auto start = memory.bytes();
  const auto model = gpt::load_model(folder.path(), {torch::kFloat, "nf4", "none"}, torch::kCPU);
  const auto largest = width * inner * 4;
  const auto panels = 2 * 4 * lora::detail::kPanel;  // of the weight and of its numbers in few bits, to be compared
  const auto transposed = is_llama ? 0 : largest;    // numbers are taken in order, and the files have another one
  INFO(memory.bytes() - start << " at most, " << bytes_of(*model) << " stay");
  CHECK(memory.bytes() - start > bytes_of(*model));
  CHECK(memory.bytes() - start < bytes_of(*model) + largest + transposed + panels);
  CHECK(bytes_of(*model) < 0.15 * static_cast<double>(bytes_of(*folder.load())));
}

TEST_CASE("numbers that no code stands for are refused while a model is loaded") {
  testing::ModelFolder folder(testing::kLlamaJson);
  folder.weights["model.layers.1.mlp.up_proj.weight"][3][4] = std::numeric_limits<float>::quiet_NaN();
  folder.write();
  const auto error = error_of([&] { gpt::load_model(folder.path(), {torch::kFloat, "int8", "none"}, torch::kCPU); });
  CHECK_THAT(error, contains("model.layers.1.mlp.up_proj has numbers that are not finite"));
  CHECK_THAT(error_of([] { gpt::parse_quantization("nf5"); }),
             contains("must be none, nf4, fp4, int8 or lossless, got \"nf5\""));
}

TEST_CASE("a model in shards is held in few bits, too") {
  testing::ModelFolder folder(testing::kLlamaJson);
  const gpt::WeightFormat format(torch::kFloat, "nf4", "int8");
  auto expected = rounded(folder.load(), format);
  folder.split();
  auto model = gpt::load_model(folder.path(), format, torch::kCPU);
  const lora::Adapters none(*model);
  auto base = none.activate("");
  const auto ids = testing::random_ids(2, 9);
  CHECK(distance(model->forward(ids), expected->forward(ids)) < 1e-4);
}
