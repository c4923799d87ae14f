#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <lora/version.hpp>

#include <algorithm>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

// The scopes that are active on a thread. They are kept where LibTorch keeps what follows a computation to other
// threads (autograd's workers, at::launch, at::wrapPropagateTLSState), beside the dispatch keys, which go the same way.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Keys that no backend uses and that lie above autograd and autocast. They can be avoided with these macros where
/// other code claims them; the second one has to be above the first.
#ifndef LORA_DISPATCH_KEY
#define LORA_DISPATCH_KEY TESTING_ONLY_GenericWrapper
#endif
#ifndef LORA_OBSERVING_DISPATCH_KEY
#define LORA_OBSERVING_DISPATCH_KEY TESTING_ONLY_GenericMode
#endif
inline constexpr auto kInterceptionKey = c10::DispatchKey::LORA_DISPATCH_KEY;
inline constexpr auto kObservingKey = c10::DispatchKey::LORA_OBSERVING_DISPATCH_KEY;

class Scope;

/// An unchangeable list of scopes, the outermost first.
class ActiveScopes final : public c10::DebugInfoBase {
 public:
  using List = std::vector<std::shared_ptr<Scope>>;

  explicit ActiveScopes(List all);

  /// Every scope that was opened and not left.
  const List& all() const { return all_; }
  /// Those that count: of several scopes of one owner the innermost.
  const List& effective() const { return effective_; }
  /// Whether one of them wants to see every operator.
  bool observe() const { return observe_; }

  /// The scopes of this thread; nullptr when there was none yet.
  static const ActiveScopes* current() {
    return static_cast<const ActiveScopes*>(c10::ThreadLocalDebugInfo::get(kind()));
  }

 private:
  friend class ScopeGuard;

  __attribute__((visibility("default"))) static c10::DebugInfoKind kind() {
    static constexpr std::string_view name = "LORA_SCOPES";
    return c10::DebugInfoKind(&name);
  }

  List all_, effective_;
  bool observe_ = false;
};

/// Makes a scope active on this thread while it lives, and leaves the thread exactly as it found it. Ends on the thread
/// it began on.
class ScopeGuard {
 public:
  explicit ScopeGuard(std::shared_ptr<Scope> scope) : scope_(std::move(scope)) {
    auto all = scopes();
    all.push_back(scope_);
    before_ = c10::ThreadLocalDebugInfo::current();
    push(std::move(all));
    after_ = c10::ThreadLocalDebugInfo::current();
  }

  ~ScopeGuard() {
    auto rest = scopes();
    rest.erase(std::remove(rest.begin(), rest.end(), scope_), rest.end());
    if (c10::ThreadLocalDebugInfo::current() == after_) {
      c10::ThreadLocalDebugInfo::_forceCurrentDebugInfo(before_);
      include_keys();
    } else {  // not in reverse order, or something else was put on top
      push(std::move(rest));
    }
  }

  ScopeGuard(const ScopeGuard&) = delete;
  ScopeGuard& operator=(const ScopeGuard&) = delete;

 private:
  static ActiveScopes::List scopes() {
    const auto* active = ActiveScopes::current();
    return active == nullptr ? ActiveScopes::List() : active->all();
  }

  static void push(ActiveScopes::List all) {
    c10::ThreadLocalDebugInfo::_push(ActiveScopes::kind(), std::make_shared<ActiveScopes>(std::move(all)));
    include_keys();
  }

  static void include_keys() {
    const auto* active = ActiveScopes::current();
    const bool any = active != nullptr && !active->all().empty();
    c10::impl::tls_set_dispatch_key_included(kInterceptionKey, any);
    c10::impl::tls_set_dispatch_key_included(kObservingKey, any && active->observe());
  }

  std::shared_ptr<Scope> scope_;
  std::shared_ptr<c10::ThreadLocalDebugInfo> before_, after_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
