// Graphs that are made once, into which adapters of different ranks, scales and layers are put one after the other.
#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/hot_swap.hpp>
#include <lora/quantize.hpp>
#include <lora/weight/four_bit.hpp>

#include <torch/script.h>

#include <thread>

namespace {

using torch::Tensor;
using Compiled = torch::jit::Module;
using Names = std::vector<std::string>;
using testing::contains;
using testing::distance;
using testing::error_of;

/// A layer of each kind that a graph can have room for, with what it takes as input, in a model of that layer alone.
struct Kind {
  const char* name;
  std::function<std::shared_ptr<torch::nn::Module>()> layer;
  std::function<Tensor(torch::nn::Module&, const Tensor&)> run;
  std::function<Tensor(int64_t rows)> input;
  lora::LoRAConfig config = lora::LoRAConfig(8).target_modules({"layer"});
  bool is_known_by_its_class = true;  // so that a directory can be put into it without the model
  int64_t rows = 3;                   // as many as are traced, two, where the layer itself writes down how many
};

template <class Layer>
Tensor forward(torch::nn::Module& layer, const Tensor& x) {
  return layer.as<Layer>()->forward(x);
}

template <class Layer, class Options>
std::function<std::shared_ptr<torch::nn::Module>()> made(const Options& options) {
  return [options] { return std::make_shared<Layer>(options); };
}

std::function<Tensor(int64_t)> floats(std::vector<int64_t> sizes) {
  return [sizes](int64_t rows) {
    auto all = sizes;
    all.insert(all.begin(), rows);
    return torch::randn(all, testing::on_device(torch::kDouble));
  };
}

std::vector<Kind> kinds() {
  namespace nn = torch::nn;
  const auto fused = lora::LoRAConfig(8).target_modules({"layer"}).fused({{"layer", {4, 6, 2}, {true, false, true}}});
  std::vector<Kind> all;
  all.push_back({"Linear", made<nn::LinearImpl>(nn::LinearOptions(6, 5)), &forward<nn::LinearImpl>, floats({6})});
  all.push_back({"Linear without a bias, three dimensions", made<nn::LinearImpl>(nn::LinearOptions(6, 5).bias(false)),
                 &forward<nn::LinearImpl>, floats({3, 6})});
  all.push_back({"Linear of fused parts", made<nn::LinearImpl>(nn::LinearOptions(6, 12)), &forward<nn::LinearImpl>,
                 floats({3, 6}), fused, false});
  all.push_back({"Conv1d", made<nn::Conv1dImpl>(nn::Conv1dOptions(4, 6, 3).padding(1)), &forward<nn::Conv1dImpl>,
                 floats({4, 7})});
  all.push_back({"Conv2d with groups", made<nn::Conv2dImpl>(nn::Conv2dOptions(4, 6, 3).groups(2)),
                 &forward<nn::Conv2dImpl>, floats({4, 5, 5})});
  all.push_back({"ConvTranspose2d", made<nn::ConvTranspose2dImpl>(nn::ConvTranspose2dOptions(4, 6, 2).groups(2)),
                 [](nn::Module& layer, const Tensor& x) { return layer.as<nn::ConvTranspose2dImpl>()->forward(x); },
                 floats({4, 5, 5})});
  all.push_back(
      {"Embedding", made<nn::EmbeddingImpl>(nn::EmbeddingOptions(9, 8)), &forward<nn::EmbeddingImpl>, [](int64_t rows) {
         return torch::randint(9, {rows, 3}, testing::on_device(torch::kLong));
       }});
  all.push_back({"LSTM", made<nn::LSTMImpl>(nn::LSTMOptions(5, 4).batch_first(true)),
                 [](nn::Module& layer, const Tensor& x) { return std::get<0>(layer.as<nn::LSTMImpl>()->forward(x)); },
                 floats({3, 5}), lora::LoRAConfig(8).target_modules({"layer"}), false, 2});
  all.push_back({"MultiheadAttention", made<nn::MultiheadAttentionImpl>(nn::MultiheadAttentionOptions(8, 2)),
                 [](nn::Module& layer, const Tensor& x) {
                   const auto y = x.transpose(0, 1);
                   return std::get<0>(layer.as<nn::MultiheadAttentionImpl>()->forward(y, y, y)).transpose(0, 1);
                 },
                 floats({3, 8}), lora::LoRAConfig(8).target_modules({"layer"}), false, 2});
  return all;
}

/// Adapters of different ranks and scales for what a configuration selects.
void add_adapters(lora::Adapters& adapters, const lora::LoRAConfig& room) {
  using Config = lora::LoRAConfig;
  const std::vector<std::pair<std::string, Config>> all{{"two", Config(room).rank(2).alpha(3)},
                                                        {"four", Config(room).rank(4).alpha(16).rank_stabilized(true)},
                                                        {"eight", Config(room).rank(8).alpha(5)}};
  for (const auto& [name, config] : all) {
    adapters.add(name, config);
    testing::randomize(adapters.parameters(name));
  }
}

/// The module as another process would find it.
Compiled saved_and_loaded(const Compiled& compiled) {
  const testing::TemporaryFolder folder;
  compiled.save(folder / "model.pt");
  return torch::jit::load(folder / "model.pt", testing::device());
}

Compiled traced(testing::Stack& model, const lora::LoRAConfig& room, const Tensor& x) {
  return lora::trace(*model, room, {x}, [&](const std::vector<Tensor>& in) { return model->forward(in[0]); });
}

/// Past TorchScript's profiling runs.
Tensor run(Compiled& compiled, const Tensor& x) {
  for (int i = 0; i < 3; ++i) compiled.forward({x});
  return compiled.forward({x}).toTensor();
}

lora::LoRAConfig stack_room() {
  return lora::LoRAConfig(8).target_modules({"q_proj", "v_proj", "lm_head"}).rank_pattern({{"lm_head", 4}});
}

lora::LoRAConfig lora_of(int64_t rank, Names modules) { return lora::LoRAConfig(rank).target_modules(modules); }

}  // namespace

TEST_CASE("A graph computes what the model does with each adapter that is put into it") {
  const auto kind = GENERATE(from_range(kinds()));
  const bool is_loaded = GENERATE(false, true);
  CAPTURE(kind.name, is_loaded);
  torch::manual_seed(0);
  const auto model = std::make_shared<torch::nn::Module>();
  const auto layer = model->register_module("layer", kind.layer());
  model->to(testing::device(), torch::kDouble);
  model->eval();
  const torch::NoGradGuard no_grad;
  auto compiled = lora::trace(*model, kind.config, {kind.input(2)},
                              [&](const std::vector<Tensor>& in) { return kind.run(*layer, in[0]); });
  for (const auto& parameter : model->parameters()) CHECK(parameter.requires_grad());
  if (is_loaded) compiled = saved_and_loaded(compiled);
  lora::Adapters adapters(*model);
  add_adapters(adapters, kind.config);
  const testing::TemporaryFolder directory;
  if (kind.is_known_by_its_class) adapters.save_all(directory.path());
  lora::HotSwap swap(compiled);
  const auto x = kind.input(kind.rows);
  const auto base = kind.run(*layer, x);
  CHECK(distance(run(compiled, x), base) < 1e-12);
  for (const auto* name : {"two", "eight", "four", "two"}) {  // the second leaves nothing in the third
    swap.put(adapters, name);
    const auto expected = [&] {
      const auto active = adapters.activate(name);
      return kind.run(*layer, x);
    }();
    CHECK(distance(expected, base) > 1e-3);
    CHECK(distance(run(compiled, x), expected) < 1e-12);
    if (!kind.is_known_by_its_class) continue;
    swap.clear();
    swap.load(directory / name);
    CHECK(distance(run(compiled, x), expected) < 1e-12);
  }
  swap.clear();
  CHECK(distance(run(compiled, x), base) < 1e-12);
}

TEST_CASE("A graph takes any number of rows, and adapters with fewer layers and scales of their own") {
  const auto type = GENERATE(torch::kFloat, torch::kDouble, torch::kBFloat16);
  const double precision = type == torch::kDouble        ? 1e-12
                           : type == torch::kFloat       ? 1e-5
                           : testing::device().is_cuda() ? 0.03  // whose products of bfloat16 round in other places
                                                         : 0.02;
  torch::manual_seed(0);
  testing::Stack model;
  model->to(type);
  const torch::NoGradGuard no_grad;
  const auto input = [&](int64_t rows, int64_t positions) {
    return torch::randn({rows, positions, 8}, testing::on_device(torch::kFloat)).to(type);
  };
  auto compiled = traced(model, stack_room(), input(2, 3));
  lora::Adapters adapters(*model);
  const std::vector<std::pair<std::string, lora::LoRAConfig>> all{
      {"a/b.c", lora_of(2, {"q_proj", "lm_head"}).alpha(3)},
      {"head", lora_of(4, {"lm_head"}).alpha(8).rank_stabilized(true)},
      {"ranks", lora_of(8, {"q_proj", "v_proj"})
                    .alpha(4)
                    .rank_pattern({{"layers.1.q_proj", 3}})
                    .alpha_pattern({
                        {"layers.2.v_proj", 12},
                    })}};
  for (const auto& [name, config] : all) {
    adapters.add(name, config);
    testing::randomize(adapters.parameters(name), 0.5);
  }
  lora::HotSwap swap(compiled);
  const auto check = [&](const std::string& name) {
    swap.put(adapters, name);
    for (const auto& x : {input(2, 3), input(5, 1), input(1, 7)}) {
      const auto expected = [&] {
        const auto active = adapters.activate(name);
        return model->forward(x);
      }();
      const auto tolerance = precision * (1 + expected.abs().max().item<double>());
      CHECK(distance(expected, model->forward(x)) > std::max(1e-3, 2 * tolerance));
      CHECK(distance(run(compiled, x), expected) < tolerance);
    }
  };
  for (const auto& item : all) check(item.first);
  adapters.set_scale("ranks", 0.5);
  adapters.set_scale("ranks", "layers.0.q_proj", -2);
  check("ranks");
}

TEST_CASE("An adapter that a graph has no room for is refused by name, and the former one stays") {
  torch::manual_seed(0);
  testing::Stack model, other;
  other->lm_head = torch::nn::Linear(torch::nn::LinearOptions(8, 7).bias(false));
  other->replace_module("lm_head", other->lm_head);
  const torch::NoGradGuard no_grad;
  const auto x = torch::randn({2, 8}, testing::on_device(torch::kFloat));
  auto compiled = traced(model, stack_room(), x);
  lora::HotSwap swap(compiled);
  std::map<std::string, int64_t> room{{"lm_head", 4}};
  for (const auto* layer : {"layers.0.", "layers.1.", "layers.2."})
    for (const auto* name : {"q_proj", "v_proj"}) room.emplace(std::string(layer) + name, 8);
  CHECK(swap.room() == room);
  lora::Adapters adapters(*model), others(*other);
  const auto fits = lora_of(2, {"q_proj"});
  adapters.add("good", fits);
  adapters.add("large", lora_of(5, {"q_proj", "lm_head"}));
  adapters.add("wide", lora_of(2, {"q_proj", "k_proj"}));
  adapters.add("dora", lora::LoRAConfig(fits).method(lora::DoRA()));
  adapters.add("whole", lora::LoRAConfig(fits).modules_to_save({"lm_head"}));
  others.add("foreign", lora_of(2, {"q_proj", "lm_head"}));
  for (const auto& name : adapters.names()) testing::randomize(adapters.parameters(name));
  swap.put(adapters, "good");
  const auto before = run(compiled, x);
  CHECK(distance(before, model->forward(x)) > 1e-3);
  const auto refused = [&](const lora::Adapters& of, const std::string& name) {
    auto text = error_of([&] { swap.put(of, name); });
    CHECK_THAT(text, contains("the adapter \"" + name + "\""));
    CHECK(torch::equal(run(compiled, x), before));
    return text;
  };
  CHECK_THAT(refused(adapters, "large"), contains("has the rank 5 on \"lm_head\"") && contains("has room for 4"));
  CHECK_THAT(refused(adapters, "wide"), contains("changes the layer \"layers.0.k_proj\"") && contains("places for"));
  CHECK_THAT(refused(adapters, "dora"), contains("is of the method DoRA on \"layers.0.q_proj\""));
  CHECK_THAT(refused(adapters, "whole"), contains("has \"lm_head.weight\" trained in full"));
  CHECK_THAT(refused(others, "foreign"), contains("[7, 2] on \"lm_head\"") && contains("[6, 4]"));
  CHECK_THAT(error_of([&] { swap.put(adapters, "nobody"); }), contains("there is no adapter \"nobody\""));
  const testing::TemporaryFolder directory;
  CHECK_THROWS_WITH(swap.load(directory.path()), contains("adapter_config.json"));
  adapters.save(directory / "wide", "wide");
  CHECK_THAT(error_of([&] { swap.load(directory / "wide"); }), contains("wide changes the layer \"layers.0.k_proj\""));
  CHECK_THAT(error_of([&] { swap.load(directory / "wide", lora::LoadOptions().take_tables(true)); }),
             contains("take_tables"));
  CHECK(torch::equal(run(compiled, x), before));
}

TEST_CASE("What cannot be traced with room for adapters is said, and the model is as before") {
  torch::manual_seed(0);
  testing::Stack model;
  const auto x = torch::randn({2, 8}, testing::on_device(torch::kFloat));
  const auto room = stack_room();
  const auto of = [&](const lora::LoRAConfig& config) { return error_of([&] { traced(model, config, x); }); };
  CHECK_THAT(of(lora::LoRAConfig(room).method(lora::VeRA())), contains("the configuration is of a VeRA"));
  CHECK_THAT(of(lora::LoRAConfig(room).dropout(0.1)), contains("has no dropout") && contains("asks for 0.1"));
  CHECK_THAT(of(lora::LoRAConfig(room).bias(lora::Bias::kAll)), contains(".bias\" in full"));
  CHECK_THAT(of(lora_of(2, {"haed"})), contains("no module matches \"haed\""));
  CHECK_THAT(error_of([&] {
               lora::trace(*model, room, {x}, [&](const std::vector<Tensor>& in) {
                 return model->layers[0]->as<testing::Block>()->forward(in[0]);
               });
             }),
             contains("did not compute with the layer \"layers.1.q_proj\""));
  CHECK_THROWS_WITH(
      lora::trace(*model, room, {x}, [](const std::vector<Tensor>&) -> Tensor { throw std::runtime_error("no rows"); }),
      contains("no rows"));
  for (const auto& parameter : model->parameters()) CHECK(parameter.requires_grad());
  lora::quantize(*model, lora::NF4());
  CHECK_THAT(of(room), contains("q_proj.weight\" is held in few bits") && contains("lora::dequantize"));
  lora::dequantize(*model);
  auto compiled = traced(model, room, x);
  compiled.eval();
  CHECK_THAT(error_of([&] { lora::HotSwap(torch::jit::freeze(compiled)); }), contains("before it was frozen"));
}

TEST_CASE("A graph shares the weights of its model, also of tied layers, and returns what the function does") {
  torch::manual_seed(0);
  testing::Tied model;
  model->to(torch::kDouble);
  const auto ids = torch::randint(10, {2, 3}, testing::on_device(torch::kLong));
  const torch::NoGradGuard no_grad;
  const auto room = lora_of(4, {"tokens", "head"});
  auto compiled = lora::trace(*model, room, {ids, ids}, [&](const std::vector<Tensor>& in) {
    return std::make_tuple(model->forward(in[0]), in[1] + 1);
  });
  lora::Adapters adapters(*model);
  adapters.add("one", lora_of(2, {"head"}).alpha(8));
  adapters.add("both", lora_of(3, {"tokens", "head"}));
  for (const auto& name : adapters.names()) testing::randomize(adapters.parameters(name));
  for (const bool is_loaded : {false, true}) {
    if (is_loaded) {
      compiled = saved_and_loaded(compiled);
    } else {
      model->tokens->weight.add_(0.25);  // which the graph sees
    }
    lora::HotSwap swap(compiled);
    for (const auto* name : {"both", "one"}) {
      swap.put(adapters, name);
      const auto active = adapters.activate(name);
      const auto expected = model->forward(ids);
      std::vector<c10::IValue> outputs;
      std::thread([&] {  // which is in no scope
        const torch::NoGradGuard here;
        outputs = compiled.forward({ids, ids}).toTupleRef().elements().vec();
      })
          .join();
      CHECK(distance(outputs[0].toTensor(), expected) < 1e-12);
      CHECK(torch::equal(outputs[1].toTensor(), ids + 1));
    }
  }
}

TEST_CASE("A TorchScript module is traced with room for adapters, too") {
  torch::manual_seed(0);
  Compiled layer("Linear"), model("Net");
  layer.register_parameter("weight", torch::randn({6, 4}, testing::on_device(torch::kDouble)), false);
  layer.define("def forward(self, x):\n  return torch.linear(x, self.weight)\n");
  model.register_module("fc", layer);
  model.define("def forward(self, x):\n  return torch.tanh(self.fc.forward(x))\n");
  const auto input = [](int64_t rows) { return torch::randn({rows, 3, 4}, testing::on_device(torch::kDouble)); };
  const torch::NoGradGuard no_grad;
  auto compiled =
      saved_and_loaded(lora::trace(std::make_shared<lora::ScriptModel>(model), lora_of(4, {"fc"}), {input(2)},
                                   [&](const std::vector<Tensor>& in) { return model.forward({in[0]}); }));
  lora::Adapters adapters(std::make_shared<lora::ScriptModel>(model));
  lora::HotSwap swap(compiled);
  for (const auto& [name, rank] : {std::pair("one", 1), {"four", 4}}) {
    adapters.add(name, lora_of(rank, {"fc"}).alpha(3));
    testing::randomize(adapters.parameters(name));
    swap.put(adapters, name);
    const auto x = input(5);
    const auto base = model.forward({x}).toTensor(), y = run(compiled, x);
    CHECK(distance(y, base) > 1e-3);
    const auto active = adapters.activate(name);
    CHECK(distance(y, model.forward({x}).toTensor()) < 1e-12);
  }
}

TEST_CASE("Room for adapters starts empty, and holds no adapter of its own") {
  torch::manual_seed(0);
  testing::Stack model;
  lora::Adapters adapters(*model);
  adapters.add("room", stack_room().method(lora::Swappable()));
  CHECK(adapters.parameters("room").empty());
  const auto x = torch::randn({2, 8}, testing::on_device(torch::kFloat));
  const auto base = model->forward(x);
  const auto active = adapters.activate("room");
  CHECK(distance(model->forward(x), base) < 1e-6);
}
