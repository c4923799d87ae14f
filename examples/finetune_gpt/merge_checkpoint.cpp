// Folds an adapter into the model it was trained on: base directory + PEFT directory -> Hugging Face directory.
#include <CLI/CLI.hpp>

#include <filesystem>

#include <fmt/core.h>

#include "common.hpp"
#include "merge_files.hpp"

int main(int argc, char** argv) {
  CLI::App app("Folds an adapter into its base model and writes a Hugging Face directory.", "merge_checkpoint");
  std::filesystem::path base, adapter, out;
  app.add_option("base", base, "Hugging Face directory of the base model")
      ->required()
      ->check(CLI::ExistingDirectory)
      ->type_name("DIR");
  app.add_option("adapter", adapter, "PEFT directory of the adapter")
      ->required()
      ->check(CLI::ExistingDirectory)
      ->type_name("DIR");
  app.add_option("out", out, "directory to write; made if needed")->required()->type_name("DIR");
  return gpt::run_program(app, argc, argv, [&] {
    const auto count = gpt::merge_files(base, adapter, out);
    fmt::print("{} adapted layers merged into {}\n", count, out.string());
  });
}
