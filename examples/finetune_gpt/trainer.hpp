// Training: the learning rate of each step, one step of AdamW on the adapters, and the loss on held-out examples.
#pragma once

#include <torch/torch.h>
#include <c10/util/MathConstants.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <lora/lora.hpp>
#include <lora/train/cross_entropy.hpp>
#include <lora/train/optimizer.hpp>

#include "data.hpp"
#include "model.hpp"

namespace gpt {

/// AdamW's decay rates of the two moments, and what it adds to the root of the second.
inline constexpr double kBeta1 = 0.9, kBeta2 = 0.999, kEpsilon = 1e-8;

/// What decides how the adapters move.
struct TrainingOptions {
  /// Updates in the whole run. At least 1.
  int64_t steps = 100;
  /// Updates over which the learning rate rises from 0 to its peak. 0 starts at the peak.
  int64_t warmup = 10;
  /// Peak of the learning rate.
  double learning_rate = 1e-3;
  /// The learning rate at the end, as a share of the peak.
  double min_lr_ratio = 0.1;
  /// AdamW's decoupled weight decay.
  double weight_decay = 0.01;
  /// Largest norm of the gradient of all adapters together; 0 does not clip.
  double clip = 1.0;
  /// Whether the loss is LibTorch's, of all logits at once.
  bool all_logits = false;
};

/// The learning rate of update `step`, counted from 0: linear up to the peak over the warm-up, then half a cosine down
/// to min_lr_ratio of it.
///
///   step < warmup:  peak (step + 1) / warmup
///   else:           low + (peak - low) (1 + cos(pi t)) / 2,  t = (step - warmup) / (steps - warmup)
inline double learning_rate_at(int64_t step, const TrainingOptions& options) {
  const auto peak = options.learning_rate;
  if (step < options.warmup) return peak * static_cast<double>(step + 1) / static_cast<double>(options.warmup);
  const auto low = peak * options.min_lr_ratio;
  const auto t = static_cast<double>(step - options.warmup) / static_cast<double>(options.steps - options.warmup);
  return low + (peak - low) * (1 + std::cos(c10::pi<double> * t)) / 2;
}

/// Sum of the cross entropies of all targets that count, in float32 whatever the model computes in. The head runs only
/// where there is such a target, and of the logits, which would be the largest tensor of a step, only some rows exist
/// at a time, or, with `all_logits`, all of them.
inline torch::Tensor summed_cross_entropy(LanguageModelImpl& model, const Batch& batch, bool all_logits = false) {
  namespace F = torch::nn::functional;
  const auto hidden = model.hidden_states(batch.inputs);  // (B, T, hidden_size)
  if (all_logits) {
    const auto logits = model.lm_head->forward(hidden).to(torch::kFloat).flatten(0, 1);
    const auto options = F::CrossEntropyFuncOptions().ignore_index(kIgnored).reduction(torch::kSum);
    return F::cross_entropy(logits, batch.targets.flatten().to(torch::kLong), options);
  }
  const auto options = lora::CrossEntropyOptions().ignore_index(kIgnored).reduction(torch::kSum);
  return lora::linear_cross_entropy(hidden, model.lm_head->weight, batch.targets, options);
}

/// What one update did.
struct StepResult {
  double loss;           // mean over the step's targets, before the update
  double learning_rate;  // of this update
  double gradient_norm;  // before clipping
};

/// Trains the adapters of a model; the model itself stays as it is.
class Trainer {
 public:
  /// `model` and `adapters` must outlive the trainer.
  Trainer(LanguageModelImpl& model, lora::Adapters& adapters, const TrainingOptions& options)
      : options(options),
        parameters(adapters.parameters()),
        optimizer(adapters, lora::AdamWOptions(options.learning_rate)
                                .betas({kBeta1, kBeta2})
                                .eps(kEpsilon)
                                .weight_decay(options.weight_decay)),
        model_(model),
        adapters_(adapters),
        device_(parameters.front().device()) {}

  /// One update from the mean loss over all targets of `batches` together (gradient accumulation, in which a batch
  /// counts by the number of its targets). Throws c10::Error, before any adapter has changed, if the loss or the
  /// norm of the gradient is not finite.
  StepResult step(const std::vector<Batch>& batches) {
    const auto rate = learning_rate_at(steps_done, options);
    model_.train();
    optimizer.zero_grad();
    const auto loss = accumulate(batches);
    TORCH_CHECK(std::isfinite(loss), "the loss of step ", steps_done + 1, " is ", loss,
                ", so training cannot go on; a lower --lr or a longer --warmup may help");
    const auto limit = options.clip > 0 ? options.clip : std::numeric_limits<double>::infinity();
    const auto norm = lora::clip_grad_norm(optimizer, limit);
    TORCH_CHECK(std::isfinite(norm), "the gradient of step ", steps_done + 1, " has the norm ", norm,
                ", so training cannot go on; a lower --lr or a longer --warmup may help");
    for (auto& group : optimizer.param_groups()) group.options().set_lr(rate);
    optimizer.step();
    ++steps_done;
    return {loss, rate, norm};
  }

  /// Mean loss over all targets of `batches`, with the adapters and without dropout; perplexity is its exponential.
  double evaluate(const std::vector<Batch>& batches) {
    torch::NoGradGuard no_grad;
    auto active = adapters_.activate();
    model_.eval();
    double sum = 0;
    int64_t tokens = 0;
    for (const auto& batch : batches) {
      sum += summed_cross_entropy(model_, batch.to(device_), options.all_logits).item<double>();
      tokens += batch.learned;
    }
    return sum / static_cast<double>(tokens);
  }

  const TrainingOptions options;
  const std::vector<torch::Tensor> parameters;  // of the adapters
  lora::AdamW optimizer;                        // over exactly these
  int64_t steps_done = 0;

 private:
  /// Adds up the gradients of the mean loss over all batches, and returns that loss.
  double accumulate(const std::vector<Batch>& batches) {
    auto active = adapters_.activate();
    int64_t tokens = 0;
    for (const auto& batch : batches) tokens += batch.learned;
    auto sum = torch::zeros({}, torch::TensorOptions(torch::kDouble).device(device_));
    for (const auto& batch : batches) {
      auto loss = summed_cross_entropy(model_, batch.to(device_), options.all_logits) / static_cast<double>(tokens);
      loss.backward();
      sum += loss.detach();
    }
    return sum.item<double>();
  }

  LanguageModelImpl& model_;
  lora::Adapters& adapters_;
  torch::Device device_;
};

}  // namespace gpt
