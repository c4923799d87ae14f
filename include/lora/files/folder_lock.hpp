#pragma once

#include <cerrno>
#include <filesystem>

#include <fcntl.h>
#include <sys/file.h>

#include <lora/files/descriptor.hpp>
#include <lora/version.hpp>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Takes the lock of an open file, which ends when the file is closed, also by the end of the process. `how` is
/// LOCK_SH or LOCK_EX, and LOCK_NB for not to wait. False, with errno, when there is none to be had.
inline bool lock_file(const Descriptor& file, int how) {
  int result = 0;
  do {
    result = ::flock(file.number(), how);
  } while (result != 0 && errno == EINTR);
  return result == 0;
}

/// Keeps two files of a folder together: whoever replaces both holds the folder for himself (LOCK_EX), and whoever
/// reads both holds it together with other readers (LOCK_SH), until the end of this object. Other threads and processes
/// wait.
///
/// Where the folder cannot be opened, or its file system has no locks, `held()` is false, and everybody goes ahead.
class FolderLock {
 public:
  FolderLock(const std::filesystem::path& folder, int how)
      : folder_(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)),
        held_(folder_.number() >= 0 && lock_file(folder_, how)) {}

  bool held() const { return held_; }

 private:
  const Descriptor folder_;
  const bool held_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
