#pragma once

#include <c10/util/Exception.h>

#include <lora/version.hpp>

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

// Names, for the rules of selection and for errors that say what there is.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

inline bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

/// Whether the module `name` is meant by `entry`: the same name, or ends in "." and the entry.
inline bool is_or_ends_with(const std::string& name, const std::string& entry) {
  return name == entry || ends_with(name, "." + entry);
}

/// The name of the module that has a tensor; empty for the model itself.
inline std::string owner_of(const std::string& tensor) {
  const auto dot = tensor.rfind('.');
  return dot == std::string::npos ? "" : tensor.substr(0, dot);
}

/// "a", or "a" and "b".
inline std::string quoted(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "\"" : " and \"") + name + "\"";
  return text;
}

/// "a, b, c (+10 more)"; what is longer than a line has a line for each name.
inline std::string list(const std::vector<std::string>& names, size_t most = 6) {
  constexpr size_t kLine = 120;
  const auto last = names.begin() + static_cast<std::ptrdiff_t>(std::min(most, names.size()));
  const auto add = [](size_t sum, const std::string& name) { return sum + name.size() + 2; };
  const bool is_long = last - names.begin() > 1 && std::accumulate(names.begin(), last, size_t{0}, add) > kLine;
  std::string text = is_long ? "\n  " : "";
  for (auto name = names.begin(); name != last; ++name)
    text += (name == names.begin() ? "" : is_long ? ",\n  " : ", ") + *name;
  if (names.size() > most) text += " (+" + std::to_string(names.size() - most) + " more)";
  return names.empty() ? "none" : text;
}

/// What becomes of entries of a configuration that match nothing in a model. A user's own are an error; those of an
/// adapter's file, which may name more kinds of models than this one, are noted, since the file's tensors tell whether
/// anything is amiss.
class Unmatched {
 public:
  /// `noted` takes the texts; without it they are thrown.
  explicit Unmatched(std::vector<std::string>* noted = nullptr) : noted_(noted) {}

  /// `text` says which entry it is, `meant` perhaps what was meant, `here` what the model has.
  void report(const std::string& text, const std::string& meant, const std::string& here) const {
    TORCH_CHECK(noted_ != nullptr, "lora::attach: ", text, ";", meant, " ", here);
    noted_->push_back(text + (meant.empty() ? "" : ";" + meant));
  }

 private:
  std::vector<std::string>* noted_;
};

/// The number of single-letter edits between two words; neighbours that changed places count as one (Damerau).
inline size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> before(b.size() + 1), last(b.size() + 1), now(b.size() + 1);
  std::iota(last.begin(), last.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    now[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      now[j] = std::min({last[j] + 1, now[j - 1] + 1, last[j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1)});
      const bool swapped = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
      if (swapped) now[j] = std::min(now[j], before[j - 2] + 1);
    }
    before = std::exchange(last, now);
  }
  return last[b.size()];
}

/// Up to three of `candidates` that look like `word`, the nearest first.
inline std::vector<std::string> nearest(const std::string& word, std::vector<std::string> candidates) {
  std::sort(candidates.begin(), candidates.end());
  candidates.erase(std::unique(candidates.begin(), candidates.end()), candidates.end());
  std::vector<std::pair<size_t, std::string>> ranked;
  for (auto& candidate : candidates) {
    const auto edits = edit_distance(word, candidate);
    if (edits <= std::max(word.size(), candidate.size()) / 2) ranked.emplace_back(edits, std::move(candidate));
  }
  std::stable_sort(ranked.begin(), ranked.end(), [](auto& a, auto& b) { return a.first < b.first; });
  std::vector<std::string> names;
  for (size_t i = 0; i < std::min<size_t>(3, ranked.size()); ++i) names.push_back(std::move(ranked[i].second));
  return names;
}

/// ` did you mean "head"?`, or nothing when no candidate is near.
inline std::string did_you_mean(const std::string& word, const std::vector<std::string>& candidates) {
  const auto names = nearest(word, candidates);
  if (names.empty()) return "";
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "\"" : " or \"") + name + "\"";
  return " did you mean " + text + "?";
}

/// What a mistyped entry may have meant: the names and their last parts.
inline std::vector<std::string> with_last_parts(std::vector<std::string> names) {
  for (size_t i = 0, size = names.size(); i < size; ++i) names.push_back(names[i].substr(names[i].rfind('.') + 1));
  return names;
}

/// A regular expression that matches `text` and nothing else.
inline std::string escaped(const std::string& text) {
  std::string pattern;
  for (const char letter : text) {
    if (std::string_view(R"(.^$|()[]{}*+?\)").find(letter) != std::string_view::npos) pattern += '\\';
    pattern += letter;
  }
  return pattern;
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
