#pragma once

#include <filesystem>
#include <utility>

#include <lora/files/error.hpp>
#include <lora/system/files.hpp>
#include <lora/version.hpp>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Owns an open file and closes it at the end.
class Descriptor {
 public:
  explicit Descriptor(FileHandle file) : file_(file) {}
  ~Descriptor() {
    if (is_open()) close_file(file_);
  }
  Descriptor(Descriptor&& other) noexcept : file_(std::exchange(other.file_, kNoFile)) {}
  Descriptor& operator=(Descriptor&&) = delete;

  bool is_open() const { return file_ != kNoFile; }
  FileHandle file() const { return file_; }

 private:
  FileHandle file_;
};

/// Opens an existing file; throws CheckpointError with the reason of the operating system.
inline Descriptor open_existing(const std::filesystem::path& path, Access access) {
  Descriptor file(open_file(path, access));
  if (!file.is_open()) throw CheckpointError(path, "cannot be opened: ", last_error().message());
  return file;
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
