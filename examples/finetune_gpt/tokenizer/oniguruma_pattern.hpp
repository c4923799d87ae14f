#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace gpt {

/// The members of a general category of Unicode, as PCRE2 writes them inside a character class: `\p{L}` and what the
/// categories L, Lu, Ll, Lt, Lm, Lo, M, N, Nd, Nl, No, P, S and Z gained up to Unicode 16. Empty for any other name.
///
/// The Python package `tokenizers` (0.23) knows Unicode 16, PCRE2 10.42 knows Unicode 14, and each one splits by what
/// it knows. With the difference written out, every version of PCRE2 from 10.42 on splits as `tokenizers` does; only
/// code points that come after Unicode 16 are what the PCRE2 in use takes them for.
inline std::string unicode_category(std::string_view name) {
  static const std::pair<std::string_view, std::string_view> kSinceUnicode14[] = {
      {"Lu", R"(\x{1C89}\x{A7CB}-\x{A7CC}\x{A7DA}\x{A7DC}\x{10D50}-\x{10D65})"},
      {"Ll", R"(\x{1C8A}\x{A7CD}\x{A7DB}\x{10D70}-\x{10D85}\x{1DF25}-\x{1DF2A})"},
      {"Lm", R"(\x{10D4E}\x{10D6F}\x{16D40}-\x{16D42}\x{16D6B}-\x{16D6C}\x{1E030}-\x{1E06D}\x{1E4EB})"},
      {"Lo", R"(\x{105C0}-\x{105F3}\x{10D4A}-\x{10D4D}\x{10D4F}\x{10EC2}-\x{10EC4}\x{1123F}-\x{11240})"
             R"(\x{11380}-\x{11389}\x{1138B}\x{1138E}\x{11390}-\x{113B5}\x{113B7}\x{113D1}\x{113D3})"
             R"(\x{11BC0}-\x{11BE0}\x{11F02}\x{11F04}-\x{11F10}\x{11F12}-\x{11F33}\x{1342F}\x{13441}-\x{13446})"
             R"(\x{13460}-\x{143FA}\x{16100}-\x{1611D}\x{16D43}-\x{16D6A}\x{18CFF}\x{1B132}\x{1B155})"
             R"(\x{1E4D0}-\x{1E4EA}\x{1E5D0}-\x{1E5ED}\x{1E5F0}\x{2B739}\x{2EBF0}-\x{2EE5D}\x{31350}-\x{323AF})"},
      {"M", R"(\x{897}\x{CF3}\x{ECE}\x{10D69}-\x{10D6D}\x{10EFC}-\x{10EFF}\x{11241}\x{113B8}-\x{113C0}\x{113C2})"
            R"(\x{113C5}\x{113C7}-\x{113CA}\x{113CC}-\x{113D0}\x{113D2}\x{113E1}-\x{113E2}\x{11F00}-\x{11F01})"
            R"(\x{11F03}\x{11F34}-\x{11F3A}\x{11F3E}-\x{11F42}\x{11F5A}\x{13440}\x{13447}-\x{13455})"
            R"(\x{1611E}-\x{1612F}\x{1E08F}\x{1E4EC}-\x{1E4EF}\x{1E5EE}-\x{1E5EF})"},
      {"Nd", R"(\x{10D40}-\x{10D49}\x{116D0}-\x{116E3}\x{11BF0}-\x{11BF9}\x{11F50}-\x{11F59}\x{16130}-\x{16139})"
             R"(\x{16D70}-\x{16D79}\x{1CCF0}-\x{1CCF9}\x{1E4F0}-\x{1E4F9}\x{1E5F1}-\x{1E5FA})"},
      {"No", R"(\x{1D2C0}-\x{1D2D3})"},
      {"P", R"(\x{1B4E}-\x{1B4F}\x{1B7F}\x{10D6E}\x{113D4}-\x{113D5}\x{113D7}-\x{113D8}\x{11B00}-\x{11B09}\x{11BE1})"
            R"(\x{11F43}-\x{11F4F}\x{16D6D}-\x{16D6F}\x{1E5FF})"},
      {"S", R"(\x{2427}-\x{2429}\x{2FFC}-\x{2FFF}\x{31E4}-\x{31E5}\x{31EF}\x{10D8E}-\x{10D8F}\x{1CC00}-\x{1CCEF})"
            R"(\x{1CD00}-\x{1CEB3}\x{1F6DC}\x{1F774}-\x{1F776}\x{1F77B}-\x{1F77F}\x{1F7D9}\x{1F8B2}-\x{1F8BB})"
            R"(\x{1F8C0}-\x{1F8C1}\x{1FA75}-\x{1FA77}\x{1FA87}-\x{1FA89}\x{1FA8F}\x{1FAAD}-\x{1FAAF})"
            R"(\x{1FABB}-\x{1FABF}\x{1FAC6}\x{1FACE}-\x{1FACF}\x{1FADA}-\x{1FADC}\x{1FADF}\x{1FAE8}-\x{1FAE9})"
            R"(\x{1FAF7}-\x{1FAF8}\x{1FBCB}-\x{1FBEF})"},
  };
  static const std::string_view kNames[] = {"L", "Lu", "Ll", "Lt", "Lm", "Lo", "M",
                                            "N", "Nd", "Nl", "No", "P",  "S",  "Z"};
  if (std::find(std::begin(kNames), std::end(kNames), name) == std::end(kNames)) return "";
  auto members = "\\p{" + std::string(name) + "}";
  for (const auto& [category, ranges] : kSinceUnicode14) {
    if (category.substr(0, name.size()) == name) members += ranges;
  }
  return members;
}

/// Rewrites a pattern of Oniguruma (what tokenizer.json holds) for PCRE2, so that both match the same: `\s`, `\d` and
/// `\p{..}` are written out, sets within sets are joined. What the two libraries take differently, or what no
/// known tokenizer uses, is refused with a c10::ValueError that names it.
class OnigurumaPattern {
 public:
  static std::string to_pcre2(std::string_view pattern) {
    OnigurumaPattern rewriting(pattern);
    while (!rewriting.done()) rewriting.item();
    return std::move(rewriting.out_);
  }

 private:
  explicit OnigurumaPattern(std::string_view pattern) : pattern_(pattern) {}

  void item() {
    switch (const char c = next()) {
      case '\\':
        return escape();
      case '[':
        return set();
      case '(':
        return open_group();
      case '{':
        return interval();
      case ')':
        if (!caseless_.empty()) caseless_.pop_back();
        [[fallthrough]];
      default:
        out_ += c;
    }
  }

  /// `(`, `(?:`, `(?>`, `(?i:` and looking ahead or back.
  void open_group() {
    static const std::string_view kKinds[] = {"?:", "?>", "?i:", "?=", "?!", "?<=", "?<!"};
    out_ += '(';
    caseless_.push_back(!caseless_.empty() && caseless_.back());
    if (peek() == '*') refuse("(*");
    if (peek() != '?') return;
    for (auto kind : kKinds) {
      if (pattern_.substr(at_, kind.size()) != kind) continue;
      if (kind == "?i:") caseless_.back() = true;
      out_ += kind;
      at_ += kind.size();
      return;
    }
    refuse("(" + std::string(pattern_.substr(at_, 3)));
  }

  /// `{n}`, `{n,}` and `{n,m}`. A `+` or `?` behind them means different things to the two libraries.
  void interval() {
    const auto end = pattern_.find('}', at_);
    const auto text = "{" + std::string(pattern_.substr(at_, end - at_)) + "}";
    const auto digits = text.find_first_not_of("0123456789", 1);
    const bool counts = end != std::string_view::npos && digits > 1 &&
                        (text[digits] == '}' ||
                         (text[digits] == ',' && text.find_first_not_of("0123456789", digits + 1) == text.size() - 1));
    if (!counts) refuse("{");
    at_ = end + 1;
    if (peek() == '+' || peek() == '?') refuse(text + peek());
    out_ += text;
  }

  /// `[...]`, with the sets in it joined to it.
  void set() {
    size_t depth = 1;
    out_ += '[';
    if (peek() == '^') out_ += next();
    const auto first = at_;
    if (peek() == ']') refuse("[]");
    while (depth > 0) {
      if (done()) refuse("[ without ]");
      const char c = next();
      if (c == '&' && peek() == '&') refuse("&&");
      if (c == '\\') {
        escape_in_set(first);
      } else if (c == '[') {
        if (peek() == '^' || peek() == ':' || peek() == ']' || out_.back() == '-')
          refuse(std::string("[") + peek() + " in a set");
        ++depth;
      } else if (c == ']') {
        --depth;
        if (depth > 0 && peek() == '-') refuse("a set followed by -");
      } else {
        out_ += c;
      }
    }
    out_ += ']';
  }

  void escape() {
    if (!class_follows()) return literal();
    const auto [negated, members] = class_escape();
    out_ += (negated ? "[^" : "[") + members + "]";
  }

  void escape_in_set(size_t first) {
    if (!class_follows()) return literal();
    const auto start = at_ - 1;
    const auto [negated, members] = class_escape();
    const auto text = std::string(pattern_.substr(start, at_ - start));
    if (negated) refuse(text + " in a set");
    const bool ends_range = start > first + 1 && pattern_[start - 1] == '-' && pattern_[start - 2] != '\\';
    const bool starts_range = peek() == '-' && pattern_.substr(at_, 2) != "-]";
    if (ends_range || starts_range) refuse(text + " beside - in a set");
    out_ += members;
  }

  bool class_follows() const { return std::string_view("sSdDpP").find(peek()) != std::string_view::npos; }

  /// What `\s`, `\d` and `\p{..}` and their opposites stand for.
  std::pair<bool, std::string> class_escape() {
    static const std::string kSpaces =
        R"(\t-\r \x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";
    const char c = next();
    if (c == 's' || c == 'S') return {c == 'S', kSpaces};
    if (c == 'd' || c == 'D') return {c == 'D', unicode_category("Nd")};
    const auto end = pattern_.find('}', at_);
    if (peek() != '{' || end == std::string_view::npos) refuse(std::string("\\") + c);
    const auto name = pattern_.substr(at_ + 1, end - at_ - 1);
    const auto text = std::string("\\") + c + "{" + std::string(name) + "}";
    auto members = unicode_category(name);
    if (members.empty()) refuse(text);
    if (!caseless_.empty() && caseless_.back()) refuse(text + " in (?i:");
    at_ = end + 1;
    return {c == 'P', std::move(members)};
  }

  /// A control character by its letter, or a character that is no letter and no digit.
  void literal() {
    const char c = next();
    const bool word = (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '\0';
    if (word && std::string_view("rntf").find(c) == std::string_view::npos) refuse(std::string("\\") + c);
    out_ += '\\';
    out_ += c;
  }

  bool done() const { return at_ >= pattern_.size(); }
  char peek() const { return done() ? '\0' : pattern_[at_]; }
  char next() { return done() ? '\0' : pattern_[at_++]; }

  [[noreturn]] void refuse(const std::string& what) const {
    TORCH_CHECK_VALUE(false, "gpt::OnigurumaPattern: ", what, " is not supported in the pattern ", pattern_);
  }

  std::string_view pattern_;
  size_t at_ = 0;
  std::string out_;
  std::vector<bool> caseless_;  // for each open group
};

}  // namespace gpt
