#pragma once

#include <c10/util/Exception.h>

#include <lora/selection/text.hpp>
#include <lora/site.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// One operator that a weight was given to.
struct WeightUse {
  std::string layer;      ///< the name of the layer
  std::string operation;  ///< "aten::linear"
  bool adapted = false;   ///< whether it computed with the adapters
  int64_t count = 0;      ///< how often
};

namespace detail {

/// Which operators used the weights of one `Adapters` in its scopes: all of them while somebody wants to know, and at
/// any time those that did so without the adapters.
class Usage {
 public:
  bool is_recording() const { return recording_ > 0; }

  /// Begins anew.
  void start_recording() {
    ++recording_;
    std::lock_guard<std::mutex> lock(mutex_);
    uses_.clear();
  }
  std::vector<WeightUse> stop_recording() {
    --recording_;
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<WeightUse> uses;
    for (const auto& item : uses_) uses.push_back(item.second);
    return uses;
  }

  void record(const Site& site, const char* operation, bool adapted) {
    if (adapted) site.uses.fetch_add(1, std::memory_order_relaxed);
    if (adapted && !is_recording()) return;
    std::lock_guard<std::mutex> lock(mutex_);
    auto& use = uses_[{site.name(), operation, adapted}];
    use = {site.name(), operation, adapted, use.count + 1};
  }

  /// Warns, the first time, that layers were not reached.
  void warn(const std::vector<std::string>& unreached) {
    if (unreached.empty() || warned_.exchange(true)) return;
    std::string operations;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (const auto& [key, use] : uses_) {
        const bool missed = std::find(unreached.begin(), unreached.end(), use.layer) != unreached.end();
        if (missed && !use.adapted)
          operations += "; " + use.operation + " used the weight of " + use.layer + " as it is";
      }
    }
    TORCH_WARN("lora::activate: no forward pass in the scope used the adapters of ", list(unreached), operations,
               ". The base model ran there. Threads other than the scope's own need lora::carry; Adapters::diagnose ",
               "shows every use of every weight.");
  }

 private:
  std::atomic<int> recording_{0};
  std::atomic<bool> warned_{false};
  std::mutex mutex_;
  std::map<std::tuple<std::string, std::string, bool>, WeightUse> uses_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
