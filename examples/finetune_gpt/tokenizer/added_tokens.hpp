#pragma once

#include "oniguruma_pattern.hpp"
#include "split_pattern.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace gpt {

/// The tokens that are recognized in the text itself, before any word is split: "added_tokens" in the file.
class AddedTokens {
 public:
  struct Token {
    std::string content;
    int64_t id;
    bool single_word;
    bool strips_left;
    bool strips_right;
  };
  /// A token that was found, with the white space it took, or the text between two of them (without an id).
  struct Part {
    std::string_view text;
    std::optional<int64_t> id;
  };

  void add(Token token) {
    auto& tokens = by_first_byte_[static_cast<unsigned char>(token.content.front())];
    const auto shorter = std::find_if(tokens.begin(), tokens.end(),
                                      [&](const Token& other) { return other.content.size() < token.content.size(); });
    tokens.insert(shorter, std::move(token));
  }

  /// Of two tokens that overlap, the one that starts first is found, of two at one place the longest.
  std::vector<Part> split(std::string_view text) const {
    std::vector<Part> parts;
    size_t covered = 0;
    for (size_t at = 0; at < text.size();) {
      const auto* token = longest_at(text, at);
      const auto end = at + (token == nullptr ? 1 : token->content.size());
      const auto begin = std::exchange(at, end);
      if (token == nullptr ||
          (token->single_word && (ends_with_word(text.substr(0, begin)) || starts_with_word(text.substr(end))))) {
        continue;
      }
      const auto from = token->strips_left ? std::max(covered, begin - spaces_at_end(text.substr(0, begin))) : begin;
      const auto to = token->strips_right ? end + spaces_at_start(text.substr(end)) : end;
      if (covered < from) parts.push_back({text.substr(covered, from - covered), std::nullopt});
      parts.push_back({text.substr(from, to - from), token->id});
      covered = to;
    }
    if (covered < text.size()) parts.push_back({text.substr(covered), std::nullopt});
    return parts;
  }

 private:
  const Token* longest_at(std::string_view text, size_t at) const {
    for (const auto& token : by_first_byte_[static_cast<unsigned char>(text[at])]) {
      if (text.substr(at, token.content.size()) == token.content) return &token;
    }
    return nullptr;
  }

  static std::string_view first_character(std::string_view text) {
    size_t length = std::min<size_t>(1, text.size());
    while (length < text.size() && continues(text[length])) ++length;
    return text.substr(0, length);
  }
  static std::string_view last_character(std::string_view text) {
    size_t begin = text.size() - std::min<size_t>(1, text.size());
    while (begin > 0 && continues(text[begin])) --begin;
    return text.substr(begin);
  }
  static bool continues(char byte) { return (static_cast<unsigned char>(byte) & 0xC0) == 0x80; }

  static size_t spaces_at_start(std::string_view text) {
    size_t length = 0;
    while (is_one(spaces(), first_character(text.substr(length))))
      length += first_character(text.substr(length)).size();
    return length;
  }
  static size_t spaces_at_end(std::string_view text) {
    const auto all = text.size();
    while (is_one(spaces(), last_character(text))) text.remove_suffix(last_character(text).size());
    return all - text.size();
  }
  static bool starts_with_word(std::string_view text) { return is_one(word_characters(), first_character(text)); }
  static bool ends_with_word(std::string_view text) { return is_one(word_characters(), last_character(text)); }

  static bool is_one(const SplitPattern& members, std::string_view character) {
    return !character.empty() && members.split(character).front().is_match;
  }
  static const SplitPattern& spaces() {
    static const SplitPattern members(OnigurumaPattern::to_pcre2("\\s"));
    return members;
  }
  /// What `\w` means to the regular expressions of Rust.
  static const SplitPattern& word_characters() {
    static const SplitPattern members("[" + unicode_category("L") + unicode_category("M") + unicode_category("Nd") +
                                      R"(\p{Alphabetic}\p{Pc}\p{Join_Control}])");
    return members;
  }

  std::array<std::vector<Token>, 256> by_first_byte_;  // the longest first
};

}  // namespace gpt
