// Continues a prompt, or answers it, with a model from a Hugging Face directory and, if wanted, an adapter.
#include <torch/torch.h>

#include <CLI/CLI.hpp>

#include <cstdio>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <lora/lora.hpp>
#include <lora/peft/checkpoint.hpp>

#include "chat_template.hpp"
#include "checkpoint.hpp"
#include "common.hpp"
#include "generation_config.hpp"
#include "progress.hpp"
#include "sampling.hpp"
#include "special_tokens.hpp"
#include "tokenizer.hpp"

namespace gpt {
namespace {

struct Options {
  std::filesystem::path model, adapter;
  std::string prompt;
  std::string system;
  bool chat = false;
  bool merge = false;
  std::optional<int64_t> max_new_tokens, top_k;
  std::optional<double> temperature, top_p, repetition_penalty;
  uint64_t seed = 0;
  std::string device = "auto";
  std::string dtype = "float32";
  std::string quantize = "none";
  std::string quantize_embedding = "none";

  WeightFormat format() const { return {parse_dtype(dtype), quantize, quantize_embedding}; }
};

void add_options(CLI::App& app, Options& options) {
  app.add_option("--model", options.model, "Hugging Face directory of the model")
      ->required()
      ->check(CLI::ExistingDirectory)
      ->type_name("DIR");
  app.add_option("--adapter", options.adapter, "PEFT directory of an adapter for it")
      ->check(CLI::ExistingDirectory)
      ->type_name("DIR");
  app.add_flag("--merge", options.merge, "fold the adapter into the weights first: faster, more memory")
      ->needs("--adapter");
  app.add_option("--prompt", options.prompt, "the text to continue; without it, standard input")->type_name("TEXT");
  app.add_flag("--chat", options.chat,
               "the prompt is a user's message, to be answered; the model's chat template says\n"
               "how that is written");
  app.add_option("--system", options.system, "message that precedes it")->needs("--chat")->type_name("TEXT");
  app.add_option("--max-new-tokens", options.max_new_tokens, "end after this many tokens [generation_config.json; 128]")
      ->check(between(1));
  app.add_option(
         "--temperature", options.temperature,
         "draw tokens; 0: always the most likely one; 1: as the model says.\nThis and the three that follow are "
         "as generation_config.json says,\nwhich draws where \"do_sample\" is true; giving one of the first three "
         "draws too")
      ->check(between(0));
  app.add_option("--top-k", options.top_k, "draw from this many of the most likely tokens; 0: all")->check(between(0));
  app.add_option("--top-p", options.top_p, "draw from the most likely tokens of this total probability")
      ->check(between(0, 1));
  app.add_option("--repetition-penalty", options.repetition_penalty, "make tokens of the text less likely; 1: do not")
      ->check(between(0));
  app.option_defaults()->always_capture_default();
  app.add_option("--seed", options.seed, "the same seed gives the same text");
  app.add_option("--device", options.device, "auto, cpu, cuda or cuda:N");
  app.add_option("--dtype", options.dtype, "float32 or bfloat16");
  app.add_option("--quantize", options.quantize, "hold the linear layers but the head in few bits")
      ->check(CLI::IsMember(quantization_names()));
  app.add_option("--quantize-embedding", options.quantize_embedding, "the same for the embedding and the head")
      ->check(CLI::IsMember(quantization_names()));
}

/// What the command line says, and for the rest what the model's generation_config.json does, as in transformers.
SamplingOptions sampling_options(const Options& options, const GenerationConfig& config) {
  SamplingOptions sampling;
  const bool draws = config.do_sample || options.temperature || options.top_k || options.top_p;
  sampling.temperature = draws ? options.temperature.value_or(config.temperature) : 0;
  sampling.top_k = options.top_k.value_or(config.top_k);
  sampling.top_p = options.top_p.value_or(config.top_p);
  sampling.repetition_penalty = options.repetition_penalty.value_or(config.repetition_penalty);
  sampling.max_new_tokens = options.max_new_tokens.value_or(config.max_new_tokens.value_or(sampling.max_new_tokens));
  sampling.seed = options.seed;
  return sampling;
}

std::string describe(const SamplingOptions& sampling) {
  const auto penalty = sampling.repetition_penalty == 1
                           ? std::string()
                           : fmt::format(", repetition penalty {:g}", sampling.repetition_penalty);
  if (sampling.temperature == 0) return "always the most likely token" + penalty;
  return fmt::format("drawn with temperature {:g}, top-k {}, top-p {:g}", sampling.temperature, sampling.top_k,
                     sampling.top_p) +
         penalty;
}

std::string read_prompt(const Options& options) {
  if (!options.prompt.empty()) return options.prompt;
  std::string text(std::istreambuf_iterator<char>(std::cin), {});
  if (!text.empty() && text.back() == '\n') text.pop_back();
  TORCH_CHECK_VALUE(!text.empty(), "there is no prompt: give --prompt TEXT or write it to standard input");
  return text;
}

/// The tokens that the model is to continue. A chat template writes a whole text by itself.
std::vector<int64_t> prompt_tokens(const Options& options, const Tokenizer& tokenizer) {
  const auto prompt = read_prompt(options);
  if (!options.chat) return tokenizer.encode_whole(prompt);
  std::vector<ChatMessage> messages;
  if (!options.system.empty()) messages.push_back({"system", options.system});
  messages.push_back({"user", prompt});
  return tokenizer.encode(ChatTemplate(options.model).render(messages, /*open_reply=*/true));
}

// Half a character is written as the bytes it is: the next token brings the rest.
void print_token(const Tokenizer& tokenizer, int64_t token) {
  const auto bytes = tokenizer.decode({token});
  std::fwrite(bytes.data(), 1, bytes.size(), stdout);
  std::fflush(stdout);
}

/// Calls `call` where the model computes what was asked for.
template <class Call>
auto in_scope(const Options& options, LanguageModelImpl& model, const Call& call) {
  if (options.adapter.empty()) {
    auto fast = lora::fast_products();  // in which weights of few bits are found, too
    return call();
  }
  auto adapters = lora::load_adapter(model, options.adapter);
  if (options.merge) {
    adapters.merge_and_unload();
    auto fast = lora::fast_products();
    return call();
  }
  auto active = adapters.activate();
  return call();
}

void print_memory(LanguageModelImpl& model, torch::Device device) {
  lora::Adapters adapters(model);
  adapters.prepare();
  fmt::print(stderr, "the model takes {}, the process took {:.3f} GB at most\n", weight_memory(adapters.report()),
             static_cast<double>(peak_memory(device)) / 1e9);
}

void run(const Options& options) {
  TORCH_CHECK_VALUE(!options.merge || !(options.format().is_quantized() || holds_few_bits(options.model)),
                    "--merge would give merged weights their full size again; merge_checkpoint writes a merged model, "
                    "which can be held in few bits");
  const auto device = parse_device(options.device);
  const auto config = read_generation_config(options.model, options.adapter);
  const auto sampling = sampling_options(options, config);
  const auto model = load_model(options.model, options.format(), device);
  const Tokenizer tokenizer(options.model / "tokenizer.json");
  const auto prompt = prompt_tokens(options, tokenizer);
  check_ends(config, model->config.vocab_size);
  check_rows("the prompt", prompt, model->config.vocab_size, tokenizer);
  if (!config.ignored.empty())
    fmt::print(stderr, "{} asks for {}, which is not done here\n", config.file.string(),
               fmt::join(config.ignored, ", "));

  std::optional<Stopwatch> watch;
  auto write = [&] {
    watch.emplace();
    return generate(*model, prompt, sampling, config.eos_token_ids,
                    [&](int64_t token) { print_token(tokenizer, token); });
  };
  const auto tokens = in_scope(options, *model, write);
  const auto seconds = watch->seconds();
  fmt::print("\n");
  fmt::print(stderr, "{} tokens after a prompt of {} in {:.1f} s: {:.1f} tokens/s; {}\n", tokens.size(), prompt.size(),
             seconds, static_cast<double>(tokens.size()) / seconds, describe(sampling));
  print_memory(*model, device);
}

}  // namespace
}  // namespace gpt

int main(int argc, char** argv) {
  CLI::App app("Continues a prompt, or answers it with --chat, with a Llama or GPT-2 model.", "generate");
  gpt::Options options;
  gpt::add_options(app, options);
  return gpt::run_program(app, argc, argv, [&] { gpt::run(options); });
}
