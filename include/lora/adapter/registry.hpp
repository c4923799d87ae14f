#pragma once

#include <lora/adapter/adapter.hpp>
#include <lora/adapter/merge.hpp>
#include <lora/intercept/weight_table.hpp>
#include <lora/selection/text.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// One adapter of a model, and how it counts.
struct AdapterEntry {
  std::string name;
  std::shared_ptr<const Adapter> adapter;
  double scale = 1;                           ///< a factor for the update as a whole
  std::map<std::string, double> scales = {};  ///< further ones, for layers or tensors

  /// The factor for what the adapter does to one tensor: its own one, or that of its layer.
  double scale_of(const AdapterPart& part) const {
    if (scales.empty()) return scale;
    auto own = scales.find(part.changed());
    if (own == scales.end()) own = scales.find(owner_of(part.changed()));
    return own == scales.end() ? scale : scale * own->second;
  }
};

/// The adapters of a model by name, in the order in which they were added; not changed once it is published.
struct AdapterList {
  const AdapterEntry* find(const std::string& name) const {
    const auto found = std::find_if(entries.begin(), entries.end(), [&](const auto& e) { return e.name == name; });
    return found == entries.end() ? nullptr : &*found;
  }
  /// The same, which has to be there.
  const AdapterEntry& at(const std::string& name) const {
    const auto* entry = find(name);
    TORCH_CHECK(entry != nullptr, "lora::Adapters: there is no adapter \"", name,
                "\"; there are: ", detail::list(names()));
    return *entry;
  }
  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const auto& entry : entries) names.push_back(entry.name);
    return names;
  }

  std::vector<AdapterEntry> entries;
  std::vector<Place> running_means;  ///< of the model
};

/// An adapter and its active set.
struct ActiveAdapter {
  std::shared_ptr<const Adapter> adapter;
  std::shared_ptr<const ActiveSet> set;
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
    const auto now = by_name(*next);
    std::lock_guard<std::mutex> lock(mutex_);
    const auto before = by_name(*list_);
    const bool all_change = list_->running_means.size() != next->running_means.size();
    for (auto kept = sets_.begin(); kept != sets_.end();)
      kept = !all_change && stays(before, now, kept->first) ? std::next(kept) : sets_.erase(kept);
    list_ = std::move(next);
  }

  /// Those of that adapter, if they were made from this list and the weights are the same still.
  std::optional<ActiveAdapter> active(const std::string& name) const {
    std::optional<ActiveAdapter> found;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto active = sets_.find(name);
      if (active != sets_.end()) found = active->second;
    }
    return found && found->set->is_current() ? found : std::nullopt;
  }

  void keep(const std::string& name, const std::shared_ptr<const AdapterList>& list, const ActiveAdapter& active) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (list == list_) sets_[name] = active;
  }

 private:
  using Entries = std::unordered_map<std::string_view, const AdapterEntry*>;

  static Entries by_name(const AdapterList& list) {
    Entries entries;
    for (const auto& entry : list.entries) entries.emplace(entry.name, &entry);
    return entries;
  }

  /// Whether the set of an adapter is the same for both lists.
  static bool stays(const Entries& before, const Entries& now, const std::string& name) {
    const auto old = before.find(name), next = now.find(name);
    return old != before.end() && next != now.end() && old->second->adapter == next->second->adapter &&
           old->second->scale == next->second->scale && old->second->scales == next->second->scales;
  }

  mutable std::mutex mutex_;
  std::shared_ptr<const AdapterList> list_ = std::make_shared<const AdapterList>();
  std::map<std::string, ActiveAdapter> sets_;
};

/// Whether the tensor is that of the layer of that name, or whose name ends in a dot and it, or its bias.
inline bool is_of_layer(const Site& site, const std::string& layer) {
  return is_or_ends_with(site.name(), layer) || is_or_ends_with(owner_of(site.name()), layer);
}

/// Sets that act together, e.g. of several adapters at once, or each on rows of its own.
class ActiveSets {
 public:
  /// Adds what a set does, with a factor, and on the rows of a group where there are rows.
  void add(const ActiveSet& set, double weight, size_t group = 0) {
    for (const auto& active : set.sites()) {
      auto& site = site_of(active);
      for (auto acting : active.methods) {
        acting.weight *= weight;
        acting.group = group;
        site.methods.push_back(std::move(acting));
      }
    }
    statistics_ = is_first_ ? set.statistics() : common(set.statistics());
    is_first_ = false;
  }

  /// Adds a layer on which nothing acts by this: one with an adapter of its own, whose place the set takes.
  void add_layer(const std::shared_ptr<Site>& site) {
    if (places_.count(site.get()) == 0) site_of(ActiveSite(site, {}));
  }

  /// The set of all of them. Of `rows` the layers get the dimensions that its options name.
  std::shared_ptr<const ActiveSet> take(std::shared_ptr<const BatchRows> rows = nullptr) {
    if (rows != nullptr) name_axes(rows->options().axes());
    return std::make_shared<const ActiveSet>(std::move(sites_), std::move(statistics_), std::move(rows));
  }

 private:
  ActiveSite& site_of(const ActiveSite& active) {
    const auto [place, is_new] = places_.emplace(active.site.get(), sites_.size());
    if (is_new) {
      sites_.push_back(active);
      sites_.back().methods.clear();
    }
    return sites_[place->second];
  }

  /// Running statistics that none of the adapters has of its own.
  std::vector<Place> common(const std::vector<Place>& others) const {
    auto statistics = statistics_;
    const auto is_missing = [&](const Place& place) {
      return std::none_of(others.begin(), others.end(), [&](const Place& o) { return o.name == place.name; });
    };
    statistics.erase(std::remove_if(statistics.begin(), statistics.end(), is_missing), statistics.end());
    return statistics;
  }

  void name_axes(const RowOptions::Axes& axes) {
    for (const auto& [layer, dimension] : axes) {
      for (auto& active : sites_) {
        if (is_of_layer(*active.site, layer)) active.row_axis = dimension;
      }
    }
  }

  std::vector<ActiveSite> sites_;
  std::unordered_map<const Site*, size_t> places_;
  std::vector<Place> statistics_;
  bool is_first_ = true;
};

/// What adapters change, each tensor once: two of them, and a bias that is trained in full and scaled by its layer's
/// method, too.
inline std::vector<Merging> mergings_of(const AdapterList& all, const std::vector<std::string>& names) {
  std::vector<Merging> mergings;
  std::unordered_map<const Site*, size_t> places;
  for (const auto& name : names) {
    const auto& entry = all.at(name);
    for (const auto& part : entry.adapter->parts) {
      const auto [place, is_new] = places.emplace(part.site.get(), mergings.size());
      if (is_new) mergings.push_back({part.site, {}});
      mergings[place->second].methods.push_back({entry.name, part.method, entry.scale_of(part)});
    }
  }
  return mergings;
}

/// The active set of one adapter. Marks the weights, some of which may have lost the key when they were moved.
inline std::shared_ptr<const ActiveSet> make_active_set(const AdapterList& all, const AdapterEntry& entry) {
  std::vector<ActiveSite> sites;
  for (const auto& part : entry.adapter->parts) {
    mark(part.site->slot().handles().member);
    sites.emplace_back(part.site, std::vector<ActiveSite::Acting>{{part.method, entry.scale_of(part)}});
  }
  auto statistics = all.running_means;
  const auto is_own = [&](const Place& place) { return entry.adapter->part(place.name) != nullptr; };
  statistics.erase(std::remove_if(statistics.begin(), statistics.end(), is_own), statistics.end());
  return std::make_shared<const ActiveSet>(std::move(sites), std::move(statistics));
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
