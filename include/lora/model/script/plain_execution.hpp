#pragma once

#include <ATen/autocast_mode.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/passes/inline_fork_wait.h>

#include <lora/model/script/module.hpp>
#include <lora/system/process_wide.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// No autocast on this thread while it lives.
class NoAutocast {
 public:
  NoAutocast() { set(false, false); }
  ~NoAutocast() { set(cpu_, cuda_); }
  NoAutocast(const NoAutocast&) = delete;
  NoAutocast& operator=(const NoAutocast&) = delete;

 private:
  static void set(bool cpu, bool cuda) {
    at::autocast::set_autocast_enabled(at::kCPU, cpu);
    at::autocast::set_autocast_enabled(at::kCUDA, cuda);
  }

  bool cpu_ = at::autocast::is_autocast_enabled(at::kCPU);
  bool cuda_ = at::autocast::is_autocast_enabled(at::kCUDA);
};

/// Has the functions of a TorchScript module run as they are written, by the plain executor, while it lives.
///
/// The optimizing executor differentiates parts of a function on its own, from what it sees in the first runs, and
/// hands out a gradient that knows nothing of the adapters. Once it has done so it keeps the plan, whatever
/// setGraphExecutorOptimize says; and it may do so on one thread while another one is inside a scope. So it is taken
/// out for good while there are adapters. Any number of these may live for one module.
class PlainExecution {
 public:
  explicit PlainExecution(torch::jit::Module module) : PlainExecution(std::move(module), Unfinished()) {
    std::lock_guard<std::mutex> lock(mutex());
    for (const auto& part : module_.modules()) {
      for (auto* method : part.type()->methods()) {
        auto* function = torch::jit::tryToGraphFunction(*method);
        const bool is_new = function != nullptr && std::find(held_.begin(), held_.end(), function) == held_.end();
        if (is_new) hold(*function);
      }
    }
  }

  ~PlainExecution() {
    std::lock_guard<std::mutex> lock(mutex());
    for (auto* function : held_) release(*function);
  }

  /// Whether something is forked that executors of its own run, which would optimize again: what is forked and then
  /// kept in a list, or returned.
  bool leaves_forks() const { return leaves_forks_; }

  PlainExecution(const PlainExecution&) = delete;
  PlainExecution& operator=(const PlainExecution&) = delete;

 private:
  using Function = torch::jit::GraphFunction;

  struct Unfinished {};
  explicit PlainExecution(torch::jit::Module module, Unfinished) : module_(std::move(module)) {}

  struct Held {
    int64_t holders;
    torch::jit::GraphExecutor executor;  // as it was
    bool casts;                          // whether the function switches autocast on by itself
    bool leaves_forks;
  };

  struct All {
    static constexpr const char* kName = "plain_execution";
    std::mutex mutex;
    std::unordered_map<Function*, Held> functions;
  };

  static std::mutex& mutex() { return process_wide<All>().mutex; }
  static std::unordered_map<Function*, Held>& all() { return process_wide<All>().functions; }

  void hold(Function& function) {
    auto found = all().find(&function);
    if (found == all().end()) found = all().emplace(&function, replaced(function)).first;
    ++found->second.holders;
    leaves_forks_ = leaves_forks_ || found->second.leaves_forks;
    held_.push_back(&function);
  }

  /// Under autocast TorchScript would compile the function once more, with casts of the weights written into it; but it
  /// does not have to, since autocast acts below TorchScript as everywhere.
  static Held replaced(Function& function) {
    const NoAutocast without;
    auto graph = function.optimized_graph()->copy();
    const bool casts = any_node(*graph->block(), [](const auto& node) {
      return node.kind() == c10::prim::Enter || node.kind() == c10::aten::_autocast_to_reduced_precision;
    });
    const bool waits = waits_for_all(*graph->block());
    if (waits) torch::jit::InlineForkWait(graph);
    torch::jit::GraphExecutor plain(graph, function.name(), torch::jit::SIMPLE);
    auto former = std::exchange(function.get_executor(), std::move(plain));
    function._set_initial_executor_execution_mode(torch::jit::SIMPLE);
    if (!casts) function._set_ignore_amp(true);
    return {0, std::move(former), casts, !waits};
  }

  static void release(Function& function) {
    auto& held = all().at(&function);
    if (--held.holders > 0) return;
    const NoAutocast without;
    function._set_initial_executor_execution_mode(torch::jit::getExecutorMode() ? torch::jit::PROFILING
                                                                                : torch::jit::SIMPLE);
    if (!held.casts) function._set_ignore_amp(false);
    function.get_executor() = std::move(held.executor);
    all().erase(&function);
  }

  /// Whether everything that is forked is only waited for, so that it can be computed in the place where it is forked.
  static bool waits_for_all(const torch::jit::Block& block) {
    return !any_node(block, [](const auto& node) {
      if (node.kind() != c10::prim::fork) return false;
      const auto& uses = node.output()->uses();
      return !std::all_of(uses.begin(), uses.end(),
                          [](const auto& use) { return use.user->kind() == c10::aten::wait; });
    });
  }

  torch::jit::Module module_;  // whose class owns the functions
  std::vector<Function*> held_;
  bool leaves_forks_ = false;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
