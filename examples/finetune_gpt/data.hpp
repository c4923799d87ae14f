// From text to batches: blocks of packed tokens, or prompt/completion pairs and conversations with the loss on the
// replies only; the split into training and validation; the order of training, a function of seed and step alone.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "common.hpp"

namespace gpt {

/// Positions with this target do not count in the loss.
inline constexpr int32_t kIgnored = -100;

/// Turns text into token ids; the tokenizer of the model, or a toy in a test.
using Encode = std::function<std::vector<int64_t>(std::string_view)>;

/// How a model wants its texts.
struct TextFormat {
  Encode encode;                       ///< the ids of a text, and nothing around them
  std::vector<int64_t> before, after;  ///< what stands around a whole text: the tokenizer's post_processor
  std::optional<int64_t> end;          ///< closes a completion, and stands between two texts
  /// A conversation as its chat template writes it, with or without the opening of a reply.
  std::function<std::string(const std::vector<ChatMessage>& messages, bool open_reply)> render;
  std::function<bool(int64_t)> is_added;  ///< whether a token is one of the added ones, as the ends of turns are
};

/// What the model reads, and for each position the token that it is to predict there (or kIgnored).
struct Example {
  std::vector<int32_t> inputs;
  std::vector<int32_t> targets;
};

/// Examples side by side, the shorter ones filled up on the right, where causal attention never looks back from.
struct Batch {
  torch::Tensor inputs;   // (B, T) int64
  torch::Tensor targets;  // (B, T) int64
  int64_t read = 0;       // tokens of the examples, without what was filled up
  int64_t learned = 0;    // targets that count in the loss

  Batch to(torch::Device device) const { return {inputs.to(device), targets.to(device), read, learned}; }
};

/// Examples to learn from, and examples that are never learned from.
struct Dataset {
  std::vector<Example> train;
  std::vector<Example> validation;
  int64_t shortened = 0;   // examples that were cut at the block length
  int64_t dropped = 0;     // examples of which the cut left nothing to predict
  bool is_chat = false;    // conversations, in the form of the model's chat template
  std::set<int64_t> ends;  // the tokens that were learned as the end of a completion or a reply

  /// A number that changes with any token of the data: two runs with the same number saw the same data.
  uint64_t fingerprint() const;
};

/// The example of a row of tokens; `learn[i]` says whether token i is to be predicted (the first never is).
inline Example make_example(const std::vector<int64_t>& tokens, const std::vector<bool>& learn) {
  Example example;
  for (size_t i = 0; i + 1 < tokens.size(); ++i) {
    example.inputs.push_back(static_cast<int32_t>(tokens[i]));
    example.targets.push_back(learn[i + 1] ? static_cast<int32_t>(tokens[i + 1]) : kIgnored);
  }
  return example;
}

/// The targets that count.
inline std::vector<int32_t> learned(const Example& example) {
  std::vector<int32_t> ids;
  std::copy_if(example.targets.begin(), example.targets.end(), std::back_inserter(ids),
               [](int32_t id) { return id != kIgnored; });
  return ids;
}

/// Cuts a stream of tokens into examples of `block` inputs. Neighbours share one token, the last target of one and the
/// first input of the next, so that every token but the first is predicted exactly once; a short rest is left out.
inline std::vector<Example> cut_into_blocks(const std::vector<int64_t>& tokens, int64_t block) {
  std::vector<Example> examples;
  const std::vector<bool> learn(block + 1, true);
  for (size_t begin = 0; begin + block < tokens.size(); begin += block) {
    const auto first = tokens.begin() + static_cast<int64_t>(begin);
    examples.push_back(make_example({first, first + block + 1}, learn));
  }
  return examples;
}

/// Takes the last `share` of the examples (at least one) for validation, before anything is shuffled, so that no
/// validation text lies between training texts. Of more than `limit` examples, `limit` evenly spaced ones are kept; the
/// others are left out altogether. Throws c10::ValueError if share is not in (0, 1), c10::Error with fewer than two.
inline Dataset split(std::vector<Example> examples, double share, int64_t limit) {
  TORCH_CHECK_VALUE(share > 0 && share < 1, "--validation-share must be above 0 and below 1, got ", share);
  const auto all = static_cast<int64_t>(examples.size());
  TORCH_CHECK(all >= 2, "the data has ", all,
              " example(s), at least 2 are needed (one to learn from, one for "
              "validation); give more text, or a smaller --block");
  const auto held = std::clamp<int64_t>(static_cast<int64_t>(static_cast<double>(all) * share + 0.5), 1, all - 1);
  const auto kept = std::min(held, limit);
  Dataset data;
  for (int64_t i = 0; i < kept; ++i) data.validation.push_back(std::move(examples[all - held + i * held / kept]));
  examples.resize(all - held);
  data.train = std::move(examples);
  return data;
}

inline uint64_t Dataset::fingerprint() const {
  uint64_t hash = 14695981039346656037u;  // FNV-1a, a token at a time
  auto add = [&hash](uint64_t value) { hash = (hash ^ value) * 1099511628211u; };
  for (const auto* part : {&train, &validation}) {
    add(part->size());
    for (const auto& example : *part) {
      add(example.inputs.size());
      for (auto id : example.inputs) add(static_cast<uint32_t>(id));
      for (auto id : example.targets) add(static_cast<uint32_t>(id));
    }
  }
  return hash;
}

/// Inputs of the longest example.
inline int64_t longest(const std::vector<Example>& examples) {
  size_t length = 0;
  for (const auto& example : examples) length = std::max(length, example.inputs.size());
  return static_cast<int64_t>(length);
}

/// Puts examples into one batch; `length` is at least the longest of them, 0 means exactly the longest.
inline Batch collate(const std::vector<const Example*>& examples, int64_t length = 0) {
  for (const auto* example : examples) length = std::max<int64_t>(length, static_cast<int64_t>(example->inputs.size()));
  const auto rows = static_cast<int64_t>(examples.size());
  Batch batch{torch::zeros({rows, length}, torch::kLong), torch::full({rows, length}, kIgnored, torch::kLong)};
  for (int64_t row = 0; row < rows; ++row) {
    const auto& example = *examples[row];
    std::copy(example.inputs.begin(), example.inputs.end(), batch.inputs[row].data_ptr<int64_t>());
    std::copy(example.targets.begin(), example.targets.end(), batch.targets[row].data_ptr<int64_t>());
    batch.read += static_cast<int64_t>(example.inputs.size());
  }
  batch.learned = batch.targets.ne(kIgnored).sum().item<int64_t>();
  return batch;
}

/// The batches of a run: batch i follows from seed and i alone, so a resumed run needs to remember nothing. Each epoch
/// goes through all examples once, in an order of its own; a batch may reach from one epoch into the next.
class TrainingBatches {
 public:
  /// `examples` must outlive this object and must not be empty.
  TrainingBatches(const std::vector<Example>& examples, int64_t batch, uint64_t seed)
      : examples_(examples), batch_(batch), seed_(seed) {
    TORCH_CHECK(!examples.empty(), "there is no example to learn from");
  }

  /// Batch `index`, filled up to `length` (0: to its longest example).
  Batch at(int64_t index, int64_t length = 0) {
    std::vector<const Example*> rows;
    for (int64_t i = 0; i < batch_; ++i) rows.push_back(&examples_[position(index * batch_ + i)]);
    return collate(rows, length);
  }

 private:
  int64_t position(int64_t drawn) {
    const auto count = static_cast<int64_t>(examples_.size());
    if (drawn / count != epoch_) {
      epoch_ = drawn / count;
      auto generator = at::make_generator<at::CPUGeneratorImpl>(seed_ + static_cast<uint64_t>(epoch_));
      order_ = torch::randperm(count, generator, torch::kLong);
    }
    return order_[drawn % count].item<int64_t>();
  }

  const std::vector<Example>& examples_;
  int64_t batch_;
  uint64_t seed_;
  int64_t epoch_ = -1;
  torch::Tensor order_;
};

/// All examples in their order, `batch` at a time; the last batch may be smaller.
inline std::vector<Batch> in_batches(const std::vector<Example>& examples, int64_t batch) {
  std::vector<Batch> batches;
  for (size_t begin = 0; begin < examples.size(); begin += batch) {
    std::vector<const Example*> rows;
    for (auto i = begin; i < std::min(begin + batch, examples.size()); ++i) rows.push_back(&examples[i]);
    batches.push_back(collate(rows));
  }
  return batches;
}

/// The whole of a file. Throws c10::Error when it cannot be read.
inline std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, path.string(), ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

namespace detail {

inline void append(std::vector<int64_t>& ids, const std::vector<int64_t>& more) {
  ids.insert(ids.end(), more.begin(), more.end());
}

inline std::vector<int64_t> encode_file(const std::filesystem::path& path, const TextFormat& format) {
  const auto text = read_file(path);
  auto ids = format.before;
  try {
    append(ids, format.encode(text));
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, path.string(), ": ", error.what_without_backtrace());
  }
  append(ids, format.after);
  return ids;
}

}  // namespace detail

/// Reads text files into one stream of tokens and cuts it into blocks. Each file is a whole text, with what the
/// tokenizer puts around one; `format.end` stands between two files, unless it does already. Throws c10::ValueError for
/// several files when there is no such token: nothing would tell the model that one text ends.
inline std::vector<Example> read_text(const std::vector<std::filesystem::path>& paths, const TextFormat& format,
                                      int64_t block) {
  TORCH_CHECK_VALUE(paths.size() < 2 || format.end, "--text: the ", paths.size(),
                    " files cannot be told apart, because this model names no token that ends a text: \"eos_token\" in "
                    "tokenizer_config.json; name one there, or give one file");
  std::vector<int64_t> tokens;
  for (const auto& path : paths) {
    if (!tokens.empty() && tokens.back() != *format.end) tokens.push_back(*format.end);
    detail::append(tokens, detail::encode_file(path, format));
  }
  auto examples = cut_into_blocks(tokens, block);
  TORCH_CHECK(examples.size() >= 2, "the text has ", tokens.size(), " tokens, at least ", 2 * block + 1,
              " are needed for two blocks of ", block, "; give more text, or a smaller --block");
  return examples;
}

/// One line of a JSONL file: a conversation, or what is given and what is to be completed.
struct Dialogue {
  std::vector<ChatMessage> messages;
  std::string prompt, completion;
};

namespace detail {

/// The string under `key`. Throws c10::Error when there is none.
inline std::string string_at(const nlohmann::json& object, const char* key, const std::string& where = "") {
  const auto found = object.find(key);
  TORCH_CHECK(found != object.end(), where, "\"", key, "\" is missing");
  TORCH_CHECK(found->is_string(), where, "\"", key, "\" must be a string, found ", found->type_name());
  return found->get<std::string>();
}

inline ChatMessage message_of(const nlohmann::json& message, size_t index) {
  const auto where = fmt::format("messages[{}]: ", index);
  TORCH_CHECK(message.is_object(), where, "must be an object with \"role\" and \"content\", found ",
              message.type_name());
  ChatMessage result{string_at(message, "role", where), string_at(message, "content", where)};
  const bool is_known = result.role == "system" || result.role == "user" || result.role == "assistant";
  TORCH_CHECK(is_known, where, "\"role\" must be system, user or assistant, found \"", result.role, "\"");
  return result;
}

inline std::vector<ChatMessage> messages_of(const nlohmann::json& list) {
  TORCH_CHECK(list.is_array(), "\"messages\" must be a list, found ", list.type_name());
  std::vector<ChatMessage> messages;
  bool has_reply = false;
  for (size_t i = 0; i < list.size(); ++i) {
    messages.push_back(message_of(list[i], i));
    has_reply = has_reply || messages.back().role == "assistant";
  }
  TORCH_CHECK(has_reply, "\"messages\" has no message of the assistant, so there is nothing to learn");
  return messages;
}

inline Dialogue pair_of(const nlohmann::json& object) {
  Dialogue dialogue{{}, string_at(object, "prompt"), string_at(object, "completion")};
  TORCH_CHECK(!dialogue.completion.empty(), "\"completion\" is empty, so there is nothing to learn");
  return dialogue;
}

inline nlohmann::json parse_line(const std::string& line) {
  try {
    return nlohmann::json::parse(line);
  } catch (const nlohmann::json::parse_error& error) {
    TORCH_CHECK(false, "not valid JSON at column ", error.byte);
  }
}

}  // namespace detail

/// One line of a JSONL file: {"prompt": ..., "completion": ...} or {"messages": [{"role": ..., "content": ...}, ...]}.
/// Throws c10::Error that says what is wrong with the line.
inline Dialogue parse_dialogue(const std::string& line) {
  const auto object = detail::parse_line(line);
  TORCH_CHECK(object.is_object(), "must be a JSON object, found ", object.type_name());
  if (object.contains("messages")) return {detail::messages_of(object["messages"]), "", ""};
  TORCH_CHECK(object.contains("prompt") || object.contains("completion"),
              "must have \"prompt\" and \"completion\", or \"messages\"");
  return detail::pair_of(object);
}

/// Tokens, and which of them are to be learned.
struct Tokens {
  std::vector<int64_t> ids;
  std::vector<bool> learn;

  /// Adds `more`, of which the first `learned` are learned.
  void add(const std::vector<int64_t>& more, size_t learned) {
    ids.insert(ids.end(), more.begin(), more.end());
    for (size_t i = 0; i < more.size(); ++i) learn.push_back(i < learned);
  }
};

/// What a JSONL file holds.
struct Dialogues {
  std::vector<Example> examples;
  int64_t shortened = 0, dropped = 0;  // see Dataset
  bool is_chat = false;
  std::set<int64_t> ends;
};

namespace detail {

/// A pair, of which the completion and its end are learned. Each part is encoded by itself, as it happens when a model
/// is asked: it reads the prompt before the completion exists.
inline Tokens encode_pair(const Dialogue& dialogue, const TextFormat& format, std::set<int64_t>& ends) {
  Tokens tokens;
  tokens.add(format.before, 0);
  tokens.add(format.encode(dialogue.prompt), 0);
  auto completion = format.encode(dialogue.completion);
  const bool is_closed = !format.after.empty() && format.after.front() == format.end;  // the tokenizer does it
  if (format.end && !is_closed) completion.push_back(*format.end);
  if (format.end) ends.insert(*format.end);
  tokens.add(completion, completion.size());
  tokens.add(format.after, is_closed ? 1 : 0);
  return tokens;
}

inline bool starts_with(const std::string& text, const std::string& start) {
  return text.compare(0, start.size(), start) == 0;
}

/// How many tokens of `reply` are the assistant's. `closed` is the reply as it ends a conversation, and `reply` goes on
/// with the next turn: what they share is the reply and what closes it, and the last added token there is what the
/// assistant says at last. White space that a template writes behind it is not learned.
inline size_t learned_length(const std::vector<int64_t>& reply, const std::vector<int64_t>& closed,
                             const TextFormat& format, std::set<int64_t>& ends) {
  const auto count = std::min(reply.size(), closed.size());
  const auto shared = std::mismatch(reply.begin(), reply.begin() + static_cast<int64_t>(count), closed.begin()).first;
  const auto last = std::find_if(std::make_reverse_iterator(shared), reply.rend(), format.is_added);
  if (last == reply.rend()) return static_cast<size_t>(shared - reply.begin());
  ends.insert(*last);
  return static_cast<size_t>(last.base() - reply.begin());
}

/// A conversation as the chat template writes it, of which the replies are learned with the tokens that close them. A
/// reply starts where the template, asked for the messages before it and the opening of a reply, ends; so up to there
/// the tokens are those that the model reads when it is asked.
inline Tokens encode_conversation(const std::vector<ChatMessage>& messages, const TextFormat& format,
                                  std::set<int64_t>& ends) {
  const auto whole = format.render(messages, false);
  std::vector<size_t> starts;  // of the replies
  std::vector<std::string> closed;
  for (size_t i = 0; i < messages.size(); ++i) {
    if (messages[i].role != "assistant") continue;
    TORCH_CHECK(i > 0, "messages[0] is the assistant's, which nobody has asked yet; let a user or a system begin");
    const auto at = messages.begin() + static_cast<int64_t>(i);
    const auto opened = format.render({messages.begin(), at}, true);
    const auto up_to_here = format.render({messages.begin(), at + 1}, false);
    TORCH_CHECK(starts_with(whole, opened) && starts_with(up_to_here, opened), "messages[", i,
                "]: the chat template writes the conversation up to this reply in another way once the reply is there "
                "(as templates do that drop earlier thoughts, or a system message), so the model would learn it after "
                "a text that it is never asked with; leave out the system message, let each line end with the reply it "
                "is to teach, or give \"prompt\" and \"completion\"");
    starts.push_back(opened.size());
    closed.push_back(up_to_here.substr(opened.size()));
  }
  Tokens tokens;
  tokens.add(format.encode(whole.substr(0, starts.front())), 0);
  for (size_t i = 0; i < starts.size(); ++i) {
    const auto end = i + 1 < starts.size() ? starts[i + 1] : whole.size();
    const auto ids = format.encode(whole.substr(starts[i], end - starts[i]));
    tokens.add(ids, learned_length(ids, format.encode(closed[i]), format, ends));
  }
  return tokens;
}

/// Cuts an example at `block` tokens; one that has nothing left to predict is dropped.
inline void add_example(Dialogues& dialogues, Example example, int64_t block) {
  if (static_cast<int64_t>(example.inputs.size()) > block) {
    example.inputs.resize(block);
    example.targets.resize(block);
    ++dialogues.shortened;
  }
  const bool is_empty =
      std::all_of(example.targets.begin(), example.targets.end(), [](int32_t target) { return target == kIgnored; });
  if (is_empty) ++dialogues.dropped;
  if (!is_empty) dialogues.examples.push_back(std::move(example));
}

}  // namespace detail

/// Reads a JSONL file; a pair's completion ends with `format.end`, a reply of a conversation with what the chat
/// template closes it with. Empty lines are skipped. Throws c10::Error that names file, line and what is wrong.
inline Dialogues read_jsonl(const std::filesystem::path& path, const TextFormat& format, int64_t block) {
  std::ifstream file(path);
  TORCH_CHECK(file, path.string(), ": cannot be read");
  Dialogues dialogues;
  int64_t number = 0;
  for (std::string line; std::getline(file, line);) {
    ++number;
    if (line.find_first_not_of(" \t\r") == line.npos) continue;
    try {
      const auto dialogue = parse_dialogue(line);
      const bool is_chat = !dialogue.messages.empty();
      dialogues.is_chat = dialogues.is_chat || is_chat;
      const auto tokens = is_chat ? detail::encode_conversation(dialogue.messages, format, dialogues.ends)
                                  : detail::encode_pair(dialogue, format, dialogues.ends);
      detail::add_example(dialogues, make_example(tokens.ids, tokens.learn), block);
    } catch (const c10::Error& error) {
      TORCH_CHECK(false, path.string(), ":", number, ": ", error.what_without_backtrace());
    }
  }
  TORCH_CHECK(!dialogues.examples.empty() || dialogues.dropped == 0, path.string(), ": all ", dialogues.dropped,
              " examples have nothing left to learn when they are cut at ", block, " tokens; give a larger --block");
  return dialogues;
}

}  // namespace gpt
