// Prints the ids of each line of a file, for comparison with Python:
//   tokenize_lines TOKENIZER_JSON LINES
// LINES holds one JSON string per line, so that a text may hold line breaks; the ids of each go to one line of the
// output. Says on stderr how many lines there were, how many decode to something else, and the time it took.
#include "../../examples/finetune_gpt/tokenizer.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <chrono>
#include <cstdio>
#include <exception>
#include <fstream>
#include <string>

int main(int argc, char** argv) try {
  if (argc != 3) {
    fmt::print(stderr, "usage: tokenize_lines TOKENIZER_JSON LINES\n");
    return 2;
  }
  const gpt::Tokenizer tokenizer(argv[1]);
  std::ifstream lines(argv[2]);
  if (!lines) {
    fmt::print(stderr, "{} cannot be opened\n", argv[2]);
    return 1;
  }
  int64_t count = 0, changed = 0;
  std::chrono::duration<double> time{};
  for (std::string line; std::getline(lines, line); ++count) {
    const auto text = nlohmann::json::parse(line).get<std::string>();
    const auto start = std::chrono::steady_clock::now();
    const auto ids = tokenizer.encode(text);
    time += std::chrono::steady_clock::now() - start;
    changed += tokenizer.decode(ids) != text;
    fmt::print("{}\n", fmt::join(ids, " "));
  }
  fmt::print(stderr, "{} lines, {} changed by decode(encode(line)), {:.2f} s\n", count, changed, time.count());
  return 0;
} catch (const c10::Error& error) {
  fmt::print(stderr, "{}\n", error.what_without_backtrace());
  return 1;
} catch (const std::exception& error) {
  fmt::print(stderr, "{}\n", error.what());
  return 1;
}
