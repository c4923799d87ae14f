#pragma once

#include <cstddef>
#include <filesystem>
#include <string_view>

#include <sys/mman.h>
#include <sys/stat.h>

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
  explicit MappedFile(const std::filesystem::path& path) {
    // Without O_NONBLOCK a named pipe would wait for a writer before it could be refused.
    const auto file = open_existing(path, O_RDONLY | O_NONBLOCK);
    struct stat status {};
    if (::fstat(file.number(), &status) != 0) throw CheckpointError(path, "cannot be read: ", std::strerror(errno));
    if (!S_ISREG(status.st_mode)) throw CheckpointError(path, "is not a regular file");
    size_ = static_cast<size_t>(status.st_size);
    if (size_ > 0) map(path, file.number());  // an empty mapping is an error of its own
  }
  ~MappedFile() {
    if (size_ > 0) ::munmap(data_, size_);
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  char* data() const { return data_; }
  size_t size() const { return size_; }
  std::string_view text() const { return {data_, size_}; }

 private:
  void map(const std::filesystem::path& path, int file) {
    // Without MAP_NORESERVE a private writable mapping counts as memory in use, as large as the file.
    void* address = ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file, 0);
    if (address == MAP_FAILED) throw CheckpointError(path, "cannot be mapped: ", std::strerror(errno));
    data_ = static_cast<char*>(address);
  }

  char* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
