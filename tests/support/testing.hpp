// Included by every test: LibTorch before Catch2 (otherwise CHECK is not Catch's), one spelling for Catch2 2 and 3
// (LORA_CATCH2 is the one that was found; a machine can have both), and the comparisons the tests share.
#pragma once

#include <torch/torch.h>

#if LORA_CATCH2 >= 3
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <limits>
#include <string>
#include <vector>

namespace testing {

#if LORA_CATCH2 >= 3
using Catch::Approx;
inline auto contains(const std::string& text) { return Catch::Matchers::ContainsSubstring(text); }
#else
using Catch::Detail::Approx;
inline auto contains(const std::string& text) { return Catch::Matchers::Contains(text); }
#endif

/// Largest absolute difference of two tensors, in double on the CPU; infinite when their shapes differ.
inline double distance(const torch::Tensor& a, const torch::Tensor& b) {
  if (a.sizes() != b.sizes()) return std::numeric_limits<double>::infinity();
  auto difference = a.detach().to(torch::kCPU, torch::kDouble) - b.detach().to(torch::kCPU, torch::kDouble);
  return difference.numel() == 0 ? 0.0 : difference.abs().max().item<double>();
}

/// The largest of the distances; NaN where one is.
inline double distance(const std::vector<torch::Tensor>& a, const std::vector<torch::Tensor>& b) {
  if (a.size() != b.size()) return std::numeric_limits<double>::infinity();
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const auto one = distance(a[i], b[i]);
    if (std::isnan(one)) return one;
    largest = std::max(largest, one);
  }
  return largest;
}

/// The text of the error that `call` throws, without the stack trace; empty when it throws none.
inline std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

/// The device the suite runs on: LORA_TEST_DEVICE ("cuda", or "fake" for that of second_device.cpp), else the CPU.
inline torch::Device device() {
  static const auto device = [] {
    const char* name = std::getenv("LORA_TEST_DEVICE");
    const torch::Device named(name == nullptr ? "cpu" : name);
    if (named.is_cuda()) at::globalContext().setAllowTF32CuDNN(false);  // convolutions with all digits of a float
    return named.is_cpu() || named.has_index() ? named : torch::Device(named.type(), 0);  // as tensors report it
  }();
  return device;
}

/// Numbers of a type on that device.
inline torch::TensorOptions on_device(torch::ScalarType type) { return torch::TensorOptions(type).device(device()); }

/// The warnings that are given while it lives.
class Warnings : public c10::WarningHandler {
 public:
  Warnings() : before_(c10::WarningUtils::get_warning_handler()) { c10::WarningUtils::set_warning_handler(this); }
  ~Warnings() override { c10::WarningUtils::set_warning_handler(before_); }
  void process(const c10::Warning& warning) override { texts.push_back(warning.msg()); }
  std::vector<std::string> texts;

 private:
  c10::WarningHandler* before_;
};

/// An empty folder of its own for one test, removed with everything in it at the end.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    auto pattern = (std::filesystem::temp_directory_path() / "lora_test_XXXXXX").string();
    TORCH_CHECK(mkdtemp(pattern.data()) != nullptr, "no temporary folder could be made at ", pattern);
    path_ = pattern;
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

/// Compares the gradients of `loss` with central differences, for every element of `tensors` (float64 leaves).
/// Returns the largest difference found.
inline double gradient_error(const std::function<torch::Tensor()>& loss, const std::vector<torch::Tensor>& tensors,
                             double step = 1e-6) {
  auto gradients = torch::autograd::grad({loss()}, tensors);
  double worst = 0;
  torch::NoGradGuard no_grad;
  for (size_t t = 0; t < tensors.size(); ++t) {
    auto flat = tensors[t].detach().view(-1);  // shares storage
    auto gradient = gradients[t].reshape(-1);
    for (int64_t i = 0; i < flat.numel(); ++i) {
      const auto value = flat[i].item<double>();
      auto at = [&](double v) {
        flat[i] = v;
        return loss().item<double>();
      };
      const auto slope = (at(value + step) - at(value - step)) / (2 * step);
      flat[i] = value;
      worst = std::max(worst, std::abs(slope - gradient[i].item<double>()));
    }
  }
  return worst;
}

}  // namespace testing
