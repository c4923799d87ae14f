#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <tuple>
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

/// The types of the format in its own order, in which a writer sorts; F6_E2M3 and F6_E3M2 are not in LibTorch.
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

/// The bytes of a tensor; false when they cannot be counted in 63 bits. An empty dimension counts as one here, because
/// the strides of the others have to be countable too.
inline bool count_bytes(const TensorInfo& info, int64_t& bytes) {
  int64_t with_empty = static_cast<int64_t>(c10::elementSize(info.dtype));
  bool empty = false;
  for (const auto size : info.shape) {
    empty = empty || size == 0;
    if (size < 0 || __builtin_mul_overflow(with_empty, std::max<int64_t>(size, 1), &with_empty)) return false;
  }
  bytes = empty ? 0 : with_empty;
  return true;
}

/// Reads the header of one file; every rule of the format that it breaks is a CheckpointError.
class SafetensorsHeaderReader {
 public:
  explicit SafetensorsHeaderReader(const std::filesystem::path& path) : path_(path) {}

  /// `file` is the whole file. Sets `data` to the place where the values start.
  SafetensorsHeader read(std::string_view file, int64_t& data) const {
    const auto length = header_length(file);
    data = kSafetensorsLengthBytes + length;
    const auto text = file.substr(kSafetensorsLengthBytes, static_cast<size_t>(length));
    check(!text.empty() && text.front() == '{', "the header has to start with '{'");
    auto header = read_entries(parse_json(path_, text));
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

  SafetensorsHeader read_entries(const nlohmann::json& json) const {
    SafetensorsHeader header;
    for (const auto& [name, entry] : json.items()) {
      if (name == "__metadata__") {
        header.metadata = read_metadata(entry);
      } else {
        header.tensors.push_back(read_tensor(name, entry));
      }
    }
    return header;
  }

  std::map<std::string, std::string> read_metadata(const nlohmann::json& entry) const {
    check(entry.is_object(), "__metadata__ has to be an object, but is ", entry.type_name());
    std::map<std::string, std::string> metadata;
    for (const auto& [key, value] : entry.items()) {
      check(value.is_string(), "__metadata__ has to hold strings, but \"", key, "\" is ", value.type_name());
      metadata[key] = value.get<std::string>();
    }
    return metadata;
  }

  StoredTensor read_tensor(const std::string& name, const nlohmann::json& entry) const {
    check(entry.is_object(), "tensor \"", name, "\" has to be an object, but is ", entry.type_name());
    for (const auto* key : {"dtype", "shape", "data_offsets"})
      check(entry.contains(key), "tensor \"", name, "\" has no ", key);
    const auto offsets = numbers(name, "data_offsets", entry["data_offsets"]);
    check(offsets.size() == 2, "tensor \"", name, "\": data_offsets has to hold 2 numbers, but holds ", offsets.size());

    const auto& type = read_type(name, entry["dtype"]);
    StoredTensor tensor{{name, type.dtype, numbers(name, "shape", entry["shape"])}, offsets[0], offsets[1]};
    check_size(tensor, type);
    return tensor;
  }

  const SafetensorsType& read_type(const std::string& name, const nlohmann::json& dtype) const {
    check(dtype.is_string(), "tensor \"", name, "\": dtype has to be a string, but is ", dtype.type_name());
    const auto* type = find_safetensors_type([&](const auto& type) { return dtype == type.name; });
    check(type != nullptr, "tensor \"", name, "\" has the unknown dtype ", dtype.dump());
    return *type;
  }

  std::vector<int64_t> numbers(const std::string& name, const char* key, const nlohmann::json& list) const {
    const auto is_number = [](const auto& n) {
      return n.is_number_unsigned() && n.template get<uint64_t>() >> 63 == 0;
    };
    if (!list.is_array() || !std::all_of(list.begin(), list.end(), is_number))
      throw CheckpointError(path_, "tensor \"", name, "\": ", key,
                            " has to be a list of numbers from 0 to 2^63 - 1, but is ", list.dump().substr(0, 80));
    return list.get<std::vector<int64_t>>();
  }

  /// Checks that offsets, shape and type agree, and turns a shape in values into one in elements.
  void check_size(StoredTensor& tensor, const SafetensorsType& type) const {
    auto& [name, dtype, shape] = tensor.info;
    const auto stored_shape = shape;
    if (type.values_per_element > 1) {
      check(!shape.empty() && shape.back() % type.values_per_element == 0, "tensor \"", name, "\" of ", type.name,
            " needs a last dimension that is a multiple of ", type.values_per_element, ", but has shape ",
            c10::IntArrayRef(shape));
      shape.back() /= type.values_per_element;
    }
    int64_t bytes = 0;
    check(count_bytes(tensor.info, bytes), "tensor \"", name, "\": shape ", c10::IntArrayRef(stored_shape),
          " is too large");
    check(tensor.end >= tensor.begin && tensor.end - tensor.begin == bytes, "tensor \"", name, "\": shape ",
          c10::IntArrayRef(stored_shape), " of ", type.name, " needs ", bytes, " bytes, but data_offsets are ",
          tensor.begin, " and ", tensor.end);
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
