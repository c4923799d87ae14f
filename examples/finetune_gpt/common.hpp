// What the programs of this folder share: devices and number types from the command line, how errors end a program,
// and the messages of a conversation.
#pragma once

#include <torch/torch.h>

#include <CLI/CLI.hpp>

#include <cmath>
#include <exception>
#include <limits>
#include <string>
#include <vector>

#include <fmt/format.h>

namespace gpt {

/// The device that "auto", "cpu", "cuda" or "cuda:N" names; "auto" is the first CUDA device, or the CPU without one.
/// Throws c10::ValueError for any other name, and when the CUDA device asked for is not there.
inline torch::Device parse_device(const std::string& name) {
  const auto found = static_cast<int64_t>(torch::cuda::device_count());
  if (name == "cpu" || (name == "auto" && found == 0)) return torch::kCPU;
  if (name == "auto") return {torch::kCUDA, 0};
  const bool has_index = name.rfind("cuda:", 0) == 0;
  const auto digits = has_index ? name.substr(5) : std::string("0");
  const bool is_number = !digits.empty() && digits.size() < 4 && digits.find_first_not_of("0123456789") == digits.npos;
  TORCH_CHECK_VALUE((name == "cuda" || has_index) && is_number, "device must be auto, cpu, cuda or cuda:N, got \"",
                    name, "\"");
  TORCH_CHECK_VALUE(found > 0, "device \"", name, "\" was asked for, but no CUDA device is there; use auto or cpu");
  const auto index = std::stoll(digits);
  TORCH_CHECK_VALUE(index < found, "device \"", name, "\" was asked for, but there are only ", found, " CUDA devices");
  return {torch::kCUDA, static_cast<torch::DeviceIndex>(index)};
}

/// The number type that "float32" or "bfloat16" names. Throws c10::ValueError for any other name.
inline torch::ScalarType parse_dtype(const std::string& name) {
  if (name == "float32") return torch::kFloat;
  TORCH_CHECK_VALUE(name == "bfloat16", "dtype must be float32 or bfloat16, got \"", name, "\"");
  return torch::kBFloat16;
}

/// Finite numbers from `least` to `most`; the errors and --help are CLI11's, but without the limits of number types.
inline CLI::Validator between(double least = -std::numeric_limits<double>::infinity(),
                              double most = std::numeric_limits<double>::infinity()) {
  auto check = [least, most](const std::string& text) -> std::string {
    double value = 0;
    if (CLI::detail::lexical_cast(text, value) && std::isfinite(value) && value >= least && value <= most) return "";
    if (std::isinf(least)) return fmt::format("must be a finite number, got {}", text);
    if (std::isinf(most)) return fmt::format("must be a number of at least {:g}, got {}", least, text);
    return fmt::format("must be a number from {:g} to {:g}, got {}", least, most, text);
  };
  return CLI::Validator(check, "");
}

inline constexpr int kExitBadOptions = 2;

/// Parses the command line and calls `run`. Every error is one line on stderr; returns the program's exit code: 0, 1,
/// or kExitBadOptions when an option was wrong.
template <class Run>
int run_program(CLI::App& app, int argc, char** argv, const Run& run) {
  auto fail = [&](const std::string& reason, int code) {
    fmt::print(stderr, "{}: {}\n", app.get_name(), reason);
    return code;
  };
  try {
    app.parse(argc, argv);
    run();
    return 0;
  } catch (const CLI::Success& help) {
    return app.exit(help);
  } catch (const CLI::Error& error) {
    return fail(std::string(error.what()) + " (--help shows all options)", kExitBadOptions);
  } catch (const c10::ValueError& error) {
    return fail(error.what_without_backtrace(), kExitBadOptions);
  } catch (const c10::Error& error) {
    return fail(error.what_without_backtrace(), 1);
  } catch (const std::exception& error) {
    return fail(error.what(), 1);
  }
}

/// One turn of a conversation; the role is "system", "user" or "assistant".
struct ChatMessage {
  std::string role;
  std::string content;
};

}  // namespace gpt
