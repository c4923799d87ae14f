#pragma once

#include <lora/files/error.hpp>

#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

namespace gpt {

/// A value in a JSON file that knows its place there, so that every complaint names file, field and value.
/// A missing member reads as null. All errors are lora::CheckpointError.
class JsonField {
 public:
  /// The whole of `file`.
  static JsonField read(const std::filesystem::path& file, nlohmann::json& storage) {
    std::ifstream stream(file, std::ios::binary);
    if (!stream) throw lora::CheckpointError(file, "cannot be opened");
    try {
      storage = nlohmann::json::parse(stream);
    } catch (const nlohmann::json::exception& error) {
      throw lora::CheckpointError(file, "is no JSON: ", error.what());
    }
    return JsonField(file, "", storage);
  }

  JsonField operator[](const std::string& key) const {
    const auto name = name_.empty() ? key : name_ + "." + key;
    if (!value_->is_object()) refuse("an object is needed");
    const auto found = value_->find(key);
    static const nlohmann::json null;
    return JsonField(file_, name, found == value_->end() ? null : *found);
  }

  std::vector<JsonField> elements() const {
    if (!value_->is_array()) refuse("an array is needed");
    std::vector<JsonField> all;
    for (const auto& value : *value_) {
      all.push_back(JsonField(file_, name_ + "[" + std::to_string(all.size()) + "]", value));
    }
    return all;
  }

  std::string text() const {
    if (!value_->is_string()) refuse("a string is needed");
    return value_->get<std::string>();
  }

  bool flag() const {
    if (!value_->is_boolean()) refuse("true or false is needed");
    return value_->get<bool>();
  }
  bool flag_or(bool absent) const { return is_null() ? absent : flag(); }

  /// A token's number: 0 to 2^32 - 1.
  int64_t id() const {
    if (!value_->is_number_unsigned() || value_->get<uint64_t>() > 0xFFFFFFFF) refuse("an id is needed");
    return value_->get<int64_t>();
  }

  bool is_null() const { return value_->is_null(); }
  const nlohmann::json& value() const { return *value_; }

  /// Throws: the value is not what it has to be, because of `reason`.
  [[noreturn]] void refuse(const std::string& reason) const {
    auto text = value_->dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    if (text.size() > 200) text = text.substr(0, 200) + "...";
    throw lora::CheckpointError(file_, name_.empty() ? "the content" : name_, " is ", text, "; ", reason);
  }

 private:
  JsonField(std::filesystem::path file, std::string name, const nlohmann::json& value)
      : file_(std::move(file)), name_(std::move(name)), value_(&value) {}

  std::filesystem::path file_;
  std::string name_;
  const nlohmann::json* value_;
};

}  // namespace gpt
