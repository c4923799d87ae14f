// Scopes and what else a thread has: the profiler, other threads, functions without autograd, other models.
#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/quantize.hpp>
#include <lora/torchscript.hpp>
#include <lora/weight/four_bit.hpp>

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/profiler_legacy.h>
#include <torch/csrc/jit/api/module.h>

#include <dlfcn.h>

#include <atomic>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <thread>

namespace {

using torch::Tensor;

/// A stack with an adapter whose update is not zero, and what it computes with and without.
struct Fixture {
  Fixture() {
    testing::randomize(adapters.parameters());
    base = model->forward(x);
    auto active = adapters.activate();
    adapted = model->forward(x);
  }

  testing::Stack model{1};
  Tensor x = torch::randn({16, 8}, testing::device());
  lora::Adapters adapters = lora::attach(*model, lora::LoRAConfig(2).alpha(6).target_modules({"q_proj", "lm_head"}));
  Tensor base, adapted;
};

}  // namespace

TEST_CASE("Scopes that are switched leave nothing behind, in whatever order they end") {
  Fixture f;
  std::weak_ptr<torch::nn::Module> model = f.model.ptr();
  std::optional<lora::Activation> active(f.adapters.activate());
  std::weak_ptr<c10::ThreadLocalDebugInfo> link = c10::ThreadLocalDebugInfo::current();
  for (int i = 0; i < 100; ++i) {
    auto next = f.adapters.activate();  // before the former one ends
    CHECK(link.expired());
    link = c10::ThreadLocalDebugInfo::current();
    active.emplace(std::move(next));
    CHECK(link.expired());
    link = c10::ThreadLocalDebugInfo::current();
  }
  CHECK(torch::equal(f.model->forward(f.x), f.adapted));
  active.reset();
  CHECK(c10::ThreadLocalDebugInfo::current() == nullptr);
  CHECK(torch::equal(f.model->forward(f.x), f.base));
  f.model = nullptr;
  f.adapters = lora::attach(*testing::Stack(1), lora::LoRAConfig(1).target_modules({"q_proj"}));
  CHECK(model.expired());
}

TEST_CASE("The profiler may be started and stopped anywhere, in and out of scopes") {
  namespace profiler = torch::autograd::profiler;
  using torch::profiler::impl::ProfilerConfig;
  Fixture f;
  const auto start = [] { profiler::enableProfilerLegacy(ProfilerConfig(torch::profiler::impl::ProfilerState::CPU)); };
  const auto stop = [] { return !profiler::disableProfilerLegacy().empty(); };
  const auto is_adapted = [&] { return torch::equal(f.model->forward(f.x), f.adapted); };
  SECTION("started in one scope and stopped in another") {
    std::optional<lora::Activation> active(f.adapters.activate());
    start();
    CHECK(is_adapted());
    active.reset();
    CHECK(torch::equal(f.model->forward(f.x), f.base));
    active.emplace(f.adapters.activate());
    CHECK(is_adapted());
    CHECK(stop());
    CHECK(is_adapted());
  }
  SECTION("started before a scope and stopped in it") {
    start();
    auto active = f.adapters.activate();
    CHECK(is_adapted());
    CHECK(stop());
    CHECK(is_adapted());
  }
  SECTION("started in a scope and stopped after it") {
    {
      auto active = f.adapters.activate();
      start();
      CHECK(is_adapted());
    }
    CHECK(stop());
  }
  SECTION("beside another entry of the chain") {
    c10::DebugInfoGuard other(c10::DebugInfoKind::TEST_INFO, std::make_shared<c10::DebugInfoBase>());
    start();
    auto active = f.adapters.activate();
    CHECK(is_adapted());
    CHECK(stop());
    CHECK(c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::TEST_INFO) != nullptr);
  }
  CHECK(torch::equal(f.model->forward(f.x), f.base));
  CHECK(c10::ThreadLocalDebugInfo::current() == nullptr);
}

TEST_CASE("A scope that is left on another thread says so, there and at home") {
  Fixture f;
  std::optional<lora::Activation> active(f.adapters.activate());
  std::vector<std::string> texts;
  std::thread([&] {
    const testing::Warnings warnings;  // of this thread
    active.reset();
    texts = warnings.texts;
  }).join();
  REQUIRE(texts.size() == 1);
  CHECK_THAT(texts[0], testing::contains("left on another thread than the one it was opened on"));
  CHECK_THAT(testing::error_of([&] { f.model->forward(f.x); }), testing::contains("left on another thread"));
  CHECK(torch::equal(f.model->forward(f.x), f.base));  // it has ended with the error
  CHECK(c10::ThreadLocalDebugInfo::current() == nullptr);
}

namespace {

/// Calls `body` on two threads of LibTorch's OpenMP, as a region of a program does that is compiled for it, whatever
/// the tests are compiled for. False where LibTorch has none.
bool run_on_two_threads(std::function<void()> body) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
  const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (parallel == nullptr) return false;
  parallel([](void* body) { (*static_cast<std::function<void()>*>(body))(); }, &body, 2, 0);
  return true;
}

}  // namespace

TEST_CASE("Threads of a parallel region are carried into the scope, or the region is told") {
  Fixture f;
  const bool carried = GENERATE(true, false);
  testing::Warnings warnings;
  std::atomic<int> threads{0}, adapted{0};
  {
    auto active = f.adapters.activate();
    const auto compute = [&] {
      ++threads;
      adapted += testing::distance(f.model->forward(f.x), f.adapted) < 1e-6 ? 1 : 0;
    };
    const bool is_known = carried ? run_on_two_threads(lora::carry(compute)) : run_on_two_threads(compute);
    if (!is_known) {
      WARN("LibTorch has no OpenMP here");
      return;
    }
  }
  CHECK(threads == 2);
  CHECK(adapted == (carried ? 2 : 1));
  REQUIRE(warnings.texts.size() == (carried ? 0 : 1));
  if (!carried)
    CHECK_THAT(warnings.texts[0], testing::contains("a parallel region") && testing::contains("lora::carry"));
}

namespace {

/// y = x W^T with a backward pass by hand, as users write it.
struct OwnLinear : torch::autograd::Function<OwnLinear> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const Tensor& weight) {
    context->save_for_backward({x, weight});
    return x.mm(weight.t());
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    return {gradients[0].mm(saved[1]), gradients[0].t().mm(saved[0])};
  }
};

}  // namespace

TEST_CASE("A function without autograd is told that its adapters get no gradient, and how they do") {
  Fixture f;
  auto& weight = f.model->lm_head->weight;
  const bool clones = GENERATE(true, false);
  const auto run = [&] {
    const auto hidden = f.model->layers[0]->as<testing::Block>()->forward(f.x);
    return OwnLinear::apply(hidden, clones ? weight.clone() : weight).sin().sum();
  };
  f.adapters = lora::attach(*f.model, lora::LoRAConfig(2).alpha(6).target_modules({"q_proj", "lm_head"}));
  testing::Warnings warnings;
  {
    auto active = f.adapters.activate();
    for (int step = 0; step < 2; ++step) run().backward();
  }
  const auto named = f.adapters.named_parameters();
  CHECK(named["lm_head.lora_B"].grad().defined() == clones);
  REQUIRE(warnings.texts.size() == (clones ? 0 : 1));
  if (!clones)
    CHECK_THAT(warnings.texts[0],
               testing::contains("lm_head get no gradient: ") && testing::contains("weight.clone()"));
}

TEST_CASE("A scope in which another model runs says so, also when the adapted one ran before") {
  Fixture f;  // in which it did
  testing::Stack clone(1);
  {
    torch::NoGradGuard no_grad;
    const auto from = f.model->parameters();
    auto into = clone->parameters();
    for (size_t i = 0; i < from.size(); ++i) into[i].copy_(from[i]);
  }
  testing::Warnings warnings;
  const bool both = GENERATE(true, false);
  {
    auto active = f.adapters.activate();
    CHECK(torch::equal(clone->forward(f.x), f.base));  // a clone has no adapters
    if (both) f.model->forward(f.x);                   // as a teacher beside the one that is trained
  }
  { auto nothing = f.adapters.activate(); }
  REQUIRE(warnings.texts.size() == (both ? 0 : 1));
  if (!both) CHECK_THAT(warnings.texts[0], testing::contains("none with an adapter"));
}

TEST_CASE("A clone that runs beside the adapted model in one scope is said to have no adapters") {
  const auto* name = GENERATE("0", "1");  // a table, and a matrix
  torch::nn::Sequential model(torch::nn::Embedding(10, 8), torch::nn::Linear(8, 6));
  model->to(testing::device());
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).alpha(6).target_modules({name}));
  testing::randomize(adapters.parameters());
  const auto ids = torch::arange(10, testing::on_device(torch::kLong));
  const auto base = model->forward(ids);
  const auto copy = model->clone();
  auto& clone = dynamic_cast<torch::nn::SequentialImpl&>(*copy);
  testing::Warnings warnings;
  SECTION("in one warning, however often it runs") {
    for (int i = 0; i < 2; ++i) {
      const auto active = adapters.activate();
      CHECK(testing::distance(model->forward(ids), base) > 1e-3);
      CHECK(torch::equal(clone.forward(ids), base));
    }
    REQUIRE(warnings.texts.size() == 1);
    CHECK_THAT(warnings.texts[0], testing::contains(std::string("a copy of the weight of ") + name + ",") &&
                                      testing::contains("attach to the clone"));
  }
  SECTION("also where its weight is held in few bits, since before it was cloned or since then") {
    const bool held_first = GENERATE(true, false);
    const auto hold = [&] { lora::quantize(*model, lora::NF4(), lora::QuantizeOptions().target_modules({name})); };
    if (held_first) hold();
    const auto other = model->clone();
    if (!held_first) hold();
    const auto active = adapters.activate();
    dynamic_cast<torch::nn::SequentialImpl&>(*other).forward(ids);
    REQUIRE(warnings.texts.size() == 1);
    CHECK_THAT(warnings.texts[0], testing::contains("attach to the clone"));
  }
  SECTION("not outside of the scope, nor in a scope of adapters of its own") {
    CHECK(torch::equal(clone.forward(ids), base));
    auto own = lora::attach(clone, lora::LoRAConfig(2).target_modules({name}));
    const auto active = own.activate();
    clone.forward(ids);
    CHECK(warnings.texts.empty());
  }
  SECTION("not of a model that was cast, whose weights are copies of what they were") {
    model->to(torch::kDouble);
    const auto active = adapters.activate();
    CHECK(testing::distance(model->forward(ids), base) > 1e-3);
    CHECK(warnings.texts.empty());
  }
}

TEST_CASE("carry wraps whatever can be called") {
  Fixture f;
  auto active = f.adapters.activate();
  const auto on_thread = [](auto&& function) { std::thread([&] { function(); }).join(); };
  SECTION("a lambda that changes what it holds") {
    int calls = 0;
    auto counted = lora::carry([&calls, own = 0]() mutable { calls = ++own; });
    on_thread(counted);
    on_thread(counted);
    CHECK(calls == 2);
  }
  SECTION("what can only be moved") {
    std::packaged_task<Tensor()> task([&] { return f.model->forward(f.x); });
    auto result = task.get_future();
    on_thread(lora::carry(std::move(task)));
    CHECK(torch::equal(result.get(), f.adapted));
  }
  SECTION("what returns a reference") {
    Tensor output;
    const auto carried = lora::carry([&]() -> Tensor& { return output = f.model->forward(f.x); });
    on_thread([&] { CHECK(&carried() == &output); });
    CHECK(torch::equal(output, f.adapted));
  }
  SECTION("a member") {
    auto forward = lora::carry(&testing::StackImpl::forward);
    Tensor output;
    on_thread([&] { output = forward(*f.model, f.x); });
    CHECK(torch::equal(output, f.adapted));
  }
}

TEST_CASE("A limit on the norms of a lookup that failed is not that of the next one") {
  namespace nn = torch::nn;
  nn::Sequential limited(nn::Embedding(nn::EmbeddingOptions(5, 4).max_norm(0.1))), free(nn::Embedding(5, 4));
  const auto config = lora::LoRAConfig(2).alpha(6).target_modules({"0"});
  limited->to(testing::device());
  free->to(testing::device());
  auto first = lora::attach(*limited, config), second = lora::attach(*free, config);
  testing::randomize(second.parameters());
  const auto ids = torch::arange(5, testing::on_device(torch::kLong));
  auto active = second.activate();
  const auto expected = free->forward(ids);
  const auto too_far = torch::full({1}, 77, testing::on_device(torch::kLong));
  auto other = first.activate();
  if (testing::device().is_cpu()) CHECK_THROWS(limited->forward(too_far));
  CHECK(torch::equal(free->forward(ids), expected));
  torch::NoGradGuard no_grad;  // the limit alone, as where something throws before the lookup
  torch::embedding_renorm_(limited[0]->as<nn::Embedding>()->weight, ids, 0.1, 2);
  CHECK(torch::equal(free->forward(ids), expected));
}

TEST_CASE("TorchScript modules are frozen inside of a scope as outside") {
  torch::jit::Module module("Net");
  module.register_parameter("weight", torch::randn({3, 4}, testing::device()), false);
  module.register_attribute("training", c10::BoolType::get(), false);
  module.define("def forward(self, x):\n  return torch.tanh(torch.linear(x, self.weight))\n");
  const auto other = module.clone();
  auto adapters = lora::attach(module, lora::LoRAConfig(2).target_parameters({"weight"}));
  auto x = torch::randn({2, 4}, testing::device());
  const auto expected = other.deepcopy().forward({x}).toTensor();
  auto active = adapters.activate();
  CHECK(torch::jit::getGraphExecutorOptimize());
  auto frozen = torch::jit::freeze(other);
  for (int i = 0; i < 4; ++i) CHECK(testing::distance(frozen.forward({x}).toTensor(), expected) < 1e-6);
}
