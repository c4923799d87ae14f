#pragma once

#include <lora/files/safetensors/entries.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

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
    reader.read(text);
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
    const auto& [dtype, values, offsets] = entry;
    const auto begin = offsets[0], end = offsets[1];
    const auto* type = find_safetensors_type([&dtype = dtype](const auto& other) { return dtype == other.name; });
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
    const auto* type = find_safetensors_type([&](const auto& other) { return other.dtype == info.dtype; });
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
    return dump(tensor.info.name) + ":{\"dtype\":" + dump(type->name) + ",\"shape\":" + dump(shape) +
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
}  // namespace LORA_ABI
}  // namespace lora
