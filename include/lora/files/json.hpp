#pragma once

#include <filesystem>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include <lora/files/mapped_file.hpp>
#include <lora/version.hpp>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Refuses what the parser by itself lets pass: a key that appears twice in one object, of which it would keep the
/// last, and nesting without end.
template <class Json>
class JsonRules {
 public:
  explicit JsonRules(const std::filesystem::path& path) : path_(path) {}

  bool operator()(int depth, typename Json::parse_event_t event, const Json& value) {
    using Event = typename Json::parse_event_t;
    if (depth > kMaxDepth) throw CheckpointError(path_, "JSON nested more than ", kMaxDepth, " deep");
    if (event == Event::object_start) keys_.emplace_back();
    if (event == Event::object_end) keys_.pop_back();
    if (event == Event::key && !keys_.back().insert(value.template get<std::string>()).second)
      throw CheckpointError(path_, "the key ", value.dump(), " appears twice in one object");
    return true;
  }

 private:
  static constexpr int kMaxDepth = 64;

  const std::filesystem::path& path_;
  std::vector<std::set<std::string>> keys_;  // of the objects that are open
};

/// The parser takes a zero byte for the end of the text and would not see what follows it.
inline void check_no_zero_byte(const std::filesystem::path& path, std::string_view text) {
  if (text.find('\0') != text.npos) throw CheckpointError(path, "is not valid JSON: it contains a zero byte");
}

/// What the parser found is a syntax error, or a number that fits no type.
[[noreturn]] inline void throw_not_json(const std::filesystem::path& path, const nlohmann::json::exception& error) {
  const std::string what = error.what();  // "[json.exception.parse_error.101] parse error at ..."
  throw CheckpointError(path, "is not valid JSON: ", what.substr(what.find(' ') + 1));
}

/// Parses `text`, which stands in the file `path`; `rules` sees every event of the parser. Errors: CheckpointError,
/// with the place of a syntax error.
template <class Json, class Rules>
Json parse_json(const std::filesystem::path& path, std::string_view text, Rules rules) {
  check_no_zero_byte(path, text);
  try {
    return Json::parse(text, rules);
  } catch (const nlohmann::json::exception& error) {
    throw_not_json(path, error);
  }
}

/// Reads a whole JSON file, in which no key may appear twice. Json is nlohmann::json, whose objects are sorted and
/// quick to search, or nlohmann::ordered_json, which keeps the order.
template <class Json = nlohmann::json>
Json read_json(const std::filesystem::path& path) {
  const MappedFile file(path);
  return parse_json<Json>(path, file.text(), JsonRules<Json>(path));
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
