#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/tensor.h>
#include <torch/csrc/autograd/graph_task.h>

#include <lora/intercept/observe.hpp>
#include <lora/intercept/weight_table.hpp>
#include <lora/system/libtorch.hpp>
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

/// One activation. It is shared by the threads it is carried to, and not changed while it is active.
struct Scope {
  /// The adapters in effect, and their owner: of several scopes of one owner the innermost decides, those of different
  /// owners add up.
  std::shared_ptr<const ActiveSet> set;
  std::shared_ptr<Usage> usage;
  const void* owner() const { return usage.get(); }

  /// The pass of autograd's backward in which the scope was opened; -1 outside of any.
  const int64_t backward_pass = torch::autograd::get_current_graph_task_id();

  /// Whether autograd evaluates one of its own formulas, whose operands are those of the forward pass and are not to be
  /// adapted once more; what is computed again in a backward pass, by a function of somebody's own, is no such formula.
  bool is_in_formula() const {
    if (torch::autograd::get_current_graph_task_id() == backward_pass) return false;
    const auto node = torch::autograd::get_current_node();
    return dynamic_cast<torch::autograd::TraceableFunction*>(node.get()) != nullptr ||
           dynamic_cast<torch::autograd::CopySlices*>(node.get()) != nullptr;
  }
};

/// An unchangeable list of scopes, the outermost first.
class ActiveScopes final : public c10::DebugInfoBase {
 public:
  using List = std::vector<std::shared_ptr<const Scope>>;

  explicit ActiveScopes(List all) : all_(std::move(all)) {
    for (auto scope = all_.begin(); scope != all_.end(); ++scope) {
      const auto same_owner = [&](const auto& inner) { return inner->owner() == (*scope)->owner(); };
      if (std::none_of(std::next(scope), all_.end(), same_owner)) effective_.push_back(*scope);
    }
  }

  /// Every scope that was opened and not left.
  const List& all() const { return all_; }
  /// Those that count: of several scopes of one owner the innermost.
  const List& effective() const { return effective_; }

  /// The scopes of this thread; nullptr when there was none yet.
  static const ActiveScopes* current() {
    return static_cast<const ActiveScopes*>(c10::ThreadLocalDebugInfo::get(kind()));
  }

 private:
  friend class ScopeGuard;

  __attribute__((visibility("default"))) static c10::DebugInfoKind kind() {
    static constexpr std::string_view name = "LORA_SCOPES " LORA_ABI_NAME;
    return debug_info_kind<c10::DebugInfoKind>(&name);
  }

  List all_, effective_;
};

/// Makes a scope active on this thread while it lives, and leaves the thread exactly as it found it. Ends on the thread
/// it began on.
class ScopeGuard {
 public:
  explicit ScopeGuard(std::shared_ptr<const Scope> scope) : scope_(std::move(scope)) {
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
      include_key();
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
    include_key();
  }

  static void include_key() {
    const auto* active = ActiveScopes::current();
    c10::impl::tls_set_dispatch_key_included(kInterceptionKey, active != nullptr && !active->all().empty());
  }

  std::shared_ptr<const Scope> scope_;
  std::shared_ptr<c10::ThreadLocalDebugInfo> before_, after_;
};

/// Whether the uses of that kind are those of the site. A layer that has its weight for itself has them all; of a tied
/// weight each has its own.
inline bool has_use(const Site& site, Use use) { return overlap(site.use(), use) || site.place().tied_to.empty(); }

/// Calls `visit(scope, active, part)` for every adapted weight of the active scopes of which `operand` is a part, for
/// the uses that are meant. Throws for an operand of `operation` that has numbers of a weight and others beside them.
template <class Visit>
void for_each_match(const at::Tensor& operand, Use use, const char* operation, const Visit& visit) {
  const auto* scopes = ActiveScopes::current();
  if (scopes == nullptr) return;
  for (const auto& scope : scopes->effective()) {
    scope->set->table().for_each_in_storage_of(operand, [&](const ActiveSite& active) {
      if (!has_use(*active.site, use) || scope->is_in_formula()) return;
      const auto& weight = active.base.weight();
      if (const auto part = part_of(weight, operand)) return visit(*scope, active, *part);
      TORCH_CHECK(operation == nullptr || !may_overlap(weight, operand), "lora: ", operation, " got a tensor that has ",
                  "some of the numbers of the weight of \"", active.site->name(), "\" and others beside them, which ",
                  "cannot be adapted apart. Give it a view of the weight alone");
    });
  }
}

/// The same where nothing is computed with the operand, and one that is no part of a weight is passed over.
template <class Visit>
void for_each_match(const at::Tensor& operand, Use use, const Visit& visit) {
  for_each_match(operand, use, nullptr, visit);
}

/// The updates that act on an operand of `operation`, which is going to compute with them. What is merged, also since
/// the scope opened, is in the weight and does not act again.
inline Updates find_updates(const at::Tensor& operand, Use use, const char* operation) {
  Updates updates;
  const Site* first = nullptr;
  for_each_match(operand, use, operation, [&](const Scope& scope, const ActiveSite& active, const Part& part) {
    if (first == nullptr) first = active.site.get();
    TORCH_CHECK(overlap(first->use(), active.site->use()), "lora: ", operation, " got the weight that \"",
                first->name(), "\" and \"", active.site->name(),
                "\" share, each with an update of its own. It neither multiplies with ",
                "the weight nor looks it up, so it is not known whose update is meant; give one of them a copy of the ",
                "weight first");
    scope.usage->record(*active.site, operation, /*adapted=*/true);
    const bool training = active.site->is_training();
    for (const auto& acting : active.methods) {
      const bool is_merged = active.site->is_merged() && active.site->is_in(acting.method.get());
      if (!is_merged) updates.push_back({acting.method.get(), &active.base, part, training, acting.weight});
    }
  });
  return updates;
}

/// Whether an active scope of this thread adapts the weight.
inline bool is_in_scope(const at::Tensor& weight) {
  bool found = false;
  for_each_match(weight, Use::kAny, [&](const Scope&, const ActiveSite&, const Part&) { found = true; });
  return found;
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
