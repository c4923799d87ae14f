#pragma once

#ifndef PCRE2_CODE_UNIT_WIDTH
#define PCRE2_CODE_UNIT_WIDTH 8
#endif
#include <pcre2.h>

#include <c10/util/Exception.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace gpt {

/// A part of a text: the bytes [begin, end), and whether the pattern matched them or they lie between two matches.
struct Piece {
  size_t begin;
  size_t end;
  bool is_match;
};

/// A compiled regular expression of PCRE2 that cuts a text into what matches and what lies between. Unicode properties
/// are on, `^` and `$` match at each line. May be used from several threads at once.
class SplitPattern {
 public:
  /// Throws c10::ValueError where PCRE2 does not understand `pattern`.
  explicit SplitPattern(const std::string& pattern) {
    std::unique_ptr<pcre2_compile_context, void (*)(pcre2_compile_context*)> context(
        pcre2_compile_context_create(nullptr), pcre2_compile_context_free);
    pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);  // a build of PCRE2 may have another default
    int error = 0;
    PCRE2_SIZE where = 0;
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                              PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &error, &where, context.get()),
                pcre2_code_free);
    TORCH_CHECK_VALUE(code_ != nullptr, "gpt::SplitPattern: PCRE2 cannot compile \"", pattern, "\": ", message(error),
                      " at byte ", where);
    pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);  // where that is not possible, the interpreter does it
  }

  /// All pieces of `text`, which has to be UTF-8, from first to last. They cover it, and only a match can be empty.
  std::vector<Piece> split(std::string_view text) const {
    std::vector<Piece> pieces;
    const auto found = match_data();
    size_t covered = 0;  // end of the last piece
    size_t from = 0;     // where the search goes on
    while (from <= text.size() && match(text, from, found.get(), PCRE2_NO_UTF_CHECK) >= 0) {
      const auto* range = pcre2_get_ovector_pointer(found.get());
      const bool again = range[0] == range[1] && range[1] == covered && !pieces.empty();  // the same empty match
      if (again) {
        from += character_length(text, from);
        continue;
      }
      if (covered != range[0]) pieces.push_back({covered, range[0], false});
      pieces.push_back({range[0], range[1], true});
      covered = from = range[1];
    }
    if (covered != text.size()) pieces.push_back({covered, text.size(), false});
    return pieces;
  }

  /// Where the first bytes are that are not UTF-8 (surrogates are not); nothing if all are.
  static std::optional<size_t> find_invalid_utf8(std::string_view text) {
    static const SplitPattern nothing("");
    const auto found = nothing.match_data();
    const auto result = nothing.match(text, 0, found.get(), 0);
    return result < 0 ? std::make_optional(pcre2_get_startchar(found.get())) : std::nullopt;
  }

 private:
  using MatchData = std::unique_ptr<pcre2_match_data, void (*)(pcre2_match_data*)>;

  MatchData match_data() const {
    return {pcre2_match_data_create_from_pattern(code_.get(), nullptr), pcre2_match_data_free};
  }

  /// At least 0 for a match, else "no match" or, if `options` leave that check on, "not UTF-8".
  int match(std::string_view text, size_t from, pcre2_match_data* found, uint32_t options) const {
    auto run = [&](uint32_t all_options) {
      return pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from, all_options, found,
                         limits());
    };
    auto result = run(options);
    if (result == PCRE2_ERROR_JIT_STACKLIMIT) result = run(options | PCRE2_NO_JIT);  // the interpreter uses the heap
    const bool not_utf8 = result <= PCRE2_ERROR_UTF8_ERR1 && result >= PCRE2_ERROR_UTF8_ERR21;
    TORCH_CHECK(result >= 0 || result == PCRE2_ERROR_NOMATCH || not_utf8, "gpt::SplitPattern: a text of ", text.size(),
                " bytes cannot be split: ", message(result));
    return result;
  }

  /// The default limit on backtracking is for patterns of strangers; a run of a million spaces is no mistake here.
  static pcre2_match_context* limits() {
    static const std::unique_ptr<pcre2_match_context, void (*)(pcre2_match_context*)> context = [] {
      auto* made = pcre2_match_context_create(nullptr);
      pcre2_set_match_limit(made, std::numeric_limits<uint32_t>::max());
      return std::unique_ptr<pcre2_match_context, void (*)(pcre2_match_context*)>(made, pcre2_match_context_free);
    }();
    return context.get();
  }

  static size_t character_length(std::string_view text, size_t at) {
    size_t end = at + 1;
    while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) ++end;
    return end - at;
  }

  static std::string message(int error) {
    PCRE2_UCHAR text[256];
    pcre2_get_error_message(error, text, sizeof text);
    return reinterpret_cast<const char*>(text);
  }

  std::shared_ptr<pcre2_code> code_;
};

}  // namespace gpt
