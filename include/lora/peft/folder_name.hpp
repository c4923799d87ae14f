#pragma once

#include <lora/peft/tensors.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

// Names of adapters as names of the folders they lie in. A name may be any text, and a folder's may not.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The number of bytes of the UTF-8 character that `text` begins with; 0 where it begins with none.
inline size_t character_length(std::string_view text) {
  const auto byte = [&](size_t i) -> uint32_t { return i < text.size() ? static_cast<uint8_t>(text[i]) : 0; };
  const auto first = byte(0);
  if (first < 0x80) return text.empty() ? 0 : 1;
  const size_t length = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  uint32_t code = first & (0x7Fu >> length);
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0u) != 0x80) return 0;
    code = code << 6 | (byte(i) & 0x3Fu);
  }
  constexpr uint32_t kLeast[] = {0, 0, 0x80, 0x800, 0x10000};  // a longer spelling of a smaller code is none
  const bool is_surrogate = code >= 0xD800 && code < 0xE000;
  return first < 0xC0 || first > 0xF4 || code < kLeast[length] || code > 0x10FFFF || is_surrogate ? 0 : length;
}

/// The folder of an adapter: its name, with "%" and two hexadecimal digits in place of
///
///   - "%", "/", "\" and what else a file system may refuse: ":", "*", "?", quotes, "<", ">", "|", control characters
///   - bytes that are no UTF-8
///   - a "." that it begins with, so that it is neither hidden nor ".." nor a temporary file, and a "." or a space that
///     it ends with
///   - the first letter, where it is that of a file of an adapter ("adapter_config.json")
///
/// So ordinary names are folders as PEFT has them, and no name leads out of the directory or to another name's folder.
inline std::string folder_name(std::string_view adapter) {
  const bool is_file = adapter == kAdapterConfig || adapter == kAdapterTensors || adapter == kLegacyTensors;
  std::string folder;
  const auto escape = [&](char letter) {
    constexpr char kDigits[] = "0123456789ABCDEF";
    const auto byte = static_cast<uint8_t>(letter);
    folder += {'%', kDigits[byte >> 4], kDigits[byte & 15]};
  };
  for (size_t i = 0; i < adapter.size();) {
    const auto letter = adapter[i];
    const auto length = character_length(adapter.substr(i));
    const bool at_start = i == 0 && (letter == '.' || is_file);
    const bool at_end = i + 1 == adapter.size() && (letter == '.' || letter == ' ');
    const bool is_control = static_cast<uint8_t>(letter) < 0x20 || letter == 0x7F;
    const bool is_special = std::string_view("%/\\:*?\"<>|").find(letter) != std::string_view::npos;
    if (length == 0 || at_start || at_end || is_control || is_special) {
      escape(letter);
      ++i;
    } else {
      folder.append(adapter.substr(i, length));
      i += length;
    }
  }
  return folder;
}

/// The adapter of a folder: what `folder_name` made it of, or, where it made none of that name, the name as it is.
inline std::string adapter_name(const std::string& folder) {
  const auto digit = [](char letter) {
    return letter >= '0' && letter <= '9' ? letter - '0' : letter >= 'A' && letter <= 'F' ? letter - 'A' + 10 : -1;
  };
  std::string name;
  for (size_t i = 0; i < folder.size(); ++i) {
    const bool is_escape =
        folder[i] == '%' && i + 2 < folder.size() && digit(folder[i + 1]) >= 0 && digit(folder[i + 2]) >= 0;
    name += is_escape ? static_cast<char>(digit(folder[i + 1]) * 16 + digit(folder[i + 2])) : folder[i];
    if (is_escape) i += 2;
  }
  return folder_name(name) == folder ? name : folder;
}

/// An adapter below a directory.
struct StoredName {
  std::string name;
  std::filesystem::path directory;
};

/// The adapters below a directory, sorted by name. PEFT makes folders inside of each other of a name with "/".
inline void find_adapters(const std::filesystem::path& directory, const std::string& prefix,
                          std::vector<StoredName>& found) {
  const auto options = std::filesystem::directory_options::skip_permission_denied;
  for (const auto& entry : std::filesystem::directory_iterator(directory, options)) {
    const auto folder = entry.path().filename().string();
    const auto name = prefix + adapter_name(folder);
    std::error_code error;
    if (std::filesystem::exists(entry.path() / kAdapterConfig, error)) found.push_back({name, entry.path()});
    const bool is_folder = entry.is_directory(error) && !entry.is_symlink(error);
    if (is_folder && folder.front() != '.') find_adapters(entry.path(), name + "/", found);
  }
}

inline std::vector<StoredName> find_adapters(const std::filesystem::path& directory) {
  std::vector<StoredName> found;
  try {
    find_adapters(directory, "", found);
  } catch (const std::filesystem::filesystem_error& error) {
    throw CheckpointError(error.path1(), "cannot be read: ", error.code().message());
  }
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  return found;
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
