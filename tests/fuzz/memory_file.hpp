// What the fuzzers share.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <string>

#include <sys/mman.h>
#include <unistd.h>

namespace fuzz {

/// A file in memory with a path, for readers that want one.
class MemoryFile {
 public:
  MemoryFile(const void* bytes, size_t size) : number_(::memfd_create("fuzz", MFD_CLOEXEC)) {
    if (number_ < 0 || ::write(number_, bytes, size) != static_cast<ssize_t>(size)) std::abort();
  }
  explicit MemoryFile(const std::string& text) : MemoryFile(text.data(), text.size()) {}
  ~MemoryFile() { ::close(number_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;

  std::filesystem::path path() const { return "/proc/self/fd/" + std::to_string(number_); }

 private:
  const int number_;
};

/// Ends the process, which the fuzzer reports together with the input, when something does not hold.
inline void require(bool holds, const char* what) {
  if (holds) return;
  std::cerr << "does not hold: " << what << std::endl;
  std::abort();
}

}  // namespace fuzz
