#pragma once

#include <ATen/ThreadLocalState.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

#include <lora/fwd.hpp>
#include <lora/intercept/carried_here.hpp>
#include <lora/linkage.hpp>
#include <lora/product_run.hpp>
#include <lora/version.hpp>

#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// What `carry` returns: copied, moved and called as the function it wraps.
template <class Function>
class Carried {
 public:
  explicit Carried(Function function) : function_(std::move(function)) {}

  template <class... Arguments>
  std::invoke_result_t<Function&, Arguments...> operator()(Arguments&&... arguments) {
    const Here here(*this);
    return std::invoke(function_, std::forward<Arguments>(arguments)...);
  }
  template <class... Arguments>
  std::invoke_result_t<const Function&, Arguments...> operator()(Arguments&&... arguments) const {
    const Here here(*this);
    return std::invoke(function_, std::forward<Arguments>(arguments)...);
  }

 private:
  struct Here {
    explicit Here(const Carried& carried) : state(carried.state_), optimizer(carried.optimize_) {}
    at::ThreadLocalStateGuard state;
    torch::jit::GraphOptimizerEnabledGuard optimizer;
    CarriedHere is_here;
    OwnProductRun run;
  };

  at::ThreadLocalState state_;
  bool optimize_ = torch::jit::getGraphExecutorOptimize();
  Function function_;
};

}  // namespace detail

/// While it lives, forward passes on this thread use the adapters it names; leaving it restores the thread exactly.
/// Made by `Adapters::activate`. Scopes nest and end in any order: of several scopes of the same adapters the innermost
/// decides, those of different `Adapters` add up. Every use of an adapted weight in it computes with W'; what was
/// added, removed or loaded meanwhile acts in scopes that are opened later. Autograd's threads, at::launch and what
/// `carry` wraps have the scopes of the thread they were started from; other threads run the base model.
///
/// Warns, each once for each `Adapters`: when a scope is left and some of its layers were never used by a forward pass;
/// when products ran in it and none used an adapter, as where another model runs; when a product or a lookup in it took
/// a copy of one of its weights, as a clone of the model does beside it; when a weight was only used with gradient mode
/// off although its input has a gradient, as a torch::autograd::Function does, so that its adapter gets none; when a
/// thread of a parallel region uses it, whose other threads are in no scope; when modules with running statistics were
/// in training mode, which changes the base. A scope that is left on another thread than its own stays open there: that
/// warns, and the next use on its own thread throws.
class [[nodiscard]] Activation {
 public:
  Activation(std::shared_ptr<const detail::ActiveSet> set, std::shared_ptr<detail::Usage> usage,
             bool needs_plain_scripts);

  ~Activation();

  /// Moved to another variable of the same thread, e.g. into a std::optional.
  Activation(Activation&&) noexcept;
  Activation& operator=(Activation&&) = delete;

 private:
  void warn() const;

  std::shared_ptr<const detail::Scope> scope_;
  std::unique_ptr<detail::ScopeGuard> guard_;
  int exceptions_ = std::uncaught_exceptions();
};

/// A scope of no adapters. As in any other, weights that are held in few bits are found, and products of float32 with
/// frozen weights are computed by the faster one of LibTorch's libraries, for a base model, or a merged one, that is to
/// be as fast as an adapted one:
///
///   auto fast = lora::fast_products();
///   auto y = model->forward(x);
///
/// On processors with AVX-512 that are not Intel's, and with LibTorch's MKL, large products take half of their time
/// then (see weight/dense_product.hpp); elsewhere nothing changes.
LORA_INLINE Activation fast_products();

/// Wraps a function so that it runs with the scopes of this thread, and with its gradient and autocast modes, wherever
/// it is called:
///
///   auto active = adapters.activate();
///   pool.run(lora::carry([&] { model->forward(x); }));
///
/// The scopes stay in effect for it also when they were left here meanwhile.
template <class Function>
auto carry(Function function) {
  return detail::Carried<Function>(std::move(function));
}

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <lora/intercept/kernels.hpp>

namespace lora {
inline namespace LORA_ABI {

namespace detail {

/// Names of a scope's layers that are so.
template <class Is>
std::vector<std::string> names_of(const Scope& scope, const Is& is) {
  std::vector<std::string> names;
  for (const auto& active : scope.set->sites()) {
    const bool is_layer = !active.site->kind().empty();  // and not a bias, or what is trained in full
    if (is_layer && is(*active.site)) names.push_back(active.site->name());
  }
  return names;
}

}  // namespace detail

LORA_INLINE Activation::Activation(Activation&&) noexcept = default;

LORA_INLINE Activation::Activation(std::shared_ptr<const detail::ActiveSet> set, std::shared_ptr<detail::Usage> usage,
                                   bool needs_plain_scripts)
    : scope_(std::make_shared<const detail::Scope>(std::move(set), std::move(usage), needs_plain_scripts)),
      guard_(std::make_unique<detail::ScopeGuard>(scope_)) {}

LORA_INLINE Activation::~Activation() {
  const bool is_moved_from = scope_ == nullptr;
  if (!is_moved_from && std::uncaught_exceptions() == exceptions_) warn();
}

LORA_INLINE Activation fast_products() {
  detail::register_kernels();
  using Set = const detail::ActiveSet;
  static const auto nothing = std::make_shared<Set>(std::vector<detail::ActiveSite>(), std::vector<Place>());
  return {nothing, std::make_shared<detail::Usage>(), /*needs_plain_scripts=*/false};
}

LORA_INLINE void Activation::warn() const {
  const auto unreached = detail::names_of(*scope_, [](const Site& site) { return site.uses.count == 0; });
  scope_->usage->warn_of_unreached(unreached);
  const bool is_base = scope_->set->sites().empty();  // for every row
  if (unreached.empty() && !is_base && scope_->was_passed && !scope_->was_used) scope_->usage->warn_of_other_model();
  if (scope_->was_used) scope_->usage->warn_of_statistics(scope_->set->statistics());
  // One use without gradient may be that of a checkpoint, which is computed again when the scope has ended.
  scope_->usage->warn_of_gradients(detail::names_of(
      *scope_, [](const Site& site) { return site.uses.without_gradient > 1 && !site.uses.with_gradient; }));
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
