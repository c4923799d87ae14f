#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <lora/files/folder_lock.hpp>
#include <lora/version.hpp>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// A name for something temporary in a folder; no two of this process are the same.
inline std::string temporary_name() {
  static std::atomic<uint64_t> counter{0};
  return ".lora-" + std::to_string(process_id()) + "-" + std::to_string(counter++) + ".tmp";
}

/// The entries of a folder whose names are those of `temporary_name`.
inline std::vector<std::filesystem::path> temporary_entries(const std::filesystem::path& folder) {
  std::vector<std::filesystem::path> entries;
  std::error_code error;  // a folder that cannot be read has nothing to clean up
  for (std::filesystem::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    const auto name = entry->path().filename().string();
    if (name.rfind(".lora-", 0) == 0 && entry->path().extension() == ".tmp") entries.push_back(entry->path());
  }
  return entries;
}

/// Brings the entries of a folder to the disk, where its file system can.
inline void sync_folder(const Descriptor& folder, const std::filesystem::path& shown) {
  if (!sync_folder(folder.file()))
    throw CheckpointError(shown, "cannot be brought to the disk: ", last_error().message());
}

/// A file that appears under its name only when it is complete.
///
/// What is written goes to a temporary file in the same folder; commit() brings it to the disk and renames it over the
/// target. Whatever happens before, the target keeps what it had, and the temporary file is removed. One that a killed
/// process left behind is removed by the next that writes a file into the folder.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path target)
      : target_(std::move(target)), folder_(target_.has_parent_path() ? target_.parent_path() : "."), file_(create()) {
    remove_abandoned();
  }
  ~AtomicFile() {
    if (!committed_) remove_file(temporary_);
  }
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  const std::filesystem::path& target() const { return target_; }
  const std::filesystem::path& folder() const { return folder_; }

  /// Writes `bytes`, the first of them at `offset`.
  void write_at(int64_t offset, std::string_view bytes) {
    if (!write_file(file_.file(), offset, bytes)) fail("cannot be written");
  }

  /// Brings what was written to the disk; after that only the renaming can still fail.
  void sync() {
    if (!sync_file(file_.file())) fail("cannot be written");
  }

  /// Gives the complete file the name `place`, on the same file system. It is no longer removed at the end.
  void move_to(const std::filesystem::path& place) {
    if (!replace_file(temporary_, place)) fail("cannot be replaced");
    committed_ = true;
  }

  void commit() {
    sync();
    const auto folder = open_existing(folder_, Access::kFolder);
    move_to(target_);
    sync_folder(folder, target_);
  }

 private:
  /// The lock says that the file is being written. A file that was taken for an abandoned one before it had its lock is
  /// given up for another.
  Descriptor create() {
    while (true) {
      temporary_ = folder_ / temporary_name();
      Descriptor file(open_file(temporary_, Access::kCreate));
      if (!file.is_open() && last_error() == std::errc::file_exists) continue;
      if (!file.is_open()) fail("cannot be created");
      const bool taken = !lock_file(file.file(), Lock::kExclusive, /*waits=*/false) && is_locked_by_other(last_error());
      FileStatus status;
      if (!taken && read_status(file.file(), status) && status.names > 0) return file;
    }
  }

  void remove_abandoned() const {
    for (const auto& path : temporary_entries(folder_)) {
      const Descriptor file(open_file(path, Access::kLock));  // never a folder
      if (file.is_open() && lock_file(file.file(), Lock::kExclusive, /*waits=*/false)) remove_file(path);
    }
  }

  [[noreturn]] void fail(const char* what) const { throw CheckpointError(target_, what, ": ", last_error().message()); }

  const std::filesystem::path target_;
  const std::filesystem::path folder_;
  std::filesystem::path temporary_;
  const Descriptor file_;
  bool committed_ = false;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
