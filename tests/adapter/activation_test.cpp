// Scopes: how they nest, and what else is on the thread that has them.
#include "support/models.hpp"

#include <lora/attach.hpp>

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <atomic>
#include <optional>
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

namespace {

/// Runs a function of its input again in backward, as checkpointing does.
struct Recomputed : torch::autograd::Function<Recomputed> {
  using Pass = std::function<torch::Tensor(const torch::Tensor&)>;
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& x, const Pass& pass) {
    context->save_for_backward({x});
    context->saved_data["pass"] = reinterpret_cast<int64_t>(&pass);
    torch::NoGradGuard no_grad;
    return pass(x);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    torch::AutoGradMode with_grad(true);
    auto x = context->get_saved_variables()[0].detach().requires_grad_();
    auto y = (*reinterpret_cast<const Pass*>(context->saved_data["pass"].toInt()))(x);
    torch::autograd::backward({y}, {gradients[0]});
    return {x.grad(), torch::Tensor()};
  }
};

std::vector<torch::Tensor> gradients_of(const std::vector<torch::Tensor>& parameters) {
  std::vector<torch::Tensor> gradients;
  for (const auto& parameter : parameters) {
    gradients.push_back(parameter.grad().defined() ? parameter.grad().clone() : torch::Tensor());
    parameter.mutable_grad().reset();
  }
  return gradients;
}

}  // namespace

TEST_CASE("Leaving a scope restores the thread exactly, in whatever order scopes are left") {
  testing::Stack model(1);
  auto adapters = lora::attach(*model, kQueries), others = lora::attach(*model, kQueries);
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  const auto info = c10::ThreadLocalDebugInfo::current();
  const auto is_restored = [&] {
    const auto now = c10::impl::tls_local_dispatch_key_set();
    return now.included_ == keys.included_ && now.excluded_ == keys.excluded_;
  };
  auto x = torch::randn({2, 8}, testing::device());
  {
    auto active = adapters.activate();
    CHECK_FALSE(is_restored());
    model->forward(x);
  }
  CHECK(is_restored());
  CHECK(c10::ThreadLocalDebugInfo::current() == info);
  testing::randomize(others.parameters());
  auto base = model->forward(x);
  std::optional<lora::Activation> first, second;
  first.emplace(adapters.activate());
  second.emplace(others.activate());
  first.reset();
  CHECK(testing::distance(model->forward(x), base) > 1e-3);  // the second one is still there
  second.reset();
  CHECK(is_restored());
  CHECK(torch::equal(model->forward(x), base));
}

TEST_CASE("Leaving a scope that missed layers warns once, and names the operator that took the weight as it is") {
  testing::Warnings warnings;
  testing::Stack model(1);
  auto adapters = lora::attach(*model, kQueries);
  auto x = torch::randn({2, 8}, testing::device());
  for (int pass = 0; pass < 2; ++pass) {
    auto active = adapters.activate();
    model->layers[0]->as<testing::Block>()->forward(x);
    model->lm_head->weight.detach().mul_(1);  // writes to it
  }
  REQUIRE(warnings.texts.size() == 1);
  CHECK_THAT(warnings.texts[0], testing::contains("the adapters of lm_head") &&
                                    testing::contains("aten::mul_ used the weight of lm_head as it is"));
  CHECK(adapters.unreached() == std::vector<std::string>{"lm_head"});
}

TEST_CASE("A scope in which another thread computes says that the scope has to be carried there") {
  testing::Warnings warnings;
  testing::Stack model(1);
  auto adapters = lora::attach(*model, kQueries);
  auto x = torch::randn({2, 8}, testing::device());
  {
    auto active = adapters.activate();
    std::thread([&] { model->forward(x); }).join();
  }
  REQUIRE(warnings.texts.size() == 1);
  CHECK_THAT(warnings.texts[0], testing::contains("lora::carry"));
}

TEST_CASE("diagnose tells every use of every adapted weight") {
  testing::Stack model(1);
  auto adapters = lora::attach(*model, kQueries);
  auto x = torch::randn({2, 8}, testing::device());
  auto uses = adapters.diagnose([&] {
    model->forward(x);
    model->lm_head->weight.square().sum();
    torch::linear(x.to(torch::kBFloat16), model->lm_head->weight.t().t().to(torch::kBFloat16));
    model->lm_head->weight.to(torch::kFloat);  // the weight itself
  });
  const auto count = [&](const std::string& layer, const std::string& operation, bool adapted) {
    return std::count_if(uses.begin(), uses.end(), [&](const lora::WeightUse& use) {
      return use.layer == layer && use.operation == operation && use.adapted == adapted && use.count == 1;
    });
  };
  CHECK(uses.size() == 4);
  CHECK(count("layers.0.q_proj", "aten::addmm", true) == 1);
  CHECK(count("lm_head", "aten::matmul", true) == 1);
  CHECK(count("lm_head", "aten::square", true) == 1);
  CHECK(count("lm_head", "aten::_to_copy", true) == 1);
  uses = adapters.diagnose([&] {
    x.requires_grad_();
    model->forward(x).sum().backward();  // which multiplies with the weights, too
    torch::addmm(x, x, model->layers[0]->as<testing::Block>()->named_parameters()["q_proj.weight"].t(), 0);
  });
  CHECK(uses.size() == 2);
}

TEST_CASE("A model is not moved or cast inside of a scope, where its adapted weights would become the frozen ones") {
  testing::Stack model(1);
  auto adapters = lora::attach(*model, kQueries);
  testing::randomize(adapters.parameters());
  const auto before = model->lm_head->weight.clone();
  {
    auto active = adapters.activate();
    CHECK_THROWS_WITH(model->lm_head->to(torch::kDouble), testing::contains("the weight of lm_head gets other data") &&
                                                              testing::contains("leave the scope"));
    model->lm_head->to(torch::kFloat);  // nothing to do
    CHECK_THROWS_WITH(model->lm_head->to(torch::Device(torch::kMeta)), testing::contains("inside of a scope"));
    CHECK_THROWS_WITH(model->lm_head->to(torch::kMeta, torch::kHalf), testing::contains("inside of a scope"));
    CHECK_THROWS_WITH(model->lm_head->weight.set_data(torch::zeros({6, 8}, testing::device())),
                      testing::contains("inside of a scope"));
  }
  CHECK(torch::equal(model->lm_head->weight, before));
  model->to(torch::kDouble);
  CHECK(torch::equal(model->lm_head->weight, before.to(torch::kDouble)));
}

TEST_CASE("A scope is carried to another thread, also after it was left here") {
  torch::manual_seed(0);
  testing::Stack model(1);
  auto x = torch::randn({2, 8}, testing::device());
  auto base = model->forward(x);
  auto adapters = lora::attach(*model, kQueries);
  testing::randomize(adapters.parameters());
  torch::Tensor adapted;
  std::function<torch::Tensor(bool)> carried;
  {
    auto active = adapters.activate();
    adapted = model->forward(x);
    carried = lora::carry([&](bool) { return model->forward(x); });
  }
  torch::Tensor there, plain;
  std::thread([&] {
    there = carried(true);
    plain = model->forward(x);
  }).join();
  CHECK(torch::equal(there, adapted));
  CHECK(torch::equal(plain, base));
}

TEST_CASE("Eight threads, half of them in a scope, get the right result every time") {
  torch::manual_seed(0);
  testing::Stack model(2);
  auto x = torch::randn({2, 8}, testing::device());
  auto base = model->forward(x);
  auto adapters = lora::attach(*model, kQueries);
  testing::randomize(adapters.parameters());
  torch::Tensor adapted;
  {
    auto active = adapters.activate();
    adapted = model->forward(x);
  }
  std::atomic<int> right{0};
  const auto work = [&](bool in_scope) {
    torch::NoGradGuard no_grad;
    for (int pass = 0; pass < 1000; ++pass) {
      std::optional<lora::Activation> active;
      if (in_scope) active.emplace(adapters.activate());
      right += torch::equal(model->forward(x), in_scope ? adapted : base) ? 1 : 0;
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) threads.emplace_back(work, i % 2 == 0);
  for (auto& thread : threads) thread.join();
  CHECK(right == 8000);
}

TEST_CASE("Recomputation inside backward uses the adapters, whether the scope still lives or was carried") {
  torch::manual_seed(0);
  testing::Stack model(1);
  auto x = torch::randn({2, 8}, testing::device()).requires_grad_();
  auto adapters = lora::attach(*model, kQueries);
  testing::randomize(adapters.parameters());
  std::vector<torch::Tensor> expected;
  {
    auto active = adapters.activate();
    model->forward(x).sin().sum().backward();
    expected = gradients_of(adapters.parameters());
  }
  const bool alive = GENERATE(true, false);
  Recomputed::Pass pass = [&](const torch::Tensor& x) { return model->forward(x); };
  torch::Tensor loss;
  {
    auto active = adapters.activate();
    if (!alive)
      pass = lora::carry([&](const torch::Tensor& x) {
        torch::AutoGradMode with_grad(true);
        return model->forward(x);
      });
    loss = Recomputed::apply(x, pass).sin().sum();
    if (alive) loss.backward();
  }
  if (!alive) loss.backward();
  const auto gradients = gradients_of(adapters.parameters());
  for (size_t i = 0; i < expected.size(); ++i) CHECK(testing::distance(gradients[i], expected[i]) < 1e-6);
}

TEST_CASE("Backward and double backward are right inside a scope and after it") {
  torch::manual_seed(0);
  testing::Stack model(1);
  model->to(torch::kDouble);
  auto x = torch::randn({2, 8}, testing::on_device(torch::kDouble)).requires_grad_();
  auto adapters = lora::attach(*model, kQueries);
  testing::randomize(adapters.parameters());
  const bool inside = GENERATE(true, false);
  const auto penalty = [&] {
    torch::AutoGradMode with_grad(true);
    std::optional<lora::Activation> active(std::in_place, adapters.activate());
    auto y = model->forward(x).sin().sum();
    if (!inside) active.reset();
    return torch::autograd::grad({y}, {x}, {}, true, /*create_graph=*/true)[0].pow(2).sum();
  };
  CHECK(testing::gradient_error(penalty, adapters.parameters()) < 1e-6);
}

TEST_CASE("Two models have scopes of their own") {
  torch::manual_seed(0);
  testing::Stack one(1), two(1);
  auto x = torch::randn({2, 8}, testing::device());
  auto first = lora::attach(*one, kQueries), second = lora::attach(*two, kQueries);
  testing::randomize(first.parameters());
  testing::randomize(second.parameters());
  auto base = one->forward(x);
  auto active = first.activate();
  auto expected = one->forward(x), other = two->forward(x);
  auto both = second.activate();
  CHECK(torch::equal(one->forward(x), expected));
  CHECK(testing::distance(two->forward(x), other) > 1e-3);
  CHECK(testing::distance(expected, base) > 1e-3);
}
