#pragma once

#include <lora/version.hpp>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string_view>
#include <system_error>
#include <vector>

#if defined(_WIN32)
#if !defined(WIN32_LEAN_AND_MEAN)
#define WIN32_LEAN_AND_MEAN
#endif
#if !defined(NOMINMAX)
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <cerrno>
#include <cstdio>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

// What files need of the operating system, and nothing else of this library calls it. Functions that return a bool or a
// file say with false or kNoFile that they failed, and last_error() says why, until the next call.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

#if defined(_WIN32)
using FileHandle = HANDLE;
inline const FileHandle kNoFile = INVALID_HANDLE_VALUE;
#else
using FileHandle = int;
inline constexpr FileHandle kNoFile = -1;
#endif

enum class Access : uint8_t {
  kRead,    ///< an existing file or folder
  kFolder,  ///< an existing folder
  kCreate,  ///< to write a file that is not there yet
  kLock     ///< an existing file, for its lock; neither a folder nor what a link leads to
};

enum class Lock : uint8_t { kShared, kExclusive };

struct FileStatus {
  bool is_regular = false;
  uint64_t size = 0;
  uint64_t names = 0;  ///< hard links; 0 for a file that was removed
};

#if defined(_WIN32)

inline std::error_code last_error() { return {static_cast<int>(::GetLastError()), std::system_category()}; }

inline int64_t process_id() { return static_cast<int64_t>(::GetCurrentProcessId()); }

/// Others may rename and remove an open file, as elsewhere.
inline FileHandle open_file(const std::filesystem::path& path, Access access) {
  const bool creates = access == Access::kCreate, writes = creates || access == Access::kLock;
  const DWORD flags = access == Access::kLock     ? FILE_FLAG_OPEN_REPARSE_POINT
                      : access == Access::kCreate ? FILE_ATTRIBUTE_NORMAL
                                                  : FILE_FLAG_BACKUP_SEMANTICS;  // without it no folder
  return ::CreateFileW(path.c_str(), writes ? GENERIC_READ | GENERIC_WRITE : GENERIC_READ,
                       FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE, nullptr,
                       creates ? CREATE_NEW : OPEN_EXISTING, flags, nullptr);
}

inline void close_file(FileHandle file) { ::CloseHandle(file); }

inline bool read_status(FileHandle file, FileStatus& status) {
  BY_HANDLE_FILE_INFORMATION found;
  if (::GetFileInformationByHandle(file, &found) == 0) return false;
  status.is_regular = ::GetFileType(file) == FILE_TYPE_DISK && (found.dwFileAttributes & FILE_ATTRIBUTE_DIRECTORY) == 0;
  status.size = (static_cast<uint64_t>(found.nFileSizeHigh) << 32U) | found.nFileSizeLow;
  status.names = found.nNumberOfLinks;
  return true;
}

/// Exactly so many bytes from `offset` on; false, too, where the file ends before.
inline bool read_file(FileHandle file, int64_t offset, char* bytes, size_t size) {
  constexpr size_t kMost = size_t{1} << 30U;
  while (size > 0) {
    OVERLAPPED place{};
    place.Offset = static_cast<DWORD>(static_cast<uint64_t>(offset) & 0xffffffffU);
    place.OffsetHigh = static_cast<DWORD>(static_cast<uint64_t>(offset) >> 32U);
    DWORD count = 0;
    const auto length = static_cast<DWORD>(size < kMost ? size : kMost);
    if (::ReadFile(file, bytes, length, &count, &place) == 0) return false;  // also at the end of the file
    bytes += count;
    size -= count;
    offset += static_cast<int64_t>(count);
  }
  return true;
}

inline bool write_file(FileHandle file, int64_t offset, std::string_view bytes) {
  constexpr size_t kMost = size_t{1} << 30U;
  while (!bytes.empty()) {
    OVERLAPPED place{};
    place.Offset = static_cast<DWORD>(static_cast<uint64_t>(offset) & 0xffffffffU);
    place.OffsetHigh = static_cast<DWORD>(static_cast<uint64_t>(offset) >> 32U);
    DWORD count = 0;
    const auto length = static_cast<DWORD>(bytes.size() < kMost ? bytes.size() : kMost);
    if (::WriteFile(file, bytes.data(), length, &count, &place) == 0) return false;
    bytes.remove_prefix(count);
    offset += static_cast<int64_t>(count);
  }
  return true;
}

inline bool sync_file(FileHandle file) { return ::FlushFileBuffers(file) != 0; }

/// The file system keeps its folders in a journal.
inline bool sync_folder(FileHandle /*folder*/) { return true; }

/// The lock of a byte that no file has: locks keep others from reading and writing here.
inline bool lock_file(FileHandle file, Lock kind, bool waits) {
  OVERLAPPED place{};
  place.OffsetHigh = 0x7fffffff;
  const DWORD flags = (kind == Lock::kExclusive ? LOCKFILE_EXCLUSIVE_LOCK : 0U) |
                      (waits ? 0U : static_cast<DWORD>(LOCKFILE_FAIL_IMMEDIATELY));
  return ::LockFileEx(file, flags, 0, 1, 0, &place) != 0;
}

/// Whether lock_file failed because somebody else has the lock.
inline bool is_locked_by_other(const std::error_code& error) { return error.value() == ERROR_LOCK_VIOLATION; }

/// A folder has no lock.
inline bool lock_folder(FileHandle /*folder*/, Lock /*kind*/) { return false; }

inline bool remove_file(const std::filesystem::path& path) { return ::DeleteFileW(path.c_str()) != 0; }

inline bool replace_file(const std::filesystem::path& from, const std::filesystem::path& to) {
  return ::MoveFileExW(from.c_str(), to.c_str(), MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH) != 0;
}

inline bool make_folder(const std::filesystem::path& path) { return ::CreateDirectoryW(path.c_str(), nullptr) != 0; }

/// Symbolic links take a privilege that few have, so there are none.
inline bool make_link(const std::filesystem::path& /*text*/, const std::filesystem::path& /*link*/) {
  ::SetLastError(ERROR_NOT_SUPPORTED);
  return false;
}

inline bool has_no_links(const std::error_code& error) { return error.value() == ERROR_NOT_SUPPORTED; }

inline bool make_hard_link(const std::filesystem::path& from, const std::filesystem::path& to) {
  return ::CreateHardLinkW(to.c_str(), from.c_str(), nullptr) != 0;
}

/// The content of a file, whose size is not 0; what is written to it stays in this process. nullptr when it fails.
inline char* map_file(FileHandle file, size_t /*size*/) {
  const HANDLE mapping = ::CreateFileMappingW(file, nullptr, PAGE_WRITECOPY, 0, 0, nullptr);
  if (mapping == nullptr) return nullptr;
  void* address = ::MapViewOfFile(mapping, FILE_MAP_COPY, 0, 0, 0);
  const auto error = ::GetLastError();
  ::CloseHandle(mapping);  // the view keeps it
  ::SetLastError(error);
  return static_cast<char*>(address);
}

inline void unmap_file(char* address, size_t /*size*/) { ::UnmapViewOfFile(address); }

#else  // POSIX

inline std::error_code last_error() { return {errno, std::generic_category()}; }

inline int64_t process_id() { return ::getpid(); }

inline FileHandle open_file(const std::filesystem::path& path, Access access) {
  // Without O_NONBLOCK a named pipe would wait for somebody at its other end.
  switch (access) {
    case Access::kRead:
      return ::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    case Access::kFolder:
      return ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    case Access::kCreate:
      return ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    default:
      return ::open(path.c_str(), O_WRONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
  }
}

inline void close_file(FileHandle file) { ::close(file); }

inline bool read_status(FileHandle file, FileStatus& status) {
  struct stat found {};
  if (::fstat(file, &found) != 0) return false;
  status.is_regular = S_ISREG(found.st_mode);
  status.size = static_cast<uint64_t>(found.st_size);
  status.names = static_cast<uint64_t>(found.st_nlink);
  return true;
}

/// Exactly so many bytes from `offset` on; false, too, where the file ends before.
inline bool read_file(FileHandle file, int64_t offset, char* bytes, size_t size) {
  while (size > 0) {
    const auto count = ::pread(file, bytes, size, static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count == 0) errno = EIO;
    if (count <= 0) return false;
    bytes += count;
    size -= static_cast<size_t>(count);
    offset += count;
  }
  return true;
}

inline bool write_file(FileHandle file, int64_t offset, std::string_view bytes) {
  while (!bytes.empty()) {
    const auto count = ::pwrite(file, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return false;
    bytes.remove_prefix(static_cast<size_t>(count));
    offset += count;
  }
  return true;
}

/// Brings what was written to the disk. On macOS fsync brings it only to the disk's own memory.
inline bool sync_file(FileHandle file) {
#if defined(F_FULLFSYNC)
  if (::fcntl(file, F_FULLFSYNC) == 0) return true;  // not every file system has it
#endif
  return ::fsync(file) == 0;
}

/// Brings the entries of a folder to the disk. Some file systems cannot, and say EINVAL.
inline bool sync_folder(FileHandle folder) { return sync_file(folder) || errno == EINVAL; }

/// Takes the lock of an open file, which ends when the file is closed, also by the end of the process.
inline bool lock_file(FileHandle file, Lock kind, bool waits) {
  int result = 0;
  do {
    result = ::flock(file, (kind == Lock::kShared ? LOCK_SH : LOCK_EX) | (waits ? 0 : LOCK_NB));
  } while (result != 0 && errno == EINTR);
  return result == 0;
}

/// Whether lock_file failed because somebody else has the lock.
inline bool is_locked_by_other(const std::error_code& error) { return error.value() == EWOULDBLOCK; }

/// The same of a folder, waiting for it.
inline bool lock_folder(FileHandle folder, Lock kind) { return lock_file(folder, kind, /*waits=*/true); }

inline bool remove_file(const std::filesystem::path& path) { return ::unlink(path.c_str()) == 0; }

/// Gives a file the name `to`, in place of what has it, at one moment.
inline bool replace_file(const std::filesystem::path& from, const std::filesystem::path& to) {
  return std::rename(from.c_str(), to.c_str()) == 0;
}

inline bool make_folder(const std::filesystem::path& path) { return ::mkdir(path.c_str(), 0777) == 0; }

inline bool make_link(const std::filesystem::path& text, const std::filesystem::path& link) {
  return ::symlink(text.c_str(), link.c_str()) == 0;
}

/// Whether make_link failed because the file system has no symbolic links. macOS tells two of these numbers apart.
inline bool has_no_links(const std::error_code& error) {
  const int value = error.value();
  return value == EPERM || value == EOPNOTSUPP || value == ENOTSUP || value == ENOSYS;
}

/// Of a symbolic link, to what it leads to.
inline bool make_hard_link(const std::filesystem::path& from, const std::filesystem::path& to) {
  return ::linkat(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), AT_SYMLINK_FOLLOW) == 0;
}

/// The content of a file, whose size is not 0; what is written to it stays in this process. nullptr when it fails.
inline char* map_file(FileHandle file, size_t size) {
#if defined(MAP_NORESERVE)  // without it a private writable mapping counts as memory in use, as large as the file
  constexpr int kFlags = MAP_PRIVATE | MAP_NORESERVE;
#else
  constexpr int kFlags = MAP_PRIVATE;
#endif
  void* address = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, kFlags, file, 0);
  return address == MAP_FAILED ? nullptr : static_cast<char*>(address);
}

inline void unmap_file(char* address, size_t size) { ::munmap(address, size); }

#endif

/// Removes a folder and all that is in it; links in it, not what they lead to. std::filesystem::remove_all must not be
/// called here: LibTorch's CUDA wheels have a copy of that function (in libtorch.so) and an older one of the iterator
/// that it uses (in libtorch_cpu.so), and a program that is linked with both crashes in it.
inline void remove_folder(const std::filesystem::path& folder) {
  std::vector<std::filesystem::path> inside;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) inside.push_back(entry.path());
  for (const auto& path : inside) {
    const bool is_folder = std::filesystem::is_directory(std::filesystem::symlink_status(path));
    is_folder ? remove_folder(path) : static_cast<void>(std::filesystem::remove(path));
  }
  std::filesystem::remove(folder);
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
