#pragma once

#include "json_field.hpp"
#include "oniguruma_pattern.hpp"
#include "split_pattern.hpp"

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace gpt {

/// One step that cuts a text before the words go to the model, "pre_tokenizer" in the file.
class SplitStep {
 public:
  /// Reads the step Split, Digits or ByteLevel. Throws lora::CheckpointError for another.
  explicit SplitStep(const JsonField& step) {
    const auto type = step["type"].text();
    if (type == "ByteLevel") {
      adds_space_ = step["add_prefix_space"].flag();
      if (step["use_regex"].flag_or(true)) pattern_.emplace(OnigurumaPattern::to_pcre2(kGPT2Pattern));
    } else if (type == "Digits") {
      pattern_.emplace(digit_pattern());
      behavior_ = step["individual_digits"].flag() ? Behavior::kIsolated : Behavior::kContiguous;
    } else if (type == "Split") {
      pattern_.emplace(read_pattern(step["pattern"]));
      behavior_ = read_behavior(step["behavior"]);
      inverted_ = step["invert"].flag();
    } else {
      step["type"].refuse("only ByteLevel, Digits, Split and Sequence can be read");
    }
  }

  /// Whether the words of `text` have to start with a space that the text does not have.
  bool adds_space_to(std::string_view text) const { return adds_space_ && !text.empty() && text.front() != ' '; }

  /// The parts of `text` that go on to the next step.
  std::vector<Piece> split(std::string_view text) const {
    if (!pattern_) return {{0, text.size(), true}};
    auto pieces = pattern_->split(text);
    if (behavior_ == Behavior::kIsolated) return pieces;
    for (auto& piece : pieces) piece.is_match = piece.is_match != inverted_;
    if (behavior_ != Behavior::kRemoved) return joined(std::move(pieces));
    const auto removed =
        std::remove_if(pieces.begin(), pieces.end(), [](const Piece& piece) { return piece.is_match; });
    pieces.erase(removed, pieces.end());
    return pieces;
  }

 private:
  /// What becomes of a match: a word of its own, nothing, one word with the matches or with the rest beside it.
  enum class Behavior { kIsolated, kRemoved, kContiguous, kMergedWithPrevious, kMergedWithNext };

  static constexpr const char* kGPT2Pattern =
      R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

  /// Unlike its patterns, the step Digits of `tokenizers` 0.23 knows the numbers of Unicode 17.
  static std::string digit_pattern() {
    return "[" + unicode_category("N") + R"(\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}])";
  }

  static std::string read_pattern(const JsonField& pattern) {
    if (!pattern["String"].is_null()) return quoted(pattern["String"].text());
    const auto regex = pattern["Regex"];
    try {
      auto text = OnigurumaPattern::to_pcre2(regex.text());
      SplitPattern compiles(text);
      return text;
    } catch (const c10::ValueError& error) {
      regex.refuse(error.what_without_backtrace());
    }
  }

  static std::string quoted(const std::string& text) {
    std::string pattern;
    for (const char c : text) {
      if (std::string_view("\\^$.[]|()?*+{}-#").find(c) != std::string_view::npos) pattern += '\\';
      pattern += c;
    }
    return pattern;
  }

  static Behavior read_behavior(const JsonField& behavior) {
    static const std::unordered_map<std::string, Behavior> kNames = {
        {"Isolated", Behavior::kIsolated},
        {"Removed", Behavior::kRemoved},
        {"Contiguous", Behavior::kContiguous},
        {"MergedWithPrevious", Behavior::kMergedWithPrevious},
        {"MergedWithNext", Behavior::kMergedWithNext},
    };
    const auto found = kNames.find(behavior.text());
    if (found == kNames.end()) behavior.refuse("it is none of the five that are known");
    return found->second;
  }

  /// Joins each match with its neighbor, or equal neighbors with each other.
  std::vector<Piece> joined(std::vector<Piece> pieces) const {
    const bool backwards = behavior_ == Behavior::kMergedWithNext;
    if (backwards) std::reverse(pieces.begin(), pieces.end());
    std::vector<Piece> all;
    bool previous = false;
    for (const auto& piece : pieces) {
      const bool join = behavior_ == Behavior::kContiguous ? piece.is_match == previous : piece.is_match && !previous;
      previous = piece.is_match;
      if (join && !all.empty()) {
        all.back() = {std::min(all.back().begin, piece.begin), std::max(all.back().end, piece.end), true};
      } else {
        all.push_back(piece);
      }
    }
    if (backwards) std::reverse(all.begin(), all.end());
    return all;
  }

  std::optional<SplitPattern> pattern_;
  Behavior behavior_ = Behavior::kIsolated;
  bool inverted_ = false;
  bool adds_space_ = false;
};

}  // namespace gpt
