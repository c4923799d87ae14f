#pragma once

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <lora/intercept/weight_use.hpp>
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

  /// `misses_gradient`: gradient mode is off, though something else that the operator got has a gradient.
  void record(const Site& site, const char* operation, bool adapted, bool misses_gradient = false) {
    if (adapted) site.uses.add(at::GradMode::is_enabled(), misses_gradient);
    if (adapted && !is_recording()) return;
    std::lock_guard<std::mutex> lock(mutex_);
    auto& use = uses_[{site.name(), operation, adapted}];
    use = {site.name(), operation, adapted, use.count + 1};
  }

  // Each of these warns the first time.

  void warn_of_unreached(const std::vector<std::string>& unreached) {
    if (unreached.empty() || warned_of_unreached_.exchange(true)) return;
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

  void warn_of_other_model() {
    if (warned_of_other_model_.exchange(true)) return;
    TORCH_WARN("lora::activate: products were computed in the scope, but none with an adapter. Does another model run ",
               "there? A clone of a model has no adapters, and neither have copies of its weights; attach to the one ",
               "that runs");
  }

  void warn_of_copy(const Site& site) {
    if (warned_of_copy_.exchange(true)) return;
    TORCH_WARN("lora::activate: in the scope somebody computed with what was made as a copy of the weight of ",
               site.name(), ", as a clone of the model has it. The adapters of the scope do not act on copies; attach ",
               "to the clone, or, where that is meant, run it outside of the scope");
  }

  void warn_of_gradients(const std::vector<std::string>& layers) {
    if (layers.empty() || warned_of_gradients_.exchange(true)) return;
    TORCH_WARN(
        "lora::activate: the adapters of ", list(layers), " get no gradient: their weights were only used with ",
        "gradient mode off, beside inputs that have a gradient. A torch::autograd::Function does that; give it ",
        "weight.clone(), which in a scope is W' with its gradient, instead of the weight. What is recomputed in ",
        "backward needs the scope there, too (lora::carry)");
  }

  /// Of those in training mode. `means` are the running means of modules.
  void warn_of_statistics(const std::vector<Place>& means) {
    if (means.empty() || warned_of_statistics_) return;
    std::vector<std::string> modules;
    for (const auto& mean : means) {
      if (mean.slot->is_training()) modules.push_back(owner_of(mean.name));
    }
    if (modules.empty() || warned_of_statistics_.exchange(true)) return;
    TORCH_WARN(
        "lora::activate: ", list(modules), " keep running statistics and were in training mode in the scope, so ",
        "that these, which are the base model's, changed. Put such modules into evaluation mode, or name them in ",
        "modules_to_save, so that the adapter has statistics of its own and its files hold them");
  }

  void warn_of_parallel(const Site& site) {
    if (warned_of_parallel_.exchange(true)) return;
    TORCH_WARN("lora::activate: the weight of ", site.name(),
               " is used inside of a parallel region (at::parallel_for, ",
               "OpenMP) that began within the scope. Its other threads are in no scope and run the base model there; ",
               "wrap the region's body with lora::carry");
  }

 private:
  std::atomic<int> recording_{0};
  std::atomic<bool> warned_of_unreached_{false}, warned_of_other_model_{false}, warned_of_gradients_{false};
  std::atomic<bool> warned_of_parallel_{false}, warned_of_statistics_{false}, warned_of_copy_{false};
  std::mutex mutex_;
  std::map<std::tuple<std::string, std::string, bool>, WeightUse> uses_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
