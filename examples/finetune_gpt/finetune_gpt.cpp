// Fine-tunes a language model that is written in plain torch::nn, with adapters on a few of its layers, on your own
// text: measures and samples before and after, saves the adapter, merges it, and writes the merged model. `run`, at the
// end of this file, tells the whole story.
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <lora/lora.hpp>
#include <lora/train/checkpointing.hpp>

#include "checkpoint.hpp"
#include "data.hpp"
#include "export_run.hpp"
#include "generation_config.hpp"
#include "interrupt.hpp"
#include "merge_files.hpp"
#include "metrics.hpp"
#include "model.hpp"
#include "options.hpp"
#include "progress.hpp"
#include "run_state.hpp"
#include "sampling.hpp"
#include "speed.hpp"
#include "texts.hpp"
#include "trainer.hpp"

namespace gpt {
namespace {

constexpr int kInterrupted = 130;  // as shells report a program that Ctrl-C ended

lora::LoRAConfig adapter_config(const Options& options, const ModelConfig& model) {
  const bool is_gpt2 = model.architecture == Architecture::kGPT2;
  auto targets = options.targets;
  if (targets.empty())
    targets = is_gpt2 ? std::vector<std::string>{"c_attn"} : std::vector<std::string>{"q_proj", "v_proj"};
  auto config = lora::LoRAConfig(options.rank).alpha(options.alpha).dropout(options.dropout);
  if (is_all_linear(targets.front())) {
    config.target_modules(lora::all_linear).exclude_modules({"lm_head"});  // as in PEFT, the head is no such layer
  } else {
    config.target_modules(targets);
  }
  for (const auto& method : lora::all_methods()) {
    if (method.info().name == options.method) config.method(method);
  }
  return config.fan_in_fan_out(is_gpt2).task_type("CAUSAL_LM").base_model_name_or_path(options.model.string());
}

/// Attaches the adapter of the options. Throws c10::ValueError when --targets does not select layers of the model.
lora::Adapters attach_adapter(const Options& options, LanguageModelImpl& model) {
  try {
    return lora::attach(model, adapter_config(options, model.config));
  } catch (const c10::ValueError&) {
    throw;  // another option, which the text names
  } catch (const c10::Error& error) {
    const std::string reason = error.what_without_backtrace();
    TORCH_CHECK_VALUE(reason.rfind("lora::attach: ", 0) != 0, "--targets: ", reason);
    throw;
  }
}

/// What must be the same for a resumed run to be the run that was interrupted.
nlohmann::json settings_of(const Options& options, const Dataset& data, const lora::Adapters& adapters) {
  const auto& training = options.training;
  return {{"model", std::filesystem::canonical(options.model).string()},
          {"the model's weights (their fingerprint)", fingerprint_of_weights(options.model)},
          {"the data (its fingerprint)", fmt::format("{:016x}", data.fingerprint())},
          {"--block", options.data.block},
          {"--batch", options.batch},
          {"--accumulate", options.accumulate},
          {"--steps", training.steps},
          {"--lr", training.learning_rate},
          {"--warmup", training.warmup},
          {"--min-lr", training.min_lr_ratio},
          {"--weight-decay", training.weight_decay},
          {"--clip", training.clip},
          {"--seed", options.seed},
          {"--rank", options.rank},
          {"--alpha", options.alpha},
          {"--dropout", options.dropout},
          {"--method", options.method},
          {"adapted layers", adapters.targets()},
          {"--device", parse_device(options.device).str()},
          {"--threads", torch::get_num_threads()},  // another number of them rounds sums in another way
          {"--without", options.without},           // and so does another order
          {"--dtype", options.dtype},
          {"--quantize", options.quantize},
          {"--quantize-embedding", options.quantize_embedding}};
}

/// The checkpoint to go on from, if any. Throws c10::ValueError when --resume finds none, and when a new run would mix
/// its checkpoints with those of an earlier one.
std::optional<Checkpoint> former_checkpoint(const Options& options) {
  const auto checkpoints = list_checkpoints(options.out);
  TORCH_CHECK_VALUE(!options.resume || !checkpoints.empty(), "--resume: there is no checkpoint in ",
                    options.out.string());
  if (checkpoints.empty()) return std::nullopt;
  TORCH_CHECK_VALUE(options.resume || options.overwrite, options.out.string(), " holds checkpoint-",
                    checkpoints.back().step,
                    " of an earlier run; add --resume to go on with it, --overwrite to remove "
                    "it, or choose another --out");
  return options.resume ? std::make_optional(checkpoints.back()) : std::nullopt;
}

/// `loading` is the memory that the process took at most to load the model.
void print_setup(const Options& options, const LanguageModelImpl& model, const lora::Adapters& adapters,
                 const Dataset& data, int64_t loading) {
  const auto report = adapters.report();
  fmt::print("model     {}, {}, {:.1f} million parameters, {} on {}, {} thread{}\n", options.model.string(),
             architecture_name(model.config.architecture), static_cast<double>(report.base) / 1e6, options.dtype,
             parse_device(options.device).str(), torch::get_num_threads(), torch::get_num_threads() == 1 ? "" : "s");
  if (holds_few_bits(options.model)) fmt::print("          layers in the few bits that its files have for them\n");
  if (options.quantize != "none") fmt::print("          linear layers but the head in {}\n", options.quantize);
  if (options.quantize_embedding != "none")
    fmt::print("          embedding and head in {}\n", options.quantize_embedding);
  const auto* rest = loading < report.base_bytes ? ", the rest comes from the file when it is used" : "";
  fmt::print("memory    the model takes {}; {:.3f} GB at most while it was loaded{}\n", weight_memory(report),
             static_cast<double>(loading) / 1e9, rest);
  fmt::print("adapters  {}, rank {}, alpha {:g}, on {} layers: {} trainable parameters ({:.3f} %)\n", options.method,
             options.rank, options.alpha, adapters.targets().size(), report.trainable, 100 * report.share());
  if (options.checkpoint) fmt::print("training  computes the activations inside of a block again in backward\n");
  if (!options.without.empty())
    fmt::print("training  computes in LibTorch's own way: {}\n", fmt::join(options.without, ", "));
  fmt::print("data      {} rows of up to {} tokens to learn from, {} for validation\n", data.train.size(),
             options.data.block, data.validation.size());
  if (data.shortened > 0) {
    fmt::print("          {} examples were cut at {} tokens (--block), {} of them had nothing left to learn\n",
               data.shortened, options.data.block, data.dropped);
  }
}

/// The text to go on from: --prompt, else how the first validation row begins (a dialogue up to its first reply).
std::vector<int64_t> prompt_tokens(const Options& options, const Dataset& data, const Texts& texts) {
  if (!options.prompt.empty() && data.is_chat)
    return texts.tokenizer.encode(texts.render({{"user", options.prompt}}, /*open_reply=*/true));
  if (!options.prompt.empty()) return texts.tokenizer.encode_whole(options.prompt);
  const auto& example = data.validation.front();
  size_t length = std::min<size_t>(16, example.inputs.size());
  if (!options.data.jsonl.empty()) {
    for (length = 1; example.targets[length - 1] == kIgnored;) ++length;
  }
  return {example.inputs.begin(), example.inputs.begin() + static_cast<int64_t>(length)};
}

/// The tokens that end a text: those of the model, and those that are trained to.
std::vector<int64_t> all_ends(const Dataset& data, const Texts& texts) {
  auto ids = texts.generation.eos_token_ids;
  ids.insert(ids.end(), data.ends.begin(), data.ends.end());
  return ids;
}

void print_sample(const char* when, const Options& options, LanguageModelImpl& model, lora::Adapters& adapters,
                  const Texts& texts, const Dataset& data, const std::vector<int64_t>& prompt) {
  if (options.sample_tokens == 0) return;
  SamplingOptions sampling;
  sampling.max_new_tokens = options.sample_tokens;
  sampling.temperature = options.sample_temperature;
  sampling.seed = options.seed;
  auto active = adapters.activate();
  const auto reply = generate(model, prompt, sampling, all_ends(data, texts));
  fmt::print("\nsample {} training\n  {} >>> {}\n\n", when, texts.tokenizer.decode(prompt),
             texts.tokenizer.decode(reply));
}

std::string format_loss(const std::optional<double>& loss) {
  if (!loss) return "unknown";
  return fmt::format("{:.4f} (perplexity {:.2f})", *loss, std::exp(*loss));
}

/// The batches of update `step`, counted from 0.
std::vector<Batch> next_batches(const Options& options, TrainingBatches& batches, int64_t step) {
  std::vector<Batch> parts;
  for (int64_t i = 0; i < options.accumulate; ++i) parts.push_back(batches.at(step * options.accumulate + i));
  return parts;
}

/// One update, shown by `progress`, and its figures.
MetricsRow timed_step(Trainer& trainer, const std::vector<Batch>& batches, Progress& progress) {
  const Stopwatch watch;
  const auto result = trainer.step(batches);
  const auto seconds = watch.seconds();
  int64_t tokens = 0;
  for (const auto& batch : batches) tokens += batch.read;
  MetricsRow row;
  row.step = trainer.steps_done;
  row.train_loss = result.loss;
  row.learning_rate = result.learning_rate;
  row.tokens_per_second = static_cast<double>(tokens) / seconds;
  row.gradient_norm = result.gradient_norm;
  progress.update(row.step, seconds, result.loss, result.learning_rate, *row.tokens_per_second,
                  memory_in_use(trainer.parameters.front().device()));
  return row;
}

/// Trains until all steps are done, or an interrupt asks to stop: then it returns false. `save` writes a checkpoint.
bool train(const Options& options, Trainer& trainer, const Dataset& data, Metrics& metrics,
           const std::function<void()>& save) {
  TrainingBatches batches(data.train, options.batch, options.seed);
  const auto validation = in_batches(data.validation, options.batch);
  const auto steps = options.training.steps;
  const InterruptGuard interrupt;
  Progress progress(trainer.steps_done, steps);
  auto validate = [&] {
    const auto loss = trainer.evaluate(validation);
    progress.print(fmt::format("step {}: validation loss {}", trainer.steps_done, format_loss(loss)));
    return loss;
  };
  if (trainer.steps_done == 0) {
    MetricsRow before;
    before.validation_loss = validate();
    metrics.add(before);
  }
  while (trainer.steps_done < steps) {
    auto row = timed_step(trainer, next_batches(options, batches, trainer.steps_done), progress);
    auto is_due = [&](int64_t interval) { return interval > 0 && row.step % interval == 0; };
    if (is_due(options.eval_every) || row.step == steps) row.validation_loss = validate();
    metrics.add(row);
    const bool stop = interrupt.stop_requested();
    if (stop || is_due(options.save_every)) save();
    if (stop) return false;
  }
  return true;
}

/// How far the merged model's logits may be from the adapted one's. float32 only adds up in another order; bfloat16
/// also rounds the merged weights, which costs a part of what the adapter does.
double allowed_difference(const Options& options, const LogitDifferences& difference) {
  if (options.dtype == "float32") return 1e-4 * std::max(10.0, difference.largest);
  return 0.1 * difference.adapted_base + 0.5;
}

/// How fast the base model is, with adapters, and, where it `merges`, with them merged.
void print_speeds(LanguageModelImpl& model, lora::Adapters& adapters, const Batch& batch, bool merges) {
  const auto speeds = measure_speeds(model, adapters, batch, merges);
  const auto merged = speeds.merged ? fmt::format(", {:.0f} merged", *speeds.merged) : "";
  fmt::print("forward   {:.0f} tokens/s base, {:.0f} adapted{} (medians of {} passes in turn)\n", speeds.base,
             speeds.adapted, merged, kSpeedPasses);
}

/// Folds the adapter that was saved into the weights of the files, of which the model has but few bits.
void merge_into_files(const Options& options) {
  merge_files(options.model, options.out / "adapter", options.out / "merged");
  const auto& few_bits = options.quantize != "none" ? options.quantize : options.quantize_embedding;
  const auto but = few_bits == "none" ? "" : fmt::format(", not in {}", few_bits);
  fmt::print("merge     into the weights as they are in {}{}\n", options.model.string(), but);
}

/// Compares the results of the base model, with adapters, and merged; then merges for good. Throws c10::Error, with
/// nothing written, when the merged model is not the adapted one.
void merge_in_memory(const Options& options, LanguageModelImpl& model, lora::Adapters& adapters, const Batch& batch) {
  const auto difference = compare_merged(model, adapters, batch.inputs);
  fmt::print(
      "merge     logits differ by at most {:.3g} from the adapted model's, and those by up to {:.3g} from the base "
      "model's\n",
      difference.merged_adapted, difference.adapted_base);
  const auto allowed = allowed_difference(options, difference);
  TORCH_CHECK(difference.merged_adapted <= allowed, "the merged model is not the adapted one: the logits differ by ",
              difference.merged_adapted, ", at most ", allowed,
              " is rounding; no merged model was written, the adapter is in ", (options.out / "adapter").string());
  adapters.merge_and_unload();
  save_model(model, options.model, options.out / "merged");
}

/// Writes the merged model.
void merge(const Options& options, LanguageModelImpl& model, lora::Adapters& adapters, const Dataset& data) {
  const auto device = adapters.parameters().front().device();
  const auto batch = in_batches(data.validation, options.batch).front().to(device);
  const bool has_numbers = !options.format().is_quantized() && !holds_few_bits(options.model);
  print_speeds(model, adapters, batch, /*merges=*/has_numbers);
  if (has_numbers) {
    merge_in_memory(options, model, adapters, batch);
  } else {
    merge_into_files(options);
  }
}

/// Says in the adapter's and the merged model's generation_config.json with which tokens texts were trained to end,
/// where the model knows others only: nobody who loads the result would stop there.
void save_ends(const Options& options, const Dataset& data, const Texts& texts) {
  const std::vector<int64_t> ends(data.ends.begin(), data.ends.end());
  write_ends(texts.generation, ends, options.out / "adapter");
  if (!options.no_merge) write_ends(texts.generation, ends, options.out / "merged");
}

void print_summary(const Options& options, const Metrics& metrics) {
  const auto& rows = metrics.rows();
  const auto before = rows.empty() ? std::nullopt : rows.front().validation_loss;
  const auto after = rows.empty() ? std::nullopt : rows.back().validation_loss;
  fmt::print("\nvalidation loss {} before, {} after {} steps\n", format_loss(before), format_loss(after),
             options.training.steps);
  const auto out = options.out.string();
  fmt::print("{}/adapter      the adapter, a PEFT directory\n", out);
  if (!options.no_merge) fmt::print("{}/merged       the merged model, a Hugging Face directory\n", out);
  fmt::print("{}/metrics.csv  the figures of every step\n", out);
  const auto problem = rows.empty() ? "metrics.csv is empty" : draw_losses(rows, options.out / "loss.png");
  if (problem.empty()) fmt::print("{}/loss.png     the loss curves\n", out);
  if (!problem.empty()) fmt::print("no picture of the loss curves: {}\n", problem);
}

/// The whole run; returns the exit code of the program.
int run(const Options& options) {
  const auto device = parse_device(options.device);
  if (!options.no_merge) check_target(options.model, options.out / "merged");
  // LibTorch's deterministic mode is not asked for: it needs CUBLAS_WORKSPACE_CONFIG, which LibTorch 2.11 parses anew
  // for each product on CUDA, in 40 us. That took half of a step, and the losses were the same.
  if (options.threads > 0) torch::set_num_threads(static_cast<int>(options.threads));
  std::filesystem::create_directories(options.out);
  const auto former = former_checkpoint(options);

  // The model as it was published. Nothing in it knows of adapters.
  if (is_without(options, "products")) at::globalContext().setUserEnabledMkldnn(false);
  const auto memory_before = memory_in_use(device);
  auto model = load_model(options.model, options.format(), device);
  if (options.checkpoint)
    model->run_block = [](const auto& block, const auto& x) { return lora::checkpoint(block, x); };
  const Texts texts(options.model);
  check_ends(texts.generation, model->config.vocab_size);
  const auto data = read_data(options.data, texts, model->config);
  const auto loading = peak_memory(device) - memory_before;
  const auto prompt = prompt_tokens(options, data, texts);
  check_rows("--prompt", prompt, model->config.vocab_size, texts.tokenizer);

  // Adapters on some of its layers. Only they learn.
  torch::manual_seed(options.seed);
  auto adapters = attach_adapter(options, *model);
  Trainer trainer(*model, adapters, options.training);
  print_setup(options, *model, adapters, data, loading);
  if (!options.export_run.empty()) export_run(options.export_run, options, data, adapters);

  // From where an interrupted run was, or from the start.
  const RunState state{adapters.named_parameters(), trainer.optimizer, device};
  const auto settings = settings_of(options, data, adapters);
  if (former) trainer.steps_done = load_checkpoint(*former, state, settings);
  if (options.overwrite) remove_old_checkpoints(options.out, 0);
  Metrics metrics(options.out / "metrics.csv", former ? std::make_optional(former->step) : std::nullopt);
  if (former) fmt::print("resumed   from {}\n", former->folder.string());
  if (!former) print_sample("before", options, *model, adapters, texts, data, prompt);

  auto save = [&] {
    save_checkpoint(options.out, trainer.steps_done, state, settings, [&](const auto& path) { adapters.save(path); });
  };
  if (!train(options, trainer, data, metrics, save)) {
    fmt::print("\ninterrupted after step {}; the same command with --resume {}goes on from there\n", trainer.steps_done,
               options.overwrite ? "(in place of --overwrite) " : "");
    return kInterrupted;
  }

  // What stays: the adapter by itself, and a model that needs no adapter.
  fmt::print("memory    {:.3f} GB at most so far, of the whole process\n",
             static_cast<double>(peak_memory(device)) / 1e9);
  adapters.save(options.out / "adapter");
  std::filesystem::remove(options.out / "adapter" / kGenerationConfig);  // of an earlier run
  print_sample("after", options, *model, adapters, texts, data, prompt);
  if (!options.no_merge) merge(options, *model, adapters, data);
  save_ends(options, data, texts);
  print_summary(options, metrics);
  return 0;
}

}  // namespace
}  // namespace gpt

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // a log shows each line as it is written
  CLI::App app("Fine-tunes a Llama or GPT-2 model with adapters, and merges them.", "finetune_gpt");
  gpt::Options options;
  gpt::add_options(app, options);
  int code = 0;
  const int failed = gpt::run_program(app, argc, argv, [&] {
    gpt::complete_options(app, options);
    gpt::check_options(options);
    code = gpt::run(options);
  });
  return failed != 0 ? failed : code;
}
