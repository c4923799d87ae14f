// The chat template of a model: how it wants a conversation to be written.
#pragma once

#include <torch/torch.h>

#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#if __has_include(<jinja/runtime.h>)
#include <json.h>
#include <jinja/lexer.h>
#include <jinja/parser.h>
#include <jinja/runtime.h>
#define GPT_HAS_JINJA 1
#endif

#include "common.hpp"
#include "special_tokens.hpp"

namespace gpt {

namespace detail {

/// chat_template.jinja, else "chat_template" of tokenizer_config.json: a text, or several with names, of which it is
/// the one that is called default. Throws lora::CheckpointError when there is none.
inline std::string read_chat_template(const std::filesystem::path& model_dir) {
  const auto file = model_dir / "chat_template.jinja", config = model_dir / "tokenizer_config.json";
  if (std::filesystem::exists(file)) {
    std::ifstream stream(file, std::ios::binary);
    return {std::istreambuf_iterator<char>(stream), {}};
  }
  auto found =
      std::filesystem::exists(config) ? read_json(config).value("chat_template", nlohmann::json()) : nlohmann::json();
  if (found.is_array()) {
    const auto named = std::find_if(found.begin(), found.end(), [](const nlohmann::json& item) {
      return item.is_object() && item.value("name", "") == "default";
    });
    found = named == found.end() ? nlohmann::json() : named->value("template", nlohmann::json());
  }
  if (found.is_string()) return found.get<std::string>();
  throw lora::CheckpointError(model_dir,
                              "has no chat template, neither chat_template.jinja nor \"chat_template\" in "
                              "tokenizer_config.json, so nothing says how a conversation is written for this model; "
                              "give it the one it was trained with, or use plain prompts");
}

/// What went wrong, in one line: the engine also shows the place in the template, over several.
inline std::string reason_of(const std::exception& error) {
  std::string text = error.what();
  for (const std::string mark : {"\nError: ", "Jinja Exception: "}) {
    const auto found = text.rfind(mark);
    if (found != text.npos) text = text.substr(found + mark.size());
  }
  return text.substr(0, text.find('\n'));
}

}  // namespace detail

/// Renders conversations as transformers does:
///
///   render(messages, open_reply) ==
///       tokenizer.apply_chat_template(messages, add_generation_prompt=open_reply, tokenize=False)
///
/// The template sees messages, add_generation_prompt and the special tokens that tokenizer_config.json names; tools and
/// documents are none. May be used from several threads at once.
class ChatTemplate {
 public:
  /// Throws lora::CheckpointError for a directory without a template, and for one that cannot be parsed.
  explicit ChatTemplate(const std::filesystem::path& model_dir)
      : dir_(model_dir), text_(detail::read_chat_template(model_dir)), tokens_(read_special_tokens(model_dir)) {
#ifdef GPT_HAS_JINJA
    try {
      jinja::lexer lexer;
      program_ = std::make_shared<jinja::program>(jinja::parse_from_tokens(lexer.tokenize(text_)));
    } catch (const std::exception& error) {
      throw lora::CheckpointError(dir_, "the chat template is no Jinja: ", detail::reason_of(error));
    }
#else
    throw lora::CheckpointError(dir_,
                                "has a chat template, but this program was built without a Jinja engine to render it; "
                                "python examples/finetune_gpt/prepare_jinja.py build/jinja fetches one, then configure "
                                "and build anew");
#endif
  }

  /// Throws c10::Error with the template's own words when it refuses the messages.
  std::string render(const std::vector<ChatMessage>& messages, bool open_reply) const {
    nlohmann::ordered_json values = {{"add_generation_prompt", open_reply}, {"tools", nullptr}, {"documents", nullptr}};
    values["messages"] = nlohmann::ordered_json::array();
    for (const auto& message : messages) {
      values["messages"].push_back({{"role", message.role}, {"content", message.content}});
    }
    for (const auto& [name, token] : tokens_) values[name] = token;
    return render(values);
  }

 private:
#ifdef GPT_HAS_JINJA
  std::string render(const nlohmann::ordered_json& values) const {
    try {
      jinja::context context(text_);
      jinja::global_from_json(context, values, /*mark_input=*/false);
      jinja::runtime runtime(context);
      return jinja::runtime::gather_string_parts(runtime.execute(*program_))->as_string().str();
    } catch (const std::exception& error) {
      TORCH_CHECK(false, "the chat template of ", dir_.string(), " says: ", detail::reason_of(error));
    }
  }

  std::shared_ptr<const jinja::program> program_;
#else
  std::string render(const nlohmann::ordered_json&) const { return {}; }  // no object of this class exists
#endif

  std::filesystem::path dir_;
  std::string text_;
  std::map<std::string, std::string> tokens_;
};

}  // namespace gpt
