// The command line of finetune_gpt.
#pragma once

#include <torch/torch.h>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <lora/lora.hpp>

#include "common.hpp"
#include "texts.hpp"
#include "trainer.hpp"
#include "weight_format.hpp"

namespace gpt {

/// What the command line says; the comments are in the texts of --help below.
struct Options {
  std::filesystem::path model;
  DataOptions data;
  std::filesystem::path out = "finetune_gpt_out";

  int64_t rank = 8;
  double alpha = 16;
  double dropout = 0;
  std::vector<std::string> targets;
  std::string method = "LowRank";

  TrainingOptions training;
  int64_t batch = 4;
  int64_t accumulate = 1;
  uint64_t seed = 0;
  int64_t eval_every = 25;

  int64_t save_every = 0;
  bool resume = false;
  bool overwrite = false;

  std::string device = "auto";
  std::string dtype = "float32";
  std::string quantize = "none";
  std::string quantize_embedding = "none";
  int64_t threads = 0;
  bool checkpoint = false;
  std::vector<std::string> without;

  std::string prompt;
  int64_t sample_tokens = 64;
  double sample_temperature = 0.8;
  bool no_merge = false;
  std::filesystem::path export_run;

  WeightFormat format() const { return {parse_dtype(dtype), quantize, quantize_embedding}; }
};

namespace detail {

inline std::vector<std::string> method_names() {
  std::vector<std::string> names;
  for (const auto& method : lora::all_methods()) names.emplace_back(method.info().name);
  return names;
}

inline void add_model_options(CLI::App& app, Options& o) {
  const auto* group = "Model and data";
  app.add_option("--model", o.model, "Hugging Face directory: config.json, model.safetensors, tokenizer.json")
      ->required()
      ->check(CLI::ExistingDirectory)
      ->type_name("DIR")
      ->group(group);
  add_data_options(app, o.data, group);
  app.add_option("--validation-blocks", o.data.validation_blocks,
                 "At most so many rows of it are evaluated, evenly spaced")
      ->check(between(1))
      ->group(group);
}

inline void add_adapter_options(CLI::App& app, Options& o) {
  const auto* group = "Adapter";
  app.add_option("--method", o.method, "Kind of adapter")
      ->transform(CLI::IsMember(method_names(), CLI::ignore_case))
      ->group(group);
  app.add_option("--rank", o.rank, "Rank of the update")->check(between(1))->group(group);
  app.add_option("--alpha", o.alpha, "The update is scaled by alpha / rank")->check(between())->group(group);
  app.add_option("--dropout", o.dropout, "Dropout on the adapter's input")->check(between(0, 0.99))->group(group);
  app.add_option(
         "--targets", o.targets,
         "Names of the layers to adapt, or all-linear: all but\nthe head [default: q_proj v_proj; GPT-2: c_attn]")
      ->type_name("NAME ...")
      ->group(group);
}

inline void add_training_options(CLI::App& app, Options& o) {
  const auto* group = "Training";
  auto& t = o.training;
  app.add_option("--steps", t.steps, "Updates in the whole run")->check(between(1))->group(group);
  app.add_option("--batch", o.batch, "Rows of a batch")->check(between(1))->group(group);
  app.add_option("--accumulate", o.accumulate, "Batches whose gradients are added up for one update")
      ->check(between(1))
      ->group(group);
  app.add_option("--lr", t.learning_rate, "Peak of the learning rate")->check(between(0))->group(group);
  app.add_option("--warmup", t.warmup,
                 "Updates of linear warm-up, before half a cosine;\nunless given, at most --steps")
      ->check(between(0))
      ->group(group);
  app.add_option("--min-lr", t.min_lr_ratio, "Learning rate at the end, as a share of --lr")
      ->check(between(0, 1))
      ->group(group);
  app.add_option("--weight-decay", t.weight_decay, "AdamW's weight decay")->check(between(0))->group(group);
  app.add_option("--clip", t.clip, "Largest norm of the gradient; 0: any")->check(between(0))->group(group);
  app.add_option("--seed", o.seed, "Of initialization, order, dropout and samples")
      ->check(between(0))
      ->type_name("INT")
      ->group(group);
  app.add_option("--eval-every", o.eval_every, "Updates between validations; 0: only before and after")
      ->check(between(0))
      ->group(group);
}

inline void add_run_options(CLI::App& app, Options& o) {
  const auto* group = "Run";
  app.add_option("--out", o.out, "Folder for all results")->type_name("DIR")->group(group);
  app.add_option("--save-every", o.save_every, "Updates between checkpoints; 0: only when interrupted")
      ->check(between(0))
      ->group(group);
  auto* resume = app.add_flag("--resume", o.resume, "Go on from the newest checkpoint in --out")->group(group);
  app.add_flag("--overwrite", o.overwrite, "Start anew although --out holds checkpoints")
      ->excludes(resume)
      ->group(group);
  app.add_option("--device", o.device, "auto, cpu, cuda or cuda:N")->group(group);
  app.add_option("--dtype", o.dtype, "Numbers of the frozen model; adapters are always float32")
      ->check(CLI::IsMember({"float32", "bfloat16"}))
      ->group(group);
  app.add_option("--quantize", o.quantize, "Hold the frozen linear layers but the head in few bits")
      ->check(CLI::IsMember(quantization_names()))
      ->group(group);
  app.add_option("--quantize-embedding", o.quantize_embedding, "The same for the embedding of the tokens and the head")
      ->check(CLI::IsMember(quantization_names()))
      ->group(group);
  app.add_flag("--checkpoint", o.checkpoint,
               "Keep no activations inside of a block, but compute them\nagain in backward: less memory, more time")
      ->group(group);
  app.add_option("--without", o.without,
                 "Compute in LibTorch's own way, to see what each saves:\n"
                 "loss (all logits at once), products (by its own choice)")
      ->check(CLI::IsMember({"loss", "products"}))
      ->type_name("NAME ...")
      ->group(group);
  app.add_option("--threads", o.threads, "CPU threads; 0: LibTorch's choice")->check(between(0, 4096))->group(group);
}

inline void add_result_options(CLI::App& app, Options& o) {
  const auto* group = "Results";
  app.add_option("--prompt", o.prompt,
                 "Text to continue before and after training\n[default: how the validation data begins]")
      ->group(group);
  app.add_option("--sample-tokens", o.sample_tokens, "Length of these samples; 0: none")
      ->check(between(0))
      ->group(group);
  app.add_option("--sample-temperature", o.sample_temperature, "Their temperature; 0: the likeliest token")
      ->check(between(0))
      ->group(group);
  app.add_flag("--no-merge", o.no_merge, "Do not measure speed, merge, and write the merged model")->group(group);
  app.add_option("--export-run", o.export_run,
                 "Also write initial adapter, batches and learning rates to this\n"
                 "folder, so that another program can repeat the run")
      ->type_name("DIR")
      ->group(group);
}

/// What --help says about an option's value: its kind or the choice there is, and the default.
inline std::string value_text(const CLI::Option& option) {
  if (option.get_type_size() == 0) return " ";  // a flag has no value, and an empty text would be filled by CLI11
  auto text = option.get_type_name();
  const auto colon = text.find(':');
  if (colon != text.npos) text = text[colon + 1] == '{' ? text.substr(colon + 1) : text.substr(0, colon);
  if (!text.empty() && !option.get_default_str().empty()) text += " [" + option.get_default_str() + "]";
  return text;
}

}  // namespace detail

/// Whether --targets asks for all linear layers, in PEFT's word for them.
inline bool is_all_linear(const std::string& target) { return CLI::detail::to_lower(target) == "all-linear"; }

/// Whether --without names it.
inline bool is_without(const Options& options, const std::string& name) {
  return std::count(options.without.begin(), options.without.end(), name) > 0;
}

/// Defines the options of finetune_gpt.
inline void add_options(CLI::App& app, Options& options) {
  app.option_defaults()->always_capture_default();
  detail::add_model_options(app, options);
  detail::add_adapter_options(app, options);
  detail::add_training_options(app, options);
  detail::add_run_options(app, options);
  detail::add_result_options(app, options);
  for (auto* option : app.get_options()) option->option_text(detail::value_text(*option));
  app.get_formatter()->column_width(32);
}

/// What follows from other options: a run shorter than the warm-up is all warm-up, where the command line says nothing.
inline void complete_options(const CLI::App& app, Options& options) {
  auto& training = options.training;
  if (app.count("--warmup") == 0) training.warmup = std::min(training.warmup, training.steps);
  training.all_logits = is_without(options, "loss");
}

/// The checks that concern more than one option. Throws c10::ValueError.
inline void check_options(const Options& options) {
  check_data_options(options.data);
  const bool has_all = std::any_of(options.targets.begin(), options.targets.end(), is_all_linear);
  TORCH_CHECK_VALUE(!has_all || options.targets.size() == 1,
                    "--targets: all-linear stands alone; give it without other names, or names without it");
  TORCH_CHECK_VALUE(options.training.learning_rate > 0, "--lr must be above 0, got ", options.training.learning_rate);
  TORCH_CHECK_VALUE(options.training.warmup <= options.training.steps, "--warmup must not be above --steps (",
                    options.training.steps, "), got ", options.training.warmup);
}

}  // namespace gpt
