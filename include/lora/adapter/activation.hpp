#pragma once

#include <ATen/ThreadLocalState.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

#include <lora/intercept/kernels.hpp>
#include <lora/version.hpp>

#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// While it lives, forward passes on this thread use the adapters it names; leaving it restores the thread exactly.
/// Made by `Adapters::activate`. Scopes nest: of several scopes of the same adapters the innermost decides, those of
/// different `Adapters` add up. Every use of an adapted weight in it computes with W'; what was added, removed or
/// loaded meanwhile acts in scopes that are opened later. Autograd's threads, at::launch and what `carry` wraps have
/// the scopes of the thread they were started from; other threads run the base model.
///
/// Leaving a scope when some of its layers were never used by a forward pass warns, once for each `Adapters`.
class [[nodiscard]] Activation {
 public:
  Activation(std::shared_ptr<const detail::ActiveSet> set, std::shared_ptr<detail::Usage> usage, bool is_script)
      : scope_(std::make_shared<const detail::Scope>(detail::Scope{std::move(set), std::move(usage)})),
        guard_(std::make_unique<detail::ScopeGuard>(scope_)) {
    if (is_script) unoptimized_ = std::make_unique<torch::jit::GraphOptimizerEnabledGuard>(false);
  }

  ~Activation() {
    const bool is_moved_from = scope_ == nullptr;
    if (!is_moved_from && std::uncaught_exceptions() == exceptions_) scope_->usage->warn(unreached());
  }

  /// Moved to another variable of the same thread, e.g. into a std::optional.
  Activation(Activation&&) = default;
  Activation& operator=(Activation&&) = delete;

 private:
  /// Names of the scope's layers that no pass has used so far.
  std::vector<std::string> unreached() const {
    std::vector<std::string> names;
    for (const auto& active : scope_->set->sites()) {
      const bool is_layer = !active.site->kind().empty();  // and not a bias, or what is trained in full
      if (is_layer && active.site->uses == 0) names.push_back(active.site->name());
    }
    return names;
  }

  std::shared_ptr<const detail::Scope> scope_;
  std::unique_ptr<detail::ScopeGuard> guard_;
  // TorchScript's optimizer would replace autograd by derivatives of its own, which know nothing of the adapters.
  std::unique_ptr<torch::jit::GraphOptimizerEnabledGuard> unoptimized_;
  int exceptions_ = std::uncaught_exceptions();
};

/// Wraps a function so that it runs with the scopes of this thread, and with its gradient and autocast modes, wherever
/// it is called:
///
///   auto active = adapters.activate();
///   pool.run(lora::carry([&] { model->forward(x); }));
///
/// The scopes stay in effect for it also when they were left here meanwhile.
template <class Function>
auto carry(Function function) {
  return [state = at::ThreadLocalState(), optimize = torch::jit::getGraphExecutorOptimize(),
          function = std::move(function)](auto&&... arguments) {
    at::ThreadLocalStateGuard scopes(state);
    torch::jit::GraphOptimizerEnabledGuard optimizer(optimize);
    return function(std::forward<decltype(arguments)>(arguments)...);
  };
}

}  // namespace LORA_ABI
}  // namespace lora
