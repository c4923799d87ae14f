// The second device itself, with LORA_TEST_DEVICE=fake: it computes what the CPU computes, and refuses what lies
// elsewhere.
#include "support/testing.hpp"

#include <ATen/autocast_mode.h>

namespace {

using Tensors = std::vector<torch::Tensor>;

const torch::Tensor& first(const torch::Tensor& output) { return output; }
template <class... Rest>
const torch::Tensor& first(const std::tuple<torch::Tensor, Rest...>& output) {
  return std::get<0>(output);
}

/// The output of a layer with the gradients of its parameters and of its input.
template <class Layer, class Forward>
Tensors trained(Layer layer, torch::Tensor x, torch::Device device, Forward forward) {
  layer->to(device);
  x = x.to(device);
  if (x.is_floating_point()) x.requires_grad_();
  auto output = first(forward(layer, x));
  output.sin().sum().backward();
  Tensors results{output};
  if (x.requires_grad()) results.push_back(x.grad());
  for (const auto& parameter : layer->parameters()) results.push_back(parameter.grad());
  return results;
}

/// The same layer with the same input on a device; made from one seed.
template <class Layer, class Options>
std::function<Tensors(torch::Device)> run(Options options, std::vector<int64_t> input_shape) {
  return [=](torch::Device device) {
    torch::manual_seed(0);
    Layer layer(options);
    return trained(layer, torch::randn(input_shape), device, [](Layer& layer, auto& x) { return layer(x); });
  };
}

Tensors train_mlp(torch::Device device) {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(5, 7), torch::nn::Tanh(), torch::nn::Linear(7, 3));
  auto x = torch::randn({6, 5}).to(device), y = torch::randint(3, {6}).to(device);
  model->to(device);
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(0.05));
  for (int step = 0; step < 10; ++step) {
    optimizer.zero_grad();
    torch::nn::functional::cross_entropy(model->forward(x), y).backward();
    torch::nn::utils::clip_grad_norm_(model->parameters(), 0.5);
    optimizer.step();
  }
  return model->parameters();
}

}  // namespace

TEST_CASE("Tensors of the second device go to the CPU, to files and back, and views share their memory", "[.fake]") {
  const auto device = testing::device();
  REQUIRE(device.type() == torch::kPrivateUse1);  // LORA_TEST_DEVICE=fake
  torch::manual_seed(0);
  auto x = torch::randn({3, 4}, device);
  torch::manual_seed(0);
  auto same = torch::randn({3, 4});
  CHECK(x.device().str() == "fake:0");
  CHECK(torch::equal(x.cpu(), same));
  CHECK(torch::equal(same.to(device), x));
  CHECK(x[1][2].item<float>() == same[1][2].item<float>());
  x.t()[0].fill_(5);
  CHECK(x[2][0].item<double>() == 5);
  CHECK((2 * x - 1 / x).device() == device);
  CHECK((1.5 + x).scalar_type() == torch::kFloat);
  testing::TemporaryFolder folder;
  torch::save(x, (folder / "x.pt").string());
  torch::Tensor loaded;
  torch::load(loaded, (folder / "x.pt").string());
  CHECK(torch::equal(loaded, x));
}

TEST_CASE("A tensor of the CPU among the operands of the second device is refused", "[.fake]") {
  auto x = torch::ones({2, 2}, testing::device()), here = torch::ones({2, 2});
  const auto ids = torch::zeros({1}, torch::kLong);
  const auto [call, text] = GENERATE_COPY(table<std::function<void()>, std::string>({
      {[=] { x.mm(here); }, "aten::mm.out got a tensor [2, 2] on cpu, but all have to be on fake:0"},
      {[=] { here.mm(x); }, "aten::mm.out"},
      {[=] { torch::linear(x, x, here[0]); }, "aten::addmm.out"},
      {[=] { torch::conv1d(x, here.unsqueeze(2)); }, "aten::convolution got a tensor [2, 2, 1"},
      {[=] { torch::conv1d(x, x.unsqueeze(2), here[0]); }, "aten::convolution got a tensor [2] on cpu"},
      {[=] { torch::embedding(x, ids); }, "aten::index_select"},
      {[=] {
         torch::cat({x, here});
       },
       "aten::cat.out"},
      {[=] { x.index({here.to(torch::kLong)}); }, "aten::index"},
      {[=] { x.bmm(here); }, "batch"},
      {[=] { x + here; }, "at least two devices, fake:0 and cpu"},
      {[=] { x.mul(here[0][0]); }, "aten::mul.out"},
      {[=] { torch::equal(x, here); }, "aten::equal"},
  }));
  CHECK_THROWS_WITH(call(), testing::contains(text));
}

TEST_CASE("A network trains on the second device to the weights it gets on the CPU", "[.fake]") {
  const auto expected = train_mlp(torch::kCPU), found = train_mlp(testing::device());
  for (size_t i = 0; i < expected.size(); ++i) CHECK(testing::distance(found[i], expected[i]) < 1e-6);
}

TEST_CASE("Layers compute on the second device what they compute on the CPU, and so do their gradients", "[.fake]") {
  using namespace torch::nn;
  const auto ids = torch::tensor({{1, 3, 2}, {0, 1, 1}});
  const auto [name, layer] = GENERATE_COPY(table<std::string, std::function<Tensors(torch::Device)>>({
      {"Conv1d", run<Conv1d>(Conv1dOptions(4, 6, 3).stride(2).padding(1).groups(2), {2, 4, 9})},
      {"Conv2d", run<Conv2d>(Conv2dOptions(4, 6, 3).padding(1).dilation(2).bias(false), {2, 4, 9, 8})},
      {"Conv3d", run<Conv3d>(Conv3dOptions(2, 3, 2), {2, 2, 4, 3, 5})},
      {"ConvTranspose2d", run<ConvTranspose2d>(ConvTranspose2dOptions(4, 6, 3).stride(2).groups(2), {2, 4, 5, 4})},
      {"LSTM", run<LSTM>(LSTMOptions(4, 5).num_layers(2).bidirectional(true), {3, 2, 4})},
      {"LSTM without bias", run<LSTM>(LSTMOptions(4, 5).bias(false), {3, 2, 4})},
      {"GRU", run<GRU>(GRUOptions(4, 5), {3, 2, 4})},
      {"RNN", run<RNN>(RNNOptions(4, 5), {3, 2, 4})},
      {"LayerNorm", run<LayerNorm>(LayerNormOptions({4}), {3, 2, 4})},
      {"Embedding",
       [=](torch::Device device) {
         torch::manual_seed(0);
         return trained(Embedding(4, 5), ids, device, [](auto& layer, auto& x) { return layer(x); });
       }},
      {"EmbeddingBag",
       [=](torch::Device device) {
         torch::manual_seed(0);
         return trained(EmbeddingBag(4, 5), ids, device, [](auto& layer, auto& x) { return layer(x); });
       }},
      {"MultiheadAttention",
       [=](torch::Device device) {
         torch::manual_seed(0);
         return trained(MultiheadAttention(MultiheadAttentionOptions(4, 2)), torch::randn({3, 2, 4}), device,
                        [](auto& layer, auto& x) { return layer(x, x, x); });
       }},
      {"scaled_dot_product_attention",
       [=](torch::Device device) {
         torch::manual_seed(0);
         return trained(Linear(4, 4), torch::randn({2, 3, 5, 4}), device, [](auto& layer, auto& x) {
           return torch::scaled_dot_product_attention(layer(x), x, x, {}, 0.0, /*is_causal=*/true);
         });
       }},
  }));
  INFO(name);
  const auto expected = layer(torch::kCPU), found = layer(testing::device());
  REQUIRE(found.size() == expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    CHECK(found[i].device() == testing::device());
    CHECK(testing::distance(found[i], expected[i]) < 1e-5);
  }
}

TEST_CASE("Autocast and double backward act on the second device", "[.fake]") {
  at::autocast::set_autocast_enabled(testing::device().type(), true);
  at::autocast::set_autocast_dtype(testing::device().type(), torch::kBFloat16);
  auto x = torch::ones({2, 2}, torch::TensorOptions(testing::device()).requires_grad(true));
  CHECK(x.matmul(x).scalar_type() == torch::kBFloat16);
  CHECK(torch::softmax(x.matmul(x), 0).scalar_type() == torch::kFloat);
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(testing::device().type(), false);
  auto slope = torch::autograd::grad({x.matmul(x).sin().sum()}, {x}, {}, {}, /*create_graph=*/true)[0];
  slope.pow(2).sum().backward();
  CHECK(x.grad().device() == testing::device());
}
