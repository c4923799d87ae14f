#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <sys/stat.h>

#include <lora/files/folder_lock.hpp>
#include <lora/version.hpp>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// A name for something temporary in a folder; no two of this process are the same.
inline std::string temporary_name() {
  static std::atomic<uint64_t> counter{0};
  return ".lora-" + std::to_string(::getpid()) + "-" + std::to_string(counter++) + ".tmp";
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

/// Brings the entries of a folder to the disk. Some file systems cannot sync a folder and say EINVAL.
inline void sync_folder(const Descriptor& folder, const std::filesystem::path& shown) {
  if (::fsync(folder.number()) != 0 && errno != EINVAL)
    throw CheckpointError(shown, "cannot be brought to the disk: ", std::strerror(errno));
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
    if (!committed_) ::unlink(temporary_.c_str());
  }
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  const std::filesystem::path& target() const { return target_; }
  const std::filesystem::path& folder() const { return folder_; }

  /// Writes `bytes`, the first of them at `offset`.
  void write_at(int64_t offset, std::string_view bytes) {
    while (!bytes.empty()) {
      const auto count = ::pwrite(file_.number(), bytes.data(), bytes.size(), offset);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) fail("cannot be written");
      bytes.remove_prefix(static_cast<size_t>(count));
      offset += count;
    }
  }

  /// Brings what was written to the disk; after that only the renaming can still fail.
  void sync() {
    if (::fsync(file_.number()) != 0) fail("cannot be written");
  }

  /// Gives the complete file the name `place`, on the same file system. It is no longer removed at the end.
  void move_to(const std::filesystem::path& place) {
    if (::rename(temporary_.c_str(), place.c_str()) != 0) fail("cannot be replaced");
    committed_ = true;
  }

  void commit() {
    sync();
    const auto folder = open_existing(folder_, O_RDONLY | O_DIRECTORY);
    move_to(target_);
    sync_folder(folder, target_);
  }

 private:
  /// The lock says that the file is being written. A file that was taken for an abandoned one before it had its lock is
  /// given up for another.
  Descriptor create() {
    while (true) {
      temporary_ = folder_ / temporary_name();
      Descriptor file(::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
      if (file.number() < 0 && errno == EEXIST) continue;
      if (file.number() < 0) fail("cannot be created");
      const bool taken = !lock_file(file, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK;
      struct stat status {};
      if (!taken && ::fstat(file.number(), &status) == 0 && status.st_nlink > 0) return file;
    }
  }

  void remove_abandoned() const {
    for (const auto& path : temporary_entries(folder_)) {
      const Descriptor file(::open(path.c_str(), O_WRONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));  // never a folder
      if (file.number() >= 0 && lock_file(file, LOCK_EX | LOCK_NB)) ::unlink(path.c_str());
    }
  }

  [[noreturn]] void fail(const char* what) const { throw CheckpointError(target_, what, ": ", std::strerror(errno)); }

  const std::filesystem::path target_;
  const std::filesystem::path folder_;
  std::filesystem::path temporary_;
  const Descriptor file_;
  bool committed_ = false;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
