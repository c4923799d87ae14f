#pragma once

#include <algorithm>
#include <array>
#include <filesystem>
#include <string>
#include <system_error>

#include <lora/files/atomic_file.hpp>
#include <lora/version.hpp>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Brings two files of one folder under their names at one moment, although one renaming is atomic and two are not.
///
/// Both names become links through one and the same link `now`, which leads to the former files:
///
///   a -> .lora-1-2.tmp/now/a      .lora-1-2.tmp/now -> old      .lora-1-2.tmp/old/{a,b}: the former files
///   b -> .lora-1-2.tmp/now/b                                    .lora-1-2.tmp/new/{a,b}: the new ones
///
/// Then `now` is turned to `new`: this renaming is the moment. After it the new files take the places of the links, and
/// the folder is plain again. A process that is killed anywhere in between leaves one of the two pairs, under the names
/// and readable by everybody; the next save clears up. Two that write the same pair wait for each other.
///
/// On a file system without symbolic links the two are renamed one after the other.
class AtomicPair {
 public:
  /// The files are complete and brought to the disk. What is missing under the names is missing in the former pair.
  AtomicPair(AtomicFile& first, AtomicFile& second)
      : files_{&first, &second},
        folder_(first.folder()),
        lock_(folder_, Lock::kExclusive),
        opened_(open_existing(folder_, Access::kFolder)) {
    TORCH_INTERNAL_ASSERT(first.folder() == second.folder(), "a pair in two folders");
  }

  ~AtomicPair() {
    try {
      remove_abandoned();
    } catch (const std::exception&) {  // what is left is in nobody's way
    }
  }
  AtomicPair(const AtomicPair&) = delete;
  AtomicPair& operator=(const AtomicPair&) = delete;

  /// Errors: CheckpointError with the reason; the former files are under their names then, unless the new ones were
  /// already.
  void commit() {
    create_place();
    const bool has_links = link_to("old", place_ / "now");
    if (has_links) {
      for (const auto* file : files_) keep_former(*file);
    }
    for (auto* file : files_) file->move_to(in("new", *file));
    if (has_links) turn();
    for (const auto* file : files_) rename(in("new", *file), *file);
    sync_folder(opened_, folder_);
  }

 private:
  void create_place() {
    do {
      place_ = folder_ / temporary_name();
    } while (!is_new_folder(place_));
    for (const auto* part : {"old", "new"}) is_new_folder(place_ / part);
  }

  /// False where there is one already: numbers of processes come again.
  bool is_new_folder(const std::filesystem::path& path) const {
    if (make_folder(path)) return true;
    if (last_error() != std::errc::file_exists) fail(*files_[0]);
    return false;
  }

  /// False where the file system has no symbolic links.
  bool link_to(const std::filesystem::path& text, const std::filesystem::path& link) const {
    if (make_link(text, link)) return true;
    if (!has_no_links(last_error())) fail(*files_[0]);
    return false;
  }

  std::filesystem::path in(const char* part, const AtomicFile& file) const {
    return place_ / part / file.target().filename();
  }

  /// A hard link costs nothing. Some file systems have none, and files of other users cannot have one.
  void keep_former(const AtomicFile& file) const {
    const auto former = in("old", file);
    if (make_hard_link(file.target(), former) || is_missing(last_error())) return;
    std::error_code error;
    std::filesystem::copy_file(file.target(), former, error);
    if (is_missing(error)) return;
    if (error) throw CheckpointError(file.target(), "cannot be replaced: ", error.message());
    sync(former);
  }

  void turn() {
    try {
      for (const auto* file : files_) link(*file);
      for (const auto* part : {"old", "new", "."}) sync(place_ / part);
      sync_folder(opened_, folder_);
      link_to("new", place_ / "next");
      rename(place_ / "next", place_ / "now", *files_[0]);
    } catch (...) {
      for (const auto* file : files_) restore(*file);
      throw;
    }
    sync(place_);
  }

  void link(const AtomicFile& file) const {
    const auto temporary = place_ / "link";
    link_to(place_.filename() / "now" / file.target().filename(), temporary);
    rename(temporary, file);
  }

  void restore(const AtomicFile& file) const {
    if (!is_linked(file.target(), place_)) return;
    if (!replace_file(in("old", file), file.target()) && is_missing(last_error())) remove_file(file.target());
  }

  static bool is_missing(const std::error_code& error) { return error == std::errc::no_such_file_or_directory; }

  /// Whether a name leads through a place.
  static bool is_linked(const std::filesystem::path& name, const std::filesystem::path& place) {
    std::error_code error;
    const auto text = std::filesystem::read_symlink(name, error);
    return !error && *text.begin() == place.filename();
  }

  bool is_in_use(const std::filesystem::path& place) const {
    const std::filesystem::directory_iterator entries(folder_);
    return std::any_of(begin(entries), end(entries), [&](const auto& entry) { return is_linked(entry, place); });
  }

  /// What killed processes left behind; while the lock is held there is nobody else at work.
  void remove_abandoned() const {
    for (const auto& path : temporary_entries(folder_)) {
      const bool is_folder = std::filesystem::is_directory(std::filesystem::symlink_status(path));
      if (is_folder && (lock_.held() || path == place_) && !is_in_use(path)) remove_folder(path);
    }
  }

  void sync(const std::filesystem::path& path) const { sync_folder(open_existing(path, Access::kRead), folder_); }

  static void rename(const std::filesystem::path& from, const AtomicFile& file) { rename(from, file.target(), file); }

  static void rename(const std::filesystem::path& from, const std::filesystem::path& to, const AtomicFile& file) {
    if (!replace_file(from, to)) fail(file);
  }

  [[noreturn]] static void fail(const AtomicFile& file) {
    throw CheckpointError(file.target(), "cannot be replaced: ", last_error().message());
  }

  const std::array<AtomicFile*, 2> files_;
  const std::filesystem::path folder_;
  const FolderLock lock_;
  const Descriptor opened_;
  std::filesystem::path place_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
