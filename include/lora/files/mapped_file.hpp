#pragma once

#include <cstddef>
#include <filesystem>
#include <string_view>

#include <lora/files/descriptor.hpp>
#include <lora/version.hpp>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The content of a file as memory that is read from the disk when it is touched.
///
/// Writing to the memory is allowed and never reaches the file: a page that is written to becomes this process's own.
/// A file that is replaced (renamed over) while it is mapped keeps its old content here; one that another program
/// cuts short ends the process with SIGBUS when the missing part is touched, as with every mapping.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path) : MappedFile(path, open_existing(path, Access::kRead)) {}
  /// `file` is open, and `path` its name for errors.
  MappedFile(const std::filesystem::path& path, const Descriptor& file) {
    FileStatus status;
    if (!read_status(file.file(), status)) throw CheckpointError(path, "cannot be read: ", last_error().message());
    if (!status.is_regular) throw CheckpointError(path, "is not a regular file");
    size_ = static_cast<size_t>(status.size);
    if (size_ == 0) return;  // an empty mapping is an error of its own
    data_ = map_file(file.file(), size_);
    if (data_ == nullptr) throw CheckpointError(path, "cannot be mapped: ", last_error().message());
  }
  ~MappedFile() {
    if (data_ != nullptr) unmap_file(data_, size_);
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  char* data() const { return data_; }
  size_t size() const { return size_; }
  std::string_view text() const { return {data_, size_}; }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
