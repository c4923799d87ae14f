// How much memory tensors take at most, as LibTorch's allocators report it.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace sweep {

/// Counts while it lives, on the thread that made it: all tensors that are made meanwhile.
class PeakMemory {
 public:
  /// The bytes of all tensors together at the worst moment since the last `reset`.
  int64_t bytes() const { return counter_->peak; }
  void reset() { counter_->peak = counter_->now; }

 private:
  struct Counter : c10::MemoryReportingInfoBase {
    int64_t now = 0, peak = 0;

    void reportMemoryUsage(void*, int64_t change, size_t, size_t, c10::Device) override {
      now += change;
      peak = std::max(peak, now);
    }
    bool memoryProfilingEnabled() const override { return true; }
  };

  std::shared_ptr<Counter> counter_ = std::make_shared<Counter>();
  c10::DebugInfoGuard guard_{c10::DebugInfoKind::PROFILER_STATE, counter_};
};

}  // namespace sweep
