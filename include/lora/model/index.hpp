#pragma once

#include <lora/site.hpp>
#include <lora/version.hpp>

#include <memory>
#include <unordered_map>
#include <utility>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The sites of a model that are adapted, one for each tensor.
class SiteIndex {
 public:
  /// The site of that place, or null.
  std::shared_ptr<Site> find(const WeightSlot& slot) const {
    const auto found = sites_.find(slot.place());
    return found == sites_.end() ? nullptr : found->second;
  }

  /// The site of that place, which is `site` where there was none.
  std::shared_ptr<Site> take(std::shared_ptr<Site> site) {
    const auto* place = site->slot().place();
    return sites_.emplace(place, std::move(site)).first->second;
  }

  template <class Visit>
  void for_each(const Visit& visit) const {
    for (const auto& item : sites_) visit(item.second);
  }

  void clear() { sites_.clear(); }

 private:
  std::unordered_map<const void*, std::shared_ptr<Site>> sites_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
