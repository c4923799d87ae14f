// Ctrl-C and SIGTERM as a wish that the run looks at between two steps.
#pragma once

#include <csignal>

namespace gpt {

/// While it lives, the first interrupt only asks to stop; a second one ends the process at once.
class InterruptGuard {
 public:
  InterruptGuard() {
    requested() = 0;
    for (auto signal : {SIGINT, SIGTERM}) std::signal(signal, &InterruptGuard::on_signal);
  }
  ~InterruptGuard() {
    for (auto signal : {SIGINT, SIGTERM}) std::signal(signal, SIG_DFL);
  }
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;

  bool stop_requested() const { return requested() != 0; }

 private:
  static volatile std::sig_atomic_t& requested() {
    static volatile std::sig_atomic_t flag = 0;
    return flag;
  }
  static void on_signal(int) {
    requested() = 1;
    for (auto signal : {SIGINT, SIGTERM}) std::signal(signal, SIG_DFL);
  }
};

}  // namespace gpt
