// The list of adapters while others read it: what may be done beside passes on other threads, and what a pass sees.
#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/peft/checkpoint.hpp>

#include <atomic>
#include <thread>

namespace {

const auto kConfig = lora::LoRAConfig(2).alpha(6).target_modules({"q_proj", "lm_head"});

}  // namespace

TEST_CASE("A pass uses the adapters as they were when its scope opened") {
  torch::manual_seed(0);
  testing::Stack model(1);
  auto x = torch::randn({2, 8}, testing::device());
  lora::Adapters adapters(*model);
  adapters.add("a", kConfig);
  testing::randomize(adapters.parameters());
  const auto base = model->forward(x);
  auto active = adapters.activate("a");
  const auto adapted = model->forward(x);
  adapters.set_scale("a", 3);
  CHECK(torch::equal(model->forward(x), adapted));
  adapters.remove("a");
  CHECK(torch::equal(model->forward(x), adapted));
  CHECK(testing::distance(adapted, base) > 0.01);
  CHECK_THROWS_WITH(adapters.activate("a"), testing::contains("there is no adapter \"a\""));
}

TEST_CASE("The scale multiplies the update, in passes, in deltas and when merged") {
  torch::manual_seed(0);
  testing::Stack model(1);
  auto adapters = lora::attach(*model, kConfig);
  testing::randomize(adapters.parameters());
  auto x = torch::randn({2, 8}, testing::device());
  const auto delta = adapters.delta("default", "lm_head"), base = model->lm_head(x);
  for (const double scale : {0.0, -0.5, 2.0}) {
    adapters.set_scale("default", scale);
    const auto expected = base + scale * x.mm(delta.t());
    CHECK(adapters.scaling("lm_head") == scale * 3);
    CHECK(testing::distance(adapters.delta("default", "lm_head"), scale * delta) < 1e-6);
    {
      auto active = adapters.activate();
      CHECK(testing::distance(model->lm_head(x), expected) < 1e-5);
    }
    lora::MergeGuard merged(adapters);
    CHECK(testing::distance(model->lm_head(x), expected) < 1e-5);
    CHECK_THROWS_WITH(adapters.set_scale("default", 1), testing::contains("merged into the weights"));
    CHECK_THROWS_WITH(adapters.remove("default"), testing::contains("merged into the weights"));
  }
  CHECK_THROWS_WITH(adapters.set_scale("default", std::nan("")), testing::contains("finite"));
  CHECK_THROWS_WITH(adapters.set_scale("other", 1), testing::contains("there is no adapter \"other\""));
}

TEST_CASE("Opening a scope again does not make its set again, unless the list or the weights changed") {
  testing::Stack model(1);
  auto adapters = lora::attach(*model, kConfig);
  testing::randomize(adapters.parameters());
  auto x = torch::randn({2, 8}, testing::device());
  const auto run = [&](torch::ScalarType type) {
    auto active = adapters.activate();
    return model->forward(x.to(type));
  };
  const auto first = run(torch::kFloat);
  CHECK(torch::equal(run(torch::kFloat), first));
  model->to(torch::kDouble);
  CHECK(testing::distance(run(torch::kDouble), first) < 1e-5);
  model->to(torch::kFloat);
  model->lm_head->weight = model->lm_head->weight.detach().clone();  // another tensor in its place
  CHECK(testing::distance(run(torch::kFloat), first) < 1e-5);
  adapters.set_scale("default", 0);
  CHECK(testing::distance(run(torch::kFloat), model->forward(x)) < 1e-6);
}

TEST_CASE("Adapters are added, loaded, scaled and removed beside passes of other threads") {
  torch::manual_seed(0);
  testing::TemporaryFolder folder;
  testing::Stack model(1);
  auto x = torch::randn({2, 8}, testing::device());
  lora::Adapters adapters(*model);
  adapters.add("kept", kConfig);
  testing::randomize(adapters.parameters());
  adapters.save(folder.path(), "kept");
  const auto base = model->forward(x);
  const auto run = [&](const std::string& name) {
    torch::NoGradGuard no_grad;
    auto active = adapters.activate(name);
    return model->forward(x);
  };
  const auto kept = run("kept");
  std::atomic<bool> stop{false};
  std::atomic<int64_t> passes{0}, wrong{0};
  const auto read = [&](bool in_scope) {
    while (!stop) {
      torch::NoGradGuard no_grad;
      const auto output = in_scope ? run("kept") : model->forward(x);
      wrong += torch::equal(output, in_scope ? kept : base) ? 0 : 1;
      ++passes;
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) threads.emplace_back(read, i != 0);
  for (int round = 0; round < 60 || passes < 200; ++round) {
    adapters.load("loaded", folder.path());
    adapters.add("added", kConfig);
    wrong += torch::equal(run("loaded"), kept) ? 0 : 1;
    adapters.set_scale("loaded", 0);
    wrong += testing::distance(run("loaded"), base) < 1e-6 ? 0 : 1;
    adapters.remove("loaded");
    adapters.remove("added");
  }
  stop = true;
  for (auto& thread : threads) thread.join();
  CHECK(wrong == 0);
  CHECK(adapters.names() == std::vector<std::string>{"kept"});
}
