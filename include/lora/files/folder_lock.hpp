#pragma once

#include <filesystem>

#include <lora/files/descriptor.hpp>
#include <lora/version.hpp>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Keeps two files of a folder together: whoever replaces both holds the folder for himself (kExclusive), and whoever
/// reads both holds it together with other readers (kShared), until the end of this object. Other threads and processes
/// wait.
///
/// Where the folder cannot be opened, or folders have no locks, as on some file systems and on Windows, `held()` is
/// false, and everybody goes ahead.
class FolderLock {
 public:
  FolderLock(const std::filesystem::path& folder, Lock kind)
      : folder_(open_file(folder, Access::kFolder)), held_(folder_.is_open() && lock_folder(folder_.file(), kind)) {}

  bool held() const { return held_; }

 private:
  const Descriptor folder_;
  const bool held_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
