#pragma once

#include <lora/adapter/adapter.hpp>
#include <lora/intercept/weight_table.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The adapters of a model by name, in the order in which they were added; not changed once it is published.
struct AdapterList {
  struct Entry {
    std::string name;
    std::shared_ptr<const Adapter> adapter;
    double scale = 1;  ///< a factor for the update as a whole
  };

  const Entry* find(const std::string& name) const {
    const auto found = std::find_if(entries.begin(), entries.end(), [&](const auto& e) { return e.name == name; });
    return found == entries.end() ? nullptr : &*found;
  }
  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const auto& entry : entries) names.push_back(entry.name);
    return names;
  }

  std::vector<Entry> entries;
  std::vector<Place> running_means;  ///< of the model
};

/// A list that is copied on write: who reads it has it as it was then, and waits for nobody but for the copy of a
/// pointer. Beside it the active sets that were made of it, until it changes.
class AdapterRegistry {
 public:
  std::shared_ptr<const AdapterList> read() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return list_;
  }

  void publish(AdapterList list) {
    auto next = std::make_shared<const AdapterList>(std::move(list));
    std::lock_guard<std::mutex> lock(mutex_);
    list_ = std::move(next);
    sets_.clear();
  }

  /// An adapter and its active set.
  struct Active {
    std::shared_ptr<const Adapter> adapter;
    std::shared_ptr<const ActiveSet> set;
  };

  /// Those of that adapter, if they were made from this list and the weights are the same still.
  std::optional<Active> active(const std::string& name) const {
    std::optional<Active> found;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto active = sets_.find(name);
      if (active != sets_.end()) found = active->second;
    }
    return found && found->set->is_current() ? found : std::nullopt;
  }

  void keep(const std::string& name, const std::shared_ptr<const AdapterList>& list, const Active& active) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (list == list_) sets_[name] = active;
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const AdapterList> list_ = std::make_shared<const AdapterList>();
  std::map<std::string, Active> sets_;
};

/// The active set of one adapter. Marks the weights, some of which may have lost the key when they were moved.
inline std::shared_ptr<const ActiveSet> make_active_set(const AdapterList& all, const AdapterList::Entry& entry) {
  std::vector<ActiveSite> sites;
  for (const auto& part : entry.adapter->parts) {
    mark(part.site->slot().handles().member);
    sites.emplace_back(part.site, std::vector<ActiveSite::Acting>{{part.method, entry.scale}});
  }
  auto statistics = all.running_means;
  const auto is_own = [&](const Place& place) { return entry.adapter->part(place.name) != nullptr; };
  statistics.erase(std::remove_if(statistics.begin(), statistics.end(), is_own), statistics.end());
  return std::make_shared<const ActiveSet>(std::move(sites), std::move(statistics));
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
