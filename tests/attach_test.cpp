// Stock models, not changed at all: wherever their layers sit, and however LibTorch multiplies with a weight.
#include "support/models.hpp"

#include <lora/attach.hpp>

#include <sstream>

using lora::LoRAConfig;

namespace {

const auto kQueries = LoRAConfig(2).alpha(6).target_modules({"q_proj", "lm_head"});

/// The model with W + delta written into copies of its weights, by hand.
torch::Tensor by_hand(testing::Stack& model, const lora::Adapters& adapters, const torch::Tensor& x) {
  torch::NoGradGuard no_grad;
  std::vector<std::pair<torch::Tensor, torch::Tensor>> saved;
  auto parameters = model->named_parameters();
  for (const auto& name : adapters.targets()) {
    auto& weight = parameters[name + ".weight"];
    saved.emplace_back(weight, weight.clone());
    weight.add_(adapters.delta("default", name));
  }
  auto y = model->forward(x);
  for (auto& [weight, value] : saved) weight.copy_(value);
  return y;
}

}  // namespace

TEST_CASE("Inside a scope typed members and lists of blocks use the adapters, outside it nothing is changed") {
  torch::manual_seed(0);
  testing::Stack model;
  auto x = torch::randn({2, 3, 8}, testing::device());
  auto base = model->forward(x);
  auto adapters = lora::attach(*model, kQueries);
  testing::randomize(adapters.parameters());
  auto expected = by_hand(model, adapters, x);
  CHECK(testing::distance(expected, base) > 0.01);
  {
    auto active = adapters.activate();
    CHECK(testing::distance(model->forward(x), expected) < 1e-5);
    CHECK(testing::distance(model->forward(x[0]), expected[0]) < 1e-5);  // two dimensions: addmm instead of matmul
    torch::NoGradGuard no_grad;
    CHECK(testing::distance(model->forward(x), expected) < 1e-5);
  }
  CHECK(torch::equal(model->forward(x), base));
  CHECK(adapters.unreached().empty());
}

TEST_CASE("Gradients through an attached model agree with finite differences, with the scope open or closed") {
  torch::manual_seed(0);
  testing::Stack model(1);
  model->to(torch::kDouble);
  auto x = torch::randn({2, 3, 8}, testing::on_device(torch::kDouble));
  auto adapters = lora::attach(*model, kQueries);
  testing::randomize(adapters.parameters());
  auto loss = [&] {
    auto active = adapters.activate();
    return model->forward(x).sin().sum();
  };
  CHECK(testing::gradient_error(loss, adapters.parameters()) < 1e-7);
  auto closed = torch::autograd::grad({loss()}, adapters.parameters());
  auto active = adapters.activate();
  auto open = torch::autograd::grad({loss()}, adapters.parameters());  // backward's own products are not adapted
  for (size_t i = 0; i < open.size(); ++i) CHECK(torch::equal(open[i], closed[i]));
}

TEST_CASE("Whatever spelling of the product a model uses is adapted") {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(6, 4));
  model->to(testing::device());
  auto& layer = *model->ptr(0)->as<torch::nn::Linear>();
  const bool transposed = GENERATE(false, true);
  if (transposed) layer.weight.set_data(torch::randn({6, 4}, testing::device()).t());  // kept as (in, out), as GPT-2's
  auto adapters = lora::attach(*model, LoRAConfig(2).alpha(6).target_modules({"0"}));
  testing::randomize(adapters.parameters());
  auto x = torch::randn({5, 6}, testing::device());
  auto w = layer.weight + adapters.delta("default", "0");
  auto active = adapters.activate();
  CHECK(testing::distance(torch::addmm(layer.bias, x, layer.weight.t()), x.mm(w.t()) + layer.bias) < 1e-5);
  CHECK(testing::distance(x.matmul(layer.weight.t()), x.mm(w.t())) < 1e-5);
  CHECK(testing::distance(at::linear(x, layer.weight, layer.bias), x.mm(w.t()) + layer.bias) < 1e-5);
  CHECK(testing::distance(torch::nn::functional::linear(x[0], layer.weight), w.mv(x[0])) < 1e-5);
  // Rows of a packed weight: the update is cut alike.
  CHECK(testing::distance(at::linear(x, layer.weight.narrow(0, 1, 2)), x.mm(w.narrow(0, 1, 2).t())) < 1e-5);
  CHECK(testing::distance(x.matmul(layer.weight.chunk(4)[3].t()), x.mm(w.narrow(0, 3, 1).t())) < 1e-5);
  // The weight the other way round, on the left, joined with itself, or reshaped.
  auto y = torch::randn({5, 4}, testing::device());
  CHECK(testing::distance(y.matmul(layer.weight), y.mm(w.clone())) < 1e-5);
  CHECK(testing::distance(layer.weight.mm(x.t()), w.mm(x.t())) < 1e-5);
  CHECK(testing::distance(layer.weight.mv(x[0]), w.mv(x[0])) < 1e-5);
  CHECK(testing::distance(torch::einsum("bi,oi->bo", {x, layer.weight}), x.mm(w.t())) < 1e-5);
  CHECK(testing::distance(x.narrow(1, 1, 3).matmul(layer.weight.narrow(1, 1, 3).t()),
                          x.narrow(1, 1, 3).mm(w.narrow(1, 1, 3).t())) < 1e-5);
  if (!transposed)
    CHECK(testing::distance(torch::bmm(x.expand({2, 5, 6}), layer.weight.view({2, 2, 6}).transpose(1, 2)),
                            torch::bmm(x.expand({2, 5, 6}), w.reshape({2, 2, 6}).transpose(1, 2))) < 1e-5);
  // A copy that is made in the scope is one of what the layer computes with there.
  CHECK(testing::distance(x.matmul(layer.weight.clone().t()), x.mm(w.t())) < 1e-5);
}

TEST_CASE("A square weight is not mistaken for its transpose") {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(4, 4));
  model->to(testing::device());
  auto& weight = model->ptr(0)->as<torch::nn::Linear>()->weight;
  auto adapters = lora::attach(*model, LoRAConfig(2).alpha(6).target_modules({"0"}));
  testing::randomize(adapters.parameters());
  auto x = torch::randn({5, 4}, testing::device());
  const auto adapted = weight + adapters.delta("default", "0");
  auto active = adapters.activate();
  CHECK(testing::distance(x.matmul(weight), x.mm(adapted)) < 1e-5);
  CHECK(testing::distance(x.matmul(weight.t()), x.mm(adapted.t())) < 1e-5);
}

TEST_CASE("Attention of LibTorch is adapted in self and cross attention, also inside an encoder layer") {
  torch::manual_seed(0);
  struct NetImpl : torch::nn::Module {
    torch::nn::MultiheadAttention attention =
        register_module("attention", torch::nn::MultiheadAttention(torch::nn::MultiheadAttentionOptions(8, 2)));
    torch::nn::TransformerEncoderLayer encoder = register_module(
        "encoder", torch::nn::TransformerEncoderLayer(torch::nn::TransformerEncoderLayerOptions(8, 2).dropout(0)));
  } model;
  model.to(testing::device());
  auto adapters = lora::attach(model, LoRAConfig(2).alpha(6).target_modules({"attention", "self_attn", "linear1"}));
  CHECK(adapters.targets() == std::vector<std::string>{"attention", "attention.out_proj", "encoder.linear1",
                                                       "encoder.self_attn", "encoder.self_attn.out_proj"});
  testing::randomize(adapters.parameters());
  auto x = torch::randn({5, 2, 8}, testing::device()), context = torch::randn({7, 2, 8}, testing::device());
  auto run = [&] {
    auto self = std::get<0>(model.attention(x, x, x));
    auto cross = std::get<0>(model.attention(x, context, context));
    return torch::cat({self, cross, model.encoder(x)});
  };
  auto base = run();
  torch::Tensor adapted;
  {
    auto active = adapters.activate();
    adapted = run();
  }
  CHECK(adapters.unreached().empty());
  lora::MergeGuard merged(adapters);
  CHECK(testing::distance(run(), adapted) < 1e-5);
  CHECK(testing::distance(base, adapted) > 0.01);
}

TEST_CASE("Encoders and decoders of LibTorch are adapted in every layer, trained and merged") {
  using namespace torch::nn;
  struct NetImpl : Module {
    TransformerEncoder encoder =
        register_module("encoder", TransformerEncoder(TransformerEncoderOptions(
                                       TransformerEncoderLayerOptions(8, 2).dim_feedforward(6).dropout(0), 2)));
    TransformerDecoder decoder =
        register_module("decoder", TransformerDecoder(TransformerDecoderOptions(
                                       TransformerDecoderLayerOptions(8, 2).dim_feedforward(6).dropout(0), 2)));
    torch::Tensor forward(const torch::Tensor& x) { return decoder(x, encoder(x)); }
  };
  const auto type = GENERATE(torch::kDouble, torch::kBFloat16);
  const auto tolerance = type == torch::kDouble ? 1e-10 : 0.6;  // of layer norms, in bfloat16
  torch::manual_seed(0);
  auto model = std::make_shared<NetImpl>();
  model->to(testing::device(), type);
  auto x = torch::randn({5, 2, 8}, testing::device()).to(type);
  const auto base = model->forward(x);
  auto adapters = lora::attach(
      *model, LoRAConfig(2).alpha(6).target_modules({"self_attn", "multihead_attn", "linear1", "linear2"}));
  CHECK(adapters.targets().size() == 2 * 4 + 2 * 6);
  testing::randomize(adapters.parameters());
  torch::Tensor adapted;
  {
    auto active = adapters.activate();
    adapted = model->forward(x);
    for (const auto& gradient : torch::autograd::grad({adapted.pow(2).sum()}, adapters.parameters()))
      CHECK(gradient.abs().max().item<double>() > 0);
    if (type == torch::kDouble) {
      auto loss = [&] { return model->forward(x).sin().sum(); };
      auto some = adapters.named_parameters();
      CHECK(testing::gradient_error(loss, {some["encoder.layers.1.self_attn.lora_A"],
                                           some["decoder.layers.0.multihead_attn.lora_B"]}) < 1e-6);
    }
    for (bool training : {false, true}) {
      model->train(training);
      torch::NoGradGuard no_grad;  // in eval mode the encoder may take its fused path
      CHECK(testing::distance(model->forward(x), adapted) < tolerance);
    }
  }
  CHECK(adapters.unreached().empty());
  CHECK(testing::distance(adapted, base) > 1);
  adapters.merge();
  CHECK(testing::distance(model->forward(x), adapted) < tolerance);
  adapters.detach();
  CHECK(torch::equal(model->forward(x), base));
}

TEST_CASE("The embedding that a head is tied to keeps its values, merged or not, and what is saved is what runs") {
  torch::manual_seed(0);
  testing::Tied model;
  auto ids = torch::randint(10, {2, 3}, testing::on_device(torch::kLong));
  auto table = model->tokens->weight.clone();
  auto registered = model->head->named_parameters()["weight"].clone();
  auto adapters = lora::attach(*model, LoRAConfig(2).alpha(6).target_modules({"head"}));
  std::ostringstream report;
  report << adapters.report();
  CHECK_THAT(report.str(), testing::contains("head shares its weight with tokens, whose own use of it stays as it is"));
  testing::randomize(adapters.parameters());
  auto expected = model->tokens(ids).tanh().matmul((table + adapters.delta("default", "head")).t());
  {
    auto active = adapters.activate();
    CHECK(testing::distance(model->forward(ids), expected) < 1e-5);
  }
  adapters.merge();
  CHECK(testing::distance(model->forward(ids), expected) < 1e-5);
  CHECK(torch::equal(model->tokens->weight, table));
  CHECK(torch::equal(model->head->named_parameters()["weight"], model->head->weight));
  adapters.unmerge();
  CHECK(model->head->weight.is_same(model->tokens->weight));
  CHECK(torch::equal(model->head->named_parameters()["weight"], registered));
  adapters.merge_and_unload();
  CHECK(testing::distance(model->forward(ids), expected) < 1e-5);
  CHECK(torch::equal(model->tokens->weight, table));
}

TEST_CASE("A model that is moved to another type after attaching is followed") {
  torch::manual_seed(0);
  testing::Stack model(1);
  auto x = torch::randn({2, 8}, testing::device());
  auto base = model->forward(x);
  auto adapters = lora::attach(*model, kQueries);
  testing::randomize(adapters.parameters());
  auto expected = by_hand(model, adapters, x);
  model->to(torch::kBFloat16);
  auto active = adapters.activate();
  CHECK(testing::distance(model->forward(x.to(torch::kBFloat16)), expected) < 0.1);
  CHECK(testing::distance(expected, base) > 0.2);
}
