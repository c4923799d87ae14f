#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <lora/method/term.hpp>
#include <lora/system/node.hpp>
#include <lora/version.hpp>
#include <lora/weight/frozen_product.hpp>
#include <lora/weight/key.hpp>
#include <lora/weight/plain.hpp>
#include <lora/weight/thin_product.hpp>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

// Products that have one input, as those of an attention's queries, keys and values, or of a gate and what it lets
// through. Beside the frozen product each passes over its input once in forward, and over it and its gradient in
// backward; together they do so once for all of them.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The node of autograd of an input x (N, in) and of what factors A_i (rank_i, in) make of it, S_i = A_i x^T:
///
///   dx = sum of g_j M_j over the products + sum_i G_i^T A_i,   dA_i = G_i x,   where G_i = dL/dS_i
///
/// The products add theirs to one sum, each in the pass of backward that it runs in. Edge 0 leads to x, edge i to A_i;
/// nothing else is known of factors whose S_i nobody uses.
class SharedInputNode : public torch::autograd::Node {
  using Tensors = torch::autograd::variable_list;

 public:
  SharedInputNode() = default;

  /// The node of x and of factors that lie together in `all`.
  static NodePointer make(const at::Tensor& x, const std::vector<at::Tensor>& factors, at::Tensor all) {
    auto node = make_node<SharedInputNode>();
    torch::autograd::edge_list edges{edge_of(x)};
    node->x_ = {x, /*is_output=*/false};
    for (const auto& factor : factors) {
      edges.push_back(edge_of(factor));
      node->factors_.emplace_back(factor, /*is_output=*/false);
    }
    node->all_ = std::move(all);
    node->is_open_.assign(factors.size(), false);
    node->set_next_edges(std::move(edges));
    return node;
  }

  /// Adds g M to the gradient of x, for the product whose node runs now and has this one first. False where that cannot
  /// be, and the gradient has to take its own way: where the node leads elsewhere, as inside of a checkpoint, or runs
  /// on another stream.
  static bool add(const at::Tensor& g, const at::Tensor& matrix) {
    const auto running = torch::autograd::get_current_node();
    const auto task = torch::autograd::get_current_graph_task_id();
    if (!running || task < 0 || running->num_outputs() == 0) return false;
    auto* node = dynamic_cast<SharedInputNode*>(running->next_edge(0).function.get());
    if (node == nullptr || running->input_metadata(0).stream() != node->input_metadata(0).stream()) return false;
    if (!node->task_should_compute_output(0)) return true;  // the factors alone are asked for
    const auto sum = node->take(task);
    node->put(task, sum.defined() ? plus_matrix_product(sum, g, matrix) : matrix_product(g, matrix));
    return true;
  }

  std::string name() const override { return "lora::SharedInput"; }

  /// Notes that somebody has S_i from now on. False where it is too late for that.
  bool hand_out(size_t i) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!all_.defined()) return false;
    is_open_[i] = true;
    return true;
  }

  /// What autograd calls after a pass that keeps nothing. Losses of products may have a pass each, so the last one lets
  /// go.
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (std::find(is_open_.begin(), is_open_.end(), true) != is_open_.end()) return;
    x_.reset_data();
    for (auto& factor : factors_) factor.reset_data();
    all_.reset();
  }

 protected:
  Tensors apply(Tensors&& gradients) override {
    const BelowInterception below;
    const auto sum = take(torch::autograd::get_current_graph_task_id());
    auto& g = gradients[0];
    auto dx = sum.defined() && g.defined() ? sum + g : sum.defined() ? sum : g;
    const bool owns_dx = sum.defined();  // what came from elsewhere others may hold, too
    Tensors results(gradients.size()), given;
    std::vector<size_t> places;
    for (size_t i = 1; i < gradients.size(); ++i) {
      if (!gradients[i].defined()) continue;
      given.push_back(gradients[i]);
      places.push_back(i);
    }
    const auto [x, acting, all] = saved(places);
    const auto wants = [&](size_t i) { return task_should_compute_output(i); };
    if (given.empty()) {
      results[0] = dx;
    } else if (at::GradMode::is_enabled() || !std::all_of(given.begin(), given.end(), is_plain)) {
      for (size_t i = 0; i < given.size(); ++i) {
        if (wants(places[i])) results[places[i]] = given[i].mm(in_type(x, given[i].scalar_type()));
        if (!wants(0)) continue;
        const auto added = in_type(given[i].t().mm(acting[i]), x.scalar_type());
        dx = dx.defined() ? dx + added : added;
      }
      results[0] = dx;
    } else {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      const auto together = 1 + given.size() == gradients.size() ? all : at::cat(acting);
      const auto G = given.size() == 1 ? given.front() : at::cat(given);
      if (wants(0)) results[0] = plus(dx, owns_dx, G, together, x);
      if (std::any_of(places.begin(), places.end(), wants)) {
        const auto sums = thin_mm_like(together, G, x, /*scale=*/1);
        int64_t row = 0;
        for (size_t i = 0; i < given.size(); row += acting[i++].size(0)) {
          // A copy: whoever keeps a gradient is not to keep those of others.
          if (wants(places[i])) results[places[i]] = sums.narrow(0, row, acting[i].size(0)).clone();
        }
      }
    }
    return results;
  }

 private:
  struct Saved {
    at::Tensor x;
    Tensors factors;  // at the places that are asked for: others may have been written to
    at::Tensor all;
  };

  /// dx + G^T A, in the type of x.
  static at::Tensor plus(const at::Tensor& dx, bool owns_dx, const at::Tensor& G, const at::Tensor& A,
                         const at::Tensor& x) {
    if (!dx.defined()) return in_type(G.t().mm(A), x.scalar_type());
    auto sum = owns_dx ? dx : dx.clone();
    add_thin_mm(sum, G, A, /*scale=*/1);
    return sum;
  }

  Saved saved(const std::vector<size_t>& places) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (places.empty()) return {};
    Saved some{x_.unpack(), {}, all_};
    for (const auto place : places) {
      some.factors.push_back(factors_[place - 1].unpack());
      is_open_[place - 1] = false;
    }
    return some;
  }

  /// The sum of a pass, which is not kept here any more.
  at::Tensor take(int64_t task) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = std::find_if(sums_.begin(), sums_.end(), [&](const auto& sum) { return sum.first == task; });
    if (found == sums_.end()) return {};
    auto sum = std::move(found->second);
    sums_.erase(found);
    return sum;
  }
  void put(int64_t task, at::Tensor sum) {
    const std::lock_guard<std::mutex> lock(mutex_);
    sums_.emplace_back(task, std::move(sum));
  }

  torch::autograd::SavedVariable x_;
  std::vector<torch::autograd::SavedVariable> factors_;
  at::Tensor all_;
  std::vector<bool> is_open_;  // S_i was handed out, and had no pass yet
  std::mutex mutex_;
  std::vector<std::pair<int64_t, at::Tensor>> sums_;  // of passes that are under way
};

/// An input x (N, in) with the products S_i = A_i x^T of some factors, computed at once.
class SharedInput {
 public:
  /// Whether x is so large that passes over it are what counts, and tells when it is written to by an operator.
  static bool is_worth_it(const at::Tensor& x) { return x.numel() >= least_numbers() && !x.is_inference(); }

  /// From so many numbers on; for tests.
  static std::atomic<int64_t>& least_numbers() {
    static std::atomic<int64_t> least{1 << 16};
    return least;
  }

  /// None where the factors cannot lie together, or one of them does not tell when it is written to.
  static std::shared_ptr<const SharedInput> make(const at::Tensor& x, const std::vector<at::Tensor>& factors) {
    const auto& first = factors.front();
    const auto fits = [&](const at::Tensor& factor) {
      return !factor.is_inference() && factor.dim() == 2 && factor.size(1) == x.size(1) &&
             factor.scalar_type() == first.scalar_type() && factor.device() == x.device() && is_plain(factor);
    };
    if (!std::all_of(factors.begin(), factors.end(), fits)) return nullptr;
    return std::shared_ptr<const SharedInput>(new SharedInput(x, factors));
  }

  /// For the products; its gradient is the sum of theirs.
  const at::Tensor& x() const { return x_; }

  /// S of this factor; undefined where it is none of these, or was changed since.
  at::Tensor projected(const at::Tensor& factor) const {
    for (size_t i = 0; i < parts_.size(); ++i) {
      const auto& part = parts_[i];
      if (!part.factor.is_same(factor) || !part.is_current()) continue;
      const bool is_open = !node_ || static_cast<SharedInputNode*>(node_.get())->hand_out(i);
      return is_open ? part.projected : at::Tensor();
    }
    return {};
  }

 private:
  struct Part {
    at::Tensor factor, projected;
    int64_t version;
    bool is_trained;

    bool is_current() const { return factor._version() == version && factor.requires_grad() == is_trained; }
  };

  SharedInput(const at::Tensor& x, const std::vector<at::Tensor>& factors) : x_(x) {
    const auto needs_gradient = [](const at::Tensor& tensor) { return tensor.requires_grad(); };
    const bool needs_any = x.requires_grad() || std::any_of(factors.begin(), factors.end(), needs_gradient);
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      const auto all = at::cat(factors);
      const auto projected = thin_mm(all, x);
      int64_t row = 0;
      for (const auto& factor : factors) {
        parts_.push_back({factor, projected.narrow(0, row, factor.size(0)), factor._version(), factor.requires_grad()});
        row += factor.size(0);
      }
      if (needs_any && at::GradMode::is_enabled()) node_ = SharedInputNode::make(x, factors, all);
    }
    if (!node_) return;
    if (x.requires_grad()) {
      x_ = x.detach();
      torch::autograd::set_history(x_, node_);
    } else {
      node_->add_input_metadata(x);
    }
    for (auto& part : parts_) torch::autograd::set_history(part.projected, node_);
  }

  NodePointer node_;
  at::Tensor x_;
  std::vector<Part> parts_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
