#pragma once

#include <lora/layers/target.hpp>
#include <lora/version.hpp>

#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

namespace detail {

/// Throws when a weight cannot be replaced; changes nothing.
inline void check_replaceable(const std::vector<Target>& targets) {
  for (const auto& target : targets) target.slot->check_replaceable(target.name);
}

/// Merges `adapters` into every target, or, when an update is not finite or a weight cannot be replaced, into none.
inline void merge(const std::vector<Target>& targets, const std::vector<std::string>& adapters) {
  check_replaceable(targets);
  std::vector<at::Tensor> merged;
  for (const auto& target : targets)
    merged.push_back(target.site->merged_weight(target.slot->read(), adapters, target.name));
  for (size_t i = 0; i < targets.size(); ++i) targets[i].site->merge(*targets[i].slot, std::move(merged[i]), adapters);
}

/// Puts the weights of every target back as they were, or, when one was replaced by someone else, none.
inline void unmerge(const std::vector<Target>& targets) {
  for (const auto& target : targets) {
    TORCH_CHECK(target.site->can_unmerge(*target.slot), "lora::unmerge: the weight of ", target.name,
                " was replaced after it was merged; undo that first (other adapters merged later are unmerged first)");
  }
  for (const auto& target : targets) target.site->unmerge(*target.slot);
}

/// Throws where `merge` would; changes nothing.
inline void check_mergeable(const std::vector<Target>& targets, const std::vector<std::string>& adapters) {
  check_replaceable(targets);
  for (const auto& target : targets) target.site->merged_weight(target.slot->read(), adapters, target.name);
}

/// Merges for good, one layer at a time, so that no second copy of all weights is held.
inline void merge_for_good(const std::vector<Target>& targets, const std::vector<std::string>& adapters) {
  for (const auto& target : targets) {
    target.site->merge(*target.slot, target.site->merged_weight(target.slot->read(), adapters, target.name), adapters);
    target.site->keep_merged(*target.slot);
  }
}

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
