#pragma once

#include <lora/selection/expression.hpp>
#include <lora/version.hpp>

#include <cstdint>
#include <optional>
#include <regex>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// rank_pattern or alpha_pattern of a configuration: values for the layers whose names match regular expressions. A
/// pattern is tried as `(.*\.)?(pattern)` on the whole name, and the first one that matches counts.
template <class T>
class Patterns {
 public:
  explicit Patterns(const std::vector<std::pair<std::string, T>>& patterns) {
    for (const auto& [pattern, value] : patterns)
      patterns_.push_back({pattern, compile("(.*\\.)?(" + pattern + ")", pattern), value});
  }

  T value(const std::string& name, T otherwise) {
    std::optional<T> first;
    for (auto& pattern : patterns_) {
      if (!std::regex_match(name, pattern.expression)) continue;
      pattern.is_used = true;
      if (!first) first = pattern.value;
    }
    return first.value_or(otherwise);
  }

  /// The patterns that have matched no name so far.
  std::vector<std::string> unused() const {
    std::vector<std::string> unused;
    for (const auto& pattern : patterns_) {
      if (!pattern.is_used) unused.push_back(pattern.text);
    }
    return unused;
  }

 private:
  struct Pattern {
    std::string text;
    std::regex expression;
    T value;
    bool is_used = false;
  };

  std::vector<Pattern> patterns_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
