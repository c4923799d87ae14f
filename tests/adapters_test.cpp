#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/peft/checkpoint.hpp>

using lora::LoRAConfig;

namespace {

const auto kQueries = LoRAConfig(2).alpha(6).target_modules({"q_proj"});

}  // namespace

TEST_CASE("An adapter trains nothing but its own tensors, and detaching gives the model back") {
  torch::manual_seed(0);
  testing::Stack model;
  model->lm_head->weight.requires_grad_(false);  // frozen by its owner
  auto x = torch::randn({4, 8}, testing::device());
  auto base = model->forward(x).detach();
  auto adapters = lora::attach(*model, kQueries);
  CHECK(lora::trainable_parameters(*model).empty());
  torch::optim::AdamW optimizer(adapters.parameters(), torch::optim::AdamWOptions(0.05));
  double first = 0, last = 0;
  for (int step = 0; step < 20; ++step) {
    auto active = adapters.activate();
    auto loss = (model->forward(x) - 1).pow(2).mean();
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    (step == 0 ? first : last) = loss.item<double>();
  }
  CHECK(last < 0.9 * first);
  for (const auto& parameter : model->parameters()) CHECK_FALSE(parameter.grad().defined());
  CHECK(torch::equal(model->forward(x), base));
  adapters.detach();
  CHECK(adapters.targets().empty());
  CHECK(torch::equal(model->forward(x), base));
  for (const auto& item : model->named_parameters())
    CHECK(item.value().requires_grad() == (item.key() != "lm_head.weight"));
}

TEST_CASE("Several adapters have their own names, tensors and layers") {
  testing::Stack model;
  lora::Adapters adapters(*model);
  adapters.add("french", kQueries);
  adapters.add("poet", LoRAConfig(3).target_modules({"q_proj", "lm_head"}));
  CHECK(adapters.names() == std::vector<std::string>{"french", "poet"});
  CHECK(adapters.targets().size() == 4);
  CHECK(adapters.parameters("french").size() == 6);
  CHECK(adapters.parameters().size() == 6 + 8);
  CHECK(adapters.named_parameters().contains("lm_head.lora_B.poet"));
  CHECK(adapters.named_parameters("poet").contains("lm_head.lora_B"));
  CHECK(adapters.scaling("french", "layers.0.q_proj") == 3);
  CHECK(adapters.config("poet").rank() == 3);
  testing::randomize(adapters.parameters());
  auto x = torch::randn({4, 8}, testing::device());
  auto hidden = [&] {
    for (const auto& layer : *model->layers) x = layer->as<testing::Block>()->forward(x);
    return x;
  };
  auto active = adapters.activate("french");  // does not touch lm_head
  auto h = hidden();
  CHECK(torch::equal(model->lm_head(h), h.matmul(model->lm_head->weight.clone().t())));
  CHECK(adapters.unreached() == std::vector<std::string>{"lm_head"});
}

TEST_CASE("A layer that no forward pass reaches is named") {
  testing::Stack model;
  auto adapters = lora::attach(*model, LoRAConfig(2).target_modules({"layers.0.q_proj", "lm_head"}));
  CHECK(adapters.unreached() == std::vector<std::string>{"layers.0.q_proj", "lm_head"});
  model->forward(torch::ones({1, 8}, testing::device()));  // outside a scope
  CHECK(adapters.unreached().size() == 2);
  auto active = adapters.activate();
  model->layers[0]->as<testing::Block>()->forward(torch::ones({1, 8}, testing::device()));
  CHECK(adapters.unreached() == std::vector<std::string>{"lm_head"});
}

TEST_CASE("Moved adapters keep everything, and outlive their model") {
  torch::manual_seed(0);
  testing::Stack model;
  auto x = torch::randn({4, 8}, testing::device());
  auto first = lora::attach(*model, kQueries);
  testing::randomize(first.parameters());
  auto delta = first.delta("default", "layers.0.q_proj");
  auto moved = std::move(first);
  {
    auto active = moved.activate();
    CHECK(moved.parameters().size() == 6);
    model->forward(x);
    CHECK(moved.unreached().empty());
  }
  model = nullptr;
  CHECK(torch::equal(moved.delta("default", "layers.0.q_proj"), delta));
  CHECK_THROWS_WITH(moved.add("late", kQueries), testing::contains("the model was destroyed"));
  testing::TemporaryFolder folder;
  moved.save(folder / "adapter");
  CHECK(std::filesystem::exists(folder / "adapter" / "adapter_model.safetensors"));
  CHECK_THROWS_WITH(moved.save_merged(folder / "merged"), testing::contains("the model was destroyed"));
  CHECK_FALSE(std::filesystem::exists(folder / "merged"));
  moved.merge();
  moved.unmerge();
  moved.detach();
}

TEST_CASE("Modules that are trained in full live as long as their adapters") {
  testing::Stack model(1);
  auto adapters = lora::attach(*model, LoRAConfig(2).target_modules({"q_proj"}).modules_to_save({"lm_head"}));
  const std::weak_ptr<torch::nn::Module> head = model->lm_head.ptr();
  model = nullptr;
  CHECK_FALSE(head.expired());
  adapters.merge();
  adapters.unmerge();
  CHECK_THROWS_WITH(adapters.save("nowhere"), testing::contains("the model was destroyed"));
  adapters.detach();
  CHECK(head.expired());
}

TEST_CASE("Errors say what there is, and change nothing") {
  testing::Stack model;
  lora::Adapters adapters(*model);
  adapters.add("french", kQueries);
  adapters.add("poet", kQueries);
  const auto [call, text] = GENERATE_REF(table<std::function<void()>, std::string>({
      {[&] { adapters.add("poet", kQueries); }, "there is an adapter \"poet\" already"},
      {[&] { adapters.add("", kQueries); }, "has to have a name that is not empty"},
      {[&] { adapters.add("late", LoRAConfig(2).target_modules({"nothing"})); }, "no module matches \"nothing\""},
      {[&] { (void)adapters.activate(); }, "name the adapter that is meant; there are: french, poet"},
      {[&] { (void)adapters.activate("pote"); }, "there is no adapter \"pote\"; there are: french, poet"},
      {[&] { adapters.merge(); }, "there are: french, poet"},
      {[&] { adapters.unmerge(); }, "nothing is merged"},
      {[&] { adapters.delta("poet", "layers.0.qproj"); }, "did you mean \"layers.0.q_proj\""},
  }));
  CHECK_THROWS_WITH(call(), testing::contains(text));
  CHECK(adapters.names() == std::vector<std::string>{"french", "poet"});
  CHECK(adapters.parameters().size() == 12);
}
