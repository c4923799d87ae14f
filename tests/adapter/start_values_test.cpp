// What an adapter took from weights that are written to afterwards, and what a merged one keeps of them.
#include "support/models.hpp"

#include <lora/attach.hpp>

#include <sstream>

namespace {

using torch::Tensor;
namespace nn = torch::nn;

/// A model in double, and another one with other weights.
struct Fixture {
  explicit Fixture(lora::LoRAConfig config) : adapters(lora::attach(*model, config.alpha(5))) {}

  static testing::Stack make() {
    testing::Stack model(1);
    model->to(torch::kDouble);
    return model;
  }

  Tensor adapted() {
    auto active = adapters.activate();
    return model->forward(x);
  }

  /// Gives the model the weights of the other one.
  void load(bool from_file) {
    if (from_file) {
      std::stringstream stream;
      torch::save(other, stream);
      torch::load(model, stream);
      return;
    }
    torch::NoGradGuard no_grad;
    const auto from = other->named_parameters();
    for (auto& item : model->named_parameters()) item.value().copy_(from[item.key()]);
  }

  testing::Stack model = make(), other = make();
  Tensor x = torch::randn({3, 8}, testing::on_device(torch::kDouble));
  lora::Adapters adapters;
};

lora::LoRAConfig configuration(const std::string& name) {
  lora::LoRAConfig config(2);
  if (name == "DoRA") return config.target_modules({"q_proj", "lm_head"}).method(lora::DoRA());
  config.target_modules({"q_proj"});
  return name == "modules_to_save" ? config.modules_to_save({"lm_head"}) : config.bias(lora::Bias::kAll);
}

}  // namespace

TEST_CASE("An adapter that was not trained is the base model again after other weights are read into it") {
  const auto name = GENERATE(as<std::string>(), "DoRA", "modules_to_save", "biases");
  const bool from_file = GENERATE(true, false);
  CAPTURE(name, from_file);
  testing::Warnings warnings;
  Fixture f(configuration(name));
  for (int time = 0; time < 2; ++time) {
    f.load(from_file);
    CHECK(testing::distance(f.adapted(), f.other->forward(f.x)) < 1e-12);
    testing::randomize(f.other->parameters());
  }
  f.adapters.merge();
  f.adapters.unmerge();
  CHECK(testing::distance(f.adapted(), f.model->forward(f.x)) < 1e-12);
  for (const auto& text : warnings.texts) FAIL_CHECK(text);
}

TEST_CASE("An adapter that was trained is said to go on from weights that are no longer there") {
  const auto name = GENERATE(as<std::string>(), "DoRA", "modules_to_save");
  const bool from_file = GENERATE(true, false);
  CAPTURE(name, from_file);
  testing::Warnings warnings;
  Fixture f(configuration(name));
  testing::randomize(f.adapters.parameters());
  f.adapters.merge();  // which writes to the weights, too
  f.adapters.unmerge();
  const auto before = f.adapted();
  f.adapters.merge();
  CHECK(testing::distance(f.adapted(), before) < 1e-12);
  f.adapters.unmerge();
  for (const auto type : {torch::kFloat, torch::kDouble}) {  // nor do casts change what was taken
    f.model->to(type);
    auto active = f.adapters.activate();
    f.model->forward(f.x.to(type));
  }
  for (const auto& text : warnings.texts) FAIL_CHECK(text);
  f.load(from_file);
  const auto values = f.adapters.parameters().back().clone();
  f.adapted();
  f.adapted();
  REQUIRE(warnings.texts.size() == 1);
  CHECK_THAT(warnings.texts[0], testing::contains("lm_head") && testing::contains("written to since the adapter was"));
  CHECK(torch::equal(f.adapters.parameters().back(), values));
}

TEST_CASE("Weights that are read between scopes are adapted, and inside of one they are refused") {
  const bool from_file = GENERATE(true, false);
  Fixture f(lora::LoRAConfig(2).target_modules({"q_proj", "lm_head"}));
  testing::randomize(f.adapters.parameters());
  f.adapted();
  f.load(from_file);
  const auto adapted = f.adapted();
  CHECK(testing::distance(adapted, f.model->forward(f.x)) > 1e-3);
  f.adapters.merge();
  CHECK(testing::distance(f.model->forward(f.x), adapted) < 1e-12);
  f.adapters.unmerge();
  if (!from_file) return;
  auto active = f.adapters.activate();
  CHECK_THAT(testing::error_of([&] { f.load(from_file); }),
             testing::contains("gets other data, as by moving, casting, loading or quantizing a model"));
}

TEST_CASE("Weights that are read into a merged model are not lost by unmerging") {
  const bool from_file = GENERATE(true, false);
  Fixture f(configuration("DoRA"));
  testing::randomize(f.adapters.parameters());
  f.adapters.merge();
  f.load(from_file);
  const auto loaded = f.model->forward(f.x);
  CHECK_THAT(testing::error_of([&] { f.adapters.unmerge(); }), testing::contains("was replaced or written after it"));
  CHECK(torch::equal(f.model->forward(f.x), loaded));

  testing::Tied tied;  // whose merged weight is a tensor of its own
  auto adapters = lora::attach(*tied, lora::LoRAConfig(2).target_modules({"head"}));
  testing::randomize(adapters.parameters());
  adapters.merge();
  testing::Tied other;
  std::stringstream stream;
  torch::save(other, stream);
  if (from_file) {
    torch::load(tied, stream);
  } else {
    torch::NoGradGuard no_grad;
    tied->head->weight.copy_(other->head->weight);
  }
  CHECK_THAT(testing::error_of([&] { adapters.unmerge(); }), testing::contains("was replaced or written after it"));
}

TEST_CASE("Modules that keep running statistics are named when a scope changes those of the base") {
  const bool training = GENERATE(true, false), saved = GENERATE(true, false);
  nn::Sequential model(nn::Linear(4, 3), nn::BatchNorm1d(3), nn::Linear(3, 2), nn::InstanceNorm1d(2));
  model->to(testing::device());
  lora::LoRAConfig config(2);
  config.target_modules({"0", "2"});
  if (saved) config.modules_to_save({"1"});
  auto adapters = lora::attach(*model, config);
  const auto mean = [&] { return model[1]->as<nn::BatchNorm1d>()->running_mean.clone(); };
  const auto before = mean();
  testing::Warnings warnings;
  model->train(training);
  for (int pass = 0; pass < 2; ++pass) {
    auto active = adapters.activate();
    model->forward(torch::randn({5, 4}, testing::device()));
  }
  const bool changes = training && !saved;
  CHECK(torch::equal(mean(), before) == !changes);
  REQUIRE(warnings.texts.size() == (changes ? 1 : 0));
  if (changes) CHECK_THAT(warnings.texts[0], testing::contains("1 keep") && testing::contains("modules_to_save"));
}
