// How long work takes and how much memory, and how a run is going: on a terminal as a bar that is drawn again and
// again, elsewhere as a line now and then.
#pragma once

#include <torch/torch.h>

#include <c10/core/CachingDeviceAllocator.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <string>

#include <fmt/format.h>

namespace gpt {

/// Counts from when it is made.
class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// Bytes that LibTorch has allocated on a device, now and at most, over pools of all sizes.
inline c10::CachingAllocator::Stat memory_of_device(torch::Device device) {
  at::globalContext().lazyInitDevice(device.type());  // before its first tensor it has no allocator
  return c10::getDeviceAllocator(device.type())->getDeviceStats(device.index()).allocated_bytes[0];
}

/// Bytes of memory in use: on a CUDA device what LibTorch has allocated there, else what the process has in RAM.
inline int64_t memory_in_use(torch::Device device) {
  if (!device.is_cpu()) return memory_of_device(device).current;
  int64_t all = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> all >> resident;  // in pages
  return resident * sysconf(_SC_PAGESIZE);
}

/// The most that it ever was.
inline int64_t peak_memory(torch::Device device) {
  if (!device.is_cpu()) return memory_of_device(device).peak;
  std::ifstream status("/proc/self/status");
  int64_t kibibytes = 0;
  for (std::string key; status >> key;) {
    if (key == "VmHWM:" && status >> kibibytes) break;
  }
  return kibibytes * 1024;
}

/// Seconds as h:mm:ss, or m:ss below an hour.
inline std::string format_duration(double seconds) {
  const auto s = static_cast<int64_t>(std::lround(seconds));
  return s < 3600 ? fmt::format("{}:{:02}", s / 60, s % 60)
                  : fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
}

/// Shows the steps of a run. Time left follows from the steps that this process has done.
class Progress {
 public:
  /// Shows steps `first` + 1 to `steps`; a bar when `stream` is a terminal, else a line every `interval` steps.
  Progress(int64_t first, int64_t steps, std::FILE* stream = stdout, int64_t interval = 10)
      : first_(first), steps_(steps), stream_(stream), interval_(interval), is_terminal_(isatty(fileno(stream)) != 0) {}

  /// Step `step` (counted from 1) took `seconds` and had these figures; `memory` in bytes.
  void update(int64_t step, double seconds, double loss, double learning_rate, double tokens_per_second,
              int64_t memory) {
    seconds_ += seconds;
    const auto left = seconds_ / static_cast<double>(step - first_) * static_cast<double>(steps_ - step);
    const auto figures = fmt::format("loss {:.4f}  lr {:.2e}  {:.0f} tok/s  {:.2f} GB  {} left", loss, learning_rate,
                                     tokens_per_second, static_cast<double>(memory) / 1e9, format_duration(left));
    if (is_terminal_) {
      draw(step, figures);
    } else if (step % interval_ == 0 || step == first_ + 1 || step == steps_) {
      fmt::print(stream_, "step {:>{}}/{}  {}\n", step, fmt::formatted_size("{}", steps_), steps_, figures);
      std::fflush(stream_);
    }
  }

  /// Prints a line of text; a bar gives way to it and comes back with the next step.
  void print(const std::string& line) {
    fmt::print(stream_, "{}{}\n", is_terminal_ ? "\r\033[K" : "", line);
    std::fflush(stream_);
  }

 private:
  void draw(int64_t step, const std::string& figures) {
    const auto count = fmt::format("{}/{}  ", step, steps_);
    const auto text = static_cast<int64_t>(count.size() + figures.size());
    const auto width = std::clamp<int64_t>(columns() - text - 5, 0, 40);  // brackets, spaces, and a free last column
    const auto done = width * step / std::max<int64_t>(steps_, 1);
    const auto bar = width < 5 ? "" : "[" + std::string(done, '=') + std::string(width - done, ' ') + "]  ";
    fmt::print(stream_, "\r\033[K{}", (bar + count + figures).substr(0, columns() - 1));
    if (step == steps_) fmt::print(stream_, "\n");
    std::fflush(stream_);
  }

  int64_t columns() const {
    winsize size{};
    return ioctl(fileno(stream_), TIOCGWINSZ, &size) == 0 && size.ws_col > 1 ? size.ws_col : 80;
  }

  int64_t first_, steps_;
  std::FILE* stream_;
  int64_t interval_;
  bool is_terminal_;
  double seconds_ = 0;
};

}  // namespace gpt
