#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>

#include <lora/selection/text.hpp>
#include <lora/layers/target.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// One layer of a model together with the count of the operators that used its adapters.
struct AdaptedLayer {
  explicit AdaptedLayer(Target target) : target(std::move(target)) {}

  Target target;
  /// `Target::file_name` for each adapter, since it depends on what else that one adapts.
  std::map<std::string, std::string> file_names;
  std::atomic<int64_t> uses{0};
};

/// One operator that a weight was given to.
struct WeightUse {
  std::string layer;      ///< the name of the layer
  std::string operation;  ///< "aten::linear"
  bool adapted = false;   ///< whether it computed with the adapters
  int64_t count = 0;      ///< how often
};

namespace detail {

/// Which operators use the weights of one `Adapters`. Every operator of the first forward passes is looked at, until
/// all layers were reached or a limit is; after that scopes look only at those that take weights.
class Usage {
 public:
  /// Whether operators are to be looked at.
  bool is_watching() const { return left_ > 0 || recording_ > 0; }

  /// Runs an operator that has the weights of `layers` among its operands and leaves what it returns on the stack.
  void watch(const c10::OperatorHandle& op, const torch::jit::Stack& stack, const std::vector<AdaptedLayer*>& layers,
             const std::function<void()>& run) {
    if (left_ > 0) --left_;
    if (layers.empty()) return run();
    std::vector<int64_t> before;
    for (const auto* layer : layers) before.push_back(layer->uses);
    run();
    if (may_give_views(op) && !gave_copy(stack, layers)) return;
    for (size_t i = 0; i < layers.size(); ++i) record(*layers[i], op, layers[i]->uses > before[i]);
  }

  /// Nothing is left to be found out.
  void stop_watching() { left_ = 0; }

  /// Looks at every operator again, and forgets what was seen before.
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

  /// Warns, the first time, that layers were not reached.
  void warn(const std::vector<std::string>& unreached) {
    if (unreached.empty()) return stop_watching();
    if (warned_.exchange(true)) return;
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
  /// Whether an operator computes nothing and only looks at its operand in another way, or writes to it.
  static bool may_give_views(const c10::OperatorHandle& op) {
    const auto& returns = op.schema().returns();
    return std::all_of(returns.begin(), returns.end(), [](const auto& value) { return value.alias_info() != nullptr; });
  }

  /// Whether what such an operator returned is no view of the weights after all: w.to(dtype), where w has another type.
  static bool gave_copy(const torch::jit::Stack& stack, const std::vector<AdaptedLayer*>& layers) {
    if (stack.empty() || !stack.back().isTensor() || !stack.back().toTensor().has_storage()) return false;
    return std::none_of(layers.begin(), layers.end(), [&](const AdaptedLayer* layer) {
      return stack.back().toTensor().is_alias_of(layer->target.slot->read());
    });
  }

  void record(const AdaptedLayer& layer, const c10::OperatorHandle& op, bool adapted) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto& use = uses_[{layer.target.name, op.operator_name().name, adapted}];
    use = {layer.target.name, op.operator_name().name, adapted, use.count + 1};
  }

  static constexpr int64_t kOperatorsWatched = 20000;

  std::atomic<int64_t> left_{kOperatorsWatched};
  std::atomic<int> recording_{0};
  std::atomic<bool> warned_{false};
  std::mutex mutex_;
  std::map<std::tuple<std::string, std::string, bool>, WeightUse> uses_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
