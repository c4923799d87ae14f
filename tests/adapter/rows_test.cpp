// A different adapter for each row of a batch: every kind of layer and method against each adapter alone.
#include "support/halves.hpp"
#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/modules/linear.hpp>

#include <utility>

namespace {

using torch::Tensor;
namespace nn = torch::nn;
using Names = std::vector<std::string>;
using testing::contains;
using testing::distance;
using testing::error_of;

constexpr int64_t kRows = 6;

torch::TensorOptions doubles() { return testing::on_device(torch::kDouble); }
Tensor numbers(std::vector<int64_t> sizes) { return torch::randint(7, sizes, testing::on_device(torch::kLong)); }

/// A layer in a model, its input with `kRows` rows, and the dimension of the output that counts them.
struct Kind {
  const char* name;
  std::function<std::shared_ptr<nn::Module>()> make;
  std::function<Tensor(nn::Module& layer, const Tensor& x)> run;
  std::vector<int64_t> sizes;  // of the input; of a lookup without a width
  int64_t axis = 0;
  bool is_lookup = false;
  lora::RowOptions options = {};
  std::function<void(lora::LoRAConfig&)> configure = [](lora::LoRAConfig& config) { config.target_modules({"layer"}); };

  Tensor input() const { return is_lookup ? numbers(sizes) : torch::randn(sizes, doubles()).requires_grad_(); }
};

template <class Impl>
Tensor forward(nn::Module& layer, const Tensor& x) {
  return layer.as<Impl>()->forward(x);
}

std::shared_ptr<nn::Module> linear() { return nn::Linear(5, 6).ptr(); }

Tensor attend(nn::Module& layer, const Tensor& x) {
  return std::get<0>(layer.as<nn::MultiheadAttentionImpl>()->forward(x, x.flip(0), x * 2));
}

/// Only the layer, as its own first dimension counts: what was flattened is told by the options.
lora::RowOptions flattened() { return lora::RowOptions().flattened(true); }

const std::vector<Kind>& kinds() {
  static const std::vector<Kind> all{
      {"Linear, one entry for each row", linear, forward<nn::LinearImpl>, {kRows, 5}},
      {"Linear, few", linear, forward<nn::LinearImpl>, {kRows, 3, 5}},
      {"Linear, many", linear, forward<nn::LinearImpl>, {kRows, 20, 5}},
      {"Linear, four dimensions", linear, forward<nn::LinearImpl>, {kRows, 2, 3, 5}},
      {"Linear, none", linear, forward<nn::LinearImpl>, {kRows, 0, 5}},
      {"Linear, flattened",
       linear,
       [](nn::Module& layer, const Tensor& x) {
         return forward<nn::LinearImpl>(layer, x.flatten(0, 1)).unflatten(0, {kRows, -1});
       },
       {kRows, 4, 5},
       0,
       false,
       flattened()},
      {"Linear, second dimension",
       linear,
       forward<nn::LinearImpl>,
       {3, kRows, 5},
       1,
       false,
       lora::RowOptions().axis("layer", 1)},
      {"Linear, second dimension, many",
       linear,
       forward<nn::LinearImpl>,
       {20, kRows, 5},
       1,
       false,
       lora::RowOptions().axis("layer", 1)},
      {"Linear, second of three",
       linear,
       forward<nn::LinearImpl>,
       {3, kRows, 2, 5},
       1,
       false,
       lora::RowOptions().axis("layer", 1)},
      {"Linear, second dimension flattened",
       linear,
       [](nn::Module& layer, const Tensor& x) {
         return forward<nn::LinearImpl>(layer, x.flatten(0, 1)).unflatten(0, {-1, kRows});
       },
       {4, kRows, 5},
       1,
       false,
       flattened().axis("layer", 1)},
      {"Linear without bias",
       [] { return nn::Linear(nn::LinearOptions(5, 6).bias(false)).ptr(); },
       forward<nn::LinearImpl>,
       {kRows, 3, 5}},
      {"Linear by mm",
       linear,
       [](nn::Module& layer, const Tensor& x) { return x.mm(layer.as<nn::LinearImpl>()->weight.t()); },
       {kRows, 5}},
      {"Linear of parts",
       linear,
       forward<nn::LinearImpl>,
       {kRows, 3, 5},
       0,
       false,
       {},
       [](lora::LoRAConfig& config) {
         config.target_modules({"layer"}).fused({{"layer", {2, 2, 2}, {true, false, true}}});
       }},
      {"Linear and its bias",
       linear,
       forward<nn::LinearImpl>,
       {kRows, 3, 5},
       0,
       false,
       {},
       [](lora::LoRAConfig& config) { config.target_modules({"layer"}).bias(lora::Bias::kAll); }},
      {"Linear in full",
       linear,
       forward<nn::LinearImpl>,
       {kRows, 3, 5},
       0,
       false,
       {},
       [](lora::LoRAConfig& config) {
         config.target_modules(lora::regex("dummy-target-modules")).modules_to_save({"layer"});
       }},
      {"Conv1d",
       [] { return nn::Conv1d(nn::Conv1dOptions(4, 6, 3).padding(1).groups(2)).ptr(); },
       forward<nn::Conv1dImpl>,
       {kRows, 4, 7}},
      {"Conv2d",
       [] { return nn::Conv2d(nn::Conv2dOptions(2, 3, 3).stride(2)).ptr(); },
       forward<nn::Conv2dImpl>,
       {kRows, 2, 7, 7}},
      {"Conv3d",
       [] { return nn::Conv3d(nn::Conv3dOptions(2, 3, 2)).ptr(); },
       forward<nn::Conv3dImpl>,
       {kRows, 2, 3, 3, 3}},
      {"ConvTranspose1d",
       [] { return nn::ConvTranspose1d(nn::ConvTranspose1dOptions(4, 6, 3).groups(2)).ptr(); },
       forward<nn::ConvTranspose1dImpl>,
       {kRows, 4, 7}},
      {"Embedding", [] { return nn::Embedding(7, 5).ptr(); }, forward<nn::EmbeddingImpl>, {kRows, 4}, 0, true},
      {"Embedding, one entry", [] { return nn::Embedding(7, 5).ptr(); }, forward<nn::EmbeddingImpl>, {kRows}, 0, true},
      {"MultiheadAttention", [] { return nn::MultiheadAttention(8, 2).ptr(); }, attend, {3, kRows, 8}, 1},
      {"MultiheadAttention, as long as there are rows",
       [] { return nn::MultiheadAttention(8, 2).ptr(); },
       attend,
       {kRows, kRows, 8},
       1},
      {"MultiheadAttention of widths",
       [] { return nn::MultiheadAttention(nn::MultiheadAttentionOptions(8, 2).kdim(8).vdim(8)).ptr(); },
       attend,
       {3, kRows, 8},
       1},
      {"MultiheadAttention, its output",
       [] { return nn::MultiheadAttention(8, 2).ptr(); },
       attend,
       {kRows, kRows, 8},
       1,
       false,
       {},
       [](lora::LoRAConfig& config) { config.target_modules({"out_proj"}).bias(lora::Bias::kAll); }},
  };
  return all;
}

/// Methods of which the layers compute rows apart, and the plain one.
const std::vector<lora::MethodKind>& methods() {
  static const std::vector<lora::MethodKind> all{lora::LowRank(), lora::DoRA(), lora::IA3(), lora::VeRA()};
  return all;
}

struct Holder : nn::Module {
  explicit Holder(std::shared_ptr<nn::Module> layer) {
    register_module("layer", std::move(layer));
    to(testing::device(), torch::kDouble);
    eval();
  }
  nn::Module& layer() { return *children().front(); }
};

/// Adds adapters "a" and "b" of different ranks; false where the layer cannot have such.
bool add_adapters(lora::Adapters& adapters, const Kind& kind, const lora::MethodKind& method, double dropout = 0) {
  try {
    for (const auto& name : {"a", "b"}) {
      auto config = lora::LoRAConfig(*name == 'a' ? 2 : 4).alpha(6).dropout(dropout).method(method);
      kind.configure(config);
      adapters.add(name, config);
      testing::randomize(adapters.parameters(name));
    }
  } catch (const c10::Error&) {
    return false;
  }
  return true;
}

std::vector<Tensor> gradients(const lora::Adapters& adapters) {
  std::vector<Tensor> all;
  for (auto& parameter : adapters.parameters()) {
    all.push_back(parameter.grad().defined() ? parameter.grad().clone() : torch::zeros_like(parameter));
    parameter.mutable_grad() = Tensor();
  }
  return all;
}

}  // namespace

TEST_CASE("Each row of a batch is computed with its own adapter, and trains it") {
  const auto& kind = GENERATE(from_range(kinds()));
  const auto& method = GENERATE(from_range(methods()));
  const auto& rows =
      GENERATE(Names{"a", "", "b", "b", "a", "b"}, Names{"a", "a", "a", "b", "b", "b"}, Names{"", "", "b", "", "", ""},
               Names{"a", "a", "a", "a", "a", "a"}, Names{"b", "a", "b", "a", "b", "a"});
  const bool is_held = GENERATE(false, true);  // in few bits
  INFO(kind.name << ", " << method.info().name << (is_held ? ", in few bits" : ""));
  Holder model(kind.make());
  lora::Adapters adapters(model);
  if (!add_adapters(adapters, kind, method)) return;
  if (is_held) {
    for (const auto& name : adapters.names()) adapters.quantize(*adapters.adapter(name), testing::Halves());
  }

  const auto x = kind.input();
  auto forward_alone = [&](const std::string& name) {
    if (name.empty() && !is_held) return kind.run(model.layer(), x);
    auto active = adapters.activate(name);
    return kind.run(model.layer(), x);
  };
  auto mixed = [&] {
    auto active = adapters.activate(rows, kind.options);
    return kind.run(model.layer(), x);
  }();
  const auto factor = torch::randn_like(mixed);
  (mixed * factor).sum().backward();
  const auto found = gradients(adapters);
  const auto found_x = kind.is_lookup ? Tensor() : x.grad().clone();
  if (x.requires_grad()) x.mutable_grad() = Tensor();

  auto loss = torch::zeros({}, doubles());
  for (int64_t row = 0; row < kRows; ++row) {
    const auto alone = forward_alone(rows[static_cast<size_t>(row)]).select(kind.axis, row);
    CHECK(distance(mixed.select(kind.axis, row), alone) < 1e-12);
    loss = loss + (alone * factor.select(kind.axis, row)).sum();
  }
  loss.backward();
  const auto expected = gradients(adapters);
  for (size_t i = 0; i < expected.size(); ++i) CHECK(distance(found[i], expected[i]) < 1e-11);
  if (!kind.is_lookup) CHECK(distance(found_x, x.grad()) < 1e-11);
}

TEST_CASE("The adapters of the kinds of layers are all tried") {
  for (const auto& kind : kinds()) {
    INFO(kind.name);
    Holder model(kind.make());
    lora::Adapters adapters(model);
    CHECK(add_adapters(adapters, kind, lora::LowRank()));
  }
}

TEST_CASE("Dropout of a row is that of its adapter") {
  const auto& kind = kinds()[static_cast<size_t>(GENERATE(range(0, 12)))];
  INFO(kind.name);
  Holder model(kind.make());
  model.train();
  lora::Adapters adapters(model);
  REQUIRE(add_adapters(adapters, kind, lora::LowRank(), /*dropout=*/0.5));
  const auto x = kind.input();
  torch::NoGradGuard no_grad;
  const auto base = kind.run(model.layer(), x);
  auto mean = torch::zeros_like(base);
  constexpr int kTimes = 2000;
  for (int i = 0; i < kTimes; ++i) {
    auto active = adapters.activate(Names{"a", "", "b", "", "a", "b"}, kind.options);
    mean += kind.run(model.layer(), x) / kTimes;
  }
  model.eval();
  auto active = adapters.activate(Names{"a", "", "b", "", "a", "b"}, kind.options);
  const auto expected = kind.run(model.layer(), x);
  if (base.numel() == 0) return;
  CHECK(distance(mean, expected) < 0.1 * (expected - base).abs().max().item<double>() + 0.05);
  for (const int64_t row : {1, 3}) CHECK(distance(mean.select(kind.axis, row), base.select(kind.axis, row)) < 1e-12);
}

TEST_CASE("Second derivatives pass through rows") {
  for (const int64_t positions : {1, 3, 20}) {
    Holder model(linear());
    lora::Adapters adapters(model);
    REQUIRE(add_adapters(adapters, kinds().front(), lora::LowRank()));
    const auto x = torch::randn({kRows, positions, 5}, doubles()).requires_grad_();
    const auto penalty = [&](const Names& rows) {
      auto active = adapters.activate(rows);
      const auto y = forward<nn::LinearImpl>(model.layer(), x).sigmoid();
      const auto gradient = torch::autograd::grad({y.pow(2).sum()}, {x}, {}, true, true).front();
      gradient.pow(2).sum().backward();
      auto all = gradients(adapters);
      all.push_back(x.grad().clone());
      x.mutable_grad() = Tensor();
      return all;
    };
    const auto mixed = penalty({"a", "b", "a", "b", "a", "b"});
    std::vector<Tensor> apart;
    for (const auto* name : {"a", "b"}) {
      Names rows(kRows, "");
      for (size_t row = *name == 'a' ? 0 : 1; row < kRows; row += 2) rows[row] = name;
      const auto own = penalty(rows);
      for (size_t i = 0; i + 1 < own.size(); ++i) {
        if (apart.size() <= i) apart.push_back(torch::zeros_like(own[i]));
        apart[i] += own[i];
      }
    }
    for (size_t i = 0; i < apart.size(); ++i) CHECK(distance(mixed[i], apart[i]) < 1e-11);
  }
}

TEST_CASE("Adapters of other types than the layer's, and those of several scopes, act on their rows") {
  testing::Stack model;
  const auto type = GENERATE(torch::kFloat, torch::kBFloat16);
  model->to(type);
  lora::Adapters first(*model), second(*model);
  for (auto* adapters : {&first, &second}) {
    for (const auto* name : {"a", "b"}) {
      adapters->add(name, lora::LoRAConfig(2).alpha(6).target_modules({"q_proj", "lm_head"}));
      testing::randomize(adapters->parameters(name));
    }
  }
  const auto x = torch::randn({3, 4, 8}, testing::on_device(type));
  const auto precision = type == torch::kFloat ? 1e-5 : 0.2;
  const auto with = [&](const lora::Adapters& adapters, const std::string& name) {
    auto active = adapters.activate(name);
    return model->forward(x);
  };
  {
    auto active = first.activate({"a", "b", ""});
    const auto y = model->forward(x);
    CHECK(distance(y[0], with(first, "a")[0]) < precision);
    CHECK(distance(y[1], with(first, "b")[1]) < precision);
  }
  const Names names{"a", "b", "b", "", "b", "a"};  // neither side by side nor evenly spaced
  auto many = torch::randn({6, 4, 8}, testing::on_device(type)).requires_grad_();
  const auto gradients_of = [&](const Names& some, const Tensor& inputs) {
    auto active = first.activate(some);
    const auto y = model->forward(inputs);
    auto tensors = first.parameters("a");
    for (const auto& tensor : first.parameters("b")) tensors.push_back(tensor);
    tensors.push_back(inputs);
    return torch::autograd::grad({y.to(torch::kFloat).pow(2).sum()}, tensors, {}, {}, false, /*allow_unused=*/true);
  };
  const auto mixed = gradients_of(names, many);
  for (const auto* name : {"a", "b"}) {
    Names own = names;
    for (auto& each : own) each = each == name ? name : "";
    const auto apart = gradients_of(own, many);
    const size_t count = first.parameters("a").size(), begin = *name == 'a' ? 0 : count;
    for (size_t i = begin; i < begin + count; ++i) {
      CHECK(mixed[i].scalar_type() == first.parameters("a")[0].scalar_type());
      CHECK(distance(mixed[i], apart[i]) < precision / 10 * (1 + apart[i].abs().max().item<double>()));
    }
    for (int64_t row = 0; row < 6; ++row) {
      if (names[static_cast<size_t>(row)] != name) continue;
      CHECK(distance(mixed.back()[row], apart.back()[row]) <
            precision / 10 * (1 + apart.back().abs().max().item<double>()));
    }
  }
  if (type != torch::kFloat) return;
  auto outer = first.activate({"a", "a", "b"});
  auto inner = second.activate({"b", "a", "a"});
  const auto y = model->forward(x);
  auto a = first.activate("a"), b = second.activate("a");
  CHECK(distance(y[1], model->forward(x)[1]) < 1e-5);
}

TEST_CASE("Several adapters on all rows add up, each with its factor") {
  const auto& method = GENERATE(from_range(methods()));
  INFO(method.info().name);
  Holder model(linear());
  lora::Adapters adapters(model);
  REQUIRE(add_adapters(adapters, kinds().front(), method));
  const auto x = torch::randn({3, 5}, doubles());
  adapters.set_scale("b", 2);
  const auto base = kinds().front().run(model.layer(), x);
  const auto y = [&] {
    auto active = adapters.activate(lora::WeightedAdapters{{"a", 1.5}, {"b", -0.25}});
    return kinds().front().run(model.layer(), x);
  }();
  const auto sum = 1.5 * adapters.delta("a", "layer") - 0.25 * adapters.delta("b", "layer");
  const auto expected = base + x.mm(sum.t());
  if (method.info().name != std::string("IA3")) CHECK(distance(y, expected) < 1e-12);  // which scales the bias, too
  CHECK_THROWS_WITH((adapters.activate(lora::WeightedAdapters{{"a", 1.0}, {"a", 2.0}})),
                    contains("\"a\" is named twice"));
  CHECK_THROWS_WITH(adapters.activate(lora::WeightedAdapters{}), contains("no adapter is named"));
  CHECK_THROWS_WITH((adapters.activate(lora::WeightedAdapters{{"a", std::nan("")}})), contains("finite"));
}

TEST_CASE("Layers of the library leave it to the rows whether their own adapter acts") {
  nn::Sequential model(lora::LoRALinear<>(nn::Linear(5, 6), lora::LoRAOptions(2)), nn::Tanh(),
                       lora::LoRALinear<lora::DoRA>(lora::LoRALinearOptions(6, 4, lora::LoRAOptions(2))));
  model->to(testing::device());
  auto first = lora::Adapters(*model);
  CHECK_THROWS_WITH(first.adopt(), contains("one adapter is of one method"));
  nn::Sequential plain(lora::LoRALinear<>(nn::Linear(5, 6), lora::LoRAOptions(2)), nn::Tanh(),
                       lora::LoRALinear<>(nn::Linear(6, 4), lora::LoRAOptions(2)));
  plain->to(testing::device());
  auto adapters = lora::adapters_of(*plain);
  testing::randomize(adapters.parameters());
  adapters.add("b", lora::LoRAConfig(3).target_modules({"0", "2"}));
  testing::randomize(adapters.parameters("b"));
  const auto x = torch::randn({3, 5}, testing::on_device(torch::kFloat));
  const auto own = plain->forward(x);
  const auto with = [&](const auto& what) {
    auto active = adapters.activate(what);
    return plain->forward(x);
  };
  const auto base = [&] {
    adapters.set_scale("default", 0);
    const auto y = with("default");
    adapters.set_scale("default", 1);
    return y;
  }();
  const auto mixed = with(Names{"b", "", "default"});
  CHECK(distance(mixed[0], with("b")[0]) < 1e-6);
  CHECK(distance(mixed[1], base[1]) < 1e-6);
  CHECK(distance(mixed[2], own[2]) < 1e-6);
  CHECK(distance(own, base) > 1e-3);
  CHECK(distance(with(Names{"", "", ""}), base) < 1e-6);
}

TEST_CASE("What is wrong with rows is said") {
  testing::Stack model;
  lora::Adapters adapters(*model);
  adapters.add("a", lora::LoRAConfig(2).target_modules({"q_proj"}));
  adapters.add("b", lora::LoRAConfig(2).target_modules({"q_proj"}));
  const auto run = [&](const Names& rows, std::vector<int64_t> sizes, lora::RowOptions options = {}) {
    return error_of([&] {
      auto active = adapters.activate(rows, options);
      model->forward(torch::randn(sizes, testing::on_device(torch::kFloat)));
    });
  };
  CHECK_THAT(run({}, {2, 8}), contains("a name") || contains("the name of an adapter for each row"));
  CHECK_THAT(run({"a", "c"}, {2, 8}), contains("there is no adapter \"c\"; there are: a, b"));
  CHECK_THAT(run({"a"}, {5, 8}), contains("each of 1 rows") && contains("layers.0.q_proj") && contains("[5, 8]"));
  CHECK_THAT(run({"a", "b"}, {4, 8}), contains("each of 2 rows") && contains("lora::RowOptions"));
  CHECK_THAT(run({"a", "b"}, {3, 4, 8}), contains("[3, 4, 8]"));
  CHECK_THAT(run({"a", "b"}, {8}), contains("each of 2 rows"));
  CHECK(run({"a", "b"}, {4, 8}, lora::RowOptions().flattened(true)).empty());
  CHECK_THAT(run({"a", "b"}, {5, 8}, lora::RowOptions().flattened(true)), contains("[5, 8]"));
  CHECK_THAT(run({"a", "b"}, {2, 8}, lora::RowOptions().axis("haed", 1)), contains("layer \"haed\""));
  adapters.merge("a");
  CHECK_THAT(run({"a", "a"}, {2, 8}), contains("\"a\" is merged"));
  CHECK_THAT(run({"", ""}, {2, 8}), contains("\"a\" is merged"));
}

TEST_CASE("Rows are known by the first layer that sees them, adapted or not") {
  struct Net : nn::Module {
    nn::Embedding embed = register_module("embed", nn::Embedding(7, 5));
    nn::Linear head = register_module("head", nn::Linear(5, 3));
    Tensor forward(const Tensor& ids) { return head(embed(ids).flatten(0, 1)).unflatten(0, ids.sizes()); }
  };
  auto model = std::make_shared<Net>();
  model->to(testing::device());
  lora::Adapters adapters(*model);
  adapters.add("a", lora::LoRAConfig(2).target_modules({"head"}));
  testing::randomize(adapters.parameters());
  const auto ids = numbers({2, 4});
  const auto base = model->forward(ids);
  auto active = adapters.activate({"", "a"});
  const auto y = model->forward(ids);
  CHECK(torch::equal(y[0], base[0]));
  CHECK(distance(y[1], base[1]) > 1e-3);
}

TEST_CASE("Operators that take a weight for all rows refuse rows by name") {
  struct Net : nn::Module {
    nn::LSTM lstm = register_module("lstm", nn::LSTM(4, 3));
    nn::Bilinear pair = register_module("pair", nn::Bilinear(4, 4, 3));
    nn::LayerNorm norm = register_module("norm", nn::LayerNorm(nn::LayerNormOptions({4})));
    nn::EmbeddingBag bag = register_module("bag", nn::EmbeddingBag(5, 4));
  };
  auto model = std::make_shared<Net>();
  model->to(testing::device());
  lora::Adapters adapters(*model);
  adapters.add("a", lora::LoRAConfig(2).target_modules({"lstm", "pair", "bag"}).modules_to_save({"norm"}));
  const auto x = torch::randn({2, 2, 4}, testing::on_device(torch::kFloat));
  auto active = adapters.activate({"a", ""});
  const auto error = [](const std::function<void()>& call) { return error_of(call); };
  CHECK_THAT(error([&] { model->lstm(x); }), contains("aten::lstm") && contains("lstm.weight_ih_l0"));
  CHECK_THAT(error([&] { model->pair(x, x); }), contains("aten::bilinear") && contains("\"pair\""));
  CHECK_THAT(error([&] { model->norm(x); }), contains("norm") && contains("rows have adapters of their own"));
  CHECK_THAT(error([&] {
               model->bag(numbers({2, 2}).remainder(5));
             }),
             contains("embedding_bag") && contains("\"bag\""));
}

TEST_CASE("The layers of a Transformer count rows in the second dimension, however long the texts are") {
  for (const int64_t length : {2, 4, 3}) {
    auto layer = std::make_shared<nn::TransformerEncoderLayerImpl>(nn::TransformerEncoderLayerOptions(8, 2).dropout(0));
    auto decoder =
        std::make_shared<nn::TransformerDecoderLayerImpl>(nn::TransformerDecoderLayerOptions(8, 2).dropout(0));
    nn::ModuleList model;
    model->push_back(layer);
    model->push_back(decoder);
    model->to(testing::device(), torch::kDouble);
    lora::Adapters adapters(*model);
    adapters.add("a",
                 lora::LoRAConfig(2).alpha(6).target_modules({"self_attn", "linear1", "linear2", "multihead_attn"}));
    testing::randomize(adapters.parameters());
    const auto x = torch::randn({length, 2, 8}, doubles());
    const auto run = [&] { return decoder->forward(layer->forward(x), x * 2); };
    const auto base = run();
    const auto alone = [&] {
      auto active = adapters.activate("a");
      return run();
    }();
    auto active = adapters.activate({"a", ""});
    const auto mixed = run();
    CHECK(distance(mixed.select(1, 0), alone.select(1, 0)) < 1e-12);
    CHECK(distance(mixed.select(1, 1), base.select(1, 1)) < 1e-12);
  }
}

TEST_CASE("What has another number of positions than the inputs before is not taken for rows") {
  nn::Sequential model(nn::Linear(4, 4), nn::Linear(4, 4));
  model->to(testing::device());
  lora::Adapters adapters(*model);
  adapters.add("a", lora::LoRAConfig(2).target_modules({"1"}));
  const auto active = adapters.activate({"a", "", "a", ""});
  const auto hidden =
      model[0]->as<nn::LinearImpl>()->forward(torch::randn({4, 6, 4}, testing::on_device(torch::kFloat)));
  auto& second = *model[1]->as<nn::LinearImpl>();
  CHECK(error_of([&] { second.forward(hidden.flatten(0, 1)); }).empty());
  const auto some = hidden.flatten(0, 1).narrow(0, 0, 8);  // as a mask selects them
  CHECK_THAT(error_of([&] { second.forward(some); }), contains("[8, 4]"));
  CHECK_THAT(error_of([&] { second.forward(hidden.transpose(0, 1).repeat({2, 1, 1})); }), contains("each of 4 rows"));
}

TEST_CASE("Rows and their options in the ways that went wrong elsewhere") {
  Holder model(linear());
  lora::Adapters adapters(model);
  REQUIRE(add_adapters(adapters, kinds().front(), lora::DoRA()));
  CHECK_THROWS_WITH(lora::RowOptions().axis("layer", -1), contains("counted from 0, but got -1"));
  auto& layer = *model.layer().as<nn::LinearImpl>();
  const auto x = torch::randn({kRows, 5}, doubles()).requires_grad_();
  const auto residual = torch::randn({kRows, 6}, doubles());
  const Names rows{"a", "", "b", "", "a", "b"};
  const auto by_layer = [&] {
    auto active = adapters.activate(rows);
    return torch::mm(x, layer.weight.t());
  }();
  {
    auto active = adapters.activate(rows);
    {
      c10::InferenceMode mode;
      layer.forward(x.detach());
    }
    layer.forward(x).sum().backward();  // what was kept for the rows is no tensor of that mode
    CHECK(distance(torch::addmm(residual, x, layer.weight.t(), 2, 0.5), 2 * residual + 0.5 * by_layer) < 1e-12);
  }
  {
    auto active = adapters.activate("a");
    adapters.merge("b");
    CHECK_THAT(error_of([&] { layer.forward(x); }), contains("was merged in a scope of others"));
    adapters.unmerge();
    CHECK(error_of([&] { layer.forward(x); }).empty());
  }
}
