#pragma once

#include <ATen/core/Tensor.h>

#include <lora/system/process_wide.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <mutex>
#include <unordered_map>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The weights of the process that have something merged into them, whoever did that: several `Adapters` of one model
/// know nothing of each other, and what is about to give a weight other numbers has to know of all of them. A weight is
/// one of these while an object of this class lives.
class MergedWeight {
 public:
  /// `was_held`: whether the numbers from before were held in few bits.
  MergedWeight(const at::Tensor& weight, bool was_held) : weight_(weight.unsafeGetTensorImpl()), was_held_(was_held) {
    std::lock_guard<std::mutex> lock(all().mutex);
    all().weights.emplace(weight_, was_held);
  }
  ~MergedWeight() {
    std::lock_guard<std::mutex> lock(all().mutex);
    const auto [first, last] = all().weights.equal_range(weight_);
    all().weights.erase(std::find_if(first, last, [&](const auto& item) { return item.second == was_held_; }));
  }
  MergedWeight(const MergedWeight&) = delete;
  MergedWeight& operator=(const MergedWeight&) = delete;

  /// Whether the tensor is one of them.
  static bool is(const at::Tensor& weight) {
    std::lock_guard<std::mutex> lock(all().mutex);
    return all().weights.count(weight.unsafeGetTensorImpl()) > 0;
  }
  /// Whether it is going to be held in few bits when it is unmerged.
  static bool was_held(const at::Tensor& weight) {
    std::lock_guard<std::mutex> lock(all().mutex);
    const auto [first, last] = all().weights.equal_range(weight.unsafeGetTensorImpl());
    return std::any_of(first, last, [](const auto& item) { return item.second; });
  }

 private:
  struct All {
    static constexpr const char* kName = "merged_weights";
    std::mutex mutex;
    std::unordered_multimap<const c10::TensorImpl*, bool> weights;
  };

  static All& all() { return process_wide<All>(); }

  const c10::TensorImpl* weight_;
  bool was_held_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
