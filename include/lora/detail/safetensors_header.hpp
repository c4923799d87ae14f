#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <nlohmann/json.hpp>

#include <lora/detail/json.hpp>

namespace lora {

/// A tensor before its values are there.
struct TensorInfo {
  std::string name;
  at::ScalarType dtype;
  std::vector<int64_t> shape;
};

namespace detail {

/// How the format calls a type of LibTorch. A LibTorch element of F4 holds two values; shapes in a file count values.
struct SafetensorsType {
  const char* name;
  at::ScalarType dtype;
  int64_t values_per_element = 1;
};

/// The types of the format in its own order, in which a writer sorts.
inline constexpr std::array<SafetensorsType, 20> kSafetensorsTypes = {{
    {"BOOL", at::kBool},
    {"F4", at::ScalarType::Float4_e2m1fn_x2, 2},
    {"U8", at::kByte},
    {"I8", at::kChar},
    {"F8_E5M2", at::kFloat8_e5m2},
    {"F8_E4M3", at::kFloat8_e4m3fn},
    {"F8_E8M0", at::kFloat8_e8m0fnu},
    {"F8_E4M3FNUZ", at::kFloat8_e4m3fnuz},
    {"F8_E5M2FNUZ", at::kFloat8_e5m2fnuz},
    {"I16", at::kShort},
    {"U16", at::kUInt16},
    {"F16", at::kHalf},
    {"BF16", at::kBFloat16},
    {"I32", at::kInt},
    {"U32", at::kUInt32},
    {"F32", at::kFloat},
    {"C64", at::kComplexFloat},
    {"F64", at::kDouble},
    {"I64", at::kLong},
    {"U64", at::kUInt64},
}};

/// Types of the format that LibTorch does not have.
inline constexpr std::array<std::string_view, 2> kSafetensorsOtherTypes = {"F6_E2M3", "F6_E3M2"};

/// The entry of kSafetensorsTypes for which `matches` holds, or null.
template <typename Predicate>
const SafetensorsType* find_safetensors_type(Predicate matches) {
  const auto* found = std::find_if(kSafetensorsTypes.begin(), kSafetensorsTypes.end(), matches);
  return found == kSafetensorsTypes.end() ? nullptr : found;
}

/// Where the values of a tensor lie, in bytes from the end of the header.
struct StoredTensor {
  TensorInfo info;
  int64_t begin = 0;
  int64_t end = 0;
};

/// What stands before the values: 8 bytes with the length of a JSON text (little-endian), then that text.
struct SafetensorsHeader {
  std::vector<StoredTensor> tensors;  // as they follow each other in the file
  std::map<std::string, std::string> metadata;
};

inline constexpr int64_t kSafetensorsLengthBytes = 8;
inline constexpr uint64_t kSafetensorsMaxHeader = 100'000'000;

/// The bytes of a tensor; false for a shape that cannot be: neither the number of its values nor its strides may
/// overflow. An empty tensor has strides too, those of one with 1 in the place of each 0.
inline bool count_bytes(const TensorInfo& info, int64_t& bytes) {
  const auto& shape = info.shape;
  uint64_t values = 1;
  for (const auto size : shape) {
    if (size < 0 || __builtin_mul_overflow(values, size, &values)) return false;
  }
  int64_t stride = 1;
  for (size_t i = shape.size(); i > 1; --i) {
    if (__builtin_mul_overflow(stride, std::max<int64_t>(shape[i - 1], 1), &stride)) return false;
  }
  return !__builtin_mul_overflow(values, c10::elementSize(info.dtype), &bytes);
}

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
  static constexpr std::array<const char*, 3> kFields = {"dtype", "shape", "data_offsets"};

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
    const auto& others = kSafetensorsOtherTypes;
    const bool is_known = find_safetensors_type([&](const auto& type) { return name == type.name; }) != nullptr ||
                          std::find(others.begin(), others.end(), name) != others.end();
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

/// Reads the header of one file; every rule of the format that it breaks is a CheckpointError.
class SafetensorsHeaderReader {
 public:
  explicit SafetensorsHeaderReader(const std::filesystem::path& path) : path_(path) {}

  /// `file` is the whole file. Sets `data` to the place where the values start.
  SafetensorsHeader read(std::string_view file, int64_t& data) const {
    const auto length = header_length(file);
    data = kSafetensorsLengthBytes + length;
    const auto text = file.substr(kSafetensorsLengthBytes, static_cast<size_t>(length));
    const auto first = text.find_first_not_of(" \t\r\n");
    check(first != text.npos && text[first] == '{', "the header has to start with '{'");
    SafetensorsEntryReader reader(path_);
    parse_json<nlohmann::json>(path_, text, std::ref(reader));
    SafetensorsHeader header{{}, std::move(reader.metadata)};
    for (const auto& [name, entry] : reader.entries) header.tensors.push_back(stored_tensor(name, entry));
    check_layout(header.tensors, static_cast<int64_t>(file.size()) - data);
    return header;
  }

 private:
  template <typename... Reason>
  void check(bool holds, const Reason&... reason) const {
    if (!holds) throw CheckpointError(path_, reason...);
  }

  int64_t header_length(std::string_view file) const {
    check(file.size() >= kSafetensorsLengthBytes, "is cut short: ", file.size(),
          " bytes, but a safetensors file has at least ", kSafetensorsLengthBytes);
    uint64_t length = 0;
    std::memcpy(&length, file.data(), sizeof(length));
    check(length <= kSafetensorsMaxHeader, "is no safetensors file, or damaged: the header would be ", length,
          " bytes long, and at most ", kSafetensorsMaxHeader, " are allowed");
    check(length <= file.size() - kSafetensorsLengthBytes, "is cut short: the header is ", length,
          " bytes long, but only ", file.size() - kSafetensorsLengthBytes, " bytes follow");
    return static_cast<int64_t>(length);
  }

  /// Checks that offsets, shape and type agree, and turns a shape in values into one in elements.
  StoredTensor stored_tensor(const std::string& name, const SafetensorsEntry& entry) const {
    const auto& [dtype, values, begin, end] = entry;
    const auto* type = find_safetensors_type([&dtype = dtype](const auto& type) { return dtype == type.name; });
    check(type != nullptr, "tensor \"", name, "\" is ", dtype, ", which LibTorch does not have");
    const auto shown = c10::ArrayRef<uint64_t>(values);
    auto elements = values;  // their numbers may fit where those of the values do not
    if (type->values_per_element > 1) {
      const auto per_element = static_cast<uint64_t>(type->values_per_element);
      check(!values.empty() && values.back() % per_element == 0, "tensor \"", name, "\" of ", type->name,
            " needs a last dimension that is a multiple of ", type->values_per_element, ", but has shape ", shown);
      elements.back() /= per_element;
    }
    TensorInfo info{name, type->dtype, {elements.begin(), elements.end()}};
    int64_t bytes = 0;
    check(count_bytes(info, bytes), "tensor \"", name, "\": shape ", shown, " is too large");
    check(end >= begin && end - begin == static_cast<uint64_t>(bytes) && end >> 63 == 0, "tensor \"", name,
          "\": shape ", shown, " of ", type->name, " needs ", bytes, " bytes, but data_offsets are ", begin, " and ",
          end);
    return {std::move(info), static_cast<int64_t>(begin), static_cast<int64_t>(end)};
  }

  /// The tensors have to fill the data without holes and without overlap. Sorts them by their place.
  void check_layout(std::vector<StoredTensor>& tensors, int64_t data_bytes) const {
    std::sort(tensors.begin(), tensors.end(),
              [](const auto& a, const auto& b) { return std::tie(a.begin, a.end) < std::tie(b.begin, b.end); });
    int64_t expected = 0;
    for (const auto& tensor : tensors) {
      check(tensor.begin == expected, "tensor \"", tensor.info.name, "\" starts at byte ", tensor.begin,
            tensor.begin > expected ? ", which leaves a hole after byte " : ", which overlaps with the one up to byte ",
            expected);
      expected = tensor.end;
    }
    check(expected <= data_bytes, "is cut short: the tensors need ", expected, " bytes after the header, but ",
          data_bytes, " are there");
    check(expected == data_bytes, "has ", data_bytes - expected, " bytes after the last tensor");
  }

  const std::filesystem::path& path_;
};

/// Lays the tensors out as the format's own writer does, largest type first, then by name, and gives the bytes of the
/// header. Errors: CheckpointError for a type the format does not have, a name given twice, a name that is not UTF-8.
class SafetensorsHeaderWriter {
 public:
  explicit SafetensorsHeaderWriter(const std::filesystem::path& path) : path_(path) {}

  SafetensorsHeader arrange(std::vector<TensorInfo> tensors, std::map<std::string, std::string> metadata) const {
    // The place in the table is the rank of the type, the larger the earlier.
    std::sort(tensors.begin(), tensors.end(), [this](const auto& a, const auto& b) {
      const auto *type_a = type_of(a), *type_b = type_of(b);
      return std::tie(type_b, a.name) < std::tie(type_a, b.name);
    });
    SafetensorsHeader header{{}, std::move(metadata)};
    int64_t end = 0;
    for (auto& info : tensors) {
      const auto begin = end;
      end += bytes_of(info);
      header.tensors.push_back({std::move(info), begin, end});
    }
    return header;
  }

  std::string text(const SafetensorsHeader& header) const {
    std::string text;
    if (!header.metadata.empty()) text += ",\"__metadata__\":" + dump(header.metadata);
    for (const auto& tensor : header.tensors) text += "," + entry(tensor);
    text = "{" + text.substr(text.empty() ? 0 : 1) + "}";
    text.resize((text.size() + 7) / 8 * 8, ' ');
    const uint64_t length = text.size();
    std::string prefix(kSafetensorsLengthBytes, '\0');
    std::memcpy(prefix.data(), &length, sizeof(length));
    return prefix + text;
  }

 private:
  const SafetensorsType* type_of(const TensorInfo& info) const {
    const auto* type = find_safetensors_type([&](const auto& type) { return type.dtype == info.dtype; });
    if (type == nullptr)
      throw CheckpointError(path_, "tensor \"", info.name, "\" is ", info.dtype, ", which safetensors cannot hold");
    return type;
  }

  int64_t bytes_of(const TensorInfo& info) const {
    int64_t bytes = 0;
    if (!count_bytes(info, bytes))
      throw CheckpointError(path_, "tensor \"", info.name, "\": shape ", c10::IntArrayRef(info.shape), " is too large");
    return bytes;
  }

  std::string entry(const StoredTensor& tensor) const {
    const auto* type = type_of(tensor.info);
    auto shape = tensor.info.shape;
    if (!shape.empty()) shape.back() *= type->values_per_element;
    return dump(tensor.info.name) + ":{\"dtype\":\"" + type->name + "\",\"shape\":" + dump(shape) +
           ",\"data_offsets\":" + dump(std::array<int64_t, 2>{tensor.begin, tensor.end}) + "}";
  }

  template <typename Value>
  std::string dump(const Value& value) const {
    try {
      return nlohmann::json(value).dump();
    } catch (const nlohmann::json::type_error&) {
      throw CheckpointError(path_, "names and metadata have to be valid UTF-8");
    }
  }

  const std::filesystem::path& path_;
};

}  // namespace detail
}  // namespace lora
