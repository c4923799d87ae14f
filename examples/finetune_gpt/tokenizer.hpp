#pragma once

#include "tokenizer/added_tokens.hpp"
#include "tokenizer/byte_pair_encoding.hpp"
#include "tokenizer/json_field.hpp"
#include "tokenizer/post_processor.hpp"
#include "tokenizer/split_pattern.hpp"
#include "tokenizer/split_step.hpp"

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace gpt {

/// Turns text into the ids of a byte-level BPE and back, as the Python package `tokenizers` does:
///
///   encode(text) == Tokenizer.from_file(tokenizer_json).encode(text, add_special_tokens=False).ids
///   encode_whole(text) == Tokenizer.from_file(tokenizer_json).encode(text).ids
///
/// The steps: added tokens are cut out of the text; the rest is split to words ("pre_tokenizer": ByteLevel, Digits,
/// Split or a Sequence of these that ends with ByteLevel); the bytes of each word are merged ("model": BPE); a whole
/// text gets the tokens around it that "post_processor" names. "truncation" and "padding" are about batches, so these
/// are not looked at.
/// Anything else that cannot be read (a normalizer, another model...) throws lora::CheckpointError that names the file,
/// the field and its value. One Tokenizer may be used from several threads; they take turns.
class Tokenizer {
 public:
  explicit Tokenizer(const std::filesystem::path& tokenizer_json) : Tokenizer(read(tokenizer_json)) {}

  /// The ids of `text`. Tokens such as <|im_end|> that are written in the text are recognized, none are added.
  /// Throws c10::ValueError if `text` is not UTF-8: a replacement would silently become training data.
  std::vector<int64_t> encode(std::string_view text) const {
    const auto invalid = SplitPattern::find_invalid_utf8(text);
    TORCH_CHECK_VALUE(!invalid, "gpt::Tokenizer: the text has to be UTF-8, but at byte ", invalid.value_or(0), " of ",
                      text.size(), " it is not; convert it first, for example with iconv");
    std::vector<int64_t> ids;
    for (const auto& outer : added_.split(text)) {
      if (outer.id) {
        ids.push_back(*outer.id);
        continue;
      }
      for (const auto& inner : added_normalized_.split(outer.text)) {
        if (inner.id)
          ids.push_back(*inner.id);
        else
          append_words(inner.text, 0, ids);
      }
    }
    return ids;
  }

  /// The ids of `text` between the tokens that the file puts around every text, such as a beginning of text. So are
  /// texts seen in training, and prompts, unless a chat template wrote them: that has written such tokens itself.
  std::vector<int64_t> encode_whole(std::string_view text) const {
    auto ids = special_tokens_.before();
    append(encode(text), ids);
    append(special_tokens_.after(), ids);
    return ids;
  }

  /// What encode_whole puts around a text.
  const PostProcessor& special_tokens() const { return special_tokens_; }

  /// The bytes of `ids`, added tokens included; decode(encode(text)) is text, unless the file asks for a space in
  /// front, has no token for a byte (SmolLM2 lacks some control characters), or strips an added token's white space.
  /// One id can be a part of a character, so decode(a) + decode(b) is decode(a and b): write them as they come.
  /// An id without a token (models pad their vocabulary) yields nothing, as in Python.
  std::string decode(const std::vector<int64_t>& ids) const {
    std::string text;
    for (const auto id : ids) {
      const auto found = texts_.find(id);
      if (found != texts_.end()) text += found->second;
    }
    return text;
  }

  /// The id of a token as it is spelled in the file, for example "<|im_end|>" or "Ġthe".
  std::optional<int64_t> token_id(std::string_view token) const {
    const auto found = ids_.find(std::string(token));
    return found == ids_.end() ? std::nullopt : std::make_optional(found->second);
  }

  /// Whether a token is one of those that are recognized in the text itself, as the ends of turns are.
  bool is_added(int64_t id) const { return added_ids_.count(id) > 0; }

  /// The number of rows an embedding needs for all ids: the greatest id plus one.
  int64_t vocab_size() const {
    int64_t size = 0;
    for (const auto& [id, text] : texts_) size = std::max(size, id + 1);
    return size;
  }

 private:
  /// Words come again and again: their ids are kept, up to a number.
  struct Cache {
    static constexpr size_t kMaxWords = 1 << 17;
    static constexpr size_t kMaxLength = 256;
    std::mutex mutex;
    std::unordered_map<std::string, std::vector<int64_t>> ids;
  };

  struct File {
    nlohmann::json content;
    std::optional<JsonField> root;
  };

  static std::unique_ptr<File> read(const std::filesystem::path& path) {
    auto file = std::make_unique<File>();
    file->root = JsonField::read(path, file->content);
    return file;
  }

  explicit Tokenizer(const std::unique_ptr<File>& file)
      : model_((*file->root)["model"]),
        special_tokens_((*file->root)["post_processor"]),
        ids_(model_.vocabulary()),
        cache_(std::make_unique<Cache>()) {
    const auto& root = *file->root;
    if (!root["version"].is_null() && root["version"].text() != "1.0") root["version"].refuse("only 1.0 can be read");
    check_normalizer(root["normalizer"]);
    check_decoder(root["decoder"]);
    read_steps(root["pre_tokenizer"]);
    const ByteAlphabet alphabet;
    for (const auto& [token, id] : ids_) texts_[id] = alphabet.bytes(token);
    if (!root["added_tokens"].is_null()) read_added(root["added_tokens"]);
  }

  static void check_normalizer(const JsonField& normalizer) {
    if (normalizer.is_null()) return;
    const auto& value = normalizer.value();
    const bool does_nothing =
        value.is_object() && value.value("type", "") == "Sequence" && normalizer["normalizers"].elements().empty();
    if (!does_nothing) normalizer.refuse("only tokenizers without a normalizer (null) can be read");
  }

  static void check_decoder(const JsonField& decoder) {
    if (decoder.is_null() || decoder["type"].text() != "ByteLevel") decoder.refuse("only ByteLevel can be read");
  }

  void read_steps(const JsonField& pre_tokenizer) {
    if (pre_tokenizer.is_null()) pre_tokenizer.refuse("ByteLevel is needed, alone or at the end of a Sequence");
    if (pre_tokenizer["type"].text() != "Sequence") return read_step(pre_tokenizer, true);
    const auto steps = pre_tokenizer["pretokenizers"].elements();
    if (steps.empty()) pre_tokenizer.refuse("ByteLevel is needed at the end");
    for (const auto& step : steps) read_step(step, &step == &steps.back());
  }

  /// ByteLevel turns text to bytes, so a step behind it would not see text, and without it there are no bytes.
  void read_step(const JsonField& step, bool is_last) {
    const auto type = step["type"];
    if ((type.text() == "ByteLevel") != is_last) type.refuse("ByteLevel is needed at the end and only there");
    steps_.emplace_back(step);
  }

  /// A token that is not in the vocabulary gets the next free id. If the file says otherwise, the two contradict.
  void read_added(const JsonField& added) {
    auto next = static_cast<int64_t>(ids_.size());
    std::set<std::string> contents;
    for (const auto& field : added.elements()) {
      const auto content = field["content"].text();
      if (content.empty()) continue;
      if (!contents.insert(content).second) field["content"].refuse("it is there twice");
      const auto [place, is_new] = ids_.emplace(content, next);
      if (is_new) ++next;
      if (field["id"].id() != place->second) {
        field["id"].refuse("\"" + content + "\" is number " + std::to_string(place->second) + " by the vocabulary");
      }
      texts_.emplace(place->second, content);
      added_ids_.insert(place->second);
      auto& tokens = field["normalized"].flag() ? added_normalized_ : added_;
      tokens.add({content, place->second, field["single_word"].flag(), field["lstrip"].flag(), field["rstrip"].flag()});
    }
  }

  /// Takes `text` through the steps from `step` on, depth first, and adds the ids of its words.
  void append_words(std::string_view text, size_t step, std::vector<int64_t>& ids) const {
    if (step == steps_.size()) return append_word(text, ids);
    std::string with_space;
    if (steps_[step].adds_space_to(text)) {
      with_space = " " + std::string(text);
      text = with_space;
    }
    for (const auto& piece : steps_[step].split(text)) {
      if (piece.begin != piece.end) append_words(text.substr(piece.begin, piece.end - piece.begin), step + 1, ids);
    }
  }

  void append_word(std::string_view word, std::vector<int64_t>& ids) const {
    if (word.size() > Cache::kMaxLength) return append(model_.encode(word), ids);
    const std::lock_guard<std::mutex> lock(cache_->mutex);
    if (cache_->ids.size() >= Cache::kMaxWords) cache_->ids.clear();
    auto [place, is_new] = cache_->ids.try_emplace(std::string(word));
    if (is_new) place->second = model_.encode(word);
    append(place->second, ids);
  }

  static void append(const std::vector<int64_t>& more, std::vector<int64_t>& ids) {
    ids.insert(ids.end(), more.begin(), more.end());
  }

  BytePairEncoding model_;
  PostProcessor special_tokens_;
  std::unordered_map<std::string, int64_t> ids_;    // of all tokens
  std::unordered_map<int64_t, std::string> texts_;  // the bytes each id stands for
  std::set<int64_t> added_ids_;
  AddedTokens added_;             // looked for in the text as it is
  AddedTokens added_normalized_;  // looked for in what is left of it
  std::vector<SplitStep> steps_;
  std::unique_ptr<Cache> cache_;
};

}  // namespace gpt
