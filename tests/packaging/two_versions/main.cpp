// two_versions FOLDER: loads two of the libraries in FOLDER, as a program with two plugins does, each pair in a process
// of its own. Right is: with the same headers in both, both compute with their adapters. With other headers in the
// second one, that holds, too, or the second one says in a sentence that another version is there, and the first one
// goes on.
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <string>

namespace {

struct Result {
  int code;  // as in library.cpp
  std::string text;
};

using Run = int (*)(char*, size_t);

Run load(const std::filesystem::path& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  void* run = handle == nullptr ? nullptr : dlsym(handle, "run");
  if (run == nullptr) {
    std::fprintf(stderr, "  %s\n", dlerror());
    std::_Exit(1);
  }
  return reinterpret_cast<Run>(run);
}

Result call(const char* name, Run run) {
  char text[2000] = "";
  const Result result{run(text, sizeof text), text};
  if (result.code != 0) std::printf("  the %s one: %s\n", name, text);
  return result;
}

bool is_refusal(const Result& result) {
  return result.code == 2 && result.text.find("another version") != std::string::npos &&
         result.text.find('\n') == std::string::npos;
}

bool is_pair_right(const std::filesystem::path& first, const std::filesystem::path& second, bool same_version) {
  const auto run_first = load(first), run_second = load(second);
  for (int round = 0; round < 2; ++round) {  // who was refused is refused again
    if (call("first", run_first).code != 0) return false;
    const auto result = call("second", run_second);
    if (result.code != 0 && (same_version || !is_refusal(result))) return false;
  }
  return call("first", run_first).code == 0;
}

/// Calls `check` in a child process, where nothing was loaded before.
template <class Check>
bool holds_in_child(const Check& check) {
  std::fflush(stdout);
  const auto child = fork();
  if (child == 0) {
    const bool holds = check();
    std::fflush(stdout);
    std::_Exit(holds ? 0 : 1);
  }
  int status = 1;
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status)) std::printf("  ended by signal %d\n", WTERMSIG(status));
  return status == 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::printf("usage: two_versions FOLDER\n");
    return 2;
  }
  const std::filesystem::path folder(arguments[1]);
  int wrong = 0;
  const std::string names[] = {"first_default",  "first_hidden",  "first_own",
                               "second_default", "second_hidden", "second_own"};
  for (const auto& first : names) {
    for (const auto& second : names) {
      const bool same_version = first.substr(0, 5) == second.substr(0, 5);
      auto second_file = folder / (second + ".so");
      if (first == second) {  // the same file would not be loaded twice
        const auto copy = folder / (second + "_copy.so");
        std::filesystem::copy_file(second_file, copy, std::filesystem::copy_options::overwrite_existing);
        second_file = copy;
      }
      const bool holds =
          holds_in_child([&] { return is_pair_right(folder / (first + ".so"), second_file, same_version); });
      std::printf("%s, then %s: %s\n", first.c_str(), second.c_str(), holds ? "passed" : "FAILED");
      wrong += holds ? 0 : 1;
    }
  }
  std::printf("%d pairs of libraries are wrong\n", wrong);
  return wrong == 0 ? 0 : 1;
}
