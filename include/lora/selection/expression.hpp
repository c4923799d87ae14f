#pragma once

#include <c10/util/Exception.h>

#include <lora/version.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <regex>
#include <string>
#include <string_view>

// Regular expressions of users and of files. Only what matches them includes this: std::regex is slow to compile.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The number of brackets that are open at the deepest place of a pattern.
inline size_t nesting(const std::string& pattern) {
  size_t open = 0, most = 0;
  for (size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] == '\\') {
      ++i;  // what follows it is no bracket
      continue;
    }
    if (pattern[i] == '(') most = std::max(most, ++open);
    if (pattern[i] == ')' && open > 0) --open;
  }
  return most;
}

/// The digits of the longest number in a \\1 or {1,2} of a pattern.
inline size_t most_digits(const std::string& pattern) {
  size_t most = 0;
  for (auto i = pattern.find_first_of("\\{,"); i != pattern.npos; i = pattern.find_first_of("\\{,", i + 1)) {
    const auto end = std::min(pattern.find_first_not_of("0123456789", i + 1), pattern.size());
    most = std::max(most, end - i - 1);
  }
  return most;
}

/// A pattern of Python's in ECMAScript, which has other words for the beginning and the end of the text, and takes a
/// letter that it does not know after a \\ for itself.
inline std::string to_ecmascript(const std::string& pattern, const std::string& shown) {
  constexpr std::string_view kKnown = "bBcdDfnrsStuvwWx";
  std::string text;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const auto letter = pattern[i] == '\\' && i + 1 < pattern.size() ? pattern[i + 1] : '\0';
    if (letter == '\0') {
      text += pattern[i];
      continue;
    }
    ++i;
    const bool is_letter = (letter >= 'a' && letter <= 'z') || (letter >= 'A' && letter <= 'Z');
    TORCH_CHECK_VALUE(!is_letter || letter == 'A' || letter == 'Z' || kKnown.find(letter) != kKnown.npos,
                      "lora::LoRAConfig: \"", shown, "\" has \\", std::string(1, letter), ", which is nothing in a ",
                      "regular expression (ECMAScript)");
    if (letter == 'A') {
      text += '^';
    } else if (letter == 'Z') {
      text += '$';
    } else {
      text += {'\\', letter};
    }
  }
  return text;
}

/// What an expression is for: to tell whether it matches, or to find what its brackets match, too.
enum class MatchFor : uint8_t { kYesOrNo, kParts };

/// std::regex. One that says yes or no is matched in a time that grows with the length of pattern and name only, where
/// the library can do that: libstdc++ tries every way to match otherwise, and (a*)*b has 2^n of them. Not so with a
/// back reference. What brackets match may then be another part, the longest one.
inline std::regex compiled_for(MatchFor use, const std::string& pattern) {
  constexpr auto kSyntax = std::regex::ECMAScript | std::regex::optimize;
#ifdef __GLIBCXX__
  try {
    if (use == MatchFor::kYesOrNo) return std::regex(pattern, kSyntax | std::regex_constants::__polynomial);
  } catch (const std::regex_error& error) {
    if (error.code() != std::regex_constants::error_complexity) throw;
  }
#endif
  (void)use;
  return std::regex(pattern, kSyntax);
}

/// A compiled pattern; an error that shows `shown` when it is none. A pattern may come from anywhere, and std::regex
/// calls itself for every letter and every bracket, and computes numbers without looking for their end, so there are
/// limits.
inline std::regex compile(const std::string& pattern, const std::string& shown, MatchFor use = MatchFor::kYesOrNo) {
  constexpr size_t kMaxLength = 10000, kMaxNesting = 200, kMaxDigits = 9;
  const auto depth = nesting(pattern), digits = most_digits(pattern);
  TORCH_CHECK_VALUE(pattern.size() <= kMaxLength && depth <= kMaxNesting && digits <= kMaxDigits,
                    "lora::LoRAConfig: a regular expression may have ", kMaxLength, " characters, ", kMaxNesting,
                    " brackets in each other and numbers of ", kMaxDigits, " digits, but \"", shown.substr(0, 60),
                    "...\" has ", pattern.size(), ", ", depth, " and ", digits);
  try {
    return compiled_for(use, to_ecmascript(pattern, shown));
  } catch (const std::regex_error& error) {
    TORCH_CHECK_VALUE(false, "lora::LoRAConfig: \"", shown,
                      "\" is not a regular expression (ECMAScript): ", error.what());
  }
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
