#pragma once

#include <ATen/Parallel.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/tensor.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

#include <lora/intercept/carried_here.hpp>
#include <lora/intercept/copies.hpp>
#include <lora/intercept/observe.hpp>
#include <lora/intercept/weight_table.hpp>
#include <lora/product_run.hpp>
#include <lora/system/libtorch.hpp>
#include <lora/system/process_wide.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

// The scopes that are active on a thread. They are kept where LibTorch keeps what follows a computation to other
// threads (autograd's workers, at::launch, at::wrapPropagateTLSState), beside the dispatch keys, which go the same way.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// One activation. It is shared by the threads it is carried to, and not changed while it is active.
struct Scope {
  Scope(std::shared_ptr<const ActiveSet> acting, std::shared_ptr<Usage> recorded, bool plain_scripts = false)
      : set(std::move(acting)), usage(std::move(recorded)), needs_plain_scripts(plain_scripts) {}

  /// The adapters in effect, and their owner: of several scopes of one owner the innermost decides, those of different
  /// owners add up.
  const std::shared_ptr<const ActiveSet> set;
  const std::shared_ptr<Usage> usage;
  const void* owner() const { return usage.get(); }

  /// Whether TorchScript's optimizer has to be off on the thread (see ScriptModel).
  const bool needs_plain_scripts;

  /// What happened in it so far: an update was computed, or a product ran that has none.
  mutable std::atomic<bool> was_used{false}, was_passed{false};

  /// The thread it is open on, and whether it was left on another one, which cannot take it away there.
  const std::thread::id home = std::this_thread::get_id();
  mutable std::atomic<bool> was_left_elsewhere{false};

  /// Whether it was opened where others compute at the same time; then they have scopes of their own.
  const bool is_parallel = at::in_parallel_region();

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
///
/// It is an entry of the chain on which LibTorch keeps what follows a computation, which is also the profiler's.
/// Whoever takes an entry from the chain expects it on top, and scopes are opened and left at any time; so this entry
/// is the lowest one, and a thread has one at most.
class ActiveScopes final : public c10::DebugInfoBase {
 public:
  using List = std::vector<std::shared_ptr<const Scope>>;

  /// Every scope that was opened and not left.
  const List& all() const { return all_; }
  /// Those that count: of several scopes of one owner the innermost.
  const List& effective() const { return effective_; }

  /// The scopes of this thread; nullptr when there are none.
  static const ActiveScopes* current() {
    return static_cast<const ActiveScopes*>(c10::ThreadLocalDebugInfo::get(kind()));
  }

  static void add(std::shared_ptr<const Scope> scope) {
    auto all = all_of_thread();
    all.push_back(std::move(scope));
    replace(std::move(all));
  }

  static void remove(const Scope* scope) {
    auto all = all_of_thread();
    const auto is_it = [&](const auto& other) { return other.get() == scope; };
    all.erase(std::remove_if(all.begin(), all.end(), is_it), all.end());
    replace(std::move(all));
  }

 private:
  using Chain = c10::ThreadLocalDebugInfo;

  ActiveScopes(List all, bool optimized) : all_(std::move(all)), optimized_(optimized) {
    for (auto scope = all_.begin(); scope != all_.end(); ++scope) {
      const auto same_owner = [&](const auto& inner) { return inner->owner() == (*scope)->owner(); };
      if (std::none_of(std::next(scope), all_.end(), same_owner)) effective_.push_back(*scope);
    }
  }

  struct Kind {
    static constexpr const char* kName = "scopes_" LORA_KEY_NAMES;
    const std::string_view name = "LORA_SCOPES " LORA_ABI_NAME " " LORA_KEY_NAMES;
    const c10::DebugInfoKind kind = debug_info_kind<c10::DebugInfoKind>(&name);
  };

  static c10::DebugInfoKind kind() { return process_wide<Kind>().kind; }

  static List all_of_thread() {
    const auto* active = current();
    return active == nullptr ? List() : active->all();
  }

  static void replace(List all) {
    const bool any = !all.empty();
    const bool plain = std::any_of(all.begin(), all.end(), [](const auto& s) { return s->needs_plain_scripts; });
    const auto* active = current();
    const bool was_plain = active != nullptr && !active->is_optimized();
    const bool optimized = active != nullptr ? active->optimized_ : torch::jit::getGraphExecutorOptimize();
    const auto others = take_off_others();
    if (current() != nullptr) Chain::_pop(kind());
    if (any) {
      auto next = std::shared_ptr<ActiveScopes>(new ActiveScopes(std::move(all), optimized));
      Chain::_push(kind(), next);
      next->entry_ = Chain::current().get();
    }
    for (auto other = others.rbegin(); other != others.rend(); ++other) Chain::_push(other->first, other->second);
    c10::impl::tls_set_dispatch_key_included(kInterceptionKey, any);
    if (plain != was_plain) torch::jit::setGraphExecutorOptimize(optimized && !plain);
  }

  bool is_optimized() const {
    return std::none_of(all_.begin(), all_.end(), [](const auto& s) { return s->needs_plain_scripts; });
  }

  using Entries = std::vector<std::pair<c10::DebugInfoKind, std::shared_ptr<c10::DebugInfoBase>>>;

  /// Takes off the chain what others have put on it above the scopes, the topmost first. What is of a kind that
  /// LibTorch does not know stays, and then what is below it.
  static Entries take_off_others() {
    using Kind = c10::DebugInfoKind;
    const std::array<Kind, 7> kinds{Kind::PROFILER_STATE,     Kind::INFERENCE_CONTEXT, Kind::PARAM_COMMS_INFO,
                                    Kind::PRODUCER_INFO,      Kind::TEST_INFO,         Kind::TEST_INFO_2,
                                    Kind::MOBILE_RUNTIME_INFO};
    Entries others;
    for (bool found = true; found;) {
      const auto top = Chain::current();
      const auto* active = current();
      if (top == nullptr || (active != nullptr && active->entry_ == top.get())) break;
      found = std::any_of(kinds.begin(), kinds.end(), [&](Kind kind) {
        if (Chain::get(kind) == nullptr) return false;
        try {
          others.emplace_back(kind, Chain::_pop(kind));
          return true;
        } catch (const c10::Error&) {  // the one on top is of another kind
          return false;
        }
      });
    }
    return others;
  }

  List all_, effective_;
  bool optimized_;                // whether TorchScript's optimizer was on before the first scope
  const Chain* entry_ = nullptr;  // where it is in the chain
};

/// Makes a scope active on this thread while it lives. Scopes may end in any order; on another thread than it began on,
/// a scope cannot be ended: that warns, and the next use of its weights on its own thread throws.
class ScopeGuard {
 public:
  explicit ScopeGuard(std::shared_ptr<const Scope> scope) : scope_(std::move(scope)) { ActiveScopes::add(scope_); }

  ~ScopeGuard() {
    end_product_run();
    if (std::this_thread::get_id() == scope_->home) {
      ActiveScopes::remove(scope_.get());
      return;
    }
    scope_->was_left_elsewhere = true;
    TORCH_WARN(
        "lora::activate: a scope was left on another thread than the one it was opened on, where it stays open. ",
        "Leave it there, and give other threads functions that lora::carry has wrapped");
  }

  ScopeGuard(const ScopeGuard&) = delete;
  ScopeGuard& operator=(const ScopeGuard&) = delete;

 private:
  std::shared_ptr<const Scope> scope_;
};

/// Throws when the scope was left on another thread, and takes it away.
inline void check_left(const Scope& scope) {
  if (!scope.was_left_elsewhere.load(std::memory_order_relaxed) || std::this_thread::get_id() != scope.home) return;
  ActiveScopes::remove(&scope);
  TORCH_CHECK(false, "lora: a scope of this thread was left on another thread, which could not end it here; it ends ",
              "now. Destroy what lora::activate returns on the thread that called it");
}

/// Whether the uses of that kind are those of the site. A layer that has its weight for itself has them all; of a tied
/// weight each has its own.
inline bool has_use(const Site& site, Use use) { return overlap(site.use(), use) || site.place().tied_to.empty(); }

/// Whether other threads, which are in no scope, compute beside this one.
inline bool is_beside_others(const Scope& scope) {
  return at::in_parallel_region() && !scope.is_parallel && !CarriedHere::is();
}

/// Whether somebody expects a gradient from what is computed without one.
inline bool misses_gradient(const at::Tensor& input) {
  return !at::GradMode::is_enabled() && input.defined() && input.requires_grad() && !input.is_leaf();
}

/// Notes an input of a layer that has no update, by which the rows of a batch may be known, and of which the first
/// `leading` dimensions may count them.
inline void note_input(const at::Tensor& x, int64_t leading) {
  const auto* scopes = ActiveScopes::current();
  if (scopes == nullptr) return;
  for (const auto& scope : scopes->effective()) {
    if (scope->set->rows() != nullptr) scope->set->rows()->note(x.sizes(), leading);
  }
}

/// Whether rows of a batch have adapters of their own in the scopes of this thread.
inline bool are_in_rows() {
  const auto* scopes = ActiveScopes::current();
  if (scopes == nullptr) return false;
  const auto& all = scopes->effective();
  return std::any_of(all.begin(), all.end(), [](const auto& scope) { return scope->set->rows() != nullptr; });
}

/// Warns where an operand for which there is no update is a copy of a weight that the active scopes adapt.
inline void look_for_copy(const at::Tensor& operand) {
  const auto* scopes = ActiveScopes::current();
  const auto origin = scopes == nullptr ? at::Tensor() : Copies::origin(operand);
  if (!origin.defined()) return;
  for (const auto& scope : scopes->effective()) {
    scope->set->table().for_each_in_storage_of(origin, [&](const ActiveSite& active) {
      if (active.base.weight().is_same(origin)) scope->usage->warn_of_copy(*active.site);
    });
  }
}

/// Notes that a product was computed with an operand for which there is no update.
inline void note_passed(const at::Tensor& operand) {
  const auto* scopes = ActiveScopes::current();
  if (scopes == nullptr) return;
  for (const auto& scope : scopes->effective()) {
    if (!scope->was_passed.load(std::memory_order_relaxed)) scope->was_passed = true;
  }
  look_for_copy(operand);
}

/// Calls `visit(scope, active, part)` for every adapted weight of the active scopes of which `operand` is a part, for
/// the uses that are meant. Throws for an operand of `operation` that has numbers of a weight and others beside them.
template <class Visit>
void for_each_match(const at::Tensor& operand, Use use, const char* operation, const Visit& visit) {
  const auto* scopes = ActiveScopes::current();
  if (scopes == nullptr) return;
  for (const auto& scope : scopes->effective()) {
    check_left(*scope);
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

/// The updates that act on an operand of `operation`, which is going to compute with them; `without_gradient` as in
/// `Usage::record`. What is merged, also since the scope opened, is in the weight and does not act again.
inline Updates find_updates(const at::Tensor& operand, Use use, const char* operation, bool without_gradient = false) {
  Updates updates;
  const Site* first = nullptr;
  for_each_match(operand, use, operation, [&](const Scope& scope, const ActiveSite& active, const Part& part) {
    if (first == nullptr) first = active.site.get();
    TORCH_CHECK(overlap(first->use(), active.site->use()), "lora: ", operation, " got the weight that \"",
                first->name(), "\" and \"", active.site->name(),
                "\" share, each with an update of its own. It neither multiplies with ",
                "the weight nor looks it up, so it is not known whose update is meant; give one of them a copy of the ",
                "weight first");
    scope.usage->record(*active.site, operation, /*adapted=*/true, without_gradient);
    if (!scope.was_used.load(std::memory_order_relaxed)) scope.was_used = true;
    if (is_beside_others(scope)) scope.usage->warn_of_parallel(*active.site);
    TORCH_CHECK(!active.was_merged_since(), "lora: an adapter of \"", active.site->name(),
                "\" was merged in a scope of ", "others, which began with the weight as it was; leave the scope first");
    const bool training = active.site->is_training();
    for (const auto& acting : active.methods) {
      const bool is_merged = active.site->is_merged() && active.site->is_in(acting.method.get());
      if (is_merged) continue;
      updates.push_back({acting.method.get(), &active.base, part, training, acting.weight});
      updates.back().followers = active.followers.get();
      if (const auto* rows = scope.set->rows())
        updates.back().rows = {rows, acting.group, active.row_axis, &active.site->name()};
    }
  });
  return updates;
}

/// Throws for a weight that the active scopes adapt.
inline void check_memory_stays(const at::Tensor& tensor) {
  for_each_match(tensor, Use::kAny, [](const Scope&, const ActiveSite& active, const Part&) {
    TORCH_CHECK(false, "lora: the weight of ", active.site->name(), " gets other data, as by moving, casting, ",
                "loading or quantizing a model, inside of a scope of its adapters; leave the scope first");
  });
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
