#include "examples/tiny_model.hpp"

#include <lora/lora.hpp>
#include <lora/train/checkpointing.hpp>

#include "trainer.hpp"

namespace {

using testing::Approx;
using torch::Tensor;

constexpr int32_t kIgnored = gpt::kIgnored;

gpt::TrainingOptions without_warmup() {
  gpt::TrainingOptions options;
  options.warmup = 0;
  options.learning_rate = 0.05;
  return options;
}

lora::Adapters attach(gpt::LanguageModelImpl& model) {
  torch::manual_seed(3);
  auto adapters = lora::attach(model, lora::LoRAConfig(3).alpha(4).target_modules({"q_proj", "v_proj", "lm_head"}));
  torch::NoGradGuard no_grad;
  for (auto& parameter : adapters.parameters()) parameter.add_(0.1 * torch::randn_like(parameter));
  return adapters;
}

// Three examples of different lengths with 3, 1 and 2 targets that count.
const gpt::Example kFirst{{1, 2, 3, 4}, {2, kIgnored, 4, 5}};
const gpt::Example kSecond{{6, 7, 8}, {kIgnored, kIgnored, 9}};
const gpt::Example kThird{{10, 11}, {11, 12}};

}  // namespace

TEST_CASE("The loss is the mean over the targets that count", "[examples][trainer]") {
  auto model = testing::tiny_llama();
  auto adapters = attach(*model);
  gpt::Trainer trainer(*model, adapters, without_warmup());
  const auto batch = gpt::collate({&kFirst, &kSecond});
  torch::Tensor scores;
  {
    auto active = adapters.activate();
    scores = model->forward(batch.inputs.to(testing::device())).log_softmax(-1);
  }
  double by_hand = 0;
  for (auto [row, column, target] : std::vector<std::array<int64_t, 3>>{{0, 0, 2}, {0, 2, 4}, {0, 3, 5}, {1, 2, 9}}) {
    by_hand -= scores[row][column][target].item<double>() / 4;
  }
  CHECK(trainer.evaluate({batch}) == Approx(by_hand).epsilon(1e-6));
  CHECK(trainer.evaluate({gpt::collate({&kFirst}), gpt::collate({&kSecond})}) == Approx(by_hand).epsilon(1e-6));
  CHECK(trainer.step({batch}).loss == Approx(by_hand).epsilon(1e-6));
}

TEST_CASE("Accumulated batches make the step of one large batch, however their targets are spread",
          "[examples][trainer]") {
  auto run = [](const std::vector<gpt::Batch>& batches) {
    auto model = testing::tiny_llama();
    auto adapters = attach(*model);
    gpt::Trainer trainer(*model, adapters, without_warmup());
    const auto result = trainer.step(batches);
    std::vector<torch::Tensor> gradients;
    for (const auto& parameter : trainer.parameters) gradients.push_back(parameter.grad().flatten());
    return std::make_tuple(result.loss, result.gradient_norm, torch::cat(gradients));
  };
  const auto [loss, norm, gradient] = run({gpt::collate({&kFirst, &kSecond, &kThird})});
  const auto [split_loss, split_norm, split_gradient] =
      run({gpt::collate({&kFirst}), gpt::collate({&kSecond, &kThird})});
  CHECK(split_loss == Approx(loss).epsilon(1e-6));
  CHECK(split_norm == Approx(norm).epsilon(1e-5));
  CHECK(gradient.abs().max().item<double>() > 1e-3);
  CHECK(testing::distance(gradient, split_gradient) < 1e-6);
}

TEST_CASE("Blocks that are computed again, and all logits at once, make the same step", "[examples][trainer]") {
  struct Way {
    bool again, all_logits;
  };
  for (const auto architecture : {gpt::Architecture::kLlama, gpt::Architecture::kGPT2}) {
    const auto run = [&](const Way& way) {
      auto model = testing::tiny_model(architecture);
      torch::manual_seed(3);
      auto adapters = lora::attach(
          *model,
          lora::LoRAConfig(3).alpha(4).dropout(0.3).target_modules(lora::all_linear).exclude_modules({"lm_head"}));
      auto options = without_warmup();
      options.all_logits = way.all_logits;
      int blocks = 0;
      if (way.again) {
        model->run_block = [&](const auto& block, const Tensor& x) {
          ++blocks;
          return lora::checkpoint(block, x);
        };
      }
      gpt::Trainer trainer(*model, adapters, options);
      torch::manual_seed(5);
      std::vector<double> losses;
      for (int i = 0; i < 3; ++i) losses.push_back(trainer.step({gpt::collate({&kFirst, &kThird})}).loss);
      CHECK(blocks == (way.again ? 3 * model->config.num_layers : 0));
      return losses;
    };
    INFO(gpt::architecture_name(architecture));
    const auto expected = run({});
    CHECK(run({/*again=*/true, false}) == expected);
    const auto with_logits = run({false, /*all_logits=*/true});
    for (size_t i = 0; i < expected.size(); ++i) CHECK(with_logits[i] == Approx(expected[i]).epsilon(1e-5));
    CHECK(expected[0] != Approx(expected[1]).epsilon(1e-3));
  }
}

TEST_CASE("A step clips the gradient and moves the adapters only", "[examples][trainer]") {
  auto model = testing::tiny_llama();
  auto adapters = attach(*model);
  auto options = without_warmup();
  options.clip = 0.01;
  gpt::Trainer trainer(*model, adapters, options);
  std::vector<torch::Tensor> frozen, learned;
  for (const auto& parameter : model->parameters()) frozen.push_back(parameter.clone());
  for (const auto& parameter : trainer.parameters) learned.push_back(parameter.detach().clone());
  const auto result = trainer.step({gpt::collate({&kFirst, &kThird})});
  CHECK(result.gradient_norm > 0.01);  // as it was before clipping
  CHECK(result.learning_rate == 0.05);
  CHECK(trainer.steps_done == 1);
  double norm = 0;
  for (const auto& parameter : trainer.parameters) norm += parameter.grad().pow(2).sum().item<double>();
  CHECK(std::sqrt(norm) == Approx(0.01).epsilon(1e-3));
  for (size_t i = 0; i < frozen.size(); ++i) CHECK(torch::equal(model->parameters()[i], frozen[i]));
  for (size_t i = 0; i < learned.size(); ++i) CHECK(testing::distance(trainer.parameters[i], learned[i]) > 1e-3);
}

TEST_CASE("Steps on the same batch lower its loss", "[examples][trainer]") {
  auto model = testing::tiny_llama();
  auto adapters = attach(*model);
  gpt::Trainer trainer(*model, adapters, without_warmup());
  const auto batch = gpt::collate({&kFirst, &kSecond, &kThird});
  const auto before = trainer.evaluate({batch});
  for (int i = 0; i < 15; ++i) trainer.step({batch});
  CHECK(trainer.evaluate({batch}) < 0.7 * before);
}

TEST_CASE("A gradient that is not finite stops the run before it spoils the adapters", "[examples][trainer]") {
  auto model = testing::tiny_llama();
  auto adapters = attach(*model);
  gpt::Trainer trainer(*model, adapters, without_warmup());
  trainer.parameters[0].register_hook([](const torch::Tensor& gradient) { return gradient / 0; });
  const auto before = trainer.parameters[0].detach().clone();
  const auto error = testing::error_of([&] { trainer.step({gpt::collate({&kFirst})}); });
  CHECK_THAT(error, testing::contains("the gradient of step 1 has the norm "));
  CHECK(torch::equal(trainer.parameters[0], before));
  CHECK(trainer.steps_done == 0);
}

TEST_CASE("A loss that is not finite stops the run before it spoils the adapters", "[examples][trainer]") {
  auto model = testing::tiny_llama();
  auto adapters = attach(*model);
  gpt::Trainer trainer(*model, adapters, without_warmup());
  {
    torch::NoGradGuard no_grad;
    model->lm_head->weight.fill_(std::numeric_limits<float>::infinity());
  }
  const auto before = trainer.parameters[0].detach().clone();
  const auto error = testing::error_of([&] { trainer.step({gpt::collate({&kFirst})}); });
  CHECK_THAT(error, testing::contains("the loss of step 1 is "));
  CHECK_THAT(error, testing::contains("--lr"));
  CHECK(torch::equal(trainer.parameters[0], before));
  CHECK(trainer.steps_done == 0);
}
