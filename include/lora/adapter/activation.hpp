#pragma once

#include <ATen/ThreadLocalState.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

#include <lora/intercept/kernels.hpp>
#include <lora/intercept/observe.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Applies the adapters of a scope to the uses of one layer's weight.
class LayerHandler final : public WeightHandler {
 public:
  LayerHandler(std::shared_ptr<AdaptedLayer> layer, std::vector<std::string> adapters)
      : layer_(std::move(layer)), adapters_(std::move(adapters)), weight_(layer_->target.slot->read()) {}

  AdaptedLayer& layer() const { return *layer_; }
  const at::Tensor& weight() const { return weight_; }

  bool accepts(Use use) const override { return overlap(target().use, use); }
  bool adds_to(Use use) const override {
    const auto& shape = target().site->view().shape();
    return shape.batch.empty() && shape.is_lookup == (use == Use::kLookup);
  }
  void count_use() override { layer_->uses.fetch_add(1, std::memory_order_relaxed); }

  at::Tensor adapt(const at::Tensor& x, const at::Tensor& y, const at::Tensor& bias, Multiply multiply) override {
    count_use();
    const auto matrix = target().site->view().matrix(weight_);
    return target().site->forward({x, y, matrix, bias, target().is_training(), std::move(multiply)}, adapters_);
  }

  at::Tensor delta(bool drop_features) override {
    return target().site->delta(weight_, adapters_, drop_features && target().is_training());
  }

  double dropout() const override { return target().is_training() ? target().site->dropout(adapters_) : 0; }

 private:
  const Target& target() const { return layer_->target; }

  std::shared_ptr<AdaptedLayer> layer_;
  std::vector<std::string> adapters_;
  at::Tensor weight_;  // as it was when the scope opened
};

/// What stands in for a tensor of the model in a scope: the copy of it that an adapter trains.
struct Replacement {
  Use use;  // which uses of the tensor are meant
  std::function<at::Tensor(const at::Tensor& original)> substitute;
};

using ReplacementTable = StorageTable<Replacement>;

/// The scope of one `Adapters::activate`.
class AdapterScope final : public Scope {
 public:
  AdapterScope(std::shared_ptr<Usage> usage, const std::vector<std::shared_ptr<AdaptedLayer>>& layers,
               const std::vector<std::string>& adapters, ReplacementTable replacements)
      : usage_(std::move(usage)), replacements_(std::move(replacements)) {
    for (const auto& layer : layers) {
      const auto on_it = [&](const std::string& name) { return layer->target.site->contains(name); };
      if (std::none_of(adapters.begin(), adapters.end(), on_it)) continue;
      handlers_.push_back(std::make_unique<LayerHandler>(layer, adapters));
      weights_.add(handlers_.back()->weight(), handlers_.back().get());
    }
  }

  const void* owner() const override { return usage_.get(); }
  const WeightTable& weights() const override { return weights_; }
  bool observes() const override { return usage_->is_watching() || !replacements_.is_empty(); }

  void run(const c10::OperatorHandle& op, torch::jit::Stack& stack, const std::function<void()>& run) override {
    if (!replacements_.is_empty()) replace(op, stack);
    if (!usage_->is_watching()) return run();
    const auto used = is_in_backward() ? std::vector<AdaptedLayer*>() : used_by(op, stack);
    usage_->watch(op, stack, used, run);
    const auto is_reached = [](const auto& handler) { return handler->layer().uses > 0; };
    if (!used.empty() && std::all_of(handlers_.begin(), handlers_.end(), is_reached)) usage_->stop_watching();
  }

  /// Names of the scope's layers that no pass has used so far.
  std::vector<std::string> unreached() const {
    std::vector<std::string> names;
    for (const auto& handler : handlers_) {
      if (handler->layer().uses == 0) names.push_back(handler->layer().target.name);
    }
    return names;
  }

  Usage& usage() const { return *usage_; }

 private:
  /// Puts the trained copies in the places of the tensors they are copies of. Autograd's own backward, which computes
  /// without gradients, has what it needs from the forward pass.
  void replace(const c10::OperatorHandle& op, torch::jit::Stack& stack) const {
    if (is_in_backward()) return;
    const bool is_lookup = op.operator_name().name.rfind("aten::embedding", 0) == 0;
    for_each_operand(op, stack, [&](const at::Tensor& operand) {
      at::Tensor replaced;
      replacements_.for_each_in_storage_of(operand, [&](const ReplacementTable::Entry& entry) {
        const auto& [use, substitute] = entry.value;
        const bool is_meant = overlap(use, is_lookup ? Use::kLookup : Use::kProduct);
        if (!replaced.defined() && is_meant && part_of(entry.tensor, operand))
          replaced = same_part(substitute(entry.tensor), entry.tensor, operand);
      });
      return replaced.defined() ? replaced : operand;
    });
  }

  /// Whether autograd computes a derivative in a pass that began after the scope; what is recomputed in it is another
  /// forward pass.
  bool is_in_backward() const {
    return backward_pass != torch::autograd::get_current_graph_task_id() && !at::GradMode::is_enabled();
  }

  /// The layers whose weights are among the operands.
  std::vector<AdaptedLayer*> used_by(const c10::OperatorHandle& op, torch::jit::Stack& stack) const {
    std::vector<AdaptedLayer*> used;
    for_each_operand(op, stack, [&](const at::Tensor& operand) {
      weights_.for_each_in_storage_of(operand, [&](const WeightTable::Entry& entry) {
        if (part_of(entry.tensor, operand)) used.push_back(&static_cast<LayerHandler*>(entry.value)->layer());
      });
      return operand;
    });
    return used;
  }

  std::shared_ptr<Usage> usage_;
  ReplacementTable replacements_;
  std::vector<std::unique_ptr<LayerHandler>> handlers_;
  WeightTable weights_;
};

}  // namespace detail

/// While it lives, forward passes on this thread use the adapters it names; leaving it restores the thread exactly.
/// Made by `Adapters::activate`. Scopes nest: of several scopes of the same adapters the innermost decides, those of
/// different `Adapters` add up. Weights are looked up when the scope opens. Autograd's threads, at::launch and what
/// `carry` wraps have the scopes of the thread they were started from; other threads run the base model.
///
/// Leaving a scope when some of its layers were never used by a forward pass warns, once for each `Adapters`.
class [[nodiscard]] Activation {
 public:
  Activation(std::shared_ptr<detail::AdapterScope> scope, bool is_script)
      : scope_(std::move(scope)), guard_(std::make_unique<detail::ScopeGuard>(registered(scope_))) {
    if (is_script) unoptimized_ = std::make_unique<torch::jit::GraphOptimizerEnabledGuard>(false);
  }

  ~Activation() {
    const bool is_moved_from = scope_ == nullptr;
    if (!is_moved_from && std::uncaught_exceptions() == exceptions_) scope_->usage().warn(scope_->unreached());
  }

  /// Moved to another variable of the same thread, e.g. into a std::optional.
  Activation(Activation&&) = default;
  Activation& operator=(Activation&&) = delete;

 private:
  static std::shared_ptr<detail::AdapterScope> registered(std::shared_ptr<detail::AdapterScope> scope) {
    detail::register_kernels();
    return scope;
  }

  std::shared_ptr<detail::AdapterScope> scope_;
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
