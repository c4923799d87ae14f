// Generation of text, one token at a time.
#pragma once

#include <torch/torch.h>

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <tuple>
#include <vector>

#include "language_model.hpp"

namespace gpt {

/// How the next token is drawn from the model's scores.
struct SamplingOptions {
  int64_t max_new_tokens = 128;
  double temperature = 0.8;  ///< scores are divided by it; 0 always takes the most likely token
  double top_p = 0.95;       ///< only the most likely tokens that together have this probability; 1: all
  int64_t top_k = 0;         ///< only this many of the most likely tokens; 0: all
  /// Scores of tokens that are in the text already are divided by it, or multiplied when below 0; 1 leaves them.
  double repetition_penalty = 1;
  uint64_t seed = 0;
};

namespace detail {

inline void validate(const SamplingOptions& options) {
  TORCH_CHECK_VALUE(options.max_new_tokens > 0, "max_new_tokens must be positive, got ", options.max_new_tokens);
  TORCH_CHECK_VALUE(options.temperature >= 0, "temperature must not be negative, got ", options.temperature);
  TORCH_CHECK_VALUE(options.top_p > 0 && options.top_p <= 1, "top_p must be in (0, 1], got ", options.top_p);
  TORCH_CHECK_VALUE(options.top_k >= 0, "top_k must not be negative, got ", options.top_k);
  TORCH_CHECK_VALUE(options.repetition_penalty > 0, "repetition_penalty must be positive, got ",
                    options.repetition_penalty);
}

// Scores (V) with those of the tokens in `text`, once each, made less likely.
inline torch::Tensor penalized(const torch::Tensor& scores, const std::vector<int64_t>& text, double penalty) {
  if (penalty == 1) return scores;
  const auto seen = std::get<0>(at::_unique(torch::tensor(text, torch::kLong)));
  const auto logits = scores.to(torch::kCPU, torch::kFloat);
  const auto before = logits.index_select(0, seen);
  return logits.index_copy(0, seen, torch::where(before < 0, before * penalty, before / penalty));
}

// One draw from scores (V), on the CPU so that a seed means the same text on every device.
inline int64_t sample(const torch::Tensor& scores, const SamplingOptions& options, const at::Generator& generator) {
  const auto logits = scores.to(torch::kCPU, torch::kFloat);
  if (options.temperature == 0) return logits.argmax().item<int64_t>();
  const auto count = options.top_k > 0 ? std::min(options.top_k, logits.size(0)) : logits.size(0);
  const auto [kept, tokens] = logits.topk(count);  // sorted, the most likely first
  auto probabilities = (kept / options.temperature).softmax(-1);
  const auto before = probabilities.cumsum(-1) - probabilities;  // of everything more likely
  probabilities = probabilities.masked_fill(before >= options.top_p, 0.0);
  return tokens[probabilities.multinomial(1, /*replacement=*/false, generator).item<int64_t>()].item<int64_t>();
}

// Eval mode, so that no dropout acts, for as long as it lives.
class EvalGuard {
 public:
  explicit EvalGuard(torch::nn::Module& module) : module_(module), was_training_(module.is_training()) {
    module_.eval();
  }
  ~EvalGuard() { module_.train(was_training_); }
  EvalGuard(const EvalGuard&) = delete;
  EvalGuard& operator=(const EvalGuard&) = delete;

 private:
  torch::nn::Module& module_;
  bool was_training_;
};

}  // namespace detail

/// Continues a prompt of at least one token: returns the new tokens and calls `on_token` with each as it is drawn. Ends
/// after max_new_tokens, before one of `stop_ids`, or where the positions the model was trained on end.
/// Throws c10::ValueError for options out of range, c10::Error for a prompt that is empty or fills all positions.
inline std::vector<int64_t> generate(LanguageModelImpl& model, const std::vector<int64_t>& prompt,
                                     const SamplingOptions& options, const std::vector<int64_t>& stop_ids,
                                     const std::function<void(int64_t)>& on_token = {}) {
  detail::validate(options);
  const auto length = static_cast<int64_t>(prompt.size()), room = model.config.max_positions - length;
  TORCH_CHECK(length > 0, "generate: the prompt must hold at least one token");
  TORCH_CHECK(room > 0, "generate: the prompt has ", length, " tokens, the model ", model.config.max_positions,
              " positions; shorten the prompt");
  torch::NoGradGuard no_grad;
  detail::EvalGuard eval(model);
  const auto generator = at::detail::createCPUGenerator(options.seed);
  const auto device = model.lm_head->weight.device();
  KeyValueCache cache;
  std::vector<int64_t> generated, text = prompt;
  auto input = torch::tensor(prompt, torch::kLong).unsqueeze(0).to(device);  // (1, T), later (1, 1)
  while (static_cast<int64_t>(generated.size()) < std::min(options.max_new_tokens, room)) {
    const auto last = model.hidden_states(input, &cache).select(1, -1);  // (1, C): only its scores are needed
    const auto scores = model.lm_head->forward(last).squeeze(0);         // (V)
    const auto token = detail::sample(detail::penalized(scores, text, options.repetition_penalty), options, generator);
    if (std::find(stop_ids.begin(), stop_ids.end(), token) != stop_ids.end()) break;
    generated.push_back(token);
    text.push_back(token);
    if (on_token) on_token(token);
    input = torch::full({1, 1}, token, input.options());
  }
  return generated;
}

}  // namespace gpt
