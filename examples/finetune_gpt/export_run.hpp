// Everything another program needs to repeat a run: where the adapter starts, what it sees, and how fast it learns.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include <lora/lora.hpp>

#include "config.hpp"
#include "data.hpp"
#include "options.hpp"
#include "trainer.hpp"

namespace gpt {

namespace detail {

/// Inputs and targets of all batches of a run, (steps, accumulate, B, T), and of the validation, (n, T).
inline std::map<std::string, torch::Tensor> all_batches(const Options& options, const Dataset& data) {
  TrainingBatches batches(data.train, options.batch, options.seed);
  const auto count = options.training.steps * options.accumulate;
  const auto length = longest(data.train);
  const std::vector<int64_t> shape{options.training.steps, options.accumulate, options.batch, length};
  std::vector<torch::Tensor> inputs, targets;
  for (int64_t i = 0; i < count; ++i) {
    const auto batch = batches.at(i, length);
    inputs.push_back(batch.inputs);
    targets.push_back(batch.targets);
  }
  const auto validation = in_batches(data.validation, static_cast<int64_t>(data.validation.size())).front();
  return {{"train_inputs", torch::stack(inputs).view(shape)},
          {"train_targets", torch::stack(targets).view(shape)},
          {"validation_inputs", validation.inputs},
          {"validation_targets", validation.targets}};
}

inline nlohmann::ordered_json run_description(const Options& options) {
  const auto& training = options.training;
  std::vector<double> rates;
  for (int64_t step = 0; step < training.steps; ++step) rates.push_back(learning_rate_at(step, training));
  return {{"model", std::filesystem::absolute(options.model).string()},
          {"steps", training.steps},
          {"accumulate", options.accumulate},
          {"lr", rates},
          {"betas", {kBeta1, kBeta2}},
          {"eps", kEpsilon},
          {"weight_decay", training.weight_decay},
          {"clip", training.clip},
          {"dropout", options.dropout},
          {"dtype", options.dtype},
          {"quantize", options.quantize},
          {"quantize_embedding", options.quantize_embedding},
          {"eval_every", options.eval_every}};
}

}  // namespace detail

/// Writes initial_adapter/, batches.safetensors and run.json into `folder`; before the first step.
/// The loss of a step is the sum over all its targets that count, divided by their number.
inline void export_run(const std::filesystem::path& folder, const Options& options, const Dataset& data,
                       lora::Adapters& adapters) {
  std::filesystem::create_directories(folder);
  adapters.save(folder / "initial_adapter");
  lora::write_safetensors(folder / "batches.safetensors", detail::all_batches(options, data));
  write_json(folder / "run.json", detail::run_description(options));
}

}  // namespace gpt
