#include "support/models.hpp"

#include <lora/attach.hpp>

#include <limits>

using lora::LoRAConfig;

namespace {

/// A model with an adapter on six layers, alpha / rank = 3, all tensors filled.
struct Fixture {
  explicit Fixture(torch::ScalarType type = torch::kFloat) {
    torch::manual_seed(0);
    model->to(type);
    adapters = std::make_unique<lora::Adapters>(
        lora::attach(*model, LoRAConfig(2).alpha(6).target_modules({"q_proj", "v_proj"})));
    testing::randomize(adapters->parameters());
    for (const auto& parameter : model->parameters()) before.push_back(parameter.clone());
    x = torch::randn({2, 3, 8}, testing::on_device(type));
  }

  torch::Tensor adapted() {
    auto active = adapters->activate();
    return model->forward(x).detach();
  }

  bool is_pristine() {
    auto now = model->parameters();
    for (size_t i = 0; i < now.size(); ++i) {
      if (!torch::equal(now[i], before[i])) return false;
    }
    return true;
  }

  testing::Stack model;
  std::unique_ptr<lora::Adapters> adapters;
  std::vector<torch::Tensor> before;
  torch::Tensor x;
};

}  // namespace

TEST_CASE("A merged model gives the adapted outputs without a scope, and with one too") {
  Fixture f;
  auto adapted = f.adapted();
  f.adapters->merge();
  CHECK(testing::distance(f.model->forward(f.x), adapted) < 1e-5);
  CHECK(testing::distance(f.adapted(), adapted) < 1e-5);  // what is merged is not added again
  f.adapters->unmerge();
  CHECK(f.is_pristine());
  CHECK(torch::equal(f.adapted(), adapted));
}

TEST_CASE("A thousand merges leave no trace in bfloat16") {
  Fixture f(torch::kBFloat16);
  for (int cycle = 0; cycle < 1000; ++cycle) {
    lora::MergeGuard merged(*f.adapters);
    if (cycle == 0) CHECK_FALSE(f.is_pristine());
  }
  CHECK(f.is_pristine());
}

TEST_CASE("An update that is not finite is refused before any weight changes") {
  Fixture f;
  const auto [value, for_good] = GENERATE(table<double, bool>({
      {std::numeric_limits<double>::quiet_NaN(), false},
      {std::numeric_limits<double>::infinity(), false},
      {std::numeric_limits<double>::quiet_NaN(), true},
  }));
  f.adapters->named_parameters()["layers.2.v_proj.lora_B"].detach()[0][0] = value;  // the last layer
  auto error =
      testing::error_of([&, for_good = for_good] { for_good ? f.adapters->merge_and_unload() : f.adapters->merge(); });
  CHECK_THAT(error, testing::contains("layers.2.v_proj") && testing::contains("adapter \"default\" is not finite") &&
                        testing::contains("nothing was merged"));
  CHECK_FALSE(f.adapters->is_merged());
  CHECK(f.is_pristine());
  CHECK(f.adapters->parameters().size() == 12);
}

TEST_CASE("A merged weight that does not fit into half precision is refused") {
  Fixture f(torch::kHalf);
  f.adapters->named_parameters()["layers.0.q_proj.lora_B"].detach().fill_(1e6);
  CHECK_THAT(testing::error_of([&] { f.adapters->merge(); }),
             testing::contains("layers.0.q_proj") && testing::contains("does not fit into its type"));
  CHECK(f.is_pristine());
}

TEST_CASE("Merging for good leaves a plain model: its tensors, its flags, its file") {
  Fixture f;
  const bool merged_before = GENERATE(false, true);
  testing::TemporaryFolder folder;
  auto adapted = f.adapted();
  if (merged_before) f.adapters->merge();
  f.adapters->merge_and_unload();
  CHECK(f.adapters->names().empty());
  CHECK(testing::distance(f.model->forward(f.x), adapted) < 1e-5);
  for (const auto& parameter : f.model->parameters()) CHECK(parameter.requires_grad());
  torch::save(f.model, (folder / "merged.pt").string());
  testing::Stack plain;
  torch::load(plain, (folder / "merged.pt").string());
  CHECK(torch::equal(plain->forward(f.x), f.model->forward(f.x)));
}

TEST_CASE("Who held the weights before they were adapted goes on with them when they are merged for good") {
  torch::manual_seed(0);
  testing::Stack model(1);
  const torch::Tensor held = model->lm_head->weight;
  const auto before = held.clone();
  torch::optim::SGD optimizer(model->parameters(), 0.1);
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).alpha(6).target_modules({"q_proj", "lm_head"}));
  testing::randomize(adapters.parameters());
  const auto expected = before + adapters.delta("default", "lm_head");
  adapters.merge_and_unload();
  CHECK(held.is_same(model->lm_head->weight));
  CHECK(testing::distance(held, expected) < 1e-6);
  const auto x = torch::randn({2, 8}, testing::device());
  const auto merged = held.clone();
  model->forward(x).square().mean().backward();
  const auto gradient = held.grad().clone();
  CHECK(gradient.abs().max().item<double>() > 1e-3);
  optimizer.step();
  CHECK(testing::distance(model->lm_head->weight, merged - 0.1 * gradient) < 1e-6);
}

TEST_CASE("What is merged cannot be merged again, and of two adapters the last is unmerged first") {
  Fixture f;
  f.adapters->merge();
  CHECK_THROWS_WITH(f.adapters->merge(), testing::contains("\"default\" is merged already"));
  CHECK_THROWS_WITH(lora::MergeGuard(*f.adapters), testing::contains("merged already"));
  lora::Adapters second(*f.model);
  second.add("second", LoRAConfig(2).target_modules({"q_proj"}));
  testing::randomize(second.parameters());
  second.merge();
  CHECK_THROWS_WITH(f.adapters->unmerge(),
                    testing::contains("layers.0.q_proj was replaced or written after it was merged"));
  second.unmerge();
  f.adapters->unmerge();
  CHECK(f.is_pristine());
}

TEST_CASE("A model moved while it is merged unmerges to its old values in the new type") {
  Fixture f;
  f.adapters->merge();
  f.model->to(torch::kDouble);
  f.adapters->unmerge();
  for (auto& value : f.before) value = value.to(torch::kDouble);
  CHECK(f.is_pristine());
}

TEST_CASE("An adapter that is merged leaves the others active and right, whatever their methods") {
  const std::vector<lora::MethodKind> methods{lora::LowRank(), lora::DoRA(), lora::IA3(), lora::VeRA()};
  const auto& first = GENERATE_REF(from_range(methods));
  const auto& second = GENERATE_REF(from_range(methods));
  const bool in_full = GENERATE(false, true);
  INFO(first.info().name << " merged, " << second.info().name << " active, in full " << in_full);
  testing::Stack model(1);
  model->to(torch::kDouble);
  lora::Adapters adapters(*model);
  for (const auto& [name, method] : {std::pair("a", first), std::pair("b", second), std::pair("c", second)}) {
    auto config = LoRAConfig(2).alpha(6).method(method).target_modules({"q_proj", "o_proj"});
    adapters.add(name, in_full ? config.modules_to_save({"lm_head"}) : config);
    testing::randomize(adapters.parameters(name));
  }
  adapters.set_scale("a", 1.5);
  adapters.set_scale("b", "layers.0.q_proj", -0.5);
  const auto x = torch::randn({3, 2, 8}, testing::on_device(torch::kDouble));
  const auto run = [&](const lora::WeightedAdapters& active_ones) {
    auto active = adapters.activate(active_ones);
    return model->forward(x);
  };
  const auto both = run({{"a"}, {"b", 0.5}}), three = run({{"a"}, {"b"}, {"c", 2.0}});
  adapters.merge("a");
  CHECK(testing::distance(run({{"a"}, {"b", 0.5}}), both) < 1e-12);
  CHECK(testing::distance(run({{"b", 0.5}, {"a"}}), both) < 1e-12);
  CHECK(testing::distance(run({{"a"}, {"b"}, {"c", 2.0}}), three) < 1e-12);
  adapters.unmerge();
  CHECK(testing::distance(run({{"a"}, {"b", 0.5}}), both) < 1e-12);
  adapters.merge({"a", "b"});
  CHECK(testing::distance(run({{"a"}, {"b"}, {"c", 2.0}}), three) < 1e-12);
  CHECK(adapters.merged() == std::vector<std::string>{"a", "b"});
  adapters.unmerge();
  CHECK(testing::distance(run({{"a"}, {"b", 0.5}}), both) < 1e-12);
}

TEST_CASE("What is merged has to be among what is active, and stays as it is") {
  Fixture f;
  f.adapters->add("other", LoRAConfig(2).target_modules({"q_proj"}));
  f.adapters->merge("default");
  const auto y = f.model->forward(f.x);
  using Weighted = lora::WeightedAdapters;
  const std::pair<std::function<void()>, const char*> wrong[] = {
      {[&] { (void)f.adapters->activate("other"); }, "\"default\" is merged, and the two would add up"},
      {[&] { (void)f.adapters->activate(Weighted{{"other"}}); }, "unmerge it first, or name it, too"},
      {[&] {
         (void)f.adapters->activate(Weighted{{"default", 0.5}, {"other"}});
       },
       "with the factor 1, not 0.5"},
      {[&] { f.adapters->merge("other"); }, "\"default\" is merged already"},
      {[&] {
         f.adapters->merge({"other", "other"});
       },
       "\"default\" is merged already"},
      {[&] { f.adapters->remove("default"); }, "is merged into the weights"},
      {[&] { f.adapters->set_scale("default", 2); }, "is merged into the weights"},
      {[&] { f.adapters->set_scale("default", "lm_head", 2); }, "is merged into the weights"},
  };
  for (const auto& [call, text] : wrong) CHECK_THROWS_WITH(call(), testing::contains(text));
  CHECK(torch::equal(f.model->forward(f.x), y));
  f.adapters->unmerge();
  CHECK_THROWS_WITH(f.adapters->merge({"other", "other"}), testing::contains("named twice"));
  CHECK_THROWS_WITH(f.adapters->merge(std::vector<std::string>()), testing::contains("no adapter is named"));
}

TEST_CASE("A scale for one layer acts on that layer, and which adapters are trained is told apart from which act") {
  Fixture f;
  const auto delta = f.adapters->delta("default", "layers.1.q_proj"),
             other = f.adapters->delta("default", "layers.0.q_proj");
  const auto scaling = f.adapters->scaling("layers.1.q_proj");
  f.adapters->set_scale("default", "layers.1.q_proj", -2);
  f.adapters->set_scale("default", 3);
  CHECK(testing::distance(f.adapters->delta("default", "layers.1.q_proj"), -6 * delta) < 1e-6);
  CHECK(testing::distance(f.adapters->delta("default", "layers.0.q_proj"), 3 * other) < 1e-6);
  CHECK(f.adapters->scaling("layers.1.q_proj") == testing::Approx(-6 * scaling));
  const auto y = f.adapted();
  f.adapters->merge();
  CHECK(testing::distance(f.model->forward(f.x), y) < 1e-5);
  f.adapters->unmerge();
  CHECK_THROWS_WITH(f.adapters->set_scale("default", "layers.1.qproj", 2), testing::contains("did you mean"));
  const auto is_trained = [&] {
    auto active = f.adapters->activate();
    return f.model->forward(f.x).requires_grad();
  };
  f.adapters->set_requires_grad("default", false);
  CHECK_FALSE(is_trained());
  f.adapters->set_requires_grad("default", true);
  CHECK(is_trained());
}

TEST_CASE("The scale of a layer is that of its bias, too, and of all of it where it is trained in full") {
  const std::vector<LoRAConfig> configs{
      LoRAConfig(2).target_modules({"q_proj"}).lora_bias(true),
      LoRAConfig(2).target_modules({"q_proj"}).bias(lora::Bias::kAdaptedOnly),
      LoRAConfig(2).target_modules({"v_proj"}).modules_to_save({"layers.0.q_proj"}),
      LoRAConfig(2).method(lora::IA3()).target_modules({"q_proj"}),
  };
  const auto& config = GENERATE_REF(from_range(configs));
  testing::Stack model(1);
  auto adapters = lora::attach(*model, config);
  testing::randomize(adapters.parameters());
  const auto x = torch::randn({3, 8}, testing::on_device(torch::kFloat));
  auto& layer = *(*model->layers)[0]->as<testing::Block>()->named_children()["q_proj"]->as<torch::nn::LinearImpl>();
  const auto base = layer.forward(x);
  const auto run = [&] {
    auto active = adapters.activate();
    return layer.forward(x);
  };
  CHECK(testing::distance(run(), base) > 1e-3);
  adapters.set_scale("default", "layers.0.q_proj", 0);
  CHECK(testing::distance(run(), base) < 1e-6);
}
