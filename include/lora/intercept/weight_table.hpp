#pragma once

#include <ATen/core/Tensor.h>

#include <lora/functional.hpp>
#include <lora/site.hpp>
#include <lora/version.hpp>

#include <memory>
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
    double weight;  // a factor for the update
  };

  ActiveSite(std::shared_ptr<const Site> of, std::vector<Acting> acting)
      : site(std::move(of)), base(site->base(site->weight())), methods(std::move(acting)) {}

  std::shared_ptr<const Site> site;
  DenseBase base;
  std::vector<Acting> methods;
};

/// Weights by the memory they lie in, since operators see views of them.
class WeightTable {
 public:
  void add(const ActiveSite& active) {
    const auto& weight = active.base.weight();
    if (weight.has_storage()) entries_[key(weight)].push_back({&active, weight.storage()});
  }

  /// Calls `visit(active)` for every weight in the storage of `operand`.
  template <class Visit>
  void for_each_in_storage_of(const at::Tensor& operand, const Visit& visit) const {
    if (!operand.defined() || !operand.has_storage()) return;
    const auto found = entries_.find(key(operand));
    if (found == entries_.end()) return;
    for (const auto& entry : found->second) {
      // else moved elsewhere since the set was made
      if (entry.active->base.weight().is_alias_of(operand)) visit(*entry.active);
    }
  }

 private:
  struct Entry {
    const ActiveSite* active;
    c10::Storage storage;  // kept alive, so that no other tensor gets its address while the table lives
  };

  static const void* key(const at::Tensor& tensor) {
    return tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  }

  std::unordered_map<const void*, std::vector<Entry>> entries_;
};

/// The adapters that are active together: for each weight the methods that act on it, without any name.
class ActiveSet {
 public:
  explicit ActiveSet(std::vector<ActiveSite> sites) : sites_(std::move(sites)) {
    for (const auto& active : sites_) table_.add(active);
  }
  ActiveSet(const ActiveSet&) = delete;
  ActiveSet& operator=(const ActiveSet&) = delete;

  const std::vector<ActiveSite>& sites() const { return sites_; }
  const WeightTable& table() const { return table_; }

  /// Whether the model still has the weights that it had when the set was made. A weight that got another type or
  /// place, and another tensor in its place, are seen.
  bool is_current() const {
    for (const auto& active : sites_) {
      const auto now = active.site->weight();
      const auto& then = active.base.weight();
      if (!now.is_same(then) || !is_marked(now)) return false;
    }
    return true;
  }

 private:
  std::vector<ActiveSite> sites_;
  WeightTable table_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
