#pragma once

#include <c10/util/Exception.h>

#include <lora/linkage.hpp>
#include <lora/site.hpp>
#include <lora/version.hpp>

#include <memory>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// A site and what is to be merged into it.
struct Merging {
  std::shared_ptr<Site> site;
  std::vector<MergedMethod> methods;
};

/// Merges into every site, or, when an update is not finite or a weight cannot be replaced, into none.
LORA_INLINE void merge(const std::vector<Merging>& all);

/// Puts the weights of every site back as they were, or, when someone else changed one, none.
LORA_INLINE void unmerge(const std::vector<std::shared_ptr<Site>>& sites);

}  // namespace detail

/// Merges on construction and unmerges at the end of the scope; for a LoRALinear or for Adapters:
///
///   { lora::MergeGuard merged(adapters);  ... }   // plain, fast layers in here
///
/// Further arguments go to `merge`, e.g. the name of an adapter. What is merged already cannot be merged again.
template <class Mergeable>
class MergeGuard {
 public:
  template <class... Arguments>
  explicit MergeGuard(Mergeable& mergeable, Arguments&&... arguments) : mergeable_(mergeable) {
    mergeable_.merge(std::forward<Arguments>(arguments)...);
  }
  ~MergeGuard() {
    try {
      if (mergeable_.is_merged()) mergeable_.unmerge();
    } catch (const c10::Error& error) {  // a destructor must not throw
      TORCH_WARN(error.what_without_backtrace());
    } catch (...) {
      TORCH_WARN("lora::MergeGuard: unmerging failed; the model is still merged");
    }
  }
  MergeGuard(const MergeGuard&) = delete;
  MergeGuard& operator=(const MergeGuard&) = delete;

 private:
  Mergeable& mergeable_;
};

template <class Mergeable, class... Arguments>
MergeGuard(Mergeable&, Arguments&&...) -> MergeGuard<Mergeable>;

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <lora/intercept/scope.hpp>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Throws when nothing can be put in one of the places.
inline void check_places(const std::vector<Merging>& all) {
  for (const auto& one : all) {
    TORCH_CHECK(!one.site->is_merged(), "lora::merge: the weight of ", one.site->name(),
                " has an adapter merged into it already; unmerge that first");
    one.site->check_mergeable();
  }
}

/// Throws when an update or a merged weight is not finite. Where W' has to be computed for it, one is in memory at a
/// time.
inline void check_updates(const std::vector<Merging>& all) {
  for (const auto& [site, methods] : all) site->check_finite(methods);
}

/// Throws inside of a scope that adapts a weight which is held in few bits: it gets other memory when it is merged or
/// unmerged, and the scope would not find it.
inline void check_leaves_scopes(const Site& site) {
  if (site.is_held()) check_memory_stays(site.weight());
}

LORA_INLINE void merge(const std::vector<Merging>& all) {
  const BelowInterception below;
  check_places(all);
  for (const auto& one : all) check_leaves_scopes(*one.site);
  std::vector<Site::Prepared> prepared;
  for (const auto& [site, methods] : all) prepared.push_back(site->prepared(methods));
  for (size_t i = 0; i < all.size(); ++i) all[i].site->merge(std::move(prepared[i]), all[i].methods);
}

LORA_INLINE void unmerge(const std::vector<std::shared_ptr<Site>>& sites) {
  for (const auto& site : sites) {
    TORCH_CHECK(site->can_unmerge(), "lora::unmerge: the weight of ", site->name(),
                " was replaced or written after it was merged; undo that first (other adapters merged later are ",
                "unmerged first)");
    check_leaves_scopes(*site);
  }
  for (const auto& site : sites) site->unmerge();
}

/// Merges one site for good: done for one after the other, no second copy of all weights is held.
inline void merge_for_good(const Merging& one) {
  const BelowInterception below;
  one.site->merge(one.site->prepared(one.methods), one.methods);
  one.site->keep_merged();
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
