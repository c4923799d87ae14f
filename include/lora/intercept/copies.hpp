#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>

#include <lora/system/process_wide.hpp>
#include <lora/version.hpp>
#include <lora/weight/placeholder.hpp>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <iterator>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Copies that were made of adapted weights outside of scopes, as by cloning a model: they have the base's numbers and
/// no adapters. A copy is known by the memory it lies in, as long as that and the weight are there.
class Copies {
 public:
  static void note(const at::Tensor& weight, const at::Tensor& copy) {
    if (!copy.has_storage()) return;
    auto& copies = all();
    const std::lock_guard<std::shared_mutex> lock(copies.mutex);
    auto& origins = copies.origins;
    if (origins.size() >= copies.most) {
      for (auto item = origins.begin(); item != origins.end();)
        item = item->second.copy.expired() ? origins.erase(item) : std::next(item);
      copies.most = std::max<size_t>(64, 2 * origins.size());
    }
    const auto& storage = copy.storage();
    origins.insert_or_assign(storage.unsafeGetStorageImpl(),
                             Origin{storage.getWeakStorageImpl(), WeakTensor(weight.getIntrusivePtr())});
    copies.are_any.store(true, std::memory_order_release);
  }

  /// The weight in the memory of whose copy the operand lies; undefined where there is none.
  static at::Tensor origin(const at::Tensor& operand) {
    auto& copies = all();
    if (!copies.are_any.load(std::memory_order_acquire) || !operand.defined() || !operand.has_storage()) return {};
    at::Tensor weight;  // outlives the lock: it may be the last to hold the memory
    const std::shared_lock<std::shared_mutex> lock(copies.mutex);
    const auto found = copies.origins.find(operand.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
    if (found == copies.origins.end()) return {};
    weight = at::Tensor(found->second.weight.lock());
    const bool is_weight = weight.defined() && share_memory(weight, operand);  // which moved into it
    return is_weight ? at::Tensor() : weight;
  }

 private:
  using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

  struct Origin {
    c10::weak_intrusive_ptr<c10::StorageImpl> copy;  // keeps the address from being another's, not the memory
    WeakTensor weight;
  };

  struct All {
    static constexpr const char* kName = "copies";
    std::atomic<bool> are_any{false};
    std::shared_mutex mutex;
    std::unordered_map<const c10::StorageImpl*, Origin> origins;
    size_t most = 64;  // before those that are gone are looked for
  };

  static All& all() { return process_wide<All>(); }
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
