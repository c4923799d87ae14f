#pragma once

#include <ATen/core/Tensor.h>

#include <lora/functional.hpp>
#include <lora/product_run.hpp>
#include <lora/site.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <memory>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

// What a scope brings into effect, made once and not changed afterwards.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// One weight of an active set, as it was when the set was made, and what acts on it.
struct ActiveSite {
  struct Acting {
    std::shared_ptr<const AnyMethod> method;
    double weight;     // a factor for the update
    size_t group = 0;  // of the rows of the batch, where the set is one of rows
  };

  ActiveSite(std::shared_ptr<const Site> of, std::vector<Acting> acting)
      : site(std::move(of)),
        row_axis(site->place().row_axis),
        base(site->present_base()),
        merges(site->merges()),
        storage(base.weight().has_storage() ? base.weight().storage().unsafeGetStorageImpl() : nullptr),
        address(storage == nullptr ? Weak(c10::intrusive_ptr<c10::StorageImpl>())
                                   : Weak(base.weight().storage().getWeakStorageImpl())),
        methods(std::move(acting)) {}

  /// Whether the model still has the weight that it had then. One that got another type or place, other memory, as
  /// torch::load gives it, another tensor in its place, and what was merged or unmerged since are seen.
  bool is_current() const {
    const auto now = site->weight();
    if (!now.is_same(base.weight()) || !is_marked(now) || site->merges() != merges) return false;
    return !now.has_storage() || now.storage().unsafeGetStorageImpl() == storage;
  }

  /// Whether something was merged since the set was made that is none of what acts here, or not all of it.
  bool was_merged_since() const {
    if (site->merges() == merges || !site->is_merged()) return false;
    const auto is_in = [&](const Acting& acting) { return site->is_in(acting.method.get()); };
    return !std::all_of(methods.begin(), methods.end(), is_in) || site->merged_count() != methods.size();
  }

  std::shared_ptr<const Site> site;
  std::optional<int64_t> row_axis;  // as in Place
  WeightBase base;
  int64_t merges;
  using Weak = c10::weak_intrusive_ptr<c10::StorageImpl>;
  const c10::StorageImpl* storage;
  Weak address;  // keeps it from being another's, and not the memory from being freed
  std::vector<Acting> methods;
  std::shared_ptr<Followers> followers = std::make_shared<Followers>();
};

/// Weights by the memory they lie in, since operators see views of them.
class WeightTable {
 public:
  void add(const ActiveSite& active) {
    if (active.storage != nullptr) entries_[active.storage].push_back(&active);
  }

  /// Calls `visit(active)` for every weight in the storage of `operand`.
  template <class Visit>
  void for_each_in_storage_of(const at::Tensor& operand, const Visit& visit) const {
    if (!operand.defined() || !operand.has_storage()) return;
    const auto found = entries_.find(key(operand));
    if (found == entries_.end()) return;
    for (const auto* active : found->second) {
      // else moved elsewhere since the set was made
      if (share_memory(active->base.weight(), operand)) visit(*active);
    }
  }

 private:
  static const void* key(const at::Tensor& tensor) {
    return tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  }

  std::unordered_map<const void*, std::vector<const ActiveSite*>> entries_;
};

/// The adapters that are active together: for each weight the methods that act on it, without any name.
class ActiveSet {
 public:
  ActiveSet(std::vector<ActiveSite> sites, std::vector<Place> statistics,
            std::shared_ptr<const BatchRows> rows = nullptr)
      : sites_(std::move(sites)), statistics_(std::move(statistics)), rows_(std::move(rows)) {
    for (const auto& active : sites_) table_.add(active);
  }
  ActiveSet(const ActiveSet&) = delete;
  ActiveSet& operator=(const ActiveSet&) = delete;

  const std::vector<ActiveSite>& sites() const { return sites_; }
  const WeightTable& table() const { return table_; }
  /// The rows of a batch, where each has adapters of its own; null where all have the same.
  const BatchRows* rows() const { return rows_.get(); }
  /// Running statistics of the model that are not the adapter's: in training mode a forward pass writes to the base.
  const std::vector<Place>& statistics() const { return statistics_; }

  /// Whether the model still has the weights that it had when the set was made.
  bool is_current() const {
    return std::all_of(sites_.begin(), sites_.end(), [](const auto& active) { return active.is_current(); });
  }

 private:
  std::vector<ActiveSite> sites_;
  std::vector<Place> statistics_;
  std::shared_ptr<const BatchRows> rows_;
  WeightTable table_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
