// Scopes: how they nest, and what else is on the thread that has them.
#include "support/models.hpp"

#include <lora/attach.hpp>

#include <ATen/autocast_mode.h>

#include <thread>

namespace {

const auto kQueries = lora::LoRAConfig(2).alpha(6).target_modules({"q_proj", "lm_head"});

}  // namespace

TEST_CASE("Scopes nest: different adapters add up, and of the same ones the innermost decides") {
  torch::manual_seed(0);
  testing::Stack model(1);
  auto x = torch::randn({2, 8}, testing::device());
  auto run = [&] { return model->forward(x); };
  auto base = run();
  lora::Adapters first(*model), second(*model);
  first.add("a", kQueries);
  first.add("b", kQueries);
  second.add("c", lora::LoRAConfig(3).alpha(6).target_modules({"lm_head"}));
  for (auto& adapters : {&first, &second}) testing::randomize(adapters->parameters());
  {
    auto outer = first.activate("a");
    auto with_a = run();
    {
      auto inner = first.activate("b");
      auto with_b = run();
      CHECK(testing::distance(with_b, with_a) > 0.01);
      auto alone = std::thread([&] { CHECK(torch::equal(run(), base)); });  // other threads run the base model
      alone.join();
    }
    CHECK(torch::equal(run(), with_a));
    auto other = second.activate();
    auto adapted_hidden = model->layers[0]->as<testing::Block>()->forward(x);
    CHECK(testing::distance(run(), with_a + adapted_hidden.matmul(second.delta("c", "lm_head").t())) < 1e-5);
  }
  CHECK(torch::equal(run(), base));
}

TEST_CASE("Autocast and inference mode act inside a scope as outside it") {
  torch::manual_seed(0);
  testing::Stack model(1);
  auto x = torch::randn({2, 8}, testing::device());
  auto adapters = lora::attach(*model, kQueries);
  testing::randomize(adapters.parameters());
  auto active = adapters.activate();
  auto expected = model->forward(x);
  {
    c10::InferenceMode inference;
    CHECK(testing::distance(model->forward(x), expected) < 1e-5);
  }
  at::autocast::set_autocast_enabled(testing::device().type(), true);
  at::autocast::set_autocast_dtype(testing::device().type(), torch::kBFloat16);
  auto cast = model->forward(x);
  cast.sum().backward();
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(testing::device().type(), false);
  CHECK(cast.scalar_type() == torch::kBFloat16);
  CHECK(testing::distance(cast, expected) < 0.1);
  for (const auto& parameter : adapters.parameters()) CHECK(parameter.grad().defined());
}
