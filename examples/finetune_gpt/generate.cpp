// Continues a prompt, or answers it, with a model from a Hugging Face directory and, if wanted, an adapter.
#include <torch/torch.h>

#include <CLI/CLI.hpp>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include <fmt/core.h>

#include <lora/lora.hpp>
#include <lora/peft/checkpoint.hpp>

#include "checkpoint.hpp"
#include "common.hpp"
#include "sampling.hpp"
#include "tokenizer.hpp"

namespace gpt {
namespace {

struct Options {
  std::filesystem::path model, adapter;
  std::string prompt;
  std::string system;
  bool chat = false;
  bool merge = false;
  SamplingOptions sampling;
  std::string device = "auto";
  std::string dtype = "float32";
};

void add_options(CLI::App& app, Options& options) {
  auto& sampling = options.sampling;
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
  app.add_flag("--chat", options.chat, "the prompt is a user's message in ChatML, to be answered");
  app.add_option("--system", options.system, "message that precedes it")->needs("--chat")->type_name("TEXT");
  app.option_defaults()->always_capture_default();
  app.add_option("--max-new-tokens", sampling.max_new_tokens, "end after this many tokens")->check(between(1));
  app.add_option("--temperature", sampling.temperature, "0: always the most likely token; 1: as the model says")
      ->check(between(0));
  app.add_option("--top-k", sampling.top_k, "draw from this many of the most likely tokens; 0: all")->check(between(0));
  app.add_option("--top-p", sampling.top_p, "draw from the most likely tokens of this total probability")
      ->check(between(0, 1));
  app.add_option("--seed", sampling.seed, "the same seed gives the same text");
  app.add_option("--device", options.device, "auto, cpu, cuda or cuda:N");
  app.add_option("--dtype", options.dtype, "float32 or bfloat16");
}

std::string read_prompt(const Options& options) {
  if (!options.prompt.empty()) return options.prompt;
  std::string text(std::istreambuf_iterator<char>(std::cin), {});
  if (!text.empty() && text.back() == '\n') text.pop_back();
  TORCH_CHECK_VALUE(!text.empty(), "there is no prompt: give --prompt TEXT or write it to standard input");
  return text;
}

std::string prompt_text(const Options& options, const Tokenizer& tokenizer) {
  const auto prompt = read_prompt(options);
  if (!options.chat) return prompt;
  TORCH_CHECK_VALUE(tokenizer.token_id("<|im_start|>") && tokenizer.token_id("<|im_end|>"),
                    "--chat needs a tokenizer with the tokens <|im_start|> and <|im_end|>, which this model's lacks");
  std::vector<ChatMessage> messages;
  if (!options.system.empty()) messages.push_back({"system", options.system});
  messages.push_back({"user", prompt});
  return to_chatml(messages, /*open_reply=*/true);
}

std::vector<int64_t> stop_ids(const Options& options, const ModelConfig& config, const Tokenizer& tokenizer) {
  auto ids = config.eos_token_ids;
  if (options.chat) ids.push_back(*tokenizer.token_id("<|im_end|>"));
  return ids;
}

// Half a character is written as the bytes it is: the next token brings the rest.
void print_token(const Tokenizer& tokenizer, int64_t token) {
  const auto bytes = tokenizer.decode({token});
  std::fwrite(bytes.data(), 1, bytes.size(), stdout);
  std::fflush(stdout);
}

template <class Call>
auto with_adapter(const Options& options, LanguageModelImpl& model, const Call& call) {
  auto adapters = lora::load_adapter(model, options.adapter);
  if (options.merge) {
    adapters.merge_and_unload();
    return call();
  }
  auto active = adapters.activate();
  return call();
}

void run(const Options& options) {
  const auto device = parse_device(options.device);
  const auto model = load_model(options.model, parse_dtype(options.dtype), device);
  const Tokenizer tokenizer(options.model / "tokenizer.json");
  const auto prompt = tokenizer.encode(prompt_text(options, tokenizer));

  std::chrono::steady_clock::time_point start;
  auto write = [&] {
    start = std::chrono::steady_clock::now();
    return generate(*model, prompt, options.sampling, stop_ids(options, model->config, tokenizer),
                    [&](int64_t token) { print_token(tokenizer, token); });
  };
  const auto tokens = options.adapter.empty() ? write() : with_adapter(options, *model, write);
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
  fmt::print("\n");
  fmt::print(stderr, "{} tokens after a prompt of {} in {:.1f} s: {:.1f} tokens/s\n", tokens.size(), prompt.size(),
             time.count(), static_cast<double>(tokens.size()) / time.count());
}

}  // namespace
}  // namespace gpt

int main(int argc, char** argv) {
  CLI::App app("Continues a prompt, or answers it with --chat, with a Llama or GPT-2 model.", "generate");
  gpt::Options options;
  gpt::add_options(app, options);
  return gpt::run_program(app, argc, argv, [&] { gpt::run(options); });
}
