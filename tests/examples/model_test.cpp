#include "examples/model_folder.hpp"

#include <c10/util/MathConstants.h>

#include <algorithm>
#include <fstream>
#include <functional>
#include <set>
#include <sstream>
#include <vector>

#include <lora/attach.hpp>
#include <nlohmann/json.hpp>
#include <support/models.hpp>

#include "checkpoint.hpp"
#include "common.hpp"
#include "sampling.hpp"

namespace {

using testing::contains;
using testing::distance;
using testing::error_of;

using testing::changed;
using testing::config_json;
using testing::kGPT2Json;
using testing::kLlamaJson;
using testing::ModelFolder;
using testing::random_ids;
using testing::random_weights;
using testing::write_text;

std::string config_error(const nlohmann::json& config) {
  testing::TemporaryFolder folder;
  write_text(folder / "config.json", config.dump());
  return error_of([&] { gpt::read_config(folder.path()); });
}

}  // namespace

TEST_CASE("cached passes give the logits of one pass over the whole text") {
  ModelFolder folder(config_json(GENERATE("llama", "gpt2")));
  auto model = folder.load();
  torch::NoGradGuard no_grad;
  const auto ids = random_ids(2, 150);
  const auto whole = model->forward(ids);
  REQUIRE(whole.sizes() == torch::IntArrayRef({2, 150, 31}));
  REQUIRE(whole.abs().max().item<double>() > 0.5);

  // A long start, single tokens across the growth of the buffers, and several tokens on top of a filled cache.
  gpt::KeyValueCache cache;
  std::vector<torch::Tensor> parts;
  int64_t done = 0;
  for (int64_t count : {60, 1, 1, 1, 1, 1, 1, 50, 33, 1}) {
    parts.push_back(model->forward(ids.narrow(1, done, count), &cache));
    done += count;
    CHECK(cache.length() == done);
  }
  CHECK(distance(torch::cat(parts, 1), whole) < 1e-4);
}

TEST_CASE("a position sees the past and not the future") {
  ModelFolder folder(config_json(GENERATE("llama", "gpt2")));
  auto model = folder.load();
  torch::NoGradGuard no_grad;
  const auto ids = random_ids(1, 20);
  auto other = ids.clone();
  other[0][12] = (other[0][12] + 1) % 31;
  const auto before = model->forward(ids), after = model->forward(other);
  CHECK(distance(before.slice(1, 0, 12), after.slice(1, 0, 12)) < 1e-6);
  CHECK(distance(before.slice(1, 13), after.slice(1, 13)) > 1e-3);
}

TEST_CASE("texts of different lengths go on in one cache as they do alone") {
  ModelFolder folder(config_json(GENERATE("llama", "gpt2")));
  auto model = folder.load();
  torch::NoGradGuard no_grad;
  const auto ids = random_ids(5, 100);
  const auto whole = model->forward(ids);
  std::vector<int64_t> lengths;
  const auto start = [&](int64_t first, int64_t count, int64_t length) {
    gpt::KeyValueCache cache;
    model->forward(ids.narrow(0, first, count).narrow(1, 0, length), &cache);
    lengths.insert(lengths.end(), static_cast<size_t>(count), length);
    return cache;
  };
  gpt::KeyValueCache cache;
  std::vector<int64_t> texts;
  // The next `count` tokens of all texts of the cache, beside what each predicts alone.
  const auto go_on = [&](int64_t count) {
    std::vector<torch::Tensor> rows, expected;
    for (const auto text : texts) {
      auto& length = lengths[static_cast<size_t>(text)];
      rows.push_back(ids[text].narrow(0, length, count));
      expected.push_back(whole[text].narrow(0, length, count));
      length += count;
    }
    CHECK(distance(model->forward(torch::stack(rows), &cache), torch::stack(expected)) < 1e-4);
  };
  cache.append_texts(start(0, 2, 7));
  texts = {0, 1};
  go_on(1);
  CHECK_FALSE(cache.padding().defined());
  cache.append_texts(start(2, 1, 30));  // longer
  cache.append_texts(start(3, 2, 3));   // shorter
  texts = {0, 1, 2, 3, 4};
  CHECK(cache.length() == 30);
  CHECK(torch::equal(cache.padding(), torch::tensor({22, 22, 0, 27, 27}, torch::kLong)));
  go_on(1);
  go_on(4);  // several tokens at a time see those before them
  cache.keep_texts({4, 1});
  texts = {4, 1};
  CHECK(cache.length() == 13);  // the longest has left
  for (int i = 0; i < 70; ++i) go_on(1);
  cache.keep_texts({1});
  texts = {1};
  CHECK_FALSE(cache.padding().defined());
  go_on(1);
  cache.keep_texts({});
  CHECK(cache.length() == 0);
  cache.append_texts(start(0, 1, 5));
  lengths[0] = 5;
  texts = {0};
  go_on(2);
}

TEST_CASE("a pass that fails half way leaves the cache as it was") {
  ModelFolder folder(kGPT2Json);
  auto model = folder.load();
  torch::NoGradGuard no_grad;
  const auto ids = random_ids(1, 12);
  gpt::KeyValueCache cache;
  model->forward(ids.narrow(1, 0, 5), &cache);
  CHECK_THROWS_WITH(model->forward(torch::full({1, 3}, 99, torch::kLong), &cache), contains("index out of range"));
  CHECK(cache.length() == 5);
  const auto rest = model->forward(ids.narrow(1, 5, 7), &cache);
  CHECK(distance(rest, model->forward(ids).slice(1, 5)) < 1e-4);
  CHECK_THROWS_WITH(model->forward(random_ids(1, 149), &cache), contains("161 tokens is longer than the model's 160"));
}

TEST_CASE("gradients flow through the frozen model, but not into a cache") {
  ModelFolder folder(config_json(GENERATE("llama", "gpt2")));
  auto model = folder.load();
  for (const auto& parameter : model->parameters()) REQUIRE(!parameter.requires_grad());
  auto& weight = model->as<gpt::LlamaImpl>() != nullptr ? model->as<gpt::LlamaImpl>()->model->embed_tokens->weight
                                                        : model->as<gpt::GPT2Impl>()->transformer->wte->weight;
  weight.requires_grad_(true);
  model->forward(random_ids(2, 9)).pow(2).mean().backward();
  CHECK(weight.grad().abs().max().item<double>() > 1e-6);
  gpt::KeyValueCache cache;
  CHECK_THROWS_WITH(model->forward(random_ids(2, 9), &cache), contains("NoGradGuard"));
}

TEST_CASE("a tied head is the embedding, for forward, parameters and files") {
  ModelFolder folder(config_json("llama tied"));
  REQUIRE(folder.weights.count("lm_head.weight") == 0);
  auto model = folder.load();
  const auto parameters = model->named_parameters();
  const auto* embedding = model->as<gpt::LlamaImpl>()->model->embed_tokens->weight.unsafeGetTensorImpl();
  CHECK(model->lm_head->weight.unsafeGetTensorImpl() == embedding);
  CHECK(parameters["lm_head.weight"].unsafeGetTensorImpl() == embedding);
  CHECK(parameters["model.embed_tokens.weight"].unsafeGetTensorImpl() == embedding);
  CHECK(model->is_tied());

  const auto ids = random_ids(2, 9);
  const auto expected = model->forward(ids);
  model->to(torch::kDouble);
  CHECK(model->is_tied());
  CHECK(distance(model->forward(ids), expected) < 1e-4);
}

TEST_CASE("of two tables that config.json ties the file says whether they are one") {
  const bool is_llama = GENERATE(true, false);
  ModelFolder folder(is_llama ? config_json("llama tied") : kGPT2Json);
  const std::string name = is_llama ? "model.embed_tokens.weight" : "transformer.wte.weight";
  const auto ids = random_ids(2, 9);
  const auto expected = folder.load()->forward(ids);
  const auto embedding = folder.weights.at(name);

  // A copy that some exporters write.
  folder.weights["lm_head.weight"] = embedding.clone();
  folder.write();
  testing::Warnings warnings;
  CHECK(folder.load()->is_tied());
  CHECK(torch::equal(folder.load()->forward(ids), expected));
  CHECK(warnings.texts.empty());

  // The one table under its other name.
  folder.weights.erase(name);
  folder.write();
  CHECK(folder.load()->is_tied());
  CHECK(torch::equal(folder.load()->forward(ids), expected));

  // A head of its own.
  folder.weights[name] = embedding;
  folder.weights["lm_head.weight"] = 2 * embedding;
  folder.write();
  auto model = folder.load();
  CHECK_FALSE(model->is_tied());
  CHECK_FALSE(model->config.tie_word_embeddings);
  CHECK(distance(model->forward(ids), 2 * expected) < 1e-5);
  REQUIRE(warnings.texts.size() == 1);
  CHECK_THAT(warnings.texts[0], contains("config.json ties the head to the embedding, but the file holds two"));
  testing::TemporaryFolder target;
  gpt::save_model(*model, folder.path(), target.path());
  CHECK(gpt::read_json(target / "config.json").at("tie_word_embeddings") == false);
}

TEST_CASE("JSON that cannot be written is an error that names the file") {
  const testing::TemporaryFolder folder;
  const nlohmann::ordered_json json{{"b", {1, 2}}, {"a", nullptr}};
  gpt::write_json(folder.path() / "file.json", json);
  std::ifstream stream(folder.path() / "file.json");
  CHECK(nlohmann::ordered_json::parse(stream).dump() == json.dump());
  const auto none = (folder.path() / "none/file.json").string();
  for (const auto& file : {none, std::string("/dev/full")})  // which opens, and has no room
    CHECK_THAT(error_of([&] { gpt::write_json(file, json); }), contains(file + ": cannot be written"));
}

TEST_CASE("a merged head is saved apart from the embedding it was tied to") {
  ModelFolder folder(config_json(GENERATE("llama tied", "gpt2")));
  auto model = folder.load();
  const auto merged = model->lm_head->weight + 0.25;
  model->lm_head->weight = merged;
  gpt::detail::Registry::of(*model->lm_head)["weight"] = merged;
  CHECK(!model->is_tied());
  testing::TemporaryFolder target;
  gpt::save_model(*model, folder.path(), target.path());
  auto again = gpt::load_model(target.path(), torch::kFloat, torch::kCPU);
  CHECK(torch::equal(again->lm_head->weight, merged));
  CHECK(torch::equal(again->forward(random_ids(2, 9)), model->forward(random_ids(2, 9))));
}

TEST_CASE("GPT-2's projections are transposed views of the mapped file") {
  ModelFolder folder(kGPT2Json);
  auto model = folder.load();
  const auto parameters = model->named_parameters();
  for (const std::string name : {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}) {
    const auto weight = parameters["transformer.h.1." + name + ".weight"];
    CHECK(weight.stride(0) == 1);
    CHECK(torch::equal(weight.t(), folder.weights.at("transformer.h.1." + name + ".weight")));
  }
  auto& c_attn = model->as<gpt::GPT2Impl>()->transformer->h->ptr(1)->as<gpt::GPT2Block>()->attn->c_attn;
  CHECK(c_attn->weight.is_same(parameters["transformer.h.1.attn.c_attn.weight"]));
  CHECK(c_attn->weight.sizes() == torch::IntArrayRef({72, 24}));

  // Mapped, not copied: a copy would own memory that can be resized.
  for (const auto& item : parameters) CHECK(!item->storage().resizable());
}

TEST_CASE("every adapter tensor on GPT-2's c_attn gets its gradient: in all rows of q, k and v, in every layer") {
  ModelFolder folder(kGPT2Json);
  auto model = folder.load();
  model->to(torch::kDouble);
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).alpha(6).target_modules({"c_attn"}));
  testing::randomize(adapters.parameters());
  const auto ids = random_ids(2, 9);
  auto loss = [&] {
    auto active = adapters.activate();
    return torch::log_softmax(model->forward(ids), -1).sin().mean();
  };
  CHECK(testing::gradient_error(loss, adapters.parameters()) < 1e-8);
  loss().backward();
  REQUIRE(adapters.parameters().size() == 2 * 2);
  for (const auto& item : adapters.named_parameters()) {
    INFO(item.key());
    CHECK(item->grad().abs().amax(1).min().item<double>() > 1e-9);  // no row without a gradient
  }
}

TEST_CASE("torch::save writes what forward uses") {
  ModelFolder folder(config_json(GENERATE("llama tied", "gpt2")));
  auto model = folder.load();
  std::stringstream stream;
  torch::save(model, stream);
  auto again = gpt::make_model(model->config);
  CHECK(again->forward(random_ids(1, 4)).isnan().all().item<bool>());  // no weights yet
  torch::load(again, stream);
  again->eval();
  CHECK(torch::equal(again->forward(random_ids(2, 9)), model->forward(random_ids(2, 9))));
}

TEST_CASE("save_model and load_model give the same model back") {
  const auto config = config_json(GENERATE("llama", "llama biased", "gpt2"));
  ModelFolder folder(config);
  write_text(folder.path() / "tokenizer.json", "{}");
  write_text(folder.path() / "unrelated.bin", "large");
  testing::TemporaryFolder parent;
  const auto target = parent / "deep/target";
  auto model = folder.load();
  std::filesystem::create_directories(target);
  write_text(target / "chat_template.jinja", "of another model");
  gpt::save_model(*model, folder.path(), target);
  CHECK(std::filesystem::exists(target / "tokenizer.json"));
  CHECK(!std::filesystem::exists(target / "chat_template.jinja"));
  CHECK(!std::filesystem::exists(target / "unrelated.bin"));

  const auto written = lora::read_safetensors(target / "model.safetensors");
  CHECK(written.size() == folder.weights.size());
  for (const auto& [name, tensor] : folder.weights) CHECK(torch::equal(written.at(name), tensor));
  auto again = gpt::load_model(target, torch::kFloat, torch::kCPU);
  CHECK(torch::equal(again->forward(random_ids(2, 9)), model->forward(random_ids(2, 9))));

  std::ofstream(target / "model.safetensors.index.json") << "{}";  // of an earlier model in shards
  auto half = gpt::load_model(folder.path(), torch::kBFloat16, torch::kCPU);
  gpt::save_model(*half, folder.path(), target);
  CHECK(!std::filesystem::exists(target / "model.safetensors.index.json"));
  const char* key = config.contains("dtype") ? "dtype" : "torch_dtype";
  CHECK(gpt::read_json(target / "config.json").at(key) == "bfloat16");
  CHECK(lora::read_safetensors(target / "model.safetensors").begin()->second.scalar_type() == torch::kBFloat16);

  CHECK_THROWS_WITH(gpt::save_model(*model, folder.path(), folder.path()),
                    contains("the directory the model came from"));
}

TEST_CASE("a bfloat16 model gives nearly the same probabilities") {
  ModelFolder folder(config_json(GENERATE("llama", "gpt2")));
  auto half = gpt::load_model(folder.path(), torch::kBFloat16, torch::kCPU);
  const auto found = half->forward(random_ids(2, 9));
  CHECK(found.scalar_type() == torch::kBFloat16);
  const auto expected = folder.load()->forward(random_ids(2, 9)).softmax(-1);
  CHECK(distance(found.to(torch::kFloat).softmax(-1), expected) < 0.05);
}

TEST_CASE("GPT-2 checkpoints load with and without the prefix, and with their buffers") {
  ModelFolder folder(kGPT2Json);
  const auto expected = folder.load()->forward(random_ids(2, 9));
  gpt::TensorMap bare;
  for (const auto& [name, tensor] : folder.weights) bare[name.substr(std::string("transformer.").size())] = tensor;
  bare["h.0.attn.bias"] = torch::ones({1, 1, 160, 160}).tril();
  bare["h.1.attn.masked_bias"] = torch::tensor(-1e4f);
  folder.weights = bare;
  folder.write();
  CHECK(torch::equal(folder.load()->forward(random_ids(2, 9)), expected));
}

TEST_CASE("a sharded checkpoint loads by its index") {
  ModelFolder folder(kLlamaJson);
  const auto expected = folder.load()->forward(random_ids(2, 9));
  folder.split();
  CHECK(torch::equal(folder.load()->forward(random_ids(2, 9)), expected));
  std::filesystem::remove(folder.path() / "model.safetensors.index.json");
  CHECK_THROWS_WITH(folder.load(), contains("neither model.safetensors nor model.safetensors.index.json"));
}

TEST_CASE("tensors that do not fit are named with their shapes") {
  ModelFolder folder(kLlamaJson);
  const std::string q = "model.layers.1.self_attn.q_proj.weight", norm = "model.norm.weight";
  SECTION("missing") {
    folder.weights.erase(q);
    folder.weights.erase("lm_head.weight");
    folder.write();
    CHECK_THROWS_AS(folder.load(), lora::CheckpointError);
    CHECK_THROWS_WITH(folder.load(), contains(q + " [24, 24] is missing"));
    CHECK_THROWS_WITH(folder.load(), contains("lm_head.weight [31, 24] is missing"));
    CHECK_THROWS_WITH(folder.load(), contains(folder.path().string()));
  }
  SECTION("extra") {
    folder.weights["model.layers.2.mlp.up_proj.weight"] = torch::zeros({40, 24});
    folder.write();
    CHECK_THROWS_WITH(folder.load(), contains("model.layers.2.mlp.up_proj.weight [40, 24] is not part of the model"));
  }
  SECTION("misshapen") {
    folder.weights[norm] = torch::zeros({23});
    folder.write();
    CHECK_THROWS_WITH(folder.load(), contains(norm + " is [23] but must be [24]"));
  }
  SECTION("no numbers") {
    folder.weights[q] = folder.weights[q].to(torch::kChar);
    folder.write();
    CHECK_THROWS_WITH(folder.load(), contains(q + " holds Char"));
  }
  SECTION("another model altogether") {
    folder.weights = random_weights(gpt::read_config(ModelFolder(kGPT2Json).path()));
    folder.write();
    CHECK(folder.load_error().find("more") != std::string::npos);
    CHECK(folder.load_error().size() < 1000);
  }
}

TEST_CASE("a computed buffer in a checkpoint is passed over") {
  ModelFolder folder(kLlamaJson);
  folder.weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch::zeros({2});
  folder.write();
  CHECK_NOTHROW(folder.load());
}

TEST_CASE("config.json is read for both architectures") {
  ModelFolder llama(changed(kLlamaJson, {{"head_dim", 8}, {"num_key_value_heads", nullptr}}));
  const auto config = gpt::read_config(llama.path());
  CHECK(config.architecture == gpt::Architecture::kLlama);
  CHECK(config.head_dim == 8);
  CHECK(config.num_key_value_heads == 6);
  CHECK(config.eos_token_ids == std::vector<int64_t>{2});
  CHECK(llama.load()->forward(random_ids(2, 9)).size(2) == 31);
  const auto gpt2 = gpt::read_config(ModelFolder(kGPT2Json).path());
  CHECK(gpt2.architecture == gpt::Architecture::kGPT2);
  CHECK(gpt2.intermediate_size == 96);
  CHECK(gpt2.tie_word_embeddings);
  CHECK(gpt2.eos_token_ids == std::vector<int64_t>{2, 5});
}

TEST_CASE("both spellings of the rotary embedding mean the same") {
  ModelFolder plain(kLlamaJson);
  const auto ids = random_ids(1, 60);
  const nlohmann::json scaling = {
      {"factor", 4.0}, {"low_freq_factor", 1.0}, {"high_freq_factor", 4.0}, {"original_max_position_embeddings", 32}};
  auto logits = [&](const nlohmann::json& changes) {
    write_text(plain.path() / "config.json", changed(kLlamaJson, changes).dump());
    return plain.load()->forward(ids);
  };
  const auto unscaled = logits(nlohmann::json::object());
  for (const std::string type : {"linear", "llama3"}) {
    auto old_style = scaling, new_style = scaling;
    old_style["type"] = type;
    new_style["rope_type"] = type;
    new_style["rope_theta"] = 100.0;
    const auto expected = logits({{"rope_scaling", old_style}});
    CHECK(distance(expected, unscaled) > 1e-3);
    CHECK(torch::equal(logits({{"rope_theta", nullptr}, {"rope_parameters", new_style}}), expected));
  }
}

TEST_CASE("llama3 scaling divides long wavelengths, keeps short ones and blends between") {
  gpt::RopeConfig rope;
  rope.scaling = gpt::RopeScaling::kLlama3;
  rope.factor = 8;
  rope.low_frequency_factor = 1;
  rope.high_frequency_factor = 4;
  rope.original_positions = 100;
  const auto wavelengths = torch::tensor({10.0, 25.0, 40.0, 100.0, 1000.0}, torch::kDouble);
  const auto frequencies = 2 * c10::pi<double> / wavelengths;
  const auto found = gpt::detail::llama3_frequencies(frequencies, rope) / frequencies;
  CHECK(distance(found, torch::tensor({1.0, 1.0, 0.5 / 8 + 0.5, 1 / 8.0, 1 / 8.0}, torch::kDouble)) < 1e-12);
}

TEST_CASE("what is not supported is an error that names it") {
  CHECK(contains("unknown architecture \"MambaForCausalLM\"; supported: LlamaForCausalLM, GPT2LMHeadModel")
            .match(config_error(changed(kLlamaJson, {{"architectures", {"MambaForCausalLM"}}}))));
  auto rope = [](const nlohmann::json& scaling) { return changed(kLlamaJson, {{"rope_scaling", scaling}}); };
  CHECK(contains("\"yarn\"").match(config_error(rope({{"rope_type", "yarn"}, {"factor", 2.0}}))));
  CHECK(contains("no \"factor\"").match(config_error(rope({{"rope_type", "linear"}}))));
  CHECK(contains("\"relu\"").match(config_error(changed(kLlamaJson, {{"hidden_act", "relu"}}))));
  CHECK(contains("no \"hidden_size\"").match(config_error(changed(kLlamaJson, {{"hidden_size", nullptr}}))));
  CHECK(contains("wrong type").match(config_error(changed(kLlamaJson, {{"hidden_size", "wide"}}))));
  CHECK(contains("key/value heads").match(config_error(changed(kLlamaJson, {{"num_key_value_heads", 4}}))));
  auto few_bits = [](const char* method) {
    return changed(kLlamaJson, {{"quantization_config", {{"quant_method", method}}}});
  };
  CHECK(contains("by \"gptq\" are unsupported, only by \"bitsandbytes\"").match(config_error(few_bits("gptq"))));
  CHECK(contains("but none is in the files").match(ModelFolder(few_bits("bitsandbytes")).load_error()));
  CHECK(contains("multiple of \"n_head\"").match(config_error(changed(kGPT2Json, {{"n_head", 5}}))));
  CHECK(contains("must be positive").match(config_error(changed(kGPT2Json, {{"n_layer", 0}}))));
  testing::TemporaryFolder empty;
  CHECK_THROWS_WITH(gpt::read_config(empty.path()), contains("config.json: cannot be opened"));
}

TEST_CASE("the fingerprint of a model's weights is that of its files") {
  ModelFolder folder(config_json("llama")), copy(config_json("llama"));
  const auto before = gpt::fingerprint_of_weights(folder.path());
  CHECK(before == gpt::fingerprint_of_weights(copy.path()));
  const std::string changed_name = GENERATE("model.embed_tokens.weight", "model.norm.weight");
  copy.weights[changed_name].view(-1)[3] += 1;
  copy.write();
  CHECK(before != gpt::fingerprint_of_weights(copy.path()));
  folder.split();
  const auto split = gpt::fingerprint_of_weights(folder.path());
  copy.split();
  CHECK(split != before);
  CHECK(split != gpt::fingerprint_of_weights(copy.path()));
}

TEST_CASE("generate continues as the logits of the whole text say") {
  ModelFolder folder(config_json(GENERATE("llama", "gpt2")));
  auto model = folder.load();
  gpt::SamplingOptions greedy;
  greedy.max_new_tokens = 20;
  greedy.temperature = 0;
  const std::vector<int64_t> prompt = {3, 1, 4, 1, 5};
  std::vector<int64_t> streamed;
  model->train();
  const auto tokens = gpt::generate(*model, prompt, greedy, {}, [&](int64_t token) { streamed.push_back(token); });
  CHECK(model->is_training());
  CHECK(streamed == tokens);
  REQUIRE(tokens.size() == 20);

  model->eval();
  auto text = prompt;
  for (const auto token : tokens) {
    const auto logits = model->forward(torch::tensor(text, torch::kLong).unsqueeze(0));
    CHECK(logits.select(1, -1).argmax().item<int64_t>() == token);
    text.push_back(token);
  }

  // A stop token ends the text and is not part of it.
  const auto stop = tokens[7];
  const auto first = std::find(tokens.begin(), tokens.end(), stop);
  CHECK(gpt::generate(*model, prompt, greedy, {stop}) == std::vector<int64_t>(tokens.begin(), first));

  // Positions end the text as well.
  greedy.max_new_tokens = 1000;
  CHECK(gpt::generate(*model, prompt, greedy, {}).size() == 155);
  CHECK_THROWS_WITH(gpt::generate(*model, std::vector<int64_t>(160, 1), greedy, {}), contains("160 positions"));
  CHECK_THROWS_WITH(gpt::generate(*model, {}, greedy, {}), contains("at least one token"));
}

TEST_CASE("sampling draws from the tokens it may, with the model's probabilities") {
  const auto probabilities = torch::tensor({0.1, 0.4, 0.05, 0.3, 0.15});
  const auto scores = probabilities.log() + 3;
  auto frequencies = [&](const gpt::SamplingOptions& options) {
    const auto generator = at::detail::createCPUGenerator(5);
    auto counts = torch::zeros({5});
    for (int i = 0; i < 2000; ++i) counts[gpt::detail::sample(scores, options, generator)] += 1;
    return counts / 2000;
  };
  gpt::SamplingOptions options;
  options.temperature = 1;
  options.top_p = 1;
  CHECK(distance(frequencies(options), probabilities) < 0.04);
  options.top_k = 2;
  CHECK(distance(frequencies(options), torch::tensor({0.0, 4 / 7.0, 0.0, 3 / 7.0, 0.0})) < 0.04);
  options.top_k = 0;
  options.top_p = 0.71;  // 0.4 + 0.3 is not enough: the third is the one that passes it
  CHECK(distance(frequencies(options), torch::tensor({0.0, 8 / 17.0, 0.0, 6 / 17.0, 3 / 17.0})) < 0.04);
  options.top_p = 1;
  options.temperature = 0.5;
  CHECK(distance(frequencies(options), probabilities.square() / probabilities.square().sum()) < 0.04);

  auto invalid = [](auto change) {
    gpt::SamplingOptions bad;
    change(bad);
    return error_of([&] { gpt::detail::validate(bad); });
  };
  CHECK(contains("max_new_tokens").match(invalid([](auto& bad) { bad.max_new_tokens = 0; })));
  CHECK(contains("temperature").match(invalid([](auto& bad) { bad.temperature = -1; })));
  CHECK(contains("top_p").match(invalid([](auto& bad) { bad.top_p = 0; })));
  CHECK(contains("top_k").match(invalid([](auto& bad) { bad.top_k = -1; })));
  CHECK(contains("repetition_penalty").match(invalid([](auto& bad) { bad.repetition_penalty = 0; })));
}

TEST_CASE("the repetition penalty makes tokens of the text less likely, each once") {
  const auto scores = torch::tensor({3.0f, -2.0f, 1.0f, 4.0f});
  CHECK(torch::equal(gpt::detail::penalized(scores, {0, 1, 0}, 2), torch::tensor({1.5f, -4.0f, 1.0f, 4.0f})));
  CHECK(gpt::detail::penalized(scores, {0, 1}, 1).is_same(scores));

  ModelFolder folder(kLlamaJson);
  gpt::SamplingOptions greedy;
  greedy.max_new_tokens = 12;
  greedy.temperature = 0;
  auto different = [&](double penalty) {
    greedy.repetition_penalty = penalty;
    const auto tokens = gpt::generate(*folder.load(), {3, 1}, greedy, {});
    return std::set<int64_t>(tokens.begin(), tokens.end()).size();
  };
  CHECK(different(1) < 12);
  CHECK(different(1e9) == 12);  // none twice, as long as one with a score above 0 is left
}

TEST_CASE("devices and types are named in words") {
  CHECK(gpt::parse_device("cpu") == torch::Device(torch::kCPU));
  CHECK(gpt::parse_device("auto").is_cuda() == torch::cuda::is_available());
  CHECK(gpt::parse_dtype("float32") == torch::kFloat);
  CHECK(gpt::parse_dtype("bfloat16") == torch::kBFloat16);
  CHECK_THROWS_WITH(gpt::parse_dtype("float8"), contains("float32 or bfloat16, got \"float8\""));
  for (const std::string name : {"gpu", "cuda:", "cuda:x", "cuda:-1", ""}) {
    CHECK_THROWS_WITH(gpt::parse_device(name), contains("auto, cpu, cuda or cuda:N, got \"" + name + "\""));
  }
  if (!torch::cuda::is_available()) {
    CHECK_THROWS_WITH(gpt::parse_device("cuda:1"), contains("\"cuda:1\" was asked for, but no CUDA device is there"));
  }
  CHECK_THROWS_WITH(gpt::parse_device("cuda:99"), contains("\"cuda:99\" was asked for"));
}

TEST_CASE("The functions of the model with a backward of their own are their formulas, with the gradients of these") {
  torch::manual_seed(0);
  static constexpr double kEpsilon = 0.03;  // which counts beside rows as small as these
  struct Case {
    const char* name;
    std::function<torch::Tensor(const torch::Tensor&a, const torch::Tensor&b)> own, formula;
  };
  const std::vector<Case> cases{
      {"SwiGLU", [](const auto& a, const auto& b) { return gpt::detail::SwiGLU::apply(a, b); },
       [](const auto& a, const auto& b) { return a * torch::sigmoid(a) * b; }},
      {"RMSNorm",
       [](const auto& a, const auto& b) {
         gpt::RMSNorm norm(7, kEpsilon);
         norm->weight = b[0][0];
         return norm->forward(a);
       },
       [](const auto& a, const auto& b) { return b[0][0] * a / ((a * a).mean(-1, true) + kEpsilon).sqrt(); }}};
  const auto a = torch::randn({2, 3, 7}) * 0.3, b = torch::randn({2, 3, 7}), weight = torch::randn({2, 3, 7});
  for (const auto& [name, own, formula] : cases) {
    for (const auto type : {torch::kFloat, torch::kBFloat16}) {
      INFO(name << " in " << type);
      const auto results = [&, &weight = weight](const auto& function, torch::ScalarType of) {
        const auto x = a.to(type).to(of).clone().requires_grad_(), y = b.to(type).to(of).clone().requires_grad_();
        const auto result = function(x, y);
        (result * weight.to(type).to(of)).sum().backward();
        return std::vector<torch::Tensor>{result.detach(), x.grad(), y.grad()};
      };
      const auto here = results(own, type), exact = results(formula, torch::kDouble);
      for (size_t i = 0; i < here.size(); ++i) {
        INFO("result, gradient, gradient: " << i);
        REQUIRE(exact[i].abs().max().item<double>() > 0.1);
        CHECK(distance(here[i], exact[i]) <
              (type == torch::kFloat ? 1e-6 : 0.03) * exact[i].abs().max().item<double>());
      }
    }
  }
}
