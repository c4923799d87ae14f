// Preferences: a language model that answers in small letters or in capitals, as it happens, is taught to prefer small
// letters, from pairs of replies of which one is preferred (direct preference optimization, dpo.hpp). The method needs
// the model as it was beside the one that is trained. With adapters that is one model: inside a scope of `activate` it
// is the one that is trained, outside of it the one that was.
//
// The model is a Llama of 90,000 parameters, which first learns a toy language (toy_language.hpp). The figures to
// check: on pairs about subjects that the preferences were never about, the margin between the rewards rises from 0,
// the preferred reply becomes the likelier one, and the model outside of the scope stays as it was to the last bit.
//
//   preferences      draws the margin into preferences.svg
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <lora/lora.hpp>

#include "../finetune_gpt/model.hpp"
#include "../finetune_gpt/sampling.hpp"
#include "../line_chart.hpp"
#include "dpo.hpp"
#include "toy_language.hpp"

namespace {

using torch::Tensor;

constexpr double kBeta = 1, kLearningRate = 3e-4;
constexpr int kPretrainingSteps = 300, kSteps = 60, kEvaluateEvery = 5;
constexpr int64_t kBatch = 32, kPairs = 16, kHeldOutPairs = 64, kHeldOutSubjects = 4;
constexpr uint64_t kSamples = 40;

gpt::LanguageModel make_model() {
  gpt::ModelConfig config;
  config.vocab_size = static_cast<int64_t>(toy::kLetters.size());
  config.hidden_size = 64;
  config.intermediate_size = 128;
  config.num_layers = 2;
  config.num_heads = config.num_key_value_heads = 4;
  config.head_dim = 16;
  config.max_positions = toy::kLength;
  auto model = gpt::make_model(config);
  for (auto& parameter : model->parameters()) {
    const bool is_norm = parameter.dim() == 1;
    parameter.set_data(is_norm ? torch::ones(parameter.sizes()) : 0.05 * torch::randn(parameter.sizes()));
  }
  return model;
}

/// Texts side by side, each with the length of its prompt, whose letters are not to be predicted.
struct Texts {
  Tensor inputs = torch::zeros({0, toy::kLength}, torch::kLong), targets = inputs;

  void add(const std::string& prompt, const std::string& reply) {
    const auto tokens = toy::encode(prompt + reply);
    auto input = torch::zeros({1, toy::kLength}, torch::kLong);
    auto target = torch::full({1, toy::kLength}, dpo::kIgnored, torch::kLong);
    for (size_t i = 0; i + 1 < tokens.size(); ++i) {
      input[0][static_cast<int64_t>(i)] = tokens[i];
      if (i + 1 >= prompt.size()) target[0][static_cast<int64_t>(i)] = tokens[i + 1];
    }
    inputs = torch::cat({inputs, input});
    targets = torch::cat({targets, target});
  }
};

/// Teaches the language: half of the replies in capitals.
void pretrain(gpt::LanguageModelImpl& model, toy::Speaker& speaker) {
  namespace F = torch::nn::functional;
  torch::optim::AdamW optimizer(model.parameters(), torch::optim::AdamWOptions(3e-3));
  for (int step = 1; step <= kPretrainingSteps; ++step) {
    Texts texts;
    for (int64_t i = 0; i < kBatch; ++i) {
      const auto subject = speaker.any(toy::kSubjects), reply = speaker.reply(subject);
      texts.add(speaker.prompt(subject), speaker.coin() ? reply : toy::in_capitals(reply));
    }
    const auto loss = F::cross_entropy(model.forward(texts.inputs).flatten(0, 1), texts.targets.flatten());
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    if (step % 100 == 0) fmt::print("language, step {}: loss {:.3f} per letter\n", step, loss.item<double>());
  }
}

/// Pairs of replies about some of the subjects: one in small letters, which is preferred, and another in capitals.
dpo::Pairs make_pairs(toy::Speaker& speaker, const std::vector<std::string>& subjects, int64_t count) {
  Texts preferred, rejected;
  for (int64_t i = 0; i < count; ++i) {
    const auto subject = speaker.any(subjects);
    preferred.add(speaker.prompt(subject), speaker.reply(subject));
    rejected.add(speaker.prompt(subject), toy::in_capitals(speaker.reply(subject)));
  }
  return {torch::cat({preferred.inputs, rejected.inputs}), torch::cat({preferred.targets, rejected.targets})};
}

/// One update; returns the mean margin before it.
double step(gpt::LanguageModelImpl& model, const lora::Adapters& adapters, torch::optim::Optimizer& optimizer,
            const dpo::Pairs& pairs) {
  const auto reference = dpo::reference_log_probabilities(model, pairs);
  const auto active = adapters.activate();  // from here on the model is the one that is trained
  const auto margins = dpo::margins(dpo::log_probabilities(model, pairs), reference, kBeta);
  optimizer.zero_grad();
  dpo::loss(margins).backward();
  optimizer.step();
  return margins.mean().item<double>();
}

/// How a model stands to pairs: the mean margin, the share of those whose preferred reply is the likelier one, and the
/// mean log probability of a preferred reply, which falls where a model forgets its language over its preferences.
struct Standing {
  double margin, likelier, preferred;
};

Standing standing(gpt::LanguageModelImpl& model, const lora::Adapters& adapters, const dpo::Pairs& pairs) {
  const auto reference = dpo::reference_log_probabilities(model, pairs);
  torch::NoGradGuard no_grad;
  const auto active = adapters.activate();
  const auto policy = dpo::log_probabilities(model, pairs);
  const auto replies = policy.chunk(2);
  return {dpo::margins(policy, reference, kBeta).mean().item<double>(),
          (replies[0] > replies[1]).to(torch::kDouble).mean().item<double>(), replies[0].mean().item<double>()};
}

/// Prints what the model says about some subjects when letters are drawn as likely as it finds them. Returns the share
/// of replies in small letters.
double speak(const char* who, gpt::LanguageModelImpl& model, const std::vector<std::string>& subjects) {
  gpt::SamplingOptions options;
  options.temperature = options.top_p = 1;
  double small = 0;
  for (; options.seed < kSamples; ++options.seed) {
    const auto prompt = "\n" + subjects[options.seed % subjects.size()] + ":";
    const auto reply = toy::decode(gpt::generate(model, toy::encode(prompt), options, toy::encode("\n")));
    const bool has_capitals = std::any_of(reply.begin(), reply.end(), [](char c) { return c >= 'A' && c <= 'Z'; });
    if (!has_capitals) small += 1.0 / kSamples;
    if (options.seed < subjects.size()) fmt::print("{} {}{}\n", who, prompt.substr(1), reply);
  }
  return small;
}

}  // namespace

int main() {
  torch::manual_seed(0);
  toy::Speaker speaker(0);
  const auto model = make_model();
  pretrain(*model, speaker);

  const std::vector<std::string> held_out(toy::kSubjects.end() - kHeldOutSubjects, toy::kSubjects.end());
  const std::vector<std::string> subjects(toy::kSubjects.begin(), toy::kSubjects.end() - kHeldOutSubjects);
  const auto held_out_pairs = make_pairs(speaker, held_out, kHeldOutPairs);
  auto adapters = lora::attach(*model, lora::LoRAConfig(8).alpha(16).target_modules(lora::all_linear));
  torch::optim::AdamW optimizer(adapters.parameters(), torch::optim::AdamWOptions(kLearningRate).weight_decay(0));
  const auto reference = dpo::reference_log_probabilities(*model, held_out_pairs);
  const auto before = standing(*model, adapters, held_out_pairs);

  chart::Curve trained{"pairs of the step", {}, "#9ecae1"},
      unseen{"held-out subjects", {{0, before.margin}}, "#d94801"};
  for (int i = 1; i <= kSteps; ++i) {
    trained.points.emplace_back(i - 1, step(*model, adapters, optimizer, make_pairs(speaker, subjects, kPairs)));
    if (i % kEvaluateEvery == 0) unseen.points.emplace_back(i, standing(*model, adapters, held_out_pairs).margin);
  }
  chart::write({"Preferences: one model, trained and as it was", "step", "reward margin", {trained, unseen}},
               "preferences.svg");

  const auto after = standing(*model, adapters, held_out_pairs);
  const bool is_same = torch::equal(reference, dpo::reference_log_probabilities(*model, held_out_pairs));
  const auto small_before = speak("as it was:", *model, held_out), small_after = [&] {
    const auto active = adapters.activate();
    return speak("trained:  ", *model, held_out);
  }();
  const auto row = [](const char* what, double a, double b) { fmt::print("{:42} {:8.3f} {:8.3f}\n", what, a, b); };
  fmt::print("\n{:42} {:>8} {:>8}\n", fmt::format("of {} pairs about unseen subjects", kHeldOutPairs), "before",
             "after");
  row("reward margin", before.margin, after.margin);
  row("share whose preferred reply is likelier", before.likelier, after.likelier);
  row("log probability of a preferred reply", before.preferred, after.preferred);
  row(fmt::format("share of small letters in {} replies", kSamples).c_str(), small_before, small_after);
  fmt::print("outside of the scope the model is {}\n", is_same ? "the same, bit by bit" : "another one");
  const bool has_learned = after.margin > before.margin + 0.5 && after.likelier > 0.9 && small_after > small_before;
  return has_learned && is_same ? 0 : 1;
}
