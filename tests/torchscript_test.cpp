#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/torchscript.hpp>

#include <torch/csrc/jit/api/function_impl.h>
#include <torch/script.h>

#include <atomic>
#include <optional>
#include <thread>

namespace {

using torch::Tensor;
using Module = torch::jit::Module;

Module linear(int64_t in, int64_t out) {
  Module module("Linear");
  module.register_attribute("training", c10::BoolType::get(), true);
  module.register_parameter("weight", torch::randn({out, in}, torch::kDouble), false);
  module.register_parameter("bias", torch::randn({out}, torch::kDouble), false);
  module.define("def forward(self, x):\n  return torch.linear(x, self.weight, self.bias)\n");
  return module;
}

/// Two linear layers and a parameter of its own.
struct Net {
  Net() : module("Net") {
    torch::manual_seed(0);
    module.register_module("fc1", linear(4, 6));
    module.register_module("fc2", linear(6, 3));
    module.register_parameter("mixing", torch::randn({3, 3}, torch::kDouble), false);
    module.define(
        "def forward(self, x):\n"
        "  return torch.matmul(self.fc2.forward(torch.tanh(self.fc1.forward(x))), self.mixing)\n");
    module.to(testing::device());
    x = torch::randn({2, 5, 4}, floats());
  }

  static torch::TensorOptions floats() { return torch::TensorOptions(torch::kDouble).device(testing::device()); }

  Tensor parameter(const std::string& name) const {
    for (const auto& item : module.named_parameters()) {
      if (item.name == name) return item.value;
    }
    return {};
  }

  Tensor run() { return module.forward({x}).toTensor(); }

  /// Past the profiling runs, with a gradient for the input: the executor then has its own idea of the gradients.
  void run_often() {
    for (int i = 0; i < 4; ++i) module.forward({x.detach().clone().requires_grad_()}).toTensor().sum().backward();
  }

  /// What it computes with W + s B A, written down by hand, from the frozen weights also where a scope is open.
  Tensor by_hand(const lora::Adapters& adapters) const {
    const lora::detail::BelowInterception below;
    const auto tensors = adapters.named_parameters();
    const auto weight = [&](const std::string& layer, const std::string& name) {
      const auto base = parameter(name);
      if (!tensors.contains(layer + ".lora_A")) return base;
      return base + adapters.scaling(layer) * tensors[layer + ".lora_B"].mm(tensors[layer + ".lora_A"]);
    };
    const auto hidden = x.matmul(weight("fc1", "fc1.weight").t()).add(parameter("fc1.bias")).tanh();
    const auto output = hidden.matmul(weight("fc2", "fc2.weight").t()).add(parameter("fc2.bias"));
    return output.matmul(weight("mixing", "mixing"));
  }

  Module module;
  Tensor x;
};

lora::LoRAConfig config(std::vector<std::string> modules, std::vector<std::string> parameters = {}) {
  return lora::LoRAConfig(2).alpha(3).target_modules(std::move(modules)).target_parameters(std::move(parameters));
}

lora::Adapters attach(Net& net, const lora::LoRAConfig& config) {
  auto adapters = lora::attach(net.module, config);
  testing::randomize(adapters.parameters(), 0.5);
  return adapters;
}

double gradient_distance(const Tensor& ours, const Tensor& theirs, const std::vector<Tensor>& tensors) {
  const auto mine = torch::autograd::grad({ours.sin().sum()}, tensors, {}, {}, false, true);
  const auto others = torch::autograd::grad({theirs.sin().sum()}, tensors);
  for (const auto& gradient : mine) REQUIRE(gradient.defined());
  return testing::distance(mine, others);
}

bool is_optimized(Net& net) {
  return torch::jit::toGraphFunction(net.module.get_method("forward").function()).get_executor().isOptimized();
}

}  // namespace

TEST_CASE("A TorchScript module is adapted by the names of its modules and parameters") {
  const auto chosen = GENERATE(config({"fc1"}), config({"fc1", "fc2"}), config({}, {"mixing"}),
                               config({"fc2"}, {"mixing"}), config({}).target_modules(lora::all_linear));
  const bool ran_before = GENERATE(true, false), differentiates_input = GENERATE(true, false);
  Net net;
  net.x.requires_grad_(differentiates_input);
  if (ran_before) net.run_often();
  auto adapters = attach(net, chosen);
  const auto base = net.run();
  const auto tensors = adapters.parameters();
  torch::optim::SGD optimizer(tensors, 0.002);
  for (int step = 0; step < 6; ++step) {
    {
      auto active = adapters.activate();
      const auto output = net.run();
      CHECK(testing::distance(output, base) > 1e-3);
      CHECK(testing::distance(output, net.by_hand(adapters)) < 1e-12);
      CHECK(gradient_distance(output, net.by_hand(adapters), tensors) < 1e-12);
      optimizer.zero_grad();
      net.run().pow(2).mean().backward();
      optimizer.step();
    }
    net.run_often();  // outside of the scope, while it is adapted
    CHECK(torch::equal(net.run(), base));
  }
  CHECK(adapters.unreached().empty());
}

TEST_CASE("Runs of the base module on another thread leave the gradients of a scope alone") {
  Net net;
  net.x.requires_grad_();
  auto adapters = attach(net, config({"fc1", "fc2"}));
  const auto base = net.run();
  std::atomic<bool> done{false};
  std::atomic<int> wrong{0};
  std::thread other([&] {
    while (!done) {
      net.run_often();
      wrong += torch::equal(net.run(), base) ? 0 : 1;
    }
  });
  {
    auto active = adapters.activate();
    for (int step = 0; step < 50; ++step)
      CHECK(gradient_distance(net.run(), net.by_hand(adapters), adapters.parameters()) < 1e-12);
  }
  done = true;
  other.join();
  CHECK(wrong == 0);
}

TEST_CASE("A function that is carried to another thread is adapted there") {
  Net net;
  auto adapters = attach(net, config({"fc1", "fc2"}));
  Tensor carried, plain;
  {
    auto active = adapters.activate();
    const auto run = lora::carry([&] { return net.run(); });
    std::thread([&] { carried = run(); }).join();
    std::thread([&] { plain = net.run(); }).join();
    net.run();
  }
  CHECK(testing::distance(carried, net.by_hand(adapters)) < 1e-12);
  CHECK(gradient_distance(carried, net.by_hand(adapters), adapters.parameters()) < 1e-12);
  CHECK(torch::equal(plain, net.run()));
}

TEST_CASE("Scopes leave TorchScript's optimizer to other modules as it is") {
  Net net;
  auto adapters = attach(net, config({"fc1"}));
  for (bool before : {true, false}) {
    const torch::jit::GraphOptimizerEnabledGuard as_before(before);
    std::optional<lora::Activation> outer(adapters.activate()), inner(adapters.activate());
    for (auto* scope : {&outer, &inner}) {  // not in reverse order
      CHECK(torch::jit::getGraphExecutorOptimize() == before);
      CHECK(testing::distance(net.run(), net.by_hand(adapters)) < 1e-12);
      scope->reset();
    }
    CHECK(torch::jit::getGraphExecutorOptimize() == before);
  }
}

TEST_CASE("The optimizing executor is back when the last adapters are gone") {
  Net net;
  net.run_often();
  REQUIRE(is_optimized(net));
  SECTION("detached in any order") {
    auto first = attach(net, config({"fc1"}));
    auto second = attach(net, config({"fc2"}));
    CHECK_FALSE(is_optimized(net));
    second.detach();
    net.run_often();
    CHECK_FALSE(is_optimized(net));
    first.detach();
  }
  SECTION("destroyed") { attach(net, config({"fc1"})); }
  SECTION("merged for good") { attach(net, config({"fc1"})).merge_and_unload(); }
  SECTION("refused") { CHECK_THROWS(lora::attach(net.module, config({"fc3"}))); }
  CHECK(is_optimized(net));
}

TEST_CASE("Adapters of one TorchScript module add up") {
  Net net;
  auto first = attach(net, config({"fc1"}));
  auto second = attach(net, config({"fc2"}));
  const auto hidden = [&] {
    auto active = first.activate();
    return testing::distance(net.run(), net.by_hand(first));
  };
  CHECK(hidden() < 1e-12);
  auto one = first.activate();
  auto two = second.activate();
  auto tensors = first.parameters();
  for (const auto& tensor : second.parameters()) tensors.push_back(tensor);
  for (const auto& gradient : torch::autograd::grad({net.run().sum()}, tensors))
    CHECK(gradient.abs().max().item<double>() > 0);
}

TEST_CASE("A TorchScript module is merged, unmerged, saved and loaded") {
  Net net;
  auto adapters = attach(net, config({"fc1"}, {"mixing"}));
  const auto base = net.run();
  const auto expected = net.by_hand(adapters).detach();
  std::vector<Tensor> before;
  for (const auto& parameter : net.module.parameters()) before.push_back(parameter.clone());

  adapters.merge();
  CHECK(testing::distance(net.run(), expected) < 1e-12);
  {
    auto active = adapters.activate();  // is in the weights already
    CHECK(testing::distance(net.run(), expected) < 1e-12);
  }
  adapters.unmerge();
  CHECK(torch::equal(net.run(), base));
  size_t i = 0;
  for (const auto& parameter : net.module.parameters()) CHECK(torch::equal(parameter, before[i++]));

  adapters.merge_and_unload();
  const testing::TemporaryFolder folder;
  net.module.save(folder / "merged.pt");
  auto loaded = torch::jit::load(folder / "merged.pt", testing::device());
  CHECK(testing::distance(loaded.forward({net.x}).toTensor(), expected) < 1e-12);
  CHECK(loaded.parameters().size() == before.size());  // nothing of the adapters
  loaded.eval();
  CHECK(testing::distance(torch::jit::freeze(loaded).forward({net.x}).toTensor(), expected) < 1e-12);
}

TEST_CASE("Of a tied weight a TorchScript module merges only the use that is adapted") {
  torch::manual_seed(0);
  const auto weight = torch::randn({4, 4}, Net::floats());
  Module model("Tied"), tokens("Embedding"), head("Linear");
  tokens.register_parameter("weight", weight, false);
  tokens.define("def forward(self, x):\n  return torch.embedding(self.weight, x)\n");
  head.register_parameter("weight", weight, false);
  head.define("def forward(self, x):\n  return torch.linear(x, self.weight)\n");
  model.register_module("tokens", tokens);
  model.register_module("head", head);
  model.define("def forward(self, x):\n  return self.head.forward(torch.tanh(self.tokens.forward(x)))\n");
  const auto x = torch::tensor({1, 3, 2}, torch::TensorOptions(torch::kLong).device(testing::device()));

  const auto layer = GENERATE(std::string("tokens"), std::string("head"));
  auto adapters = lora::attach(model, config({layer}));
  testing::randomize(adapters.parameters(), 0.5);
  const auto delta = adapters.delta("default", layer);
  const auto table = layer == "tokens" ? weight + delta : weight, out = layer == "head" ? weight + delta : weight;
  const auto expected = table.index_select(0, x).tanh().matmul(out.t());
  {
    auto active = adapters.activate();
    CHECK(testing::distance(model.forward({x}).toTensor(), expected) < 1e-12);
  }
  CHECK(adapters.report().layers.front().tied_to == std::vector<std::string>{layer == "head" ? "tokens" : "head"});
  adapters.merge();
  CHECK(testing::distance(model.forward({x}).toTensor(), expected) < 1e-12);
  adapters.unmerge();
  CHECK(model.attr("head").toModule().attr("weight").toTensor().is_same(weight));
}

TEST_CASE("A frozen TorchScript module is refused with what to do instead") {
  Net net;
  net.module.eval();
  auto frozen = torch::jit::freeze(net.module);
  CHECK_THROWS_WITH(lora::attach(frozen, config({"fc1"})),
                    testing::contains("freezing it") && testing::contains("Attach to the module as it was before"));
}

TEST_CASE("What a configuration names has to be in a TorchScript module") {
  Net net;
  CHECK_THROWS_WITH(lora::attach(net.module, config({"fc11"})),
                    testing::contains("no module matches \"fc11\"") && testing::contains("did you mean \"fc1\""));
  CHECK_THROWS_WITH(lora::attach(net.module, config({}, {"mixin"})),
                    testing::contains("no parameter matches \"mixin\"") && testing::contains("fc1.weight"));
  CHECK_THROWS_WITH(lora::attach(net.module, config({}, {"fc1.bias"})), testing::contains("has shape [6]"));
  for (auto parameter : net.module.parameters()) CHECK_FALSE(parameter.requires_grad());
}

TEST_CASE("Classes of a user's own that have names of torch.nn's are taken as they are") {
  torch::manual_seed(0);
  Module model("Net"), table("Embedding"), norm("Linear"), classifier("RNNClassifier");
  table.register_parameter("entries", torch::randn({3, 4}, Net::floats()), false);
  norm.register_parameter("weight", torch::randn({4}, Net::floats()), false);
  classifier.register_parameter("matrix", torch::randn({2, 3, 4}, Net::floats()), false);
  model.register_module("table", table);
  model.register_module("norm", norm);
  model.register_module("classifier", classifier);
  CHECK(lora::attach(model, config({"table"})).targets() == std::vector<std::string>{"table.entries"});
  CHECK(lora::attach(model, config({"classifier"})).targets() == std::vector<std::string>{"classifier.matrix"});
  CHECK_THROWS_WITH(lora::attach(model, config({"norm"})), testing::contains("has no weight that can be adapted"));
}

TEST_CASE("A TorchScript module reports its adapters and is given back") {
  Net net;
  for (auto parameter : net.module.parameters()) parameter.requires_grad_();
  auto adapters = attach(net, config({"fc1"}, {"mixing"}));
  for (const auto& parameter : net.module.parameters()) CHECK_FALSE(parameter.requires_grad());
  const auto report = adapters.report();
  REQUIRE(report.layers.size() == 2);
  CHECK(report.layers[0].name == "fc1");
  CHECK(report.layers[0].kind == "Linear");
  CHECK(report.layers[0].weight == std::vector<int64_t>{6, 4});
  CHECK(report.layers[1].name == "mixing");
  CHECK(report.trainable == 2 * (6 + 4) + 2 * (3 + 3));
  CHECK(report.base == 6 * 4 + 6 + 3 * 6 + 3 + 3 * 3);
  const auto uses = adapters.diagnose([&] { net.run(); });
  REQUIRE(uses.size() == 2);
  for (const auto& use : uses) CHECK(use.adapted);
  adapters.detach();
  for (const auto& parameter : net.module.parameters()) CHECK(parameter.requires_grad());
}

TEST_CASE("Dropout follows the mode of a TorchScript module") {
  Net net;
  auto adapters = attach(net, config({"fc1"}).dropout(0.5));
  auto active = adapters.activate();
  net.module.eval();
  CHECK(testing::distance(net.run(), net.by_hand(adapters)) < 1e-12);
  net.module.train();
  CHECK(testing::distance(net.run(), net.by_hand(adapters)) > 1e-3);
}

TEST_CASE("A TorchScript module is adapted under autocast") {
  const bool ran_before = GENERATE(true, false);
  Net net;
  net.module.to(torch::kFloat);
  net.x = net.x.to(torch::kFloat).requires_grad_();
  const auto device = testing::device().type();
  const auto autocast = [&](const std::function<Tensor()>& run) {
    at::autocast::set_autocast_enabled(device, true);
    at::autocast::set_autocast_dtype(device, at::kBFloat16);
    auto output = run();
    at::autocast::set_autocast_enabled(device, false);
    at::autocast::clear_cache();
    return output;
  };
  if (ran_before) {
    for (int i = 0; i < 4; ++i) autocast([&] { return net.module.forward({net.x}).toTensor(); });
  }
  auto adapters = attach(net, config({"fc1", "fc2"}, {"mixing"}));
  const auto base = autocast([&] { return net.run(); });
  const auto expected = net.by_hand(adapters);
  auto active = adapters.activate();
  for (int step = 0; step < 4; ++step) {
    const auto output = autocast([&] { return net.run(); });
    CHECK(output.scalar_type() == torch::kBFloat16);
    CHECK(testing::distance(output, expected) < 0.05 * (1 + expected.abs().max().item<double>()));
    CHECK(testing::distance(output, expected) < 0.2 * testing::distance(base, expected));
    for (const auto& gradient : torch::autograd::grad({output.sum()}, adapters.parameters()))
      CHECK(gradient.abs().max().item<double>() > 0);
  }
}

TEST_CASE("A TorchScript module that changes its type after it was adapted is followed") {
  Net net;
  auto adapters = attach(net, config({"fc1"}));
  const auto expected = net.by_hand(adapters);
  net.module.to(torch::kFloat);
  auto active = adapters.activate();
  const auto output = net.module.forward({net.x.to(torch::kFloat)}).toTensor();
  CHECK(output.scalar_type() == torch::kFloat);
  CHECK(testing::distance(output, expected) < 1e-4);
}

TEST_CASE("Adapters of a TorchScript module are saved and loaded") {
  Net net, other;
  auto adapters = attach(net, config({"fc1", "fc2"}, {"mixing"}));
  const testing::TemporaryFolder folder;
  adapters.save(folder.path());
  auto loaded = lora::load_adapter(other.module, folder.path());
  CHECK(loaded.targets() == adapters.targets());
  {
    auto active = loaded.activate();
    CHECK(testing::distance(other.run(), net.by_hand(adapters)) < 1e-12);
  }
  loaded.detach();
  loaded.add("other", config({"fc2"}));
  loaded.save_all(folder.path());
  loaded.detach();
  auto both = lora::load_adapters(other.module, folder.path());
  CHECK(both.names() == std::vector<std::string>{"default", "other"});
  const auto base = other.run();
  both.save_merged(folder / "merged.safetensors", "default");
  CHECK(torch::equal(other.run(), base));
  adapters.merge();
  const auto written = lora::read_safetensors(folder / "merged.safetensors");
  for (const auto& item : net.module.named_parameters())
    CHECK(testing::distance(written.at(item.name), item.value) < 1e-12);
}

TEST_CASE("Biases and whole modules of a TorchScript module are trained in full") {
  Net net;
  const auto base = net.run();
  auto adapters = attach(net, config({"fc1"}).modules_to_save({"fc2"}).bias(lora::Bias::kAdaptedOnly));
  const auto tensors = adapters.named_parameters();
  for (auto name : {"fc1.lora_A", "fc1.bias", "fc2.weight", "fc2.bias"}) CHECK(tensors.contains(name));
  Tensor adapted;
  {
    auto active = adapters.activate();
    for (int step = 0; step < 4; ++step) {
      adapted = net.run();
      for (const auto& gradient : torch::autograd::grad({adapted.sin().sum()}, tensors.values()))
        CHECK(gradient.abs().max().item<double>() > 0);
    }
  }
  CHECK(torch::equal(net.run(), base));
  adapters.merge();
  CHECK(testing::distance(net.run(), adapted) < 1e-12);
  adapters.unmerge();
  CHECK(torch::equal(net.run(), base));
}
