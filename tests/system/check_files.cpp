// check_files: whether the calls of system/files.hpp do here what they promise. It needs no LibTorch and no test
// framework, so that it also runs as a program for Windows (tests/compilers.sh).
#include <lora/system/files.hpp>

#include <cstdio>
#include <filesystem>
#include <string>
#include <string_view>

namespace {

using namespace lora::detail;

int wrong = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  ++wrong;
  std::printf("not so: %s (%s)\n", what, last_error().message().c_str());
}

void write_new(const std::filesystem::path& path, std::string_view text) {
  const auto file = open_file(path, Access::kCreate);
  expect(file != kNoFile && write_file(file, 0, text), "a new file is written");
  close_file(file);
}

void check_writing(const std::filesystem::path& folder) {
  const auto first = folder / "first", second = folder / "second";
  write_new(second, "former");
  const auto file = open_file(first, Access::kCreate);
  expect(open_file(first, Access::kCreate) == kNoFile && last_error() == std::errc::file_exists, "created only once");
  expect(write_file(file, 3, "defg") && write_file(file, 0, "abc") && sync_file(file), "written in any order");
  expect(lock_file(file, Lock::kExclusive, /*waits=*/false), "the lock is there");
  const auto other = open_file(first, Access::kLock);
  const bool is_taken = !lock_file(other, Lock::kExclusive, /*waits=*/false) && is_locked_by_other(last_error());
  expect(other != kNoFile && is_taken, "of two only one has the lock");
  expect(replace_file(first, second), "an open and locked file takes the place of another");
  FileStatus status;
  expect(read_status(file, status) && status.is_regular && status.size == 7 && status.names == 1, "its status");
  close_file(other);
  close_file(file);
  expect(!replace_file(first, second) && last_error() == std::errc::no_such_file_or_directory, "the old name is gone");
}

void check_mapping(const std::filesystem::path& folder) {
  const auto path = folder / "mapped";
  write_new(path, "abcdefg");
  const auto map = [&](const std::filesystem::path& name) {
    const auto file = open_file(name, Access::kRead);
    auto* text = map_file(file, 7);
    close_file(file);
    return text;
  };
  auto* text = map(path);
  expect(text != nullptr && std::string_view(text, 7) == "abcdefg", "the content");
  text[0] = 'x';
  expect(make_hard_link(path, folder / "twin"), "a second name");
  auto* twin = map(folder / "twin");
  expect(twin != nullptr && twin[0] == 'a', "what is written to a mapping does not reach the file");
  unmap_file(text, 7);
  unmap_file(twin, 7);
  const auto file = open_file(path, Access::kRead);
  FileStatus status;
  expect(read_status(file, status) && status.names == 2, "it has two names");
  char part[3] = {};
  expect(read_file(file, 2, part, 3) && std::string_view(part, 3) == "cde", "a part of it is read");
  expect(!read_file(file, 5, part, 3) && last_error(), "what is behind its end is not");
  close_file(file);
  expect(remove_file(folder / "twin"), "a name is removed");
  const bool is_gone = open_file(folder / "twin", Access::kRead) == kNoFile;
  expect(is_gone && last_error() == std::errc::no_such_file_or_directory, "and gone");
}

void check_folders(const std::filesystem::path& folder) {
  expect(!make_folder(folder) && last_error() == std::errc::file_exists, "a folder is made only once");
  const auto opened = open_file(folder, Access::kFolder);
  FileStatus status;
  expect(opened != kNoFile && sync_folder(opened), "a folder is brought to the disk");
  expect(read_status(opened, status) && !status.is_regular, "a folder is no file");
  close_file(opened);
  expect(open_file(folder, Access::kLock) == kNoFile, "nor opened as one");
  expect(make_link("mapped", folder / "link") || has_no_links(last_error()), "a link, or none can be made");
}

void check_removing(const std::filesystem::path& folder) {
  const auto removed = folder / "removed", kept = folder / "kept";
  for (const auto& path : {kept, removed, removed / "inside", removed / "inside" / "deep"})
    expect(make_folder(path), "a folder that is to be removed");
  write_new(kept / "file", "stays");
  write_new(removed / "inside" / "deep" / "file", "goes");
  make_link(std::filesystem::path("..") / "kept", removed / "link");
  remove_folder(removed);
  expect(!std::filesystem::exists(removed), "a folder is removed with all that is in it");
  expect(std::filesystem::exists(kept / "file"), "but not what a link in it leads to");
}

}  // namespace

int main() {
  const auto name = "lora_files_" + std::to_string(process_id()) + "_\xc3\xa4";  // no letter of every code page
  const auto folder = std::filesystem::temp_directory_path() / std::filesystem::u8path(name);
  expect(make_folder(folder), "a folder");
  check_writing(folder);
  check_mapping(folder);
  check_folders(folder);
  check_removing(folder);
  remove_folder(folder);
  std::printf("%d wrong\n", wrong);
  return wrong == 0 ? 0 : 1;
}
