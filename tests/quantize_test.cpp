// Models whose weights are held in few bits, beside the same models with the numbers that these bits hold. What each
// kind of layer, each use of a weight, rows and combinations make of such weights is a column in the tables of those
// tests; here is what concerns a model as a whole.
#include "support/halves.hpp"
#include "support/models.hpp"

#include <lora/lora.hpp>

#include <sstream>

namespace {

using testing::contains;
using testing::distance;
using testing::error_of;
using torch::Tensor;

/// A table, a convolution and linear layers, two of which share their input.
struct MixedImpl : torch::nn::Cloneable<MixedImpl> {
  MixedImpl() { reset(); }
  void reset() override {
    tokens = register_module("tokens", torch::nn::Embedding(11, 6));
    conv = register_module("conv", torch::nn::Conv1d(torch::nn::Conv1dOptions(6, 6, 3).padding(1).groups(2)));
    up = register_module("up", torch::nn::Linear(6, 9));
    gate = register_module("gate", torch::nn::Linear(torch::nn::LinearOptions(6, 9).bias(false)));
    down = register_module("down", torch::nn::Linear(9, 6));
  }
  Tensor forward(const Tensor& ids) {
    auto x = tokens(ids);  // (batch, length, 6)
    x = x + conv(x.transpose(1, 2)).transpose(1, 2);
    return x + down(up(x).tanh() * gate(x));
  }
  torch::nn::Embedding tokens{nullptr};
  torch::nn::Conv1d conv{nullptr};
  torch::nn::Linear up{nullptr}, gate{nullptr}, down{nullptr};
};
TORCH_MODULE(Mixed);

const std::vector<std::string> kLayers{"tokens", "conv", "up", "gate", "down"};

Mixed mixed(torch::ScalarType type = torch::kDouble) {
  torch::manual_seed(0);
  Mixed model;
  model->to(testing::device(), type);
  return model;
}

/// The weights as half precision holds them.
template <class Model>
Model rounded(Model model, const std::vector<std::string>& layers = kLayers) {
  for (const auto& layer : layers) testing::round_to_half(model->named_parameters()[layer + ".weight"]);
  return model;
}

Tensor ids() { return torch::arange(10, testing::device()).view({2, 5}); }

lora::QuantizeOptions all_of_them() { return lora::QuantizeOptions().target_modules(kLayers); }

const auto kHeld = contains("is held in 16 bits (halves)");

}  // namespace

TEST_CASE("A model is held in few bits as a whole or in parts, and says what became of it") {
  auto model = mixed(torch::kFloat);
  auto layers = kLayers;
  SECTION("all that is asked for") {
    const auto report = lora::quantize(*model, testing::Halves(), all_of_them());
    CHECK(report.layers == kLayers);
    CHECK(report.shared.empty());
    CHECK(report.kept_elsewhere.empty());
    CHECK(report.bytes_before == 2 * report.bytes_after);
    CHECK(report.bytes_before == 4 * (11 * 6 + 6 * 3 * 3 + 3 * 6 * 9));
    const auto exact = mixed(torch::kFloat)->named_parameters(),
               held = rounded(mixed(torch::kFloat))->named_parameters();
    double lost = 0, whole = 0;
    for (const auto& layer : kLayers) {
      const auto weight = exact[layer + ".weight"].to(torch::kDouble);
      lost += (held[layer + ".weight"] - weight).pow(2).sum().item<double>();
      whole += weight.pow(2).sum().item<double>();
    }
    CHECK(report.error == testing::Approx(std::sqrt(lost / whole)).epsilon(1e-4));
    CHECK(lora::quantize(*model, testing::Halves(), all_of_them()).layers.empty());  // they are so already
  }
  SECTION("linear layers, unless they are left out") {
    layers = lora::quantize(*model, testing::Halves(), lora::QuantizeOptions().exclude_modules({"gate"})).layers;
    CHECK(layers == std::vector<std::string>{"up", "down"});
  }
  const auto expected = rounded(mixed(torch::kFloat), layers)->forward(ids());
  CHECK(distance(expected, mixed(torch::kFloat)->forward(ids())) > 1e-5);
  CHECK_THAT(error_of([&] { model->forward(ids()); }), kHeld && contains("activate"));
  {
    lora::Adapters adapters(*model);
    auto base = adapters.activate("");
    CHECK(distance(model->forward(ids()), expected) < 1e-6);
  }
  lora::dequantize(*model);
  CHECK(torch::equal(model->forward(ids()), expected));
}

TEST_CASE("What shares its weight with another layer is left as it is, unless it is named") {
  testing::Tied model;
  const auto before = model->forward(ids());
  CHECK(lora::quantize(*model, testing::Halves()).shared == std::vector<std::string>{"head"});
  CHECK(torch::equal(model->forward(ids()), before));
  testing::Tied exact;
  exact->head->weight.detach().copy_(model->head->weight.detach());
  testing::round_to_half(exact->head->weight);
  const auto report = lora::quantize(*model, testing::Halves(), lora::QuantizeOptions().target_modules({"head"}));
  CHECK(report.layers == std::vector<std::string>{"head"});
  lora::Adapters adapters(*model);
  auto base = adapters.activate("");
  CHECK(distance(model->forward(ids()), exact->forward(ids())) < 1e-6);  // both uses of it
}

TEST_CASE("What cannot be held in few bits is an error that says why, and changes nothing") {
  auto model = mixed();
  const auto before = model->forward(ids());
  const auto quantize = [&](const char* layer) {
    return error_of([&] {
      lora::quantize(*model, testing::Halves(), lora::QuantizeOptions().target_modules({layer, "down"}));
    });
  };
  CHECK_THAT(quantize("upp"), contains("upp") && contains("did you mean \"up\""));
  {
    torch::NoGradGuard no_grad;
    model->up->weight[1][2] = std::numeric_limits<double>::infinity();
  }
  CHECK_THAT(quantize("up"), contains("up has numbers that are not finite"));
  auto config = lora::LoRAConfig(2).target_modules({"up", "down"});
  CHECK_THAT(error_of([&] { lora::attach(*model, config.quantize(testing::Halves())); }), contains("not finite"));
  {
    torch::NoGradGuard no_grad;
    model->up->weight.copy_(mixed()->up->weight);
  }
  CHECK(torch::equal(model->forward(ids()), before));
  for (const auto& parameter : model->parameters()) CHECK(parameter.requires_grad());

  auto adapters = lora::attach(*model, lora::LoRAConfig(2).target_modules({"up"}));
  adapters.merge();
  CHECK_THAT(error_of([&] { adapters.quantize(*adapters.adapter("default"), testing::Halves()); }),
             contains("up is merged"));
  CHECK_THAT(error_of([&] { auto base = adapters.activate(""); }), contains("\"default\" is merged"));
}

namespace {

/// Halves, until it is asked once too often.
struct Failing {
  explicit Failing(int calls) : left(std::make_shared<int>(calls)) {}
  std::shared_ptr<const lora::QuantizedWeight> pack(const Tensor& weight) const {
    TORCH_CHECK((*left)-- > 0, "no more");
    return testing::Halves().pack(weight);
  }
  std::shared_ptr<int> left;
};

c10::weak_intrusive_ptr<c10::StorageImpl> memory_of(const Tensor& tensor) {
  return tensor.storage().getWeakStorageImpl();
}

}  // namespace

TEST_CASE("What fails while weights are packed changes nothing") {
  auto model = mixed();
  const auto before = model->forward(ids());
  const auto config = lora::LoRAConfig(2).alpha(3).target_modules({"up", "down"});
  const auto is_unchanged = [&](const std::function<void()>& call) {
    CHECK_THAT(error_of(call), contains("no more"));
    CHECK(torch::equal(model->forward(ids()), before));
    for (const auto& parameter : model->parameters()) CHECK(parameter.requires_grad());
  };
  is_unchanged([&] { lora::quantize(*model, Failing(1), all_of_them()); });
  is_unchanged([&] { lora::attach(*model, lora::LoRAConfig(config).quantize(Failing(1))); });
  is_unchanged([&] { lora::attach(*model, lora::LoRAConfig(config).quantize(Failing(1)).loftq(1)); });
  CHECK_THAT(error_of([&] { lora::quantize(*model, lora::NF4().block_size(33)); }), contains("block_size"));

  auto adapters = lora::attach(*model, config);
  testing::randomize(adapters.parameters(), 0.5);
  const auto forward = [&] {
    auto active = adapters.activate();
    return model->forward(ids());
  };
  const auto adapted = forward();
  const bool is_merged = GENERATE(false, true);
  if (is_merged) adapters.merge();
  CHECK_THAT(error_of([&] { adapters.merge_and_unload("default", Failing(1)); }), contains("no more"));
  CHECK(distance(forward(), adapted) < 1e-12);
  if (is_merged) adapters.unmerge();
  CHECK(torch::equal(forward(), adapted));
  CHECK(torch::equal(model->forward(ids()), before));
}

TEST_CASE("A weight into which somebody merged an adapter is neither packed nor unpacked nor written") {
  testing::TemporaryFolder folder;
  auto model = mixed(torch::kFloat);
  lora::save_quantized(*model, folder / "model.safetensors");
  const auto held = GENERATE(false, true);
  auto config = lora::LoRAConfig(2).target_modules({"up"});
  if (held) config.quantize(lora::NF4().block_size(32));
  auto adapters = lora::attach(*model, config);
  testing::randomize(adapters.parameters(), 0.5);
  adapters.merge();
  const auto merged = model->forward(ids());
  const auto says = [](const std::function<void()>& call) { CHECK_THAT(error_of(call), contains("merge")); };
  says([&] { lora::quantize(*model, testing::Halves()); });
  says([&] { lora::attach(*model, lora::LoRAConfig(2).target_modules({"up"}).quantize(lora::Int8())); });
  says([&] { lora::load_quantized(*model, folder / "model.safetensors"); });
  says([&] { lora::save_quantized(*model, folder / "other.safetensors"); });
  if (held) says([&] { lora::dequantize(*model); });
  if (!held) lora::dequantize(*model);  // there is nothing to do
  CHECK(torch::equal(model->forward(ids()), merged));
  adapters.unmerge();
  adapters.detach();
  CHECK(lora::quantize(*model, testing::Halves(), lora::QuantizeOptions().target_modules({"up"})).layers.size() == 1);
}

TEST_CASE("Inside of a scope weights that it adapts do not change how they are held") {
  testing::TemporaryFolder folder;
  auto model = mixed(torch::kFloat), second = mixed(torch::kFloat);
  lora::save_quantized(*model, folder / "model.safetensors");
  auto config = lora::LoRAConfig(2).target_modules({"up"});
  const bool held = GENERATE(false, true);
  if (held) config.quantize(lora::NF4().block_size(32));
  auto adapters = lora::attach(*model, config);
  testing::randomize(adapters.parameters(), 0.5);
  const auto refused = [&](const std::function<void()>& call) {
    CHECK_THAT(error_of(call), contains("leave the scope first"));
  };
  auto active = adapters.activate();
  const auto adapted = model->forward(ids());
  if (held) refused([&] { lora::dequantize(*model); });
  if (held) refused([&] { adapters.merge(); });
  if (held) refused([&] { adapters.merge_and_unload(); });
  if (!held) refused([&] { lora::quantize(*model, testing::Halves()); });
  if (!held) refused([&] { adapters.quantize(*adapters.adapter("default"), testing::Halves()); });
  refused([&] { adapters.merge_and_unload("default", testing::Halves()); });
  refused([&] { lora::load_quantized(*model, folder / "model.safetensors"); });
  CHECK(torch::equal(model->forward(ids()), adapted));

  lora::quantize(*second, testing::Halves());  // another model is free to
  CHECK_THAT(error_of([&] { second->to(torch::kDouble); }), contains("leave the scope first"));
  CHECK(lora::detail::is_quantized(second->up->weight));
}

TEST_CASE("Packing frees the numbers, whoever saw them before") {
  auto model = mixed();
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).target_modules({"up"}));
  {
    auto active = adapters.activate();  // whose set is kept
    model->forward(ids()).sum().backward();
  }
  const auto former = memory_of(model->up->weight);
  const bool by_adapters = GENERATE(false, true);
  if (by_adapters) {
    adapters.add("more", lora::LoRAConfig(2).target_modules({"up"}).quantize(testing::Halves()));
  } else {
    CHECK(lora::quantize(*model, testing::Halves()).kept_elsewhere.empty());
  }
  CHECK(former.expired());

  auto other = mixed();
  const auto kept = other->up->weight.detach();
  const auto report = lora::quantize(*other, testing::Halves(), lora::QuantizeOptions().target_modules({"up", "gate"}));
  CHECK(report.kept_elsewhere == std::vector<std::string>{"up"});
  CHECK(report.bytes_after == 2 * (2 * 6 * 9) + 8 * 6 * 9);

  auto trained = mixed();
  trained->forward(ids()).sum().backward();
  CHECK(trained->up->weight.grad().defined());
  lora::quantize(*trained, testing::Halves());
  CHECK_FALSE(trained->up->weight.grad().defined());
  CHECK_FALSE(trained->up->weight.requires_grad());
  auto copy = std::dynamic_pointer_cast<MixedImpl>(trained->clone());
  CHECK_FALSE(copy->up->weight.requires_grad());
}

TEST_CASE("What an adapter trains in full, and bare parameters") {
  auto model = mixed();
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).target_modules({"up"}).modules_to_save({"down"}));
  adapters.merge_and_unload("default", testing::Halves());
  CHECK(lora::detail::is_quantized(model->up->weight));
  CHECK_FALSE(lora::detail::is_quantized(model->down->weight));

  struct Experts : torch::nn::Module {
    Tensor weights = register_parameter("weights", torch::randn({3, 4, 5}, testing::on_device(torch::kDouble)));
  } experts;
  const auto numbers = experts.weights.detach().to(torch::kHalf).to(torch::kDouble);
  const auto options =
      lora::QuantizeOptions().target_modules(std::vector<std::string>{}).target_parameters({"weights"});
  CHECK(lora::quantize(experts, testing::Halves(), options).layers == std::vector<std::string>{"weights"});
  {
    lora::Adapters none(experts);
    auto base = none.activate("");
    const auto x = torch::randn({2, 5}, testing::on_device(torch::kDouble)).requires_grad_();
    const auto y = torch::linear(x, experts.weights[1]), wanted = torch::linear(x, numbers[1]);
    CHECK(distance(y, wanted) < 1e-12);
    CHECK(distance(torch::autograd::grad({y.sin().sum()}, {x})[0],
                   torch::autograd::grad({wanted.sin().sum()}, {x})[0]) < 1e-12);
  }
  lora::dequantize(experts);
  CHECK(torch::equal(experts.weights, numbers));
}

TEST_CASE("A traced product with a weight in few bits has its numbers as a constant") {
  auto model = mixed(torch::kFloat), exact = rounded(mixed(torch::kFloat));
  lora::quantize(*model, testing::Halves(), all_of_them());
  lora::Adapters adapters(*model);
  const auto x = torch::randn({2, 6}, testing::device());
  for (auto& parameter : model->parameters()) parameter.requires_grad_(false);  // which no constant may
  torch::jit::Stack inputs{x};
  const auto traced = [&] {
    auto base = adapters.activate("");
    return torch::jit::tracer::trace(
               inputs, [&](torch::jit::Stack stack) { return torch::jit::Stack{model->up(stack[0].toTensor())}; },
               [](const auto&) { return ""; })
        .first;
  }();
  torch::jit::GraphFunction function("up", traced->graph, nullptr);
  torch::jit::Stack other{torch::randn({3, 6}, testing::device())};
  const auto wanted = exact->up(other[0].toTensor());
  function.run(other);
  CHECK(distance(other[0].toTensor(), wanted) < 1e-5);
}

TEST_CASE("Every method trains on weights that are held in few bits as on their numbers") {
  const auto method =
      GENERATE(from_range(std::vector<lora::MethodKind>{lora::LowRank(), lora::DoRA(), lora::VeRA(), lora::IA3()}));
  INFO(method.info().name);
  const bool is_for_linear = method.info().name == "VeRA" || method.info().name == "IA3";
  const auto layers = is_for_linear ? std::vector<std::string>{"up", "gate", "down"} : kLayers;
  auto model = mixed(), exact = rounded(mixed(), layers);
  auto config = lora::LoRAConfig(2).alpha(3).target_modules(layers).method(method);
  auto expected = lora::attach(*exact, config);
  auto adapters = lora::attach(*model, config.quantize(testing::Halves()));
  const auto same = [&](double tolerance) {
    auto active = adapters.activate(), beside = expected.activate();
    const auto found = model->forward(ids()), wanted = exact->forward(ids());
    CHECK(distance(found, wanted) < tolerance);
  };
  same(1e-12);  // also where first values are taken from the weights
  testing::randomize(adapters.parameters(), 0.5);
  testing::copy_numbers(adapters, expected);
  same(1e-12);
  const auto loss = [](Mixed& of, lora::Adapters& attached) {
    auto active = attached.activate();
    return of->forward(ids()).sin().sum();
  };
  const auto found = torch::autograd::grad({loss(model, adapters)}, adapters.parameters());
  const auto wanted = torch::autograd::grad({loss(exact, expected)}, expected.parameters());
  for (size_t i = 0; i < found.size(); ++i) CHECK(distance(found[i], wanted[i]) < 1e-10);
  const bool has_slope = method.info().name != "DoRA";  // whose gradients leave the norm out
  if (has_slope) CHECK(testing::gradient_error([&] { return loss(model, adapters); }, adapters.parameters()) < 1e-6);

  testing::TemporaryFolder folder;
  adapters.save(folder.path());
  auto other = mixed();
  lora::quantize(*other, testing::Halves(), lora::QuantizeOptions().target_modules(layers));
  auto loaded = lora::load_adapter(*other, folder.path());
  {
    auto active = loaded.activate(), beside = expected.activate();
    CHECK(distance(other->forward(ids()), exact->forward(ids())) < 1e-5);  // files hold floats
  }
  loaded.detach();
  CHECK_THAT(error_of([&] { other->forward(ids()); }), kHeld);  // as it was found

  expected.merge();
  adapters.merge();
  CHECK(distance(model->forward(ids()), exact->forward(ids())) < 1e-12);
  adapters.unmerge();
  CHECK_THAT(error_of([&] { model->forward(ids()); }), kHeld);
  adapters.save_merged(folder / "merged.safetensors");
  const auto merged = lora::read_safetensors(folder / "merged.safetensors");
  CHECK(distance(merged.at("up.weight"), exact->up->weight) < 1e-12);
  adapters.merge_and_unload();
  CHECK(distance(model->forward(ids()), exact->forward(ids())) < 1e-12);
}

TEST_CASE("A merged weight is held in few bits again, and what that loses is told") {
  auto model = mixed(), exact = mixed();
  const auto scheme = lora::NF4().block_size(32);
  auto config = lora::LoRAConfig(2).alpha(3).target_modules({"up", "conv"}).bias(lora::Bias::kAll);
  auto adapters = lora::attach(*model, config), expected = lora::attach(*exact, config);
  testing::randomize(adapters.parameters(), 0.5);
  testing::copy_numbers(adapters, expected);
  const bool is_merged_before = GENERATE(false, true);
  if (is_merged_before) adapters.merge();
  const auto lost = adapters.merge_and_unload("default", scheme);
  expected.merge_and_unload();
  const auto report = lora::quantize(*exact, scheme, lora::QuantizeOptions().target_modules({"up", "conv"}));
  CHECK(lost == testing::Approx(report.error));
  CHECK((lost > 0.01 && lost < 0.2));
  CHECK(adapters.names().empty());
  lora::Adapters held(*model), beside(*exact);
  auto base = held.activate(""), other_base = beside.activate("");
  CHECK(distance(model->forward(ids()), exact->forward(ids())) < 1e-12);
}

TEST_CASE("Nothing is merged, nor held in few bits, when one of the updates is not finite") {
  auto model = mixed();
  auto config = lora::LoRAConfig(2).alpha(3).target_modules({"up", "conv"}).bias(lora::Bias::kAll);
  auto adapters = lora::attach(*model, config);
  testing::randomize(adapters.parameters(), 0.5);
  const auto before = model->forward(ids());
  {
    torch::NoGradGuard no_grad;
    adapters.named_parameters()[GENERATE("up.lora_B", "conv.bias")].flatten()[0] = INFINITY;
  }
  CHECK_THAT(error_of([&] { adapters.merge_and_unload("default", lora::NF4()); }), contains("not finite"));
  CHECK(adapters.names() == std::vector<std::string>{"default"});
  CHECK(torch::equal(model->forward(ids()), before));
}

TEST_CASE(
    "Backward says that a weight in few bits was merged since the forward pass, and goes on after unmerging anew") {
  auto model = mixed();
  auto config = lora::LoRAConfig(2).target_modules({"up", "down"}).method(lora::DoRA());
  auto adapters = lora::attach(*model, config.quantize(testing::Halves()));
  testing::randomize(adapters.parameters(), 0.5);
  testing::Warnings warnings;
  const auto forward = [&] {
    auto active = adapters.activate();
    return model->forward(ids()).sum();
  };
  const auto before = forward();
  const auto x = torch::randn({2, 6}, testing::on_device(torch::kDouble)).requires_grad_();
  const auto alone = [&] {
    auto active = adapters.activate();
    return torch::linear(x, model->up->weight).sum();
  }();
  const auto gradients = torch::autograd::grad({before}, adapters.parameters());
  adapters.merge();
  CHECK_THAT(error_of([&] { alone.backward(); }), contains("modified by an inplace operation"));
  adapters.unmerge();
  const auto after = forward();
  CHECK(torch::equal(after, before));
  CHECK(distance(torch::autograd::grad({after}, adapters.parameters()), gradients) == 0);
  CHECK(warnings.texts.empty());  // nobody else wrote to the weights
}

TEST_CASE("Where the bits lose nothing LoftQ leaves A and B as they start") {
  auto model = mixed();
  const auto type = model->up->weight.scalar_type();
  model->to(torch::kBFloat16);
  model->to(type);
  const auto before = model->forward(ids());
  auto config = lora::LoRAConfig(2).target_modules({"up", "conv"}).quantize(lora::Lossless()).loftq(2);
  auto adapters = lora::attach(*model, config);
  auto active = adapters.activate();
  CHECK(distance(model->forward(ids()), before) < 1e-6);
  for (const auto& item : adapters.named_parameters()) {
    INFO(item.key());
    const bool is_first = item.key().find("lora_A") != std::string::npos;
    CHECK(item.value().any().item<bool>() == is_first);
  }
}

TEST_CASE("An error of a way of packing says which weight it is") {
  auto model = mixed();
  const auto options = lora::QuantizeOptions().target_modules({"up"});
  const auto says = [](const std::string& name, const std::function<void()>& call) {
    CHECK_THAT(error_of(call),
               contains("not numbers of bfloat16") && contains("while \"" + name + "\" was to be held in few bits"));
  };
  auto config = lora::LoRAConfig(2).target_modules({"up"}).quantize(lora::Lossless());
  says("up", [&] { lora::quantize(*model, lora::Lossless(), options); });
  says("up", [&] { lora::attach(*model, config); });
  says("up", [&] { lora::attach(*model, config.loftq(1)); });
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).target_modules({"up"}));
  says("up", [&] { adapters.merge_and_unload("default", lora::Lossless()); });
  CHECK(adapters.names() == std::vector<std::string>{"default"});
  testing::TemporaryFolder folder;
  auto other = mixed();
  lora::save_quantized(*model, folder / "model.safetensors");
  says("up.weight", [&] { lora::load_quantized(*other, folder / "model.safetensors", lora::Lossless(), options); });
}

TEST_CASE("LoftQ starts A and B with what the few bits lose, whatever alpha is") {
  const std::vector<std::string> layers{"tokens", "conv", "up"};
  const auto weights = [](Mixed& of) {
    return std::vector<Tensor>{of->tokens->weight, of->conv->weight, of->up->weight};
  };
  std::vector<Tensor> exact;
  auto original = mixed();
  for (const auto& weight : weights(original)) exact.push_back(weight.detach().clone());
  const auto scheme = lora::NF4().block_size(32);
  std::vector<std::vector<double>> losses;  // of each number of steps, for each layer
  for (int64_t steps : {0, 1, 5}) {
    auto model = mixed();
    auto config = lora::LoRAConfig(2).alpha(5).target_modules(layers).quantize(scheme).loftq(steps);
    auto adapters = lora::attach(*model, config);
    losses.emplace_back();
    const auto held = weights(model);
    for (size_t i = 0; i < layers.size(); ++i) {
      const auto near = lora::detail::dequantized(held[i]) + adapters.delta("default", layers[i]);
      losses.back().push_back((near - exact[i]).norm().item<double>());
      if (steps != 1) continue;  // the largest singular values are gone, the others are left
      const auto& view = adapters.sites()[i]->view();
      const auto lost = lora::dequantize(lora::quantize_nf4(exact[i], scheme)).to(testing::device(), torch::kDouble);
      const auto rank = adapters.adapter("default")->parts[i].method->tensors()[0].tensor->size(-2);
      const auto values = torch::linalg_svdvals(view.matrix(exact[i] - lost));
      const auto rest = values.narrow(-1, rank, values.size(-1) - rank);
      CHECK(losses.back().back() == testing::Approx(rest.norm().item<double>()).margin(1e-9));
    }
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    INFO(layers[i]);
    CHECK(losses[1][i] < losses[0][i]);
    CHECK(losses[2][i] < losses[0][i]);
    CHECK(losses[2][i] != losses[1][i]);  // the steps differ
  }

  auto model = mixed();
  auto config = lora::LoRAConfig(2).target_modules({"up"}).quantize(scheme).loftq(1);
  CHECK_THAT(error_of([&] { lora::attach(*model, config.method(lora::DoRA())); }),
             contains("loftq") && contains("DoRA"));
  CHECK_THAT(error_of([&] { lora::attach(*model, config.method(lora::LowRank()).loftq(-1)); }), contains("but got -1"));
  CHECK_THAT(error_of([&] { lora::attach(*model, lora::LoRAConfig(2).target_modules({"up"}).loftq(1)); }),
             contains("needs `quantize`"));
  CHECK_THAT(error_of([&] { lora::attach(*model, config.loftq(1).alpha(0)); }), contains("alpha = 0"));
  config.alpha(8);
  model->forward(ids());  // has its numbers still
  lora::quantize(*model, scheme, lora::QuantizeOptions().target_modules({"up"}));
  CHECK_THAT(error_of([&] { lora::attach(*model, config.loftq(1)); }), contains("\"up\" are held in few bits already"));
}

TEST_CASE("detach gives numbers back to the weights that were held in few bits for adapters") {
  auto model = mixed();
  auto expected = rounded(mixed());
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).target_modules(kLayers).quantize(testing::Halves()));
  CHECK(adapters.report().base_bytes == 2 * (11 * 6 + 6 * 3 * 3 + 3 * 6 * 9) + 8 * (6 + 9 + 6));
  adapters.add("more", lora::LoRAConfig(2).target_modules({"up"}).quantize(testing::Halves()));
  adapters.detach();
  CHECK(torch::equal(model->forward(ids()), expected->forward(ids())));
  for (const auto& parameter : model->parameters()) CHECK(parameter.requires_grad());
}

TEST_CASE("Moving, casting and cloning a model leave its weights in few bits") {
  auto model = mixed(torch::kFloat), exact = rounded(mixed(torch::kFloat));
  const auto report = lora::quantize(*model, testing::Halves(), all_of_them());
  CHECK(report.layers == kLayers);
  const auto bytes = [](Mixed& of) {
    int64_t sum = 0;
    for (const auto& parameter : of->parameters()) sum += lora::detail::held_bytes(parameter);
    return sum;
  };
  const auto before = bytes(model);
  const auto same = [&](Mixed& of, double tolerance) {
    lora::Adapters adapters(*of);
    auto base = adapters.activate("");
    return distance(of->forward(ids()), exact->forward(ids())) < tolerance;
  };
  SECTION("to another type") {
    model->to(torch::kDouble);
    exact->to(torch::kDouble);
    CHECK(same(model, 1e-12));
    CHECK(bytes(model) == before + 4 * (6 + 9 + 6));  // the biases
  }
  SECTION("to the device of the suite and back") {
    model->to(torch::kCPU);
    CHECK(model->up->weight.device() == torch::kCPU);
    model->to(testing::device());
    CHECK(model->up->weight.device() == testing::device());
    CHECK(same(model, 1e-4));
  }
  SECTION("into a copy") {
    Mixed copy(std::dynamic_pointer_cast<MixedImpl>(model->clone()));
    CHECK(same(copy, 1e-4));
    CHECK(same(model, 1e-4));
    lora::dequantize(*copy);
    CHECK_THAT(error_of([&] { model->forward(ids()); }), kHeld);
  }
  SECTION("a part of a weight is no copy of it") {
    CHECK_THAT(error_of([&] { model->up->weight.t().clone(); }), kHeld);
    CHECK_THAT(error_of([&] { model->up->weight.narrow(0, 0, 2).clone(); }), kHeld);
  }
  SECTION("in scopes they stay") {
    lora::Adapters adapters(*model);
    adapters.add("default", lora::LoRAConfig(2).target_modules(kLayers));
    auto active = adapters.activate();
    CHECK_THAT(error_of([&] { model->to(torch::kDouble); }), contains("inside of a scope"));
  }
  SECTION("files of LibTorch would need the numbers") {
    std::ostringstream file;
    CHECK_THAT(error_of([&] { torch::save(model, file); }), kHeld && contains("save_quantized"));
  }
}

TEST_CASE("Second derivatives pass through products with weights in few bits") {
  auto model = mixed(), exact = rounded(mixed());
  lora::quantize(*model, testing::Halves(), lora::QuantizeOptions().target_modules({"up", "down"}));
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).alpha(3).target_modules({"down"}));
  testing::randomize(adapters.parameters(), 0.5);
  const auto second = [&](Mixed& of, const Tensor& x, bool adapted) {
    auto y = of->down(of->up(x).tanh());
    if (adapted) y = y + torch::linear(of->up(x).tanh(), adapters.delta("default", "down"));
    const auto first = torch::autograd::grad({y.sin().sum()}, {x}, {}, true, /*create_graph=*/true)[0];
    return torch::autograd::grad({first.pow(2).sum()}, {x})[0];
  };
  const auto x = torch::randn({4, 6}, testing::on_device(torch::kDouble)).requires_grad_();
  const auto wanted = second(exact, x, true);
  auto active = adapters.activate();
  CHECK(distance(second(model, x, false), wanted) < 1e-11);
}

TEST_CASE("Products with weights in few bits take any input that those with numbers take") {
  auto model = mixed(torch::kFloat), exact = rounded(mixed(torch::kFloat));
  lora::quantize(*model, testing::Halves(), all_of_them());
  lora::Adapters adapters(*model);
  auto base = adapters.activate("");
  const auto floats = testing::on_device(torch::kFloat);
  for (const auto& sizes :
       std::vector<std::vector<int64_t>>{{6}, {1, 6}, {2, 6}, {0, 6}, {3, 1, 6}, {2, 0, 6}, {2, 3, 4, 6}}) {
    CAPTURE(sizes);
    const auto x = torch::randn(sizes, floats);
    CHECK(model->up(x).sizes() == exact->up(x).sizes());
    CHECK(distance(model->up(x), exact->up(x)) < 1e-5);
    CHECK(distance(model->gate(x), exact->gate(x)) < 1e-5);
  }
  for (const auto& sizes : std::vector<std::vector<int64_t>>{{}, {1}, {9}, {1, 9}, {4, 1}, {4, 9}}) {  // of a bias
    CAPTURE(sizes);
    const auto bias = torch::randn(sizes, floats).requires_grad_();
    const auto rows = torch::randn({4, 6}, floats);
    const auto added = [&](const Tensor& weight) {
      const auto y = torch::addmm(bias, rows, weight.t());
      return std::pair(y.detach(), torch::autograd::grad({y.sin().sum()}, {bias})[0]);
    };
    const auto found = added(model->up->weight), wanted = added(exact->up->weight);
    CHECK(distance(found.first, wanted.first) < 1e-5);
    CHECK(distance(found.second, wanted.second) < 1e-5);
  }
  const auto x = torch::randn({6, 5}, floats).t();  // not contiguous
  CHECK(distance(model->up(x), exact->up(x)) < 1e-5);
  CHECK(distance(x.matmul(model->up->weight.narrow(0, 2, 3).t()), x.matmul(exact->up->weight.narrow(0, 2, 3).t())) <
        1e-5);
  CHECK(distance(torch::ones({2, 3}, floats).mm(model->up->weight.narrow(0, 2, 3)),
                 torch::ones({2, 3}, floats).mm(exact->up->weight.narrow(0, 2, 3))) < 1e-5);
  CHECK_THAT(error_of([&] { model->up(x.to(torch::kDouble)); }), contains("of the type Double") && contains("up"));
  CHECK_THAT(error_of([&] { model->up(torch::ones({2, 5}, floats)); }), contains("do not fit"));
  if (testing::device().is_cuda()) return;  // whose kernels abort for such an index, and after that nothing works
  CHECK_THAT(error_of([&] { model->tokens(torch::tensor({11}, testing::device())); }), contains("index"));
}

TEST_CASE("A weight that is larger than a panel is multiplied with a part at a time") {
  torch::manual_seed(5);
  const auto [features, outputs] = GENERATE(table<int64_t, int64_t>({{1100, 1000}, {70, 17000}}));  // the second a head
  torch::nn::Sequential model(torch::nn::Linear(features, outputs)), exact(torch::nn::Linear(features, outputs));
  model->to(testing::device());
  exact->to(testing::device());
  const auto scheme =
      GENERATE(from_range(std::vector<lora::Quantization>{lora::NF4(), lora::Int8(), lora::Lossless()}));
  {
    torch::NoGradGuard no_grad;
    for (auto& parameter : model->parameters()) parameter.copy_(parameter.to(torch::kBFloat16));
  }
  lora::quantize(*model, scheme);
  CHECK(features * outputs > lora::detail::kPanel);
  auto& held = *model[0]->as<torch::nn::Linear>();
  auto& numbers = *exact[0]->as<torch::nn::Linear>();
  numbers.weight.set_data(lora::detail::dequantized(held.weight));
  numbers.bias.set_data(held.bias.detach());
  lora::Adapters adapters(*model);
  auto base = adapters.activate("");
  for (int64_t rows : {1, 2, 3, 40}) {
    CAPTURE(rows);
    const auto x = torch::randn({rows, features}, testing::device()).requires_grad_();
    const auto slope = [&](torch::nn::Sequential& of) {
      const auto y = of->forward(x);
      return std::pair(y.detach(), torch::autograd::grad({y.sin().sum()}, {x})[0]);
    };
    const auto found = slope(model), wanted = slope(exact);
    CHECK(distance(found.first, wanted.first) < 1e-5);
    CHECK(distance(found.second, wanted.second) < 1e-5 * std::max(1.0, wanted.second.abs().max().item<double>()));
  }
}

TEST_CASE("Layers of the library hold their weights in few bits, too") {
  const auto doubles = testing::on_device(torch::kDouble);
  struct Stack : torch::nn::Module {
    Stack() {
      to(testing::device(), torch::kDouble);
      testing::randomize(lora::trainable_parameters(*this), 0.5);
    }
    Tensor forward(const Tensor& x) { return last(attention(x) + conv(x.transpose(1, 2)).transpose(1, 2)); }
    lora::LoRAAttention<> attention = register_module(
        "attention", lora::LoRAAttention<>(lora::LoRAAttentionOptions(6, 2, lora::LoRAOptions(2).alpha(3))
                                               .adapted(lora::Projections().q(true).v(true))));
    lora::LoRAConv1d<> conv =
        register_module("conv", lora::LoRAConv1d<>(torch::nn::Conv1d(torch::nn::Conv1dOptions(6, 6, 3).padding(1)),
                                                   lora::LoRAOptions(2).alpha(3)));
    lora::LoRALinear<> last =
        register_module("last", lora::LoRALinear<>(torch::nn::Linear(6, 5), lora::LoRAOptions(2).alpha(3)));
  };
  torch::manual_seed(3);
  Stack model;
  torch::manual_seed(3);
  Stack exact;
  const std::vector<std::string> layers{
      "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "conv", "last"};
  rounded(&exact, layers);
  const auto report = lora::quantize(model, testing::Halves(), lora::QuantizeOptions().target_modules(layers));
  CHECK(report.layers == layers);
  const auto x = torch::randn({2, 4, 6}, doubles);
  const auto adapted = exact.forward(x);
  CHECK(distance(model.forward(x), adapted) < 1e-12);
  CHECK(testing::gradient_error([&] { return model.forward(x).sin().sum(); }, lora::trainable_parameters(model)) <
        1e-6);
  auto adapters = lora::adapters_of(model), expected = lora::adapters_of(exact);
  {
    auto active = adapters.activate(), beside = expected.activate();
    CHECK(distance(model.forward(x), adapted) < 1e-12);
  }
  {
    auto base = adapters.activate(""), beside = expected.activate("");
    CHECK(distance(model.forward(x), exact.forward(x)) < 1e-12);
    CHECK(distance(model.forward(x), adapted) > 1e-3);
  }
  torch::nn::MultiheadAttention packed(6, 2);
  lora::quantize(*torch::nn::Sequential(packed), testing::Halves(), lora::QuantizeOptions().target_modules({"0"}));
  CHECK_THAT(error_of([&] { lora::LoRAAttention<>(packed, lora::LoRAOptions(2)); }), contains("wrap the layer first"));
  model.last->merge();
  CHECK(distance(model.forward(x), adapted) < 1e-12);
  model.last->unmerge();
}

TEST_CASE("A TorchScript module is held in few bits as any model") {
  const auto make = [] {
    torch::jit::Module model("m");
    torch::manual_seed(0);
    model.register_parameter("weight", torch::randn({5, 4}, testing::device()), false);
    model.define("def forward(self, x):\n  return torch.matmul(x, self.weight.t()).tanh() @ self.weight\n");
    return model;
  };
  auto model = make(), exact = make();
  testing::round_to_half(exact.attr("weight").toTensor());
  auto config = lora::LoRAConfig(2).alpha(3).target_parameters({"weight"});
  auto expected = lora::attach(exact, config);
  auto adapters = lora::attach(model, config.quantize(testing::Halves()));
  testing::randomize(adapters.parameters(), 0.5);
  testing::copy_numbers(adapters, expected);
  const auto x = torch::randn({3, 4}, testing::device());
  for (int pass = 0; pass < 3; ++pass) {
    auto active = adapters.activate(), beside = expected.activate();
    CHECK(distance(model.forward({x}).toTensor(), exact.forward({x}).toTensor()) < 1e-5);
  }
  CHECK_THROWS_WITH(model.forward({x}), kHeld);
  adapters.detach();
  expected.detach();
  CHECK(distance(model.forward({x}).toTensor(), exact.forward({x}).toTensor()) < 1e-6);
}

TEST_CASE("Under autocast products with weights in few bits are computed in its type") {
  if (!testing::device().is_cpu()) return;
  auto model = mixed(torch::kFloat), exact = rounded(mixed(torch::kFloat));
  lora::quantize(*model, testing::Halves(), all_of_them());
  lora::Adapters adapters(*model);
  auto base = adapters.activate("");
  const auto x = torch::randn({3, 6}).requires_grad_();
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const auto found = model->up(x), wanted = exact->up(x);
  const auto slope = torch::autograd::grad({found.sum()}, {x})[0],
             expected = torch::autograd::grad({wanted.sum()}, {x})[0];
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  CHECK(found.scalar_type() == torch::kBFloat16);
  CHECK(slope.scalar_type() == torch::kFloat);
  CHECK(distance(found, wanted) < 0.05);
  CHECK(distance(slope, expected) < 0.05);
}
