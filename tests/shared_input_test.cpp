// Products that have one input compute together what they have in common: the same numbers and gradients as each alone.
#include "support/testing.hpp"

#include <lora/attach.hpp>
#include <lora/method/dora.hpp>
#include <lora/quantize.hpp>
#include <lora/shared_input.hpp>
#include <lora/train/checkpointing.hpp>
#include <lora/weight/int8.hpp>

#include <deque>
#include <thread>
#include <unordered_set>

namespace {

using testing::distance;
using torch::Tensor;
using Tensors = std::vector<Tensor>;

/// Inputs of any size are shared while it lives.
class SharesAll {
 public:
  SharesAll() { lora::detail::SharedInput::least_numbers() = 1; }
  ~SharesAll() { lora::detail::SharedInput::least_numbers() = before_; }
  SharesAll(const SharesAll&) = delete;
  SharesAll& operator=(const SharesAll&) = delete;

 private:
  int64_t before_ = lora::detail::SharedInput::least_numbers();
};

/// How many nodes of that name a graph has.
size_t count_nodes(const Tensors& roots, const std::string& name) {
  std::unordered_set<const torch::autograd::Node*> seen;
  std::deque<const torch::autograd::Node*> open;
  const auto add = [&](const torch::autograd::Node* node) {
    if (node != nullptr && seen.insert(node).second) open.push_back(node);
  };
  for (const auto& root : roots) add(root.grad_fn().get());
  size_t count = 0;
  for (; !open.empty(); open.pop_front()) {
    count += open.front()->name() == name ? 1 : 0;
    for (const auto& edge : open.front()->next_edges()) add(edge.function.get());
  }
  return count;
}

size_t shared_in(const Tensors& outputs) { return count_nodes(outputs, "lora::SharedInput"); }

/// Layers for one input, of which the third one has no adapter.
struct Layers {
  explicit Layers(torch::ScalarType type = torch::kDouble, const lora::LoRAConfig& config = lora::LoRAConfig(2)) {
    torch::manual_seed(0);
    for (const auto out : {6, 4, 6, 3})
      all->push_back(torch::nn::Linear(torch::nn::LinearOptions(5, out).bias(out != 4)));
    all->to(testing::device(), type);
    auto own = config;
    adapters.emplace(lora::attach(*all, own.alpha(5).target_modules({"0", "1", "3"})));
    for (auto& tensor : adapters->parameters()) tensor.detach().normal_(0, 0.5);
    x = torch::randn({2, 3, 5}, testing::on_device(torch::kDouble)).to(type).requires_grad_();
  }

  torch::nn::LinearImpl& layer(size_t i) { return all->at<torch::nn::LinearImpl>(i); }

  Tensors outputs(const Tensor& input) {
    Tensors outputs;
    for (size_t i = 0; i < all->size(); ++i) outputs.push_back(layer(i).forward(input));
    return outputs;
  }
  Tensors outputs() { return outputs(x); }

  /// What every output, and every number of it, has its own part in.
  static Tensor loss_of(const Tensors& outputs) {
    Tensor loss;
    double factor = 1;
    for (const auto& output : outputs) {
      const auto some = output.to(torch::kDouble), part = (some * some).sum() * (factor += 0.5) + some.sin().sum();
      loss = loss.defined() ? loss + part : part;
    }
    return loss;
  }

  Tensors leaves() {
    auto all_leaves = adapters->parameters();
    all_leaves.push_back(x);
    return all_leaves;
  }

  /// Outputs and gradients.
  Tensors trace(const Tensors& outputs) {
    for (const auto& leaf : leaves()) leaf.mutable_grad() = Tensor();
    auto all_of_them = outputs;
    loss_of(outputs).backward();
    for (const auto& leaf : leaves())
      all_of_them.push_back(leaf.grad().defined() ? leaf.grad().clone() : leaf.detach() * 0);
    return all_of_them;
  }
  Tensors trace() { return trace(outputs()); }

  torch::nn::ModuleList all;
  std::optional<lora::Adapters> adapters;
  Tensor x;
};

}  // namespace

TEST_CASE("Products with one input share it from the second time on, with the same gradients") {
  const SharesAll shares_all;
  struct Case {
    const char* name;
    torch::ScalarType type;
    double tolerance;
    std::function<void(Layers&)> change = [](Layers&) {};
    lora::LoRAConfig config = lora::LoRAConfig(2);
  };
  const std::vector<Case> cases{
      {"float64", torch::kDouble, 1e-12},
      {"float32", torch::kFloat, 1e-6},
      {"bfloat16 with adapters in float", torch::kBFloat16, 0.02},
      {"x without a gradient", torch::kDouble, 1e-12, [](Layers& l) { l.x = l.x.detach(); }},
      {"x as a matrix", torch::kDouble, 1e-12, [](Layers& l) { l.x = l.x.detach()[0].requires_grad_(); }},
      {"x that was computed", torch::kDouble, 1e-12, [](Layers& l) { l.x = (l.x.detach() * 1).requires_grad_(); }},
      {"DoRA", torch::kDouble, 1e-12, [](Layers&) {}, lora::LoRAConfig(2).method(lora::DoRA())},
      {"weights in eight bits", torch::kFloat, 1e-6, [](Layers& l) { lora::quantize(*l.all, lora::Int8()); }},
  };
  for (const auto& one : cases) {
    INFO(one.name);
    Layers layers(one.type, one.config);
    one.change(layers);
    auto active = layers.adapters->activate();
    const auto apart = layers.outputs();
    CHECK(shared_in(apart) == 0);
    const auto wanted = layers.trace(apart);
    for (int time = 0; time < 2; ++time) {
      const auto together = layers.outputs();
      CHECK(shared_in(together) == 1);
      const auto found = layers.trace(together);
      for (size_t i = 0; i < wanted.size(); ++i) {
        INFO(i);
        CHECK(distance(found[i], wanted[i]) < one.tolerance * std::max(1.0, wanted[i].abs().max().item<double>()));
      }
    }
  }
}

TEST_CASE("The gradients of products that share their input agree with finite differences, also the second ones") {
  const SharesAll shares_all;
  Layers layers;
  auto active = layers.adapters->activate();
  layers.outputs();
  REQUIRE(shared_in(layers.outputs()) == 1);
  CHECK(testing::gradient_error([&] { return Layers::loss_of(layers.outputs()); }, layers.leaves()) < 1e-6);
  const auto slope = [&] {  // whose gradient is a second derivative
    const torch::AutoGradMode with_gradient(true);
    const auto first = torch::autograd::grad({Layers::loss_of(layers.outputs())}, layers.leaves(), {}, true, true);
    return Layers::loss_of(first) * 1e-2;
  };
  REQUIRE(shared_in(layers.outputs()) == 1);
  CHECK(testing::gradient_error(slope, layers.leaves()) < 1e-5);
}

TEST_CASE("Whatever part of a shared input's graph is asked for, its gradients are those of products apart") {
  Layers layers;
  auto active = layers.adapters->activate();
  const auto leaves = layers.leaves();
  using Ask = std::function<Tensors(const Tensors& outputs)>;
  struct Case {
    const char* name;
    Ask ask;
  };
  const auto grad = [](const Tensor& loss, const Tensors& of, bool keep = false) {
    return torch::autograd::grad({loss}, of, {}, keep, false, /*allow_unused=*/true);
  };
  const std::vector<Case> cases{
      {"one output", [&](const Tensors& y) { return grad(y[1].sin().sum(), leaves); }},
      {"an output without an adapter", [&](const Tensors& y) { return grad(y[2].sin().sum(), leaves); }},
      {"x alone", [&](const Tensors& y) { return grad(Layers::loss_of(y), {layers.x}); }},
      {"each output by a pass of its own",
       [&](const Tensors& y) {
         Tensors all;
         for (const size_t i : {0, 1, 3}) {
           const auto some = grad(y[i].sin().sum(), leaves);
           all.insert(all.end(), some.begin(), some.end());
         }
         return all;
       }},
      {"one factor", [&](const Tensors& y) { return grad(Layers::loss_of(y), {leaves[2]}); }},
      {"twice in one graph",
       [&](const Tensors& y) {
         auto first = grad(Layers::loss_of(y), leaves, /*keep=*/true);
         const auto second = grad(y[0].sum() + y[3].cos().sum(), leaves);
         first.insert(first.end(), second.begin(), second.end());
         return first;
       }},
      {"after a pass that failed",
       [&](const Tensors& y) {
         const auto handle = y[0].register_hook([](const Tensor&) -> Tensor { throw std::runtime_error("no"); });
         CHECK_THROWS(grad(Layers::loss_of(y), leaves, /*keep=*/true));
         y[0].remove_hook(handle);
         return grad(Layers::loss_of(y), leaves);
       }},
      {"with a hook that keeps the gradient of x",
       [&](const Tensors& y) {
         Tensor seen;
         const auto handle = layers.x.register_hook([&](const Tensor& g) { seen = g; });
         auto all = grad(Layers::loss_of(y), leaves);
         layers.x.remove_hook(handle);
         all.push_back(seen);
         return all;
       }},
  };
  for (const auto& one : cases) {
    INFO(one.name);
    const auto wanted = one.ask(layers.outputs());
    const SharesAll shares_all;
    layers.outputs();
    const auto y = layers.outputs();
    REQUIRE(shared_in(y) == 1);
    const auto found = one.ask(y);
    REQUIRE(found.size() == wanted.size());
    for (size_t i = 0; i < found.size(); ++i) {
      INFO(i);
      REQUIRE(found[i].defined() == wanted[i].defined());
      if (found[i].defined()) CHECK(distance(found[i], wanted[i]) < 1e-12);
    }
  }
}

TEST_CASE("A second pass through a shared input that was let go says so") {
  const SharesAll shares_all;
  Layers layers;
  auto active = layers.adapters->activate();
  layers.outputs();
  const auto loss = Layers::loss_of(layers.outputs());
  loss.backward();
  CHECK_THROWS_WITH(loss.backward(), testing::contains("a second time"));
}

TEST_CASE("Layers with one input have steps of training each for itself") {
  const auto losses = [] {
    Layers layers;
    layers.x = layers.x.detach();
    auto active = layers.adapters->activate();
    std::vector<double> all;
    for (int step = 0; step < 4; ++step) {
      for (const size_t i : {0, 1, 3}) {
        const auto loss = layers.layer(i).forward(layers.x).square().sum();
        loss.backward();
        all.push_back(loss.item<double>());
        for (const auto& tensor : layers.adapters->parameters()) {
          if (tensor.grad().defined()) tensor.detach().sub_(tensor.grad() * 1e-3);
          tensor.mutable_grad() = Tensor();
        }
      }
      const auto first = layers.layer(0).forward(layers.x).square().sum(),
                 second = layers.layer(1).forward(layers.x).square().sum();
      first.backward();
      const auto parameters = layers.adapters->named_parameters();
      for (const auto& item : parameters) {
        if (item.key().find("0.") == 0) item.value().detach().mul_(0.9);
      }
      second.backward();  // which does not need what was written to
      all.push_back(second.item<double>());
    }
    return all;
  };
  const auto wanted = losses();
  const SharesAll shares_all;
  const auto found = losses();
  REQUIRE(found.size() == wanted.size());
  for (size_t i = 0; i < found.size(); ++i) CHECK(std::abs(found[i] - wanted[i]) < 1e-10);
}

TEST_CASE("What is expected to follow and does not, or is not what it was, is not shared") {
  const SharesAll shares_all;
  Layers layers;
  auto active = layers.adapters->activate();
  const auto of = [&](const Tensor& x, const std::vector<size_t>& some) {
    Tensors outputs;
    for (const auto i : some) outputs.push_back(layers.layer(i).forward(x));
    return outputs;
  };
  const auto learn = [&] {
    layers.outputs();
    REQUIRE(shared_in(layers.outputs()) == 1);
  };
  /// Checks the outputs of `some` against the same of a copy of x, and how many of the nodes there are.
  const auto check = [&](const Tensors& outputs, const Tensors& wanted, size_t nodes) {
    CHECK(shared_in(outputs) == nodes);
    CHECK(distance(outputs, wanted) < 1e-12);
  };
  const auto plain = [&](const std::vector<size_t>& some) {
    Tensors outputs;
    for (const auto i : some) outputs.push_back(of(layers.x.detach().clone(), {i}).front().detach());
    return outputs;
  };
  const auto copy = [&] { return (layers.x * 1); };

  SECTION("fewer layers") {
    learn();
    const auto wanted = plain({0, 1});
    layers.outputs();
    check(of(copy(), {0, 1}), wanted, 1);  // as expected before, of which one part is in vain
    of(copy(), {0});
    CHECK(shared_in(of(copy(), {0})) == 0);
  }
  SECTION("another order") {
    learn();
    const auto wanted = plain({3, 1, 0});
    layers.outputs();
    check(of(copy(), {3, 1, 0}), wanted, 0);
    CHECK(shared_in(of(copy(), {3, 1, 0})) == 1);
  }
  SECTION("an input that is written to in between") {
    learn();
    auto x = copy().detach().requires_grad_();
    const auto first = of(x, {0});
    {
      const torch::NoGradGuard no_grad;
      x.mul_(2);
    }
    const auto found = of(x, {1});  // before anything that would end the run
    CHECK(distance(found, of(x.detach().clone(), {1})) < 1e-12);
    CHECK_THROWS_WITH(Layers::loss_of(first).backward(), testing::contains("modified by an inplace operation"));
  }
  SECTION("a factor that is written to in between") {
    learn();
    const auto x = copy();
    of(x, {0});
    {
      const torch::NoGradGuard no_grad;
      layers.adapters->named_parameters()["1.lora_A"].mul_(2);
    }
    const auto found = of(x, {1});
    CHECK(distance(found, of(x.detach().clone(), {1})) < 1e-12);
  }
  SECTION("with and without gradients") {
    learn();
    const auto x = copy();
    of(x, {0});
    {
      const torch::NoGradGuard no_grad;
      const auto found = of(x, {1});
      CHECK(!found.front().requires_grad());
      CHECK(distance(found, plain({1})) < 1e-12);
    }
    learn();
    {
      const torch::NoGradGuard no_grad;
      of(layers.x, {0});
    }
    const auto factor = layers.adapters->named_parameters()["1.lora_A"];
    const auto gradient = torch::autograd::grad({of(layers.x, {1}).front().sum()}, {factor}).front();
    const auto apart = torch::autograd::grad({of(layers.x.detach().clone(), {1}).front().sum()}, {factor}).front();
    CHECK(distance(gradient, apart) < 1e-12);
  }
  SECTION("an input in inference mode") {
    const c10::InferenceMode inference;
    const auto x = torch::randn({2, 5}, testing::on_device(torch::kDouble));
    const auto wanted = of(x.clone(), {0, 1, 3});
    of(x, {0, 1, 3});
    CHECK(distance(of(x, {0, 1, 3}), wanted) < 1e-12);
  }
  SECTION("another scope") {
    learn();
    const auto x = copy();
    of(x, {0});
    auto other = layers.adapters->activate();
    const auto found = of(x, {1});
    CHECK(distance(found, plain({1})) < 1e-12);
  }
  SECTION("an input of other memory, and one that leads elsewhere") {
    learn();
    auto x = copy().detach().requires_grad_();
    of(x, {0});
    x.set_data(x.detach() * 2);
    const auto found = of(x, {1});
    CHECK(distance(found, of(x.detach().clone(), {1})) < 1e-12);
    learn();
    auto computed = copy();
    of(computed, {0});
    computed.detach_().requires_grad_();
    const auto y = of(computed, {1}).front();
    CHECK(torch::autograd::grad({y.sum()}, {layers.x}, {}, false, false, /*allow_unused=*/true).front().defined() ==
          false);
  }
  SECTION("dropout") {
    Layers drops(torch::kDouble, lora::LoRAConfig(2).dropout(0.5));
    auto active_here = drops.adapters->activate();
    drops.outputs();
    CHECK(shared_in(drops.outputs()) == 0);
    drops.all->eval();
    drops.outputs();
    CHECK(shared_in(drops.outputs()) == 1);
  }
}

TEST_CASE("Without gradients an input is shared, too, and not held afterwards") {
  const SharesAll shares_all;
  Layers layers;
  const torch::NoGradGuard no_grad;
  const auto wanted = [&] {
    auto active = layers.adapters->activate();
    return layers.outputs();
  }();
  auto active = layers.adapters->activate();
  for (int time = 0; time < 3; ++time) {
    auto x = layers.x.detach().clone();
    const c10::weak_intrusive_ptr<c10::StorageImpl> memory = x.storage().getWeakStorageImpl();
    CHECK(distance(layers.outputs(x), wanted) < 1e-12);
    x.reset();
    CHECK(memory.expired());
  }
  auto x = layers.x.detach().clone();
  const c10::weak_intrusive_ptr<c10::StorageImpl> memory = x.storage().getWeakStorageImpl();
  {
    auto inner = layers.adapters->activate();
    layers.outputs();
    layers.outputs();
    layers.layer(0).forward(x);  // whose followers do not come
    x.reset();
  }
  CHECK(memory.expired());
}

TEST_CASE("A shared input is let go by the last pass of backward that goes through it") {
  const SharesAll shares_all;
  Layers layers;
  auto active = layers.adapters->activate();
  layers.outputs();
  auto x = layers.x * 1;
  const c10::weak_intrusive_ptr<c10::StorageImpl> memory = x.storage().getWeakStorageImpl();
  const auto y = layers.outputs(x);
  REQUIRE(shared_in(y) == 1);
  x.reset();
  y[0].sum().backward();
  y[1].sum().backward();
  CHECK(!memory.expired());
  y[3].sum().backward();
  CHECK(memory.expired());
}

TEST_CASE("A checkpoint in which products share their input has the gradients of its function") {
  const SharesAll shares_all;
  Layers layers;
  auto active = layers.adapters->activate();
  const auto wanted = layers.trace();
  SECTION("all of them in it") {
    for (int time = 0; time < 3; ++time) {
      const auto run = [&](const Tensor& x) { return layers.outputs(x * 1); };
      CHECK(distance(layers.trace(lora::checkpoint(run, layers.x)), wanted) < 1e-12);
    }
  }
  SECTION("first computed apart, and then again together") {
    const auto x = layers.x;
    const auto y = lora::checkpoint([&](const Tensor& input) { return layers.outputs(input); }, x);
    CHECK(distance(layers.trace(y), wanted) < 1e-12);
  }
  SECTION("with one in it that was in vain") {
    for (int time = 0; time < 3; ++time) {
      const auto y = lora::checkpoint([&](const Tensor& x) { return Tensors{layers.layer(0).forward(x)}; }, layers.x);
      CHECK(distance(layers.trace(y), layers.trace({layers.layer(0).forward(layers.x * 1)})) < 1e-12);
      layers.outputs();  // so that they are expected again
    }
  }
  SECTION("one of them before it") {
    for (int time = 0; time < 3; ++time) {
      Tensors y{layers.layer(0).forward(layers.x)};
      const auto rest = lora::checkpoint(
          [&](const Tensor& x) {
            Tensors others;
            for (const size_t i : {1, 2, 3}) others.push_back(layers.layer(i).forward(x));
            return others;
          },
          layers.x);
      y.insert(y.end(), rest.begin(), rest.end());
      CHECK(distance(layers.trace(y), wanted) < 1e-12);
    }
  }
}

TEST_CASE("Threads that run one model share inputs each for itself") {
  const SharesAll shares_all;
  Layers layers;
  auto active = layers.adapters->activate();
  const auto wanted = layers.outputs();
  std::vector<double> distances(4);
  std::vector<std::thread> threads;
  for (auto& found : distances) {
    threads.emplace_back(lora::carry([&] {
      for (int time = 0; time < 20; ++time) found = std::max(found, distance(layers.outputs(layers.x * 1), wanted));
    }));
  }
  for (auto& thread : threads) thread.join();
  for (const auto found : distances) CHECK(found < 1e-12);
}

TEST_CASE("The updates of one product share its input, too") {
  const SharesAll shares_all;
  Layers layers;
  layers.adapters->add("other", lora::LoRAConfig(3).alpha(2).target_modules({"0"}));
  for (auto& tensor : layers.adapters->parameters()) tensor.detach().normal_(0, 0.5);
  auto active = layers.adapters->activate(lora::WeightedAdapters{{"default", 1.0}, {"other", 0.5}});
  CHECK(shared_in({layers.layer(0).forward(layers.x)}) == 1);
  const auto loss = [&] { return Layers::loss_of({layers.layer(0).forward(layers.x)}); };
  auto named = layers.adapters->named_parameters();
  Tensors tensors{layers.x};
  for (const auto& item : named) {
    if (item.key().find("0.lora") != std::string::npos) tensors.push_back(item.value());
  }
  REQUIRE(tensors.size() == 5);
  CHECK(testing::gradient_error(loss, tensors) < 1e-6);
}
