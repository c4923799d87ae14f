#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>

#include <lora/detail/descriptor.hpp>

namespace lora::detail {

/// A file that appears under its name only when it is complete.
///
/// What is written goes to a temporary file in the same folder; commit() brings it to the disk and renames it over the
/// target. Whatever happens before, the target keeps what it had, and the temporary file is removed.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path target)
      : target_(std::move(target)), folder_(target_.has_parent_path() ? target_.parent_path() : "."), file_(create()) {}
  ~AtomicFile() {
    if (!committed_) ::unlink(temporary_.c_str());
  }
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  const std::filesystem::path& target() const { return target_; }

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

  void commit() {
    sync();
    const auto folder = open_existing(folder_, O_RDONLY | O_DIRECTORY);
    if (::rename(temporary_.c_str(), target_.c_str()) != 0) fail("cannot be replaced");
    committed_ = true;
    // Some file systems cannot sync a folder and say EINVAL; the file itself is safe there too.
    if (::fsync(folder.number()) != 0 && errno != EINVAL) fail("was replaced, but its folder cannot be synced");
  }

 private:
  Descriptor create() {
    static std::atomic<uint64_t> counter{0};
    while (true) {
      temporary_ = folder_ / (".lora-" + std::to_string(::getpid()) + "-" + std::to_string(counter++) + ".tmp");
      Descriptor file(::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
      if (file.number() >= 0) return file;
      if (errno != EEXIST) fail("cannot be created");
    }
  }

  [[noreturn]] void fail(const char* what) const { throw CheckpointError(target_, what, ": ", std::strerror(errno)); }

  const std::filesystem::path target_;
  const std::filesystem::path folder_;
  std::filesystem::path temporary_;
  const Descriptor file_;
  bool committed_ = false;
};

}  // namespace lora::detail
