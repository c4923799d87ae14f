// What an adapter trains beside A and B: whole modules and biases, each adapter its own.
#include "support/models.hpp"

#include <lora/attach.hpp>

namespace {

struct NetImpl : torch::nn::Module {
  NetImpl() {
    register_module("body", body);
    register_module("norm", norm);
    register_module("xhead", xhead);
    register_module("head", head);
    to(testing::device());
  }
  torch::Tensor forward(const torch::Tensor& x) { return head(norm(xhead(body(x).tanh()))); }

  torch::nn::Linear body{5, 6}, xhead{6, 6}, head{6, 3};
  torch::nn::BatchNorm1d norm{6};
};
TORCH_MODULE(Net);

lora::LoRAConfig config() { return lora::LoRAConfig(2).alpha(6).target_modules({"body"}); }

/// A model whose head an adapter with random values trains in full.
struct AdaptedNet {
  AdaptedNet() {
    testing::randomize(adapters.parameters());
    model->eval();
  }

  Net model;
  lora::Adapters adapters = lora::attach(*model, config().modules_to_save({"head"}));
  torch::Tensor x = torch::randn({8, 5}, testing::device());
};

std::vector<torch::Tensor> snapshot(torch::nn::Module& model) {
  std::vector<torch::Tensor> all;
  for (const auto& tensor : model.parameters()) all.push_back(tensor.detach().clone());
  for (const auto& tensor : model.buffers()) all.push_back(tensor.detach().clone());
  return all;
}

bool is_untouched(torch::nn::Module& model, const std::vector<torch::Tensor>& before) {
  const auto now = snapshot(model);
  for (size_t i = 0; i < now.size(); ++i) {
    if (!torch::equal(now[i], before[i])) return false;
  }
  return now.size() == before.size();
}

}  // namespace

TEST_CASE("modules_to_save trains copies of whole modules with their buffers, and leaves the model as it is") {
  torch::manual_seed(0);
  Net model;
  const auto before = snapshot(*model);
  auto adapters = lora::attach(*model, config().modules_to_save({"head", "norm"}));
  CHECK(adapters.targets() == std::vector<std::string>{"body"});
  auto named = adapters.named_parameters();
  CHECK(named.keys() ==
        std::vector<std::string>{"body.lora_A", "body.lora_B", "norm.weight", "norm.bias", "head.weight", "head.bias"});
  CHECK(adapters.report().trainable == 2 * 11 + 12 + 21);
  torch::optim::SGD optimizer(adapters.parameters(), 0.1);
  auto x = torch::randn({8, 5}, testing::device());
  for (int step = 0; step < 3; ++step) {
    auto active = adapters.activate();
    optimizer.zero_grad();
    model->forward(x).pow(2).mean().backward();
    for (const auto& item : adapters.named_parameters()) CHECK(item.value().grad().defined());
    optimizer.step();
  }
  CHECK(is_untouched(*model, before));  // also the running statistics
  model->eval();
  auto base = model->forward(x);
  torch::Tensor adapted;
  {
    auto active = adapters.activate();
    adapted = model->forward(x);
  }
  CHECK(testing::distance(adapted, base) > 1e-3);
  adapters.merge();
  CHECK(testing::distance(model->forward(x), adapted) < 1e-5);
  {
    auto active = adapters.activate();
    CHECK(testing::distance(model->forward(x), adapted) < 1e-5);
  }
  adapters.unmerge();
  CHECK(is_untouched(*model, before));
  CHECK(torch::equal(model->forward(x), base));
  SECTION("detached, the original is back") {
    adapters.merge();
    adapters.detach();
    CHECK(is_untouched(*model, before));
    CHECK(model->head->weight.requires_grad());
  }
  SECTION("merged for good, the copies stay") {
    adapters.merge_and_unload();
    CHECK(testing::distance(model->forward(x), adapted) < 1e-5);
    CHECK(model->head->weight.requires_grad());
  }
}

TEST_CASE("Each adapter has copies of its own, also of a head that is tied to an embedding") {
  torch::manual_seed(0);
  testing::Tied model;
  auto ids = torch::tensor({1, 5, 5, 0}, testing::device());
  auto base = model->forward(ids), entries = model->tokens->forward(ids);
  lora::Adapters adapters(*model);
  for (auto name : {"a", "b"})
    adapters.add(name, lora::LoRAConfig(2).target_modules({"tokens"}).modules_to_save({"head"}));
  testing::randomize(adapters.parameters("b"));
  {
    auto active = adapters.activate("a");
    CHECK(testing::distance(model->forward(ids), base) < 1e-6);
  }
  auto active = adapters.activate("b");
  auto looked_up = entries + adapters.delta("b", "tokens").index({ids});
  CHECK(testing::distance(model->tokens->forward(ids), looked_up) < 1e-6);
  CHECK(testing::distance(model->forward(ids), looked_up.tanh().mm(adapters.named_parameters("b")["head.weight"].t())) <
        1e-5);
}

TEST_CASE("Biases are trained where they are asked for") {
  torch::manual_seed(0);
  Net model;
  using Names = std::vector<std::string>;
  const auto [bias, names] = GENERATE(table<lora::Bias, Names>(
      {{lora::Bias::kNone, {"body.lora_A", "body.lora_B"}},
       {lora::Bias::kAdaptedOnly, {"body.lora_A", "body.lora_B", "body.bias"}},
       {lora::Bias::kAll, {"body.lora_A", "body.lora_B", "body.bias", "norm.bias", "xhead.bias", "head.bias"}}}));
  auto adapters = lora::attach(*model, config().bias(bias));
  CHECK(adapters.named_parameters().keys() == names);
  testing::randomize(adapters.parameters());
  model->eval();
  auto x = torch::randn({8, 5}, testing::device());
  auto named = adapters.named_parameters();
  auto b = bias == lora::Bias::kNone ? model->body->bias : named["body.bias"];
  auto expected = torch::linear(x, model->body->weight + adapters.delta("default", "body"), b);
  auto active = adapters.activate();
  auto adapted = model->forward(x);
  auto loss = [&] { return model->forward(x).pow(2).sum(); };
  for (const auto& gradient : torch::autograd::grad({loss()}, adapters.parameters())) CHECK(gradient.defined());
  CHECK(testing::distance(model->body(x), expected) < 1e-5);
  lora::MergeGuard merged(adapters);
  CHECK(testing::distance(model->forward(x), adapted) < 1e-5);
}

TEST_CASE("lora_bias gives the update a bias, scaled as the update is") {
  torch::manual_seed(0);
  const auto type = GENERATE(torch::kDouble, torch::kBFloat16);
  const auto tolerance = type == torch::kDouble ? 1e-12 : 0.05;
  Net model;
  model->to(type);
  model->eval();
  const auto before = snapshot(*model);
  auto adapters = lora::attach(
      *model,
      config().target_modules({"body", "head"}).alpha_pattern({{"head", 5}}).rank_stabilized(true).lora_bias(true));
  CHECK(adapters.named_parameters().keys() == std::vector<std::string>{"body.lora_A", "body.lora_B", "head.lora_A",
                                                                       "head.lora_B", "body.lora_B.bias",
                                                                       "head.lora_B.bias"});
  CHECK(adapters.report().trainable == 2 * 11 + 2 * 9 + 6 + 3);
  auto x = torch::randn({2, 8, 5}, testing::device()).to(type).flatten(0, 1);
  const auto base = model->forward(x);
  const auto run = [&] {
    auto active = adapters.activate();
    return model->forward(x);
  };
  CHECK(torch::equal(run(), base));
  testing::randomize(adapters.parameters(), 0.5);
  auto named = adapters.named_parameters();
  CHECK(named["body.lora_B.bias"].scalar_type() == lora::adapter_dtype(type));
  const auto layer = [&](const torch::Tensor& x, const std::string& name, torch::nn::Linear& linear) {
    const auto bias = linear->bias + adapters.scaling(name) * named[name + ".lora_B.bias"];
    const auto wide = bias.scalar_type();
    return torch::linear(x.to(wide), linear->weight.to(wide) + adapters.delta("default", name), bias);
  };
  const auto expected =
      layer(model->norm(model->xhead(layer(x, "body", model->body).tanh().to(type))), "head", model->head);
  const auto adapted = run();
  CHECK(testing::distance(adapted, expected) < tolerance);
  CHECK(testing::distance(adapted, base) > 0.5);
  if (type == torch::kDouble) {
    CHECK(testing::gradient_error([&] { return run().sin().sum(); }, adapters.parameters()) < 1e-7);
    auto active = adapters.activate();  // an optimizer's step within a scope is seen in it
    torch::NoGradGuard no_grad;
    named["head.lora_B.bias"].add_(1);
    CHECK(testing::distance(model->forward(x), adapted + adapters.scaling("head")) < tolerance);
    named["head.lora_B.bias"].sub_(1);
  }
  adapters.merge();
  CHECK(testing::distance(model->forward(x), adapted) < tolerance);
  CHECK(testing::distance(run(), adapted) < tolerance);
  adapters.unmerge();
  CHECK(is_untouched(*model, before));
  adapters.merge_and_unload();
  CHECK(testing::distance(model->forward(x), adapted) < tolerance);
}

TEST_CASE("What modules_to_save and fused name has to be there") {
  Net model;
  const auto fails = [&](const lora::LoRAConfig& config) {
    return testing::error_of([&] { lora::attach(*model, config).detach(); });
  };
  CHECK_THAT(fails(config().modules_to_save({"haed"})),
             testing::contains("no module with parameters matches \"haed\"") && testing::contains("\"head\""));
  CHECK_THAT(fails(config().fan_in_fan_out(true).modules_to_save({"xhead"})),
             testing::contains("\"xhead.weight\" of modules_to_save is square"));
  CHECK(fails(config().modules_to_save({"xhead"})).empty());
  CHECK(fails(config().fan_in_fan_out(true).modules_to_save({"norm", "head"})).empty());
  CHECK_THAT(fails(config().lora_bias(true).bias(lora::Bias::kAll)), testing::contains("either `bias` trains"));
  CHECK_THAT(fails(config().lora_bias(true).method(lora::DoRA())), testing::contains("for LowRank, not for DoRA"));
  CHECK_THAT(fails(config().fused({{"bodi", {3, 3}, {true, true}}})), testing::contains("\"bodi\" of fused"));
  CHECK_THAT(fails(config().fused({{"body", {3, 4}, {true, true}}})), testing::contains("together 7"));
  CHECK_THAT(fails(config().fused({{"body", {3, 3}, {false, false}}})), testing::contains("0 of them true"));
  CHECK_THAT(fails(config().method(lora::IA3()).fused({{"body", {3, 3}, {true, true}}})),
             testing::contains("the bias of \"body\""));
  CHECK(model->body->weight.requires_grad());
  torch::nn::Sequential unbiased(torch::nn::Linear(torch::nn::LinearOptions(2, 2).bias(false)));
  CHECK_THAT(
      testing::error_of([&] { lora::attach(*unbiased, lora::LoRAConfig(2).target_modules({"0"}).lora_bias(true)); }),
      testing::contains("lora_bias adds to the biases of the adapted layers, but \"0\" (Linear) has none"));
}

TEST_CASE("Parts of a fused projection have an A and a B each, and the other parts stay as they are") {
  torch::manual_seed(0);
  const auto sizes = GENERATE(std::vector<int64_t>{2, 2, 2}, std::vector<int64_t>{3, 1, 2});
  torch::nn::Sequential model(torch::nn::Linear(4, 6));
  model->to(testing::device(), torch::kDouble);
  auto adapters = lora::attach(
      *model, lora::LoRAConfig(2).alpha(6).target_modules({"0"}).fused({{"0", sizes, {true, false, true}}}));
  auto named = adapters.named_parameters();
  auto a = named["0.lora_A"], b = named["0.lora_B"];
  CHECK(a.sizes() == torch::IntArrayRef({2, 2, 4}));
  testing::randomize({a, b});
  auto x = torch::randn({2, 5, 4}, testing::on_device(torch::kDouble));
  auto base = model->forward(x);
  const auto part = [&](int64_t i, int64_t rows) { return 3 * x.matmul(a[i].t()).matmul(b[i].narrow(0, 0, rows).t()); };
  auto middle = torch::zeros({2, 5, sizes[1]}, x.options());
  auto expected = base + torch::cat({part(0, sizes[0]), middle, part(1, sizes[2])}, -1);
  const auto run = [&] {
    auto active = adapters.activate();
    return model->forward(x);
  };
  CHECK(testing::distance(run(), expected) < 1e-12);
  CHECK(testing::gradient_error([&] { return run().sin().sum(); }, {a, b}) < 1e-7);
  adapters.merge();
  CHECK(testing::distance(model->forward(x), expected) < 1e-12);
}

TEST_CASE("A parameter is adapted, and merged, in every layer that is tied to it") {
  torch::manual_seed(0);
  testing::Tied model;
  auto ids = torch::tensor({1, 5, 5, 0}, testing::device());
  const auto name = GENERATE(std::string("tokens.weight"), std::string("head.weight"));
  auto base = model->forward(ids);
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).alpha(6).target_parameters({name}));
  testing::randomize(adapters.parameters());
  auto changed = model->tokens->weight + adapters.delta("default", name);
  auto expected = changed.index({ids}).tanh().mm(changed.t());
  {
    auto active = adapters.activate();
    CHECK(testing::distance(model->forward(ids), expected) < 1e-5);
  }
  adapters.merge();
  CHECK(testing::distance(model->forward(ids), expected) < 1e-5);
  adapters.unmerge();
  CHECK(torch::equal(model->forward(ids), base));
}

TEST_CASE("What is trained in full follows a model to another type, and says when it was moved to another device") {
  torch::manual_seed(0);
  AdaptedNet net;
  auto& model = net.model;
  auto& adapters = net.adapters;
  const auto& x = net.x;
  const auto run = [&](torch::ScalarType type) {
    auto active = adapters.activate();
    return model->forward(x.to(type));
  };
  const auto base = model->forward(x), adapted = run(torch::kFloat);
  SECTION("before it is merged") {
    model->to(torch::kBFloat16);
    CHECK(testing::distance(run(torch::kBFloat16), adapted) < 0.1);
    adapters.merge();
    CHECK(model->head->weight.scalar_type() == torch::kBFloat16);
    CHECK(testing::distance(model->forward(x.to(torch::kBFloat16)), adapted) < 0.1);
  }
  SECTION("between merging and unmerging") {
    adapters.merge();
    model->to(torch::kDouble);
    adapters.unmerge();
    for (const auto& parameter : model->parameters()) CHECK(parameter.scalar_type() == torch::kDouble);
    CHECK(testing::distance(model->forward(x.to(torch::kDouble)), base) < 1e-5);
  }
  SECTION("to another device") {
    if (testing::device().is_cpu()) return;
    model->head->to(torch::kCPU);
    CHECK_THROWS_WITH(adapters.activate(), testing::contains("moved after it was adapted: head.weight is on cpu"));
    CHECK_THROWS_WITH(adapters.merge(), testing::contains("move the model first"));
    model->to(torch::kCPU);
    CHECK_THROWS_WITH(adapters.activate(), testing::contains("moved after it was adapted: body is on cpu"));
  }
}

TEST_CASE("A bias that gets too large for its type is refused, and nothing is merged") {
  Net model;
  model->to(torch::kHalf);
  const auto before = snapshot(*model);
  auto adapters = lora::attach(*model, config().lora_bias(true));
  torch::NoGradGuard no_grad;
  adapters.named_parameters()["body.lora_B.bias"].fill_(1e6);
  CHECK_THROWS_WITH(adapters.merge(), testing::contains("body.bias") && testing::contains("nothing was merged"));
  CHECK(is_untouched(*model, before));
}

TEST_CASE("A backward pass in a scope that its forward pass was not in has the base model's gradient") {
  torch::manual_seed(0);
  AdaptedNet net;
  const auto x = net.x.requires_grad_();
  const auto gradient = [&](const torch::Tensor& loss) { return torch::autograd::grad({loss}, {x})[0]; };
  const auto run = [&] { return net.model->forward(x).sin().sum(); };
  const auto expected = gradient(run());
  const auto loss = run();
  auto active = net.adapters.activate();
  CHECK(torch::equal(gradient(loss), expected));
  CHECK(testing::distance(gradient(run()), expected) > 0.01);
}

TEST_CASE("An adapter that is added while another one is merged begins with the model's own values") {
  torch::manual_seed(0);
  Net model;
  const auto head = model->head->weight.detach().clone();
  lora::Adapters adapters(*model);
  adapters.add("a", config().modules_to_save({"norm", "head"}));
  testing::randomize(adapters.parameters("a"));
  adapters.merge("a");
  adapters.add("b", config().modules_to_save({"head"}));
  CHECK(torch::equal(adapters.named_parameters("b")["head.weight"], head));
  CHECK_FALSE(torch::equal(model->head->weight, head));
  model->to(torch::kDouble);
  adapters.add("c", config().modules_to_save({"head"}));
  CHECK(torch::equal(adapters.named_parameters("c")["head.weight"], head.to(torch::kDouble)));
}

TEST_CASE("A module that the model has under two names is trained once; two modules with one tensor are refused") {
  struct TwiceImpl : torch::nn::Module {
    TwiceImpl() {
      for (auto name : {"first", "second"}) register_module(name, twin);
      register_module("body", body);
      register_module("other", other);
      to(testing::device());
    }
    torch::Tensor forward(const torch::Tensor& x) { return other(twin(twin(body(x)).tanh())); }
    torch::nn::Linear body{5, 6}, twin{6, 6}, other{6, 6};
  };
  torch::manual_seed(0);
  auto model = std::make_shared<TwiceImpl>();
  const auto before = snapshot(*model);
  auto x = torch::randn({3, 5}, testing::device());
  auto adapters = lora::attach(*model, config().modules_to_save({"first", "second"}));
  CHECK(adapters.adapter("default")->parts.size() == 1 + 2);
  testing::randomize(adapters.parameters());
  auto run = [&] {
    auto active = adapters.activate();
    return model->forward(x);
  };
  const auto adapted = run();
  CHECK(testing::distance(adapted, model->forward(x)) > 0.01);
  adapters.merge();
  CHECK(testing::distance(model->forward(x), adapted) < 1e-5);
  adapters.unmerge();
  CHECK(is_untouched(*model, before));
  adapters.detach();
  model->other->weight = model->twin->weight;
  CHECK_THROWS_WITH(lora::attach(*model, config().modules_to_save({"second", "other"})),
                    testing::contains("\"second.weight\" and \"other.weight\" are one tensor"));
}

TEST_CASE("What two adapters of one model trained in full is unmerged in the reverse order") {
  torch::manual_seed(0);
  Net model;
  const auto before = snapshot(*model);
  auto first = lora::attach(*model, config().modules_to_save({"head"}));
  auto second = lora::attach(*model, lora::LoRAConfig(2).target_modules({"xhead"}).modules_to_save({"head"}));
  testing::randomize(first.parameters());
  testing::randomize(second.parameters());
  first.merge();
  second.merge();
  CHECK_THROWS_WITH(first.unmerge(),
                    testing::contains("the weight of head was replaced or written after it was merged"));
  second.unmerge();
  first.unmerge();
  CHECK(is_untouched(*model, before));
}

TEST_CASE("A layer that one adapter trains in full is adapted by another, in either order") {
  struct Net : torch::nn::Module {
    torch::nn::Embedding embed = register_module("embed", torch::nn::Embedding(7, 4));
    torch::nn::Conv1d conv = register_module("conv", torch::nn::Conv1d(torch::nn::Conv1dOptions(4, 6, 3).groups(2)));
    torch::nn::Linear head = register_module("head", torch::nn::Linear(6, 5));
    torch::Tensor forward(const torch::Tensor& ids) { return head(conv(embed(ids).transpose(1, 2)).transpose(1, 2)); }
  };
  const bool full_first = GENERATE(true, false);
  auto model = std::make_shared<Net>();
  model->to(testing::device(), torch::kDouble);
  const auto ids = torch::randint(7, {2, 5}, testing::on_device(torch::kLong));
  const std::vector<std::string> layers{"embed", "conv", "head"};
  const auto full = lora::LoRAConfig(2).target_modules(lora::regex("dummy-target-modules")).modules_to_save(layers);
  const auto low_rank = lora::LoRAConfig(2).alpha(6).target_modules(layers);
  lora::Adapters adapters(*model);
  adapters.add(full_first ? "full" : "low", full_first ? full : low_rank);
  adapters.add(full_first ? "low" : "full", full_first ? low_rank : full);
  const auto base = model->forward(ids);
  const auto with = [&](const auto& what) {
    auto active = adapters.activate(what);
    return model->forward(ids);
  };
  CHECK(testing::distance(with("full"), base) < 1e-12);
  CHECK(adapters.named_parameters("low").size() == 6);
  for (const auto* name : {"full", "low"}) testing::randomize(adapters.parameters(name));
  const auto y = with("full"), z = with("low"), both = with(lora::WeightedAdapters{{"full"}, {"low", 0.5}});
  CHECK(testing::distance(y, base) > 1e-3);
  CHECK(testing::distance(z, base) > 1e-3);
  for (const auto* name : {"full", "low"}) {
    const auto expected = with(name);
    lora::MergeGuard merged(adapters, name);
    CHECK(testing::distance(model->forward(ids), expected) < 1e-12);
    if (name == std::string("full"))
      CHECK(testing::distance(with(lora::WeightedAdapters{{"full"}, {"low", 0.5}}), both) < 1e-12);
  }
  CHECK(testing::distance(model->forward(ids), base) < 1e-12);
}

TEST_CASE("Of several numbers in a name the first one is that of the layer, whatever the list is called") {
  const auto [pattern, layer, is_target] = GENERATE(table<std::string, int64_t, bool>({
      {"", 2, true},
      {"", 0, false},
      {"blocks", 2, true},
      {"experts", 0, true},
      {"experts", 2, false},
      {"(?:x*)*blocks|b", 2, true},
      {"^blocks", 2, false},
      {"^model\\.blocks", 2, true},
  }));
  INFO(pattern << " " << layer);
  auto expert = std::make_shared<torch::nn::Module>();
  expert->register_module("v_proj", torch::nn::Linear(2, 2));
  torch::nn::Module model;
  auto* inner = &model;
  for (const auto* name : {"model", "blocks", "2", "experts"})
    inner = inner->register_module(name, std::make_shared<torch::nn::Module>()).get();
  inner->register_module("0", expert);
  lora::Adapters adapters(model);
  auto config = lora::LoRAConfig(2).target_modules({"v_proj"}).layers_to_transform({layer});
  if (!pattern.empty()) config.layers_pattern({pattern});
  CHECK(testing::error_of([&] { adapters.plan(config); }).empty() == is_target);
}
