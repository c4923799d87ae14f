#include "support/methods.hpp"
#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/modules/linear.hpp>
#include <lora/peft/checkpoint.hpp>

#include <cmath>

using lora::LoRAConfig;
using lora::LoRAOptions;
using lora::VeRA;

TEST_CASE("VeRA scales the rows of a fixed A and B, by hand") {
  auto any = testing::make_method<VeRA>(LoRAOptions(2).alpha(100), 2, 3, torch::kDouble);  // alpha has no effect
  auto& method = any.value;
  method.vera_A.copy_(torch::tensor({{1.0, 2.0, 3.0}, {0.0, 1.0, 0.0}}));
  method.vera_B.copy_(torch::tensor({{1.0, 0.0}, {1.0, 1.0}}));
  method.vera_lambda_d.copy_(torch::tensor({2.0, 10.0}));
  method.vera_lambda_b.copy_(torch::tensor({1.0, 0.5}));
  // diag(d) A = (2 4 6; 0 10 0); B of that: (2 4 6; 2 14 6); rows times b
  const auto w = torch::ones({2, 3}, testing::on_device(torch::kDouble));
  CHECK(testing::distance(any.delta(lora::WeightBase(w)), torch::tensor({{2.0, 4.0, 6.0}, {1.0, 7.0, 3.0}})) == 0);
  CHECK(any.scaling() == 1);
  auto x = torch::tensor({{1.0, 1.0, 0.0}}, testing::on_device(torch::kDouble));
  auto y = testing::linear_with(any, x, w, torch::full({2}, 0.5, x.options()));
  CHECK(testing::distance(y, torch::tensor({{8.5, 10.5}})) == 0);  // W x = 2, b = 0.5
}

TEST_CASE("A and B are those of the seed, uniform in Kaiming's bounds, whatever the type of the layer") {
  const auto make = [](int64_t seed, torch::ScalarType type) {
    auto method = testing::make_method<VeRA>(LoRAOptions(64), 500, 1000, type, VeRA().projection_prng_key(seed));
    method.initialize_shared();
    return method.value;
  };
  const auto one = make(3, torch::kFloat), same = make(3, torch::kDouble), other = make(4, torch::kFloat);
  CHECK(testing::distance(one.vera_A, same.vera_A) == 0);
  CHECK(testing::distance(one.vera_A, other.vera_A) > 0.01);
  for (const auto& [matrix, fan] : {std::pair(one.vera_A, 1000.0), std::pair(one.vera_B, 64.0)}) {
    CHECK(matrix.abs().max().item<double>() == testing::Approx(std::sqrt(6 / fan)).epsilon(0.01));
    CHECK(matrix.std().item<double>() == testing::Approx(std::sqrt(2 / fan)).epsilon(0.02));
  }
}

TEST_CASE(
    "All layers of an adapter share one A and one B, as large as the largest needs them, and only b and d learn") {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(6, 10), torch::nn::Tanh(), torch::nn::Linear(10, 3));
  model->to(testing::device());
  auto adapters = lora::attach(*model, LoRAConfig(4).method(VeRA().d_initial(0.25)).target_modules(lora::all_linear));
  CHECK(adapters.named_parameters().keys() ==
        std::vector<std::string>{"0.vera_lambda_b", "0.vera_lambda_d", "2.vera_lambda_b", "2.vera_lambda_d"});
  CHECK(testing::distance(adapters.named_parameters()["2.vera_lambda_d"], torch::full({4}, 0.25)) == 0);
  CHECK(adapters.report().trainable == 10 + 4 + 3 + 4);
  std::vector<torch::Tensor> shared;
  adapters.adapter("default")->for_each_tensor([&](const auto&, const lora::NamedTensor& tensor) {
    if (tensor.is_shared) shared.push_back(*tensor.tensor);
  });
  REQUIRE(shared.size() == 2);
  CHECK(shared[0].sizes() == torch::IntArrayRef({4, 10}));
  CHECK(shared[1].sizes() == torch::IntArrayRef({10, 4}));
  CHECK_FALSE(shared[0].requires_grad());
  auto x = torch::randn({2, 6}, testing::device());
  auto active = adapters.activate();
  model->forward(x).sum().backward();
  CHECK(adapters.named_parameters()["0.vera_lambda_b"].grad().abs().min().item<double>() > 0);
}

TEST_CASE("Files hold A and B, or only their seed") {
  torch::manual_seed(0);
  const bool saved = GENERATE(true, false);
  torch::nn::Sequential model(torch::nn::Linear(6, 10), torch::nn::Linear(10, 3));
  model->to(testing::device());
  auto adapters = lora::attach(
      *model, LoRAConfig(4).method(VeRA().projection_prng_key(11).save_projection(saved)).target_modules({"0", "1"}));
  testing::randomize(adapters.parameters(), 0.5);
  auto x = torch::randn({2, 6}, testing::device());
  const auto run = [&](const lora::Adapters& adapters) {
    auto active = adapters.activate();
    return model->forward(x);
  };
  const auto adapted = run(adapters);
  testing::TemporaryFolder folder;
  adapters.save(folder.path());
  adapters.detach();
  const auto written = lora::read_safetensors(folder / "adapter_model.safetensors");
  CHECK(written.count("base_model.vera_A") == (saved ? 1 : 0));
  CHECK(written.size() == (saved ? 6 : 4));
  auto loaded = lora::load_adapter(*model, folder.path());
  CHECK(torch::equal(run(loaded), adapted));
  if (!saved) return;
  auto incomplete = written;
  incomplete.erase("base_model.vera_B");
  lora::write_safetensors(folder / "adapter_model.safetensors", incomplete);
  loaded.detach();
  CHECK_THROWS_WITH(lora::load_adapter(*model, folder.path()), testing::contains("vera_B"));
}

TEST_CASE("What PEFT's VeRA has no words for is not written") {
  torch::nn::Sequential model(torch::nn::Linear(6, 10), torch::nn::Linear(10, 3));
  model->to(testing::device());
  testing::TemporaryFolder folder;
  auto config = LoRAConfig(4).method(VeRA()).target_modules({"0", "1"});
  auto adapters = lora::attach(*model, LoRAConfig(config).rank_pattern({{"1", 2}}));
  CHECK_THROWS_WITH(adapters.save(folder.path()), testing::contains("PEFT's VERA has no \"rank_pattern\""));
  adapters.detach();
  lora::attach(*model, LoRAConfig(config).exclude_modules({"1"})).save(folder.path());  // by the names that are left
  CHECK(lora::read_adapter_config(folder / "adapter_config.json").target_modules().names()->size() == 1);
}

TEST_CASE("A module has a VeRA of its own, with A and B among its buffers") {
  torch::manual_seed(0);
  lora::LoRALinear<VeRA> layer(torch::nn::Linear(6, 4), LoRAOptions(3));
  CHECK(layer->named_buffers().keys() == std::vector<std::string>{"vera_A", "vera_B"});
  testing::randomize(lora::trainable_parameters(*layer), 0.5);
  auto x = torch::randn({2, 6});
  auto copy = std::dynamic_pointer_cast<lora::LoRALinearImpl<VeRA>>(layer->clone());
  CHECK(torch::equal(copy->forward(x), layer->forward(x)));
  CHECK(testing::distance(layer->forward(x), torch::linear(x, layer->weight + layer->delta(), layer->bias)) < 1e-5);
}
