// Every kind of layer that can be adapted, in every type and mode: one table, one test.
#include "support/halves.hpp"
#include "support/models.hpp"

#include <lora/attach.hpp>

#include <utility>

namespace {

using torch::Tensor;
using Layer = std::shared_ptr<torch::nn::Module>;
namespace nn = torch::nn;

/// A model whose only child is the layer under test.
struct HolderImpl : nn::Module {
  explicit HolderImpl(Layer layer) { register_module("layer", std::move(layer)); }
};

/// Functional calls with parameters of a user's own.
struct FunctionsImpl : nn::Module {
  Tensor forward(const Tensor& x) const {  // (n, 4)
    auto y = nn::functional::linear(x, matrix).tanh().matmul(matrix);
    auto z = torch::bmm(y.expand({2, -1, -1}), experts.transpose(1, 2)).sum(0);
    const auto chosen = experts.index_select(0, torch::tensor({1, 0, 1}, testing::on_device(torch::kLong)));
    return z + torch::einsum("ni,oi->no", {x, experts[1]}) + torch::einsum("ni,eoi->no", {x, chosen});
  }
  Tensor matrix = register_parameter("matrix", torch::randn({3, 4}));
  Tensor experts = register_parameter("experts", torch::randn({2, 3, 4}));
};

/// How the update of a weight is written down by hand, without the library: from A, B, the scale, and the weight.
using Delta = Tensor (*)(const Tensor& a, const Tensor& b, double scaling, const Tensor& weight);

Tensor product(const Tensor& a, const Tensor& b, double scaling, const Tensor& weight) {
  return (scaling * torch::matmul(b, a)).reshape(weight.sizes());
}

Tensor lookup(const Tensor& a, const Tensor& b, double scaling, const Tensor& /*weight*/) {
  return scaling * a.t().mm(b.t());
}

/// Group by group, output by output: sum over the ranks of the group.
Tensor kernel(const Tensor& a, const Tensor& b, double scaling, const Tensor& weight, int64_t groups, bool transposed) {
  auto delta = torch::zeros_like(weight, a.options().requires_grad(false));
  const auto grouped_a = groups == 1 ? a.unsqueeze(0) : a, grouped_b = groups == 1 ? b.unsqueeze(0) : b;
  const auto outputs = grouped_b.size(1);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t o = 0; o < outputs; ++o) {
      auto row = scaling * grouped_b[g][o].matmul(grouped_a[g]);  // (in / groups * k)
      if (transposed) {
        const auto inputs = weight.size(0) / groups;
        auto into = delta.narrow(0, g * inputs, inputs).select(1, o);
        into.copy_(row.reshape(into.sizes()));
      } else {
        delta[g * outputs + o].copy_(row.reshape(weight.sizes().slice(1)));
      }
    }
  }
  return delta;
}

template <int64_t groups, bool transposed>
Tensor convolution(const Tensor& a, const Tensor& b, double scaling, const Tensor& weight) {
  return kernel(a, b, scaling, weight, groups, transposed);
}

struct Kind {
  const char* name;
  std::function<Layer()> make;
  std::function<Tensor(nn::Module& layer, const torch::TensorOptions& floats)> run;
  Delta delta = product;
  std::vector<std::string> modules = {"layer"};
  std::vector<std::string> parameters = {};
};

template <class Impl>
auto with(std::vector<int64_t> sizes) {
  return [sizes](nn::Module& layer, const torch::TensorOptions& floats) {
    return layer.as<Impl>()->forward(torch::randn(sizes, floats));
  };
}

template <class Impl>
Tensor sequence(nn::Module& layer, const torch::TensorOptions& floats) {
  return std::get<0>(layer.as<Impl>()->forward(torch::randn({5, 2, 4}, floats)));
}

Tensor numbers(const torch::TensorOptions& floats) {
  return torch::tensor({0, 3, 3, 1, 6, 2}, floats.dtype(torch::kLong)).view({2, 3});
}

Tensor attention(nn::Module& layer, const torch::TensorOptions& floats, bool cross, int64_t key_width = 4) {
  auto query = torch::randn({3, 2, 4}, floats);
  auto key = cross ? torch::randn({5, 2, key_width}, floats) : query;
  auto value = cross ? torch::randn({5, 2, key_width}, floats) : query;
  return std::get<0>(layer.as<nn::MultiheadAttentionImpl>()->forward(query, key, value));
}

const std::vector<Kind>& kinds() {
  static const std::vector<Kind> all{
      {"Linear", [] { return nn::Linear(4, 3).ptr(); }, with<nn::LinearImpl>({2, 5, 4})},
      {"Linear without bias", [] { return nn::Linear(nn::LinearOptions(4, 3).bias(false)).ptr(); },
       with<nn::LinearImpl>({5, 4})},
      {"Bilinear", [] { return nn::Bilinear(4, 3, 2).ptr(); },
       [](nn::Module& layer, const torch::TensorOptions& floats) {
         return layer.as<nn::BilinearImpl>()->forward(torch::randn({2, 5, 4}, floats), torch::randn({2, 5, 3}, floats));
       }},
      {"Embedding", [] { return nn::Embedding(nn::EmbeddingOptions(7, 4).padding_idx(5)).ptr(); },
       [](nn::Module& layer, auto& floats) { return layer.as<nn::EmbeddingImpl>()->forward(numbers(floats)); }, lookup},
      {"Embedding with max_norm", [] { return nn::Embedding(nn::EmbeddingOptions(7, 4).max_norm(1.5)).ptr(); },
       [](nn::Module& layer, auto& floats) { return layer.as<nn::EmbeddingImpl>()->forward(numbers(floats)); }, lookup},
      {"EmbeddingBag, mean", [] { return nn::EmbeddingBag(7, 4).ptr(); },
       [](nn::Module& layer, auto& floats) { return layer.as<nn::EmbeddingBagImpl>()->forward(numbers(floats)); },
       lookup},
      {"EmbeddingBag, weighted sum",
       [] { return nn::EmbeddingBag(nn::EmbeddingBagOptions(7, 4).mode(torch::kSum)).ptr(); },
       [](nn::Module& layer, auto& floats) {
         return layer.as<nn::EmbeddingBagImpl>()->forward(numbers(floats), {}, torch::rand({2, 3}, floats));
       },
       lookup},
      {"EmbeddingBag, max", [] { return nn::EmbeddingBag(nn::EmbeddingBagOptions(7, 4).mode(torch::kMax)).ptr(); },
       [](nn::Module& layer, auto& floats) { return layer.as<nn::EmbeddingBagImpl>()->forward(numbers(floats)); },
       lookup},
      {"Conv1d", [] { return nn::Conv1d(nn::Conv1dOptions(4, 3, 3).stride(2).padding(1)).ptr(); },
       with<nn::Conv1dImpl>({2, 4, 7}), convolution<1, false>},
      {"Conv2d, groups and dilation",
       [] {
         return nn::Conv2d(nn::Conv2dOptions(4, 6, {2, 3}).groups(2).dilation(2)).ptr();
       },
       with<nn::Conv2dImpl>({2, 4, 6, 7}), convolution<2, false>},
      {"Conv2d, padded around",
       [] { return nn::Conv2d(nn::Conv2dOptions(2, 3, 3).padding(1).padding_mode(torch::kCircular)).ptr(); },
       with<nn::Conv2dImpl>({2, 2, 4, 4}), convolution<1, false>},
      {"Conv2d, same size", [] { return nn::Conv2d(nn::Conv2dOptions(2, 3, 3).padding(torch::kSame)).ptr(); },
       with<nn::Conv2dImpl>({2, 2, 4, 4}), convolution<1, false>},
      {"Conv3d", [] { return nn::Conv3d(nn::Conv3dOptions(2, 4, 2).groups(2).bias(false)).ptr(); },
       with<nn::Conv3dImpl>({1, 2, 3, 3, 3}), convolution<2, false>},
      {"ConvTranspose1d",
       [] { return nn::ConvTranspose1d(nn::ConvTranspose1dOptions(4, 6, 3).stride(2).groups(2)).ptr(); },
       [](nn::Module& layer, auto& floats) {
         return layer.as<nn::ConvTranspose1dImpl>()->forward(torch::randn({2, 4, 5}, floats));
       },
       convolution<2, true>},
      {"ConvTranspose2d", [] { return nn::ConvTranspose2d(nn::ConvTranspose2dOptions(2, 3, 3).padding(1)).ptr(); },
       [](nn::Module& layer, auto& floats) {
         return layer.as<nn::ConvTranspose2dImpl>()->forward(torch::randn({2, 2, 4, 4}, floats));
       },
       convolution<1, true>},
      {"ConvTranspose3d", [] { return nn::ConvTranspose3d(nn::ConvTranspose3dOptions(2, 2, 2)).ptr(); },
       [](nn::Module& layer, auto& floats) {
         return layer.as<nn::ConvTranspose3dImpl>()->forward(torch::randn({1, 2, 2, 2, 2}, floats));
       },
       convolution<1, true>},
      {"MultiheadAttention, self", [] { return nn::MultiheadAttention(4, 2).ptr(); },
       [](nn::Module& layer, auto& floats) { return attention(layer, floats, false); }},
      {"MultiheadAttention, cross", [] { return nn::MultiheadAttention(4, 2).ptr(); },
       [](nn::Module& layer, auto& floats) { return attention(layer, floats, true); }},
      {"MultiheadAttention, other widths, bias_k and bias_v",
       [] {
         return nn::MultiheadAttention(nn::MultiheadAttentionOptions(4, 2).kdim(3).vdim(3).add_bias_kv(true)).ptr();
       },
       [](nn::Module& layer, auto& floats) { return attention(layer, floats, true, 3); }},
      {"TransformerEncoderLayer",
       [] {
         return nn::TransformerEncoderLayer(nn::TransformerEncoderLayerOptions(4, 2).dim_feedforward(6).dropout(0))
             .ptr();
       },
       with<nn::TransformerEncoderLayerImpl>({3, 2, 4}),
       product,
       {"self_attn", "linear1", "linear2"}},
      {"TransformerDecoderLayer",
       [] {
         return nn::TransformerDecoderLayer(nn::TransformerDecoderLayerOptions(4, 2).dim_feedforward(6).dropout(0))
             .ptr();
       },
       [](nn::Module& layer, auto& floats) {
         return layer.as<nn::TransformerDecoderLayerImpl>()->forward(torch::randn({3, 2, 4}, floats),
                                                                     torch::randn({5, 2, 4}, floats));
       },
       product,
       {"self_attn", "multihead_attn", "linear2"}},
      {"LSTM, two layers both ways with projections",
       [] { return nn::LSTM(nn::LSTMOptions(4, 3).num_layers(2).bidirectional(true).proj_size(2)).ptr(); },
       sequence<nn::LSTMImpl>},
      {"GRU", [] { return nn::GRU(nn::GRUOptions(4, 3).num_layers(2)).ptr(); }, sequence<nn::GRUImpl>},
      {"RNN", [] { return nn::RNN(nn::RNNOptions(4, 3).nonlinearity(torch::kReLU)).ptr(); }, sequence<nn::RNNImpl>},
      {"LSTMCell", [] { return nn::LSTMCell(4, 3).ptr(); },
       [](nn::Module& layer, auto& floats) {
         return std::get<0>(layer.as<nn::LSTMCellImpl>()->forward(torch::randn({2, 4}, floats)));
       }},
      {"GRUCell", [] { return nn::GRUCell(4, 3).ptr(); }, with<nn::GRUCellImpl>({2, 4})},
      {"RNNCell", [] { return nn::RNNCell(4, 3).ptr(); }, with<nn::RNNCellImpl>({2, 4})},
      {"Parameter",
       [] { return std::make_shared<FunctionsImpl>(); },
       with<FunctionsImpl>({5, 4}),
       product,
       {},
       {"matrix", "layer.experts"}},
  };
  return all;
}

/// The name of the parameter that a site is.
std::string parameter_of(const lora::Site& site) {
  if (site.kind() == "MultiheadAttention")
    return site.name() + (site.name().find("_weight") == std::string::npos ? ".in_proj_weight" : "");
  for (auto kind : {"Parameter", "LSTM", "GRU", "RNN"}) {
    if (site.kind().find(kind) == 0) return site.name();
  }
  return site.name() + ".weight";
}

struct Fixture {
  Fixture(const Kind& kind, torch::Dtype type, bool training) : kind(kind), floats(testing::on_device(type)) {
    torch::manual_seed(1);
    holder = std::make_shared<HolderImpl>(kind.make());
    holder->to(testing::device(), type);
    holder->train(training);
  }

  lora::LoRAConfig config() const {
    auto config = lora::LoRAConfig(2).alpha(3).target_modules(kind.modules);
    return config.target_parameters(kind.parameters);
  }

  Tensor run() const {
    torch::manual_seed(2);
    return kind.run(*holder->children()[0], floats);
  }

  /// Whether LibTorch has gradients of it: on CUDA not of recurrent layers in evaluation mode, nor of the highest
  /// entries of a bag in half precision.
  bool has_backward() const {
    const bool is_half = at::isReducedFloatingType(floats.dtype().toScalarType());
    const bool is_missing = !holder->is_training() || (is_half && kind.name == std::string("EmbeddingBag, max"));
    return !is_missing || !testing::device().is_cuda();
  }

  /// What the model computes when every adapted weight is W + s B A, written down by hand.
  Tensor run_by_hand(const lora::Adapters& adapters) const {
    torch::NoGradGuard no_grad;
    auto tensors = adapters.named_parameters();
    auto parameters = holder->named_parameters();
    std::vector<Tensor> pristine;
    for (const auto& site : adapters.sites()) {
      const auto& name = site->name();
      auto& weight = parameters[parameter_of(*site)];
      pristine.push_back(weight.clone());
      auto delta = kind.delta(tensors[name + ".lora_A"], tensors[name + ".lora_B"], adapters.scaling(name), weight);
      weight.copy_(weight.to(delta.scalar_type()) + delta);
    }
    auto result = run();
    for (size_t i = 0; i < pristine.size(); ++i) parameters[parameter_of(*adapters.sites()[i])].copy_(pristine[i]);
    return result;
  }

  const Kind& kind;
  torch::TensorOptions floats;
  std::shared_ptr<HolderImpl> holder;
};

double tolerance(const Tensor& like) {
  const auto magnitude = 1 + like.detach().abs().max().item<double>();
  return magnitude * (like.scalar_type() == torch::kDouble ? 1e-12 : like.scalar_type() == torch::kFloat ? 1e-5 : 0.05);
}

}  // namespace

TEST_CASE("Every kind of layer, in every type and mode, computes with W + s B A") {
  const auto index = GENERATE(range(size_t{0}, kinds().size()));
  const auto type = GENERATE(torch::kFloat, torch::kDouble, torch::kBFloat16);
  const auto training = GENERATE(true, false);
  const Fixture f(kinds()[index], type, training);
  CAPTURE(f.kind.name, type, training);
  if (!testing::error_of([&] { f.run(); }).empty()) {  // LibTorch has no such layer in half precision
    CHECK(type == torch::kBFloat16);
    return;
  }
  auto base = f.run();
  while (!torch::equal(f.run(), base)) base = f.run();  // max_norm rewrites a table in steps of its type
  std::vector<Tensor> before;
  for (const auto& parameter : f.holder->parameters()) before.push_back(parameter.detach().clone());

  auto adapters = lora::attach(*f.holder, f.config());
  testing::randomize(adapters.parameters(), 0.5);
  Tensor adapted;
  {
    auto active = adapters.activate();
    adapted = f.run();
    CHECK(adapters.unreached().empty());
    if (f.has_backward()) {
      for (const auto& gradient : torch::autograd::grad({adapted.sum()}, adapters.parameters()))
        CHECK(gradient.defined());
    }
  }
  CHECK(adapted.scalar_type() == type);
  CHECK(testing::distance(adapted, base) > 2 * tolerance(base));
  CHECK(testing::distance(adapted, f.run_by_hand(adapters)) < tolerance(adapted));
  CHECK(torch::equal(f.run(), base));  // outside of the scope

  adapters.merge();
  CHECK(testing::distance(f.run(), adapted) < tolerance(adapted));
  adapters.unmerge();
  for (size_t i = 0; i < before.size(); ++i) CHECK(torch::equal(f.holder->parameters()[i], before[i]));
  adapters.detach();
  CHECK(torch::equal(f.run(), base));
  for (const auto& parameter : f.holder->parameters()) CHECK(parameter.requires_grad());
}

TEST_CASE("Gradients of every kind of layer agree with finite differences") {
  const auto index = GENERATE(range(size_t{0}, kinds().size()));
  const Fixture f(kinds()[index], torch::kDouble, /*training=*/true);
  if (f.kind.name == std::string("Embedding with max_norm")) return;  // its factor is no part of the gradient
  CAPTURE(f.kind.name);
  auto adapters = lora::attach(*f.holder, f.config());
  testing::randomize(adapters.parameters());
  auto loss = [&] {
    auto active = adapters.activate();
    return f.run().sin().sum();
  };
  CHECK(testing::gradient_error(loss, adapters.parameters()) < 1e-6);
}

TEST_CASE("Every kind of layer computes with a weight that is held in few bits as with the numbers that these hold") {
  const auto index = GENERATE(range(size_t{0}, kinds().size()));
  const auto type = GENERATE(torch::kFloat, torch::kDouble, torch::kBFloat16);
  const auto training = GENERATE(true, false);
  const Fixture f(kinds()[index], type, training), rounded(kinds()[index], type, training);
  if (f.kind.name == std::string("Embedding with max_norm")) return;  // writes to its weight
  CAPTURE(f.kind.name, type, training);
  if (!testing::error_of([&] { f.run(); }).empty()) return;  // LibTorch has no such layer in half precision
  auto expected = lora::attach(*rounded.holder, rounded.config());
  testing::round_to_halves(expected);
  auto adapters = lora::attach(*f.holder, f.config().quantize(testing::Halves()));
  testing::randomize(adapters.parameters(), 0.5);
  testing::copy_numbers(adapters, expected);
  CHECK(testing::error_of([&] { f.run(); }).find("is held in 16 bits (halves)") != std::string::npos);
  const auto forward = [](const Fixture& fixture, lora::Adapters& attached) {
    auto active = attached.activate();
    auto y = fixture.run();
    std::vector<Tensor> gradients;
    if (fixture.has_backward()) gradients = torch::autograd::grad({y.sum()}, attached.parameters());
    gradients.push_back(y.detach());
    return gradients;
  };
  const auto wanted = forward(rounded, expected), found = forward(f, adapters);
  for (size_t i = 0; i < wanted.size(); ++i) CHECK(testing::distance(found[i], wanted[i]) < tolerance(wanted[i]));
  {
    auto base = adapters.activate("");
    CHECK(testing::distance(f.run(), rounded.run()) < tolerance(wanted.back()));
  }
  adapters.merge();
  CHECK(testing::distance(f.run(), wanted.back()) < tolerance(wanted.back()));
  adapters.unmerge();
  CHECK(testing::distance(forward(f, adapters).back(), wanted.back()) < tolerance(wanted.back()));
  adapters.merge_and_unload();
  CHECK(testing::distance(f.run(), wanted.back()) < tolerance(wanted.back()));
}

TEST_CASE("What is not looked up gets no gradient, nor does the entry that pads") {
  torch::manual_seed(0);
  nn::Sequential model(nn::Embedding(nn::EmbeddingOptions(6, 3).padding_idx(1).sparse(true)));
  model->to(testing::device());
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).alpha(3).target_modules({"0"}));
  auto tensors = adapters.named_parameters();
  CHECK(tensors["0.lora_A"].eq(0).all().item<bool>());  // entries never seen stay as they are, whatever B becomes
  testing::randomize(adapters.parameters());
  auto active = adapters.activate();
  model->forward(torch::tensor({1, 4, 2, 4}, testing::device())).pow(2).sum().backward();
  auto gradient = tensors["0.lora_A"].grad();
  for (int64_t entry = 0; entry < 6; ++entry)
    CHECK((gradient.select(1, entry).abs().max().item<double>() > 0) == (entry == 2 || entry == 4));
}

TEST_CASE("Dropout acts on the input of the adapter alone, in training mode") {
  using Operation = Tensor (*)(const Tensor& x, const Tensor& w);
  const auto [make, sizes, operation] = GENERATE(table<std::function<Layer()>, std::vector<int64_t>, Operation>({
      {[] { return nn::Linear(4, 3).ptr(); }, {2, 5, 4}, [](auto& x, auto& w) { return torch::linear(x, w); }},
      {[] { return nn::Conv1d(4, 3, 2).ptr(); }, {2, 4, 6}, [](auto& x, auto& w) { return torch::conv1d(x, w); }},
  }));
  torch::manual_seed(0);
  const auto layer = make();
  HolderImpl model(layer);
  model.to(testing::device());
  const auto forward = [&](const Tensor& x) {
    if (auto* linear = layer->as<nn::LinearImpl>()) return linear->forward(x);
    return layer->as<nn::Conv1dImpl>()->forward(x);
  };
  auto adapters = lora::attach(model, lora::LoRAConfig(2).alpha(3).dropout(0.5).target_modules({"layer"}));
  testing::randomize(adapters.parameters());
  auto x = torch::randn(sizes, testing::device());
  auto base = forward(x), delta = adapters.delta("default", "layer");
  auto active = adapters.activate();
  torch::manual_seed(3);
  auto adapted = forward(x);
  torch::manual_seed(3);
  auto dropped = lora::detail::dropout(x, 0.5);
  CHECK(testing::distance(adapted, base + operation(dropped, delta)) < 1e-5);
  model.eval();
  CHECK(testing::distance(forward(x), base + operation(x, delta)) < 1e-5);
}

TEST_CASE("An operator that takes a weight whole drops whole input features") {
  torch::manual_seed(0);
  HolderImpl model(nn::GRUCell(4, 3).ptr());
  model.to(testing::device());
  auto* cell = model.children()[0]->as<nn::GRUCellImpl>();
  auto adapters = lora::attach(
      model, lora::LoRAConfig(2).alpha(3).dropout(0.5).target_modules({"layer"}).exclude_modules({"weight_hh"}));
  testing::randomize(adapters.parameters());
  auto x = torch::randn({2, 4}, testing::device());
  auto base = cell->forward(x), pristine = cell->weight_ih.clone(),
       delta = adapters.delta("default", "layer.weight_ih");
  Tensor adapted;
  {
    auto active = adapters.activate();
    torch::manual_seed(3);
    adapted = cell->forward(x);
  }
  torch::manual_seed(3);
  auto mask = lora::detail::dropout(torch::ones({4}, testing::device()), 0.5);
  cell->weight_ih.copy_(pristine + delta.detach() * mask);
  CHECK(testing::distance(adapted, cell->forward(x)) < 1e-5);
  CHECK(testing::distance(adapted, base) > 1e-3);
}

TEST_CASE("The rank of a grouped convolution is divided among its groups") {
  HolderImpl model(nn::Conv2d(nn::Conv2dOptions(4, 4, 3).groups(4)).ptr());
  model.to(testing::device());
  CHECK_THROWS_WITH(lora::attach(model, lora::LoRAConfig(6).target_modules({"layer"})),
                    testing::contains("\"layer\" is a Conv2d of 4 groups") && testing::contains("but is 6"));
  auto adapters = lora::attach(model, lora::LoRAConfig(8).target_modules({"layer"}));
  CHECK(adapters.named_parameters()["layer.lora_A"].sizes() == torch::IntArrayRef({4, 2, 9}));
  CHECK(adapters.named_parameters()["layer.lora_B"].sizes() == torch::IntArrayRef({4, 1, 2}));
}
