// Direct preference optimization (Rafailov et al. 2023): a model learns from pairs of replies, of which one is
// preferred, without a model of rewards.
#pragma once

#include <torch/torch.h>

#include "../finetune_gpt/language_model.hpp"

namespace dpo {

/// Positions with this target do not count: those of prompts, and what texts are filled up with.
inline constexpr int64_t kIgnored = -100;

/// Pairs of texts that begin with the same prompt: n with the preferred replies, then n with the rejected ones.
struct Pairs {
  torch::Tensor inputs;   ///< (2 n, T) int64
  torch::Tensor targets;  ///< (2 n, T): the next token where a reply is, kIgnored elsewhere

  int64_t size() const { return inputs.size(0) / 2; }
};

/// log p(reply | prompt) of each text: (2 n).
inline torch::Tensor log_probabilities(gpt::LanguageModelImpl& model, const Pairs& pairs) {
  namespace F = torch::nn::functional;
  const auto logits = model.forward(pairs.inputs).flatten(0, 1);  // (2 n * T, V)
  const auto options = F::CrossEntropyFuncOptions().reduction(torch::kNone).ignore_index(kIgnored);
  return -F::cross_entropy(logits, pairs.targets.flatten(), options).view_as(pairs.targets).sum(1);
}

/// The same of the model as it was before preferences. Outside of every scope of `activate` the model that is trained
/// is that model, so there is no copy of it.
inline torch::Tensor reference_log_probabilities(gpt::LanguageModelImpl& model, const Pairs& pairs) {
  torch::NoGradGuard no_grad;
  return log_probabilities(model, pairs);
}

/// How much higher each preferred reply is rewarded than the rejected one, (n), where the reward is
///
///   r = beta (log p(reply | prompt) - log p_reference(reply | prompt))
inline torch::Tensor margins(const torch::Tensor& policy, const torch::Tensor& reference, double beta) {
  const auto rewards = (beta * (policy - reference)).chunk(2);
  return rewards[0] - rewards[1];
}

/// The mean of -log sigmoid(margin).
inline torch::Tensor loss(const torch::Tensor& margins) { return -torch::nn::functional::logsigmoid(margins).mean(); }

}  // namespace dpo
