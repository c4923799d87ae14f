// The texts of a run: which there are, on the command line, and what becomes of them for a model.
#pragma once

#include <torch/torch.h>

#include <CLI/CLI.hpp>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "chat_template.hpp"
#include "common.hpp"
#include "config.hpp"
#include "data.hpp"
#include "generation_config.hpp"
#include "special_tokens.hpp"
#include "tokenizer.hpp"

namespace gpt {

/// What the command line says about the data.
struct DataOptions {
  std::vector<std::filesystem::path> text;
  std::filesystem::path jsonl;
  int64_t block = 128;
  double validation_share = 0.05;
  int64_t validation_blocks = 16;

  bool any() const { return !text.empty() || !jsonl.empty(); }
};

/// Defines them, but those of the rows that are evaluated.
inline void add_data_options(CLI::App& app, DataOptions& o, const char* group) {
  auto* text = app.add_option("--text", o.text, "Text files to read")
                   ->check(CLI::ExistingFile)
                   ->type_name("FILE ...")
                   ->group(group);
  app.add_option("--jsonl", o.jsonl,
                 "Instead of --text: lines of {\"prompt\", \"completion\"} or\n"
                 "{\"messages\": [{\"role\", \"content\"}, ...]}; only completions\n"
                 "and what the assistant says are learned")
      ->check(CLI::ExistingFile)
      ->excludes(text)
      ->type_name("FILE")
      ->group(group);
  app.add_option("--block", o.block, "Tokens in a row of a batch")->check(between(1))->group(group);
  app.add_option("--validation-share", o.validation_share, "Share of the data, from its end, that is not learned from")
      ->check(between(0, 1))
      ->group(group);
}

/// Throws c10::ValueError where there are no data, or where none or all of them would be for validation.
inline void check_data_options(const DataOptions& options) {
  TORCH_CHECK_VALUE(options.any(), "--text or --jsonl is needed: the data to learn from");
  TORCH_CHECK_VALUE(options.validation_share > 0 && options.validation_share < 1,
                    "--validation-share must be above 0 and below 1, got ", options.validation_share);
}

/// The model's directory, as far as it is about texts.
struct Texts {
  explicit Texts(const std::filesystem::path& model)
      : tokenizer(model / "tokenizer.json"),
        generation(read_generation_config(model)),
        end(end_token(model, tokenizer, generation)),
        model_dir(model) {}

  /// A conversation as this model wants it. The template is read when it is needed: a text can be learned without one.
  std::string render(const std::vector<ChatMessage>& messages, bool open_reply) const {
    if (!chat_template) chat_template.emplace(model_dir);
    return chat_template->render(messages, open_reply);
  }

  TextFormat format() const {
    TextFormat format;
    format.encode = [this](std::string_view text) { return tokenizer.encode(text); };
    format.before = tokenizer.special_tokens().before();
    format.after = tokenizer.special_tokens().after();
    format.end = end;
    format.render = [this](const auto& messages, bool open_reply) { return render(messages, open_reply); };
    format.is_added = [this](int64_t id) { return tokenizer.is_added(id); };
    return format;
  }

  const Tokenizer tokenizer;
  const GenerationConfig generation;
  const std::optional<int64_t> end;
  const std::filesystem::path model_dir;
  mutable std::optional<ChatTemplate> chat_template;
};

/// The data as a model of this configuration reads them.
inline Dataset read_data(const DataOptions& options, const Texts& texts, const ModelConfig& config) {
  TORCH_CHECK_VALUE(options.block <= config.max_positions, "--block must be at most ", config.max_positions,
                    ", the longest text of this model, got ", options.block);
  Dialogues dialogues;
  if (options.jsonl.empty()) {
    dialogues.examples = read_text(options.text, texts.format(), options.block);
  } else {
    dialogues = read_jsonl(options.jsonl, texts.format(), options.block);
  }
  for (const auto& example : dialogues.examples) {
    check_rows("the data", example.inputs, config.vocab_size, texts.tokenizer);
    check_rows("the data", learned(example), config.vocab_size, texts.tokenizer);
  }
  auto data = split(std::move(dialogues.examples), options.validation_share, options.validation_blocks);
  data.shortened = dialogues.shortened;
  data.dropped = dialogues.dropped;
  data.is_chat = dialogues.is_chat;
  data.ends = dialogues.ends;
  return data;
}

}  // namespace gpt
