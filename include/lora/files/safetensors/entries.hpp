#pragma once

#include <lora/files/json.hpp>
#include <lora/files/safetensors/types.hpp>
#include <lora/version.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
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
  std::vector<uint64_t> data_offsets;  // begin and end
};

/// Takes the entries of a header from the events of the parser, so that no value is made for what is only looked at;
/// every rule of the format that an entry breaks is a CheckpointError.
///
/// What is valid is decided by the Python package, and not by the description of the format where that is stricter:
/// white space may come first, __metadata__ may be null, of several tensors with one name the last one counts, other
/// fields are allowed, an entry may be a list of dtype, shape and data_offsets, and a dtype an object, {"F32": null}.
class SafetensorsEntryReader final : public nlohmann::json_sax<nlohmann::json> {
 public:
  /// `path` is the name of the file for errors.
  explicit SafetensorsEntryReader(const std::filesystem::path& path) : path_(path) {}

  std::map<std::string, SafetensorsEntry> entries;
  std::map<std::string, std::string> metadata;

  /// `text` is the whole header, an object.
  void read(std::string_view text) {
    check_no_zero_byte(path_, text);
    nlohmann::json::sax_parse(text, this);
  }

  bool null() override { return see("null", "null"); }
  bool boolean(bool value) override { return see("boolean", value ? "true" : "false"); }
  bool number_integer(number_integer_t value) override { return see("number", std::to_string(value)); }
  bool number_float(number_float_t, const std::string& written) override { return see("number", written); }
  bool number_unsigned(number_unsigned_t value) override {
    if (depth_ != 3 || !is_list_of_numbers(field_)) return see("number", std::to_string(value));
    (field_ == kShape ? entry_.shape : entry_.data_offsets).push_back(value);
    return true;
  }
  bool string(std::string& value) override {
    see("string", value);
    if (depth_ == 2 && is_metadata_) metadata[key_] = value;
    if (depth_ == 2 && !is_metadata_ && field_ == kType) entry_.dtype = value;
    return true;
  }
  bool binary(binary_t&) override { return true; }  // JSON has none

  bool start_object(size_t) override { return start("object"); }
  bool start_array(size_t) override { return start("array"); }
  bool end_object() override { return end(); }
  bool end_array() override { return end(); }

  bool key(std::string& key) override {
    if (depth_ == 1) {
      name_ = key;
      is_metadata_ = key == "__metadata__";
      check(!is_metadata_ || !std::exchange(has_metadata_, true), "__metadata__ appears twice");
    } else if (depth_ == 2) {
      key_ = key;
      field_ = static_cast<size_t>(std::find(kFields.begin(), kFields.end(), key) - kFields.begin());
      if (!is_metadata_ && field_ != kOther) check_entry(!has_[field_], ": the key \"", key, "\" appears twice");
      has_[field_] = true;
    } else if (depth_ == 3 && field_ == kType) {
      check_entry(!has_wrapped_type_ || key != entry_.dtype, ": the key \"", key, "\" appears twice");
      check_entry(!std::exchange(has_wrapped_type_, true), ": dtype has to be a string, but is object");
      entry_.dtype = key;
    }
    return true;
  }

  bool parse_error(size_t, const std::string&, const nlohmann::json::exception& error) override {
    throw_not_json(path_, error);
  }

 private:
  static constexpr int kMaxDepth = 127;
  static constexpr std::array<std::string_view, 3> kFields = {"dtype", "shape", "data_offsets"};
  static constexpr size_t kType = 0, kShape = 1, kOffsets = 2, kOther = kFields.size();

  static bool is_list_of_numbers(size_t field) { return field == kShape || field == kOffsets; }

  template <typename... Reason>
  void check(bool holds, const Reason&... reason) const {
    if (!holds) throw CheckpointError(path_, reason...);
  }
  template <typename... Reason>
  void check_entry(bool holds, const Reason&... reason) const {
    if (!holds) throw CheckpointError(path_, "tensor \"", name_, "\"", reason...);
  }

  /// A value that begins, and how an error shows it. Refuses it where something else has to be.
  bool see(std::string_view type, std::string_view shown) {
    if (depth_ == 2 && is_list_) field_ = std::min(items_++, kOther);
    if (is_metadata_) {
      check(depth_ != 1 || type == "object" || type == "null", "__metadata__ has to be an object, but is ", type);
      check(depth_ != 2 || type == "string", "__metadata__ has to hold strings, but \"", key_, "\" is ", type);
    } else if (depth_ == 1) {
      check_entry(type == "object" || type == "array", " has to be an object, but is ", type);
    } else if (depth_ <= 3 && field_ == kType) {
      const bool is_type = depth_ == 2 ? type == "string" || type == "object" : type == "null";
      check_entry(is_type, ": dtype has to be a string, but is ", depth_ == 2 ? type : "object");
    } else if (depth_ <= 3 && is_list_of_numbers(field_)) {
      check_entry(depth_ == 2 && type == "array", ": ", kFields[field_],
                  " has to be a list of numbers from 0 to 2^64 - 1, but ", depth_ == 2 ? "is " : "holds ",
                  shown.substr(0, 80));
    }
    return true;
  }

  bool start(std::string_view type) {
    check(depth_ < kMaxDepth, "JSON nested more than ", kMaxDepth, " deep");
    if (depth_ > 0) see(type, type);
    if (depth_ == 1) {
      is_list_ = type == "array";
      items_ = 0;
      field_ = kOther;
      has_ = {};
      has_wrapped_type_ = false;
      entry_ = {};
    }
    ++depth_;
    return true;
  }

  bool end() {
    --depth_;
    if (depth_ == 1 && !is_metadata_) take_entry();
    return true;
  }

  void take_entry() {
    check_entry(!is_list_ || items_ == kFields.size(), " has to be a list of ", kFields.size(), ", but is one of ",
                items_);
    for (size_t field = 0; field < kFields.size(); ++field)
      check_entry(is_list_ || has_[field], " has no ", kFields[field]);
    const auto offsets = entry_.data_offsets.size();
    check_entry(offsets == 2, ": data_offsets has to hold 2 numbers, but holds ", offsets);
    const auto is_it = [&](const auto& type) { return entry_.dtype == type.name; };
    const auto& others = kSafetensorsOtherTypes;
    const bool is_known = std::any_of(kSafetensorsTypes.begin(), kSafetensorsTypes.end(), is_it) ||
                          std::find(others.begin(), others.end(), entry_.dtype) != others.end();
    if (!is_known) check_entry(false, " has the unknown dtype ", nlohmann::json(entry_.dtype).dump());
    entries.insert_or_assign(name_, std::move(entry_));
  }

  const std::filesystem::path& path_;
  int depth_ = 0;  // how many objects and lists are open: 1 beside names, 2 beside fields, 3 inside of a field
  bool has_metadata_ = false;
  // The name that was seen last, what its value is, and where in it the parser is:
  std::string name_;
  bool is_metadata_ = false;
  bool is_list_ = false;
  size_t items_ = 0;  // of a list, so far
  std::string key_;
  size_t field_ = kOther;
  std::array<bool, kOther + 1> has_ = {};
  bool has_wrapped_type_ = false;
  SafetensorsEntry entry_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
