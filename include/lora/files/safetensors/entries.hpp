#pragma once

#include <lora/files/json.hpp>
#include <lora/files/safetensors/types.hpp>
#include <lora/version.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// What the header says of one tensor, before it is clear whether it makes sense.
struct SafetensorsEntry {
  std::string dtype;
  std::vector<uint64_t> shape;
  uint64_t begin, end;
};

/// Takes the entries of a header one by one while it is parsed; every rule of the format that one of them breaks is a
/// CheckpointError.
///
/// What is valid is decided by the Python package, and not by the description of the format where that is stricter:
/// white space may come first, __metadata__ may be null, of several tensors with one name the last one counts, other
/// fields are allowed, an entry may be a list of dtype, shape and data_offsets, and a dtype an object.
class SafetensorsEntryReader {
 public:
  using Json = nlohmann::json;

  explicit SafetensorsEntryReader(const std::filesystem::path& path) : path_(path) {}

  std::map<std::string, SafetensorsEntry> entries;
  std::map<std::string, std::string> metadata;

  /// One event of the parser. False forgets the value, which is not needed any more.
  bool operator()(int depth, Json::parse_event_t event, const Json& value) {
    using Event = Json::parse_event_t;
    const bool is_start = event == Event::object_start || event == Event::array_start;
    check(!is_start || depth < kMaxDepth, "JSON nested more than ", kMaxDepth, " deep");
    if (event == Event::key) see_key(depth, value.get_ref<const std::string&>());
    const bool is_entry = depth == 1 && !is_start && event != Event::key;
    if (is_entry) take(value);
    return !is_entry;
  }

 private:
  static constexpr int kMaxDepth = 127;
  static constexpr std::array<std::string_view, 3> kFields = {"dtype", "shape", "data_offsets"};

  template <typename... Reason>
  void check(bool holds, const Reason&... reason) const {
    if (!holds) throw CheckpointError(path_, reason...);
  }

  /// Refuses keys that come twice where one of them would have to be ignored.
  void see_key(int depth, const std::string& key) {
    if (depth == 1) {
      name_ = key;
      field_ = kFields[0];  // that of the first object in a list
      fields_.clear();
      check(key != "__metadata__" || !std::exchange(has_metadata_, true), "__metadata__ appears twice");
    }
    if (depth == 2) field_ = key;
    const bool is_field = depth == 2 && std::find(kFields.begin(), kFields.end(), key) != kFields.end();
    const bool is_type = depth == 3 && field_ == kFields[0];
    if (name_ == "__metadata__" || (!is_field && !is_type)) return;
    check(fields_.insert(key).second, "tensor \"", name_, "\": the key \"", key, "\" appears twice");
  }

  void take(const Json& value) {
    if (name_ == "__metadata__") {
      read_metadata(value);
    } else {
      entries.insert_or_assign(name_, read_entry(value));
    }
  }

  void read_metadata(const Json& value) {
    if (value.is_null()) return;
    check(value.is_object(), "__metadata__ has to be an object, but is ", value.type_name());
    for (const auto& [key, text] : value.items()) {
      check(text.is_string(), "__metadata__ has to hold strings, but \"", key, "\" is ", text.type_name());
      metadata[key] = text.get<std::string>();
    }
  }

  SafetensorsEntry read_entry(const Json& entry) const {
    check(entry.is_object() || entry.is_array(), "tensor \"", name_, "\" has to be an object, but is ",
          entry.type_name());
    check(entry.is_object() || entry.size() == kFields.size(), "tensor \"", name_, "\" has to be a list of ",
          kFields.size(), ", but is one of ", entry.size());
    const auto offsets = read_numbers(entry, 2);
    check(offsets.size() == 2, "tensor \"", name_, "\": data_offsets has to hold 2 numbers, but holds ",
          offsets.size());
    return {read_type(entry), read_numbers(entry, 1), offsets[0], offsets[1]};
  }

  const Json& field(const Json& entry, size_t number) const {
    if (entry.is_array()) return entry[number];
    const auto found = entry.find(kFields[number]);
    check(found != entry.end(), "tensor \"", name_, "\" has no ", kFields[number]);
    return *found;
  }

  /// "F32", or {"F32": null}.
  std::string read_type(const Json& entry) const {
    const auto& dtype = field(entry, 0);
    const bool is_wrapped = dtype.is_object() && dtype.size() == 1 && dtype.front().is_null();
    check(dtype.is_string() || is_wrapped, "tensor \"", name_, "\": dtype has to be a string, but is ",
          dtype.type_name());
    const auto name = is_wrapped ? dtype.begin().key() : dtype.get<std::string>();
    const auto& types = kSafetensorsTypes;
    const auto& others = kSafetensorsOtherTypes;
    const auto is_it = [&](const auto& type) { return name == type.name; };
    const bool is_known =
        std::any_of(types.begin(), types.end(), is_it) || std::find(others.begin(), others.end(), name) != others.end();
    if (!is_known) throw CheckpointError(path_, "tensor \"", name_, "\" has the unknown dtype ", dtype.dump());
    return name;
  }

  std::vector<uint64_t> read_numbers(const Json& entry, size_t number) const {
    const auto& list = field(entry, number);
    const auto is_number = [](const auto& item) { return item.is_number_unsigned(); };
    if (!list.is_array() || !std::all_of(list.begin(), list.end(), is_number))
      throw CheckpointError(path_, "tensor \"", name_, "\": ", kFields[number],
                            " has to be a list of numbers from 0 to 2^64 - 1, but is ", list.dump().substr(0, 80));
    return list.get<std::vector<uint64_t>>();
  }

  const std::filesystem::path& path_;
  std::string name_;              // of the entry that is being parsed
  std::string field_;             // that is being parsed in it
  std::set<std::string> fields_;  // those that may come once, and did
  bool has_metadata_ = false;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
