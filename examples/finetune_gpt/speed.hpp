// How fast a model runs without adapters, with them, and with them merged; and how far merging moves its results.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include <lora/lora.hpp>

#include "data.hpp"
#include "model.hpp"
#include "progress.hpp"

namespace gpt {

inline constexpr int kSpeedPasses = 5;

/// Tokens per second of a forward pass; `merged` where adapters were merged.
struct Speeds {
  double base, adapted;
  std::optional<double> merged;
};

namespace detail {

inline double timed_forward(LanguageModelImpl& model, const torch::Tensor& inputs) {
  const Stopwatch watch;
  model.forward(inputs);
  if (inputs.is_cuda()) torch::cuda::synchronize(inputs.device().index());
  return watch.seconds();
}

inline double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<int64_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

}  // namespace detail

/// Medians over kSpeedPasses rounds of one pass each, after one round that does not count, so that whatever else the
/// machine does meets all alike. The adapters are unmerged afterwards, as before. Without `merges` the model is not
/// measured with merged adapters, and its weights may be held in few bits.
inline Speeds measure_speeds(LanguageModelImpl& model, lora::Adapters& adapters, const Batch& batch, bool merges) {
  torch::NoGradGuard no_grad;
  model.eval();
  std::vector<double> base, adapted, merged;
  for (int pass = -1; pass < kSpeedPasses; ++pass) {
    {
      auto base_alone = adapters.activate("");
      base.push_back(detail::timed_forward(model, batch.inputs));
    }
    {
      auto active = adapters.activate();
      adapted.push_back(detail::timed_forward(model, batch.inputs));
    }
    if (merges) {
      lora::MergeGuard guard(adapters);
      auto fast = lora::fast_products();  // as in the other scopes
      merged.push_back(detail::timed_forward(model, batch.inputs));
    }
    if (pass < 0) base.clear(), adapted.clear(), merged.clear();
  }
  const auto tokens = static_cast<double>(batch.inputs.numel());
  return {tokens / detail::median(base), tokens / detail::median(adapted),
          merges ? std::make_optional(tokens / detail::median(merged)) : std::nullopt};
}

/// Largest absolute differences between logits, and the largest absolute logit of the adapted model.
struct LogitDifferences {
  double merged_adapted, adapted_base, largest;
};

/// Compares the three forms of the model on `inputs` (B, T). The adapters are unmerged afterwards, as before.
inline LogitDifferences compare_merged(LanguageModelImpl& model, lora::Adapters& adapters,
                                       const torch::Tensor& inputs) {
  torch::NoGradGuard no_grad;
  model.eval();
  auto distance = [](const torch::Tensor& a, const torch::Tensor& b) { return (a - b).abs().max().item<double>(); };
  const auto base = model.forward(inputs).to(torch::kFloat);
  torch::Tensor adapted;
  {
    auto active = adapters.activate();
    adapted = model.forward(inputs).to(torch::kFloat);
  }
  lora::MergeGuard guard(adapters);
  return {distance(model.forward(inputs).to(torch::kFloat), adapted), distance(adapted, base),
          adapted.abs().max().item<double>()};
}

}  // namespace gpt
