// Holds a model in few bits for good: Hugging Face directory -> the same with weights as bitsandbytes keeps them, which
// finetune_gpt, generate and Python's transformers load. The codes may be chosen by what some texts put into the
// layers.
#include <torch/torch.h>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <lora/lora.hpp>

#include "checkpoint.hpp"
#include "common.hpp"
#include "progress.hpp"
#include "quantize_files.hpp"
#include "texts.hpp"

namespace gpt {
namespace {

struct Options {
  std::filesystem::path base, out;
  QuantizeFilesOptions quantize;
  DataOptions data;
  int64_t calibrate = 256;
  std::string device = "auto";
};

void add_options(CLI::App& app, Options& o) {
  app.add_option("base", o.base, "Hugging Face directory of the model")
      ->required()
      ->check(CLI::ExistingDirectory)
      ->type_name("DIR");
  app.add_option("out", o.out, "directory to write; made if needed")->required()->type_name("DIR");
  app.option_defaults()->always_capture_default();
  app.add_option("--quantize", o.quantize.scheme, "How the linear layers but the head are held")
      ->check(CLI::IsMember({"nf4", "fp4", "int8"}));
  app.add_option("--int8", o.quantize.int8,
                 "Those that are held in int8 in any case: all whose names this\n"
                 "regular expression matches from end to end")
      ->type_name("REGEX");
  app.add_option("--dtype", o.quantize.dtype, "Numbers of everything else")
      ->check(CLI::IsMember({"float32", "bfloat16"}));
  app.add_option("--device", o.device, "auto, cpu, cuda or cuda:N");
  const auto* group =
      "Data, by which the codes of nf4 and fp4 are chosen; without any each number is rounded by itself";
  add_data_options(app, o.data, group);
  app.add_option("--calibrate", o.calibrate, "So many rows of them, evenly spaced")->check(between(1))->group(group);
}

/// Some of the rows that are to be learned from, from all over the data.
std::vector<Example> calibration_rows(const Options& options, const ModelConfig& config) {
  check_data_options(options.data);
  const auto train = read_data(options.data, Texts(options.base), config).train;
  const auto size = train.size(), count = std::min(static_cast<size_t>(options.calibrate), size);
  std::vector<Example> rows;
  for (size_t i = 0; i < count; ++i) rows.push_back(train[i * size / count]);
  return rows;
}

/// The checks that concern more than one option. Throws c10::ValueError.
void check_options(const CLI::App& app, const Options& options) {
  const bool is_int8 = options.quantize.scheme == "int8";
  TORCH_CHECK_VALUE(!is_int8 || options.quantize.int8.empty(), "--int8 says nothing beside --quantize int8");
  TORCH_CHECK_VALUE(!is_int8 || !options.data.any(), "--quantize int8 has no use for data: it rounds each number by ",
                    "itself");
  for (const auto* name : {"--calibrate", "--block", "--validation-share"}) {
    TORCH_CHECK_VALUE(options.data.any() || app.count(name) == 0, name, " says which data are used, and needs --text ",
                      "or --jsonl");
  }
}

void run(const Options& options) {
  const auto device = parse_device(options.device);
  prepare_target(options.base, options.out);
  TORCH_CHECK_VALUE(!holds_few_bits(options.base), options.base.string(), " holds weights in few bits already");
  auto model = load_model(options.base, parse_dtype(options.quantize.dtype), device);
  std::function<void()> passes;
  if (options.data.any()) {
    passes = [&, rows = calibration_rows(options, model->config)] {
      // Rows of several lengths would be filled up with tokens of no text.
      for (const auto& batch : in_batches(rows, options.data.jsonl.empty() ? 4 : 1))
        model->hidden_states(batch.to(device).inputs);
    };
  }
  const auto report = quantize_layers(*model, options.quantize, passes);
  save_quantized_model(*model, options.quantize, options.base, options.out);
  fmt::print("{} layers in {}{}: {:.3f} GB in place of {:.3f}\n", report.layers.size(), options.quantize.scheme,
             options.quantize.is_mixed() ? " and int8, which transformers does not read beside each other" : "",
             static_cast<double>(report.bytes_after) / 1e9, static_cast<double>(report.bytes_before) / 1e9);
  if (!report.uncalibrated.empty()) fmt::print("the data did not reach {}\n", fmt::join(report.uncalibrated, ", "));
  fmt::print("{} is written; the process took {:.3f} GB at most\n", options.out.string(),
             static_cast<double>(peak_memory(device)) / 1e9);
}

}  // namespace
}  // namespace gpt

int main(int argc, char** argv) {
  CLI::App app("Writes a Llama or GPT-2 model with its linear layers in few bits.", "quantize_checkpoint");
  gpt::Options options;
  gpt::add_options(app, options);
  return gpt::run_program(app, argc, argv, [&] {
    gpt::check_options(app, options);
    gpt::run(options);
  });
}
