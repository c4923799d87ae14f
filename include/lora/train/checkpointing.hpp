#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <lora/adapter/activation.hpp>
#include <lora/product_run.hpp>
#include <lora/train/new_graph.hpp>
#include <lora/train/run_state.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// A function whose activations are not kept. To autograd it is one node, which leads where the function's own graph
/// led: to the inputs, and to everything else that it used and that has a gradient, above all the parameters. Backward
/// computes the graph once more and gets the gradients of these; nothing else of LibTorch's graph is touched, so hooks,
/// accumulation and torch::autograd::grad are as without it.
class Checkpoint : public torch::autograd::Node {
 public:
  using Tensors = torch::autograd::variable_list;
  using Function = std::function<Tensors(const Tensors&)>;

  static Tensors run(Function function, const Tensors& inputs) {
    if (!at::GradMode::is_enabled()) return function(inputs);
    for (const auto& input : inputs) {
      if (input.defined()) input.grad_fn();  // that of a view is made when it is asked for
    }
    const auto before = versions(inputs);
    const auto again = std::make_shared<const Again>(std::move(function), inputs);
    const NewGraph graph;
    auto results = again->first(inputs);
    check_unchanged(inputs, before);
    auto roots = roots_of(results);
    if (roots.empty()) return results;
    Exits exits;
    graph.for_each_exit(roots, [&](const auto& edge) { exits.place(edge); });

    const auto node = make_node<Checkpoint>();
    node->exits_ = exits.edges();
    node->set_next_edges(exits.edges());
    node->again_ = again;
    for (const auto& input : inputs) node->inputs_.emplace_back(input, /*is_output=*/false);
    for (auto& result : results) {
      if (!has_gradient(result)) continue;
      const auto shares = [&](const at::Tensor& input) { return input.defined() && input.is_alias_of(result); };
      const bool is_input = std::any_of(inputs.begin(), inputs.end(), shares);
      result = is_input ? result.detach().clone() : result.detach();
      torch::autograd::set_history(result, node);
    }
    return results;
  }

  std::string name() const override { return "lora::Checkpoint"; }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    inputs_.clear();
    again_.reset();
  }

 protected:
  Tensors apply(Tensors&& gradients) override {
    const auto [inputs, again] = saved();
    const NewGraph graph;
    auto roots = roots_of((*again)(inputs));
    const auto sink = make_node<Sink>();
    // Their order may be another one: products that are computed one by one at first may be computed together later.
    Exits all(exits_), exits;
    std::vector<std::pair<torch::autograd::Edge*, torch::autograd::Edge>> led;
    graph.for_each_exit(roots, [&](torch::autograd::Edge& edge) {
      led.emplace_back(&edge, edge);
      exits.place(edge);
      edge = torch::autograd::Edge(sink, all.place(edge));
    });
    const bool are_as_many = exits.edges().size() == exits_.size() && all.edges().size() == exits_.size();
    check_same(roots.size() == gradients.size() && are_as_many);
    for (const auto& edge : exits_) sink->add(edge.function->input_metadata(edge.input_nr));
    auto found = gradients_at(sink, roots, gradients);
    for (auto& [edge, before] : led) *edge = before;  // for a second derivative, whose graph goes through these nodes
    return found;
  }

 private:
  /// The function as it was called first.
  class Again {
   public:
    Again(Function function, const Tensors& inputs)
        : random_(inputs), types_(inputs), carried_(carry(std::move(function))) {}

    Tensors first(const Tensors& inputs) const {
      const WithoutCastCache no_cache;
      const OwnProductRun own_run;  // backward finds the products of the function alone
      return carried_(inputs);
    }
    Tensors operator()(const Tensors& inputs) const {
      const Restored<RandomState> random(random_);
      const Restored<CastTypes> types(types_);
      return first(inputs);
    }

   private:
    RandomState random_;
    CastTypes types_;
    Carried<Function> carried_;
  };

  static bool has_gradient(const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }

  static torch::autograd::edge_list roots_of(const Tensors& results) {
    torch::autograd::edge_list roots;
    for (const auto& result : results) {
      if (has_gradient(result)) roots.push_back(torch::autograd::impl::gradient_edge(result));
    }
    return roots;
  }

  static std::vector<int64_t> versions(const Tensors& tensors) {
    std::vector<int64_t> all;
    for (const auto& tensor : tensors)
      all.push_back(tensor.defined() && !tensor.is_inference() ? tensor._version() : 0);
    return all;
  }

  static void check_unchanged(const Tensors& inputs, const std::vector<int64_t>& before) {
    const auto now = versions(inputs);
    for (size_t i = 0; i < now.size(); ++i) {
      TORCH_CHECK(now[i] == before[i], "lora::checkpoint: the function wrote to its input ", i, ", of which backward ",
                  "needs the first values; let it write to a copy");
    }
  }

  static void check_same(bool is_same) {
    TORCH_CHECK(is_same, "lora::checkpoint: in backward the function did not compute what it computed first: its ",
                "results, or the parameters and tensors with gradient that it used, are others. It has to depend on ",
                "its inputs alone, on what does not change meanwhile, and may make no part of the graph on a thread ",
                "of its own");
  }

  std::pair<Tensors, std::shared_ptr<const Again>> saved() {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(again_ != nullptr, "lora::checkpoint: a second backward pass needs the inputs, which the first one ",
                "let go; give the first one retain_graph (keep_graph)");
    Tensors inputs;
    for (const auto& input : inputs_) inputs.push_back(input.unpack());
    return {std::move(inputs), again_};
  }

  /// What arrives at each place of the sink, where somebody wants it.
  template <class SinkPointer>
  Tensors gradients_at(const SinkPointer& sink, const torch::autograd::edge_list& roots, const Tensors& gradients) {
    torch::autograd::edge_list from, wanted;
    Tensors given, found(exits_.size());
    for (size_t i = 0; i < roots.size(); ++i) {
      if (!gradients[i].defined()) continue;
      from.push_back(roots[i]);
      given.push_back(gradients[i]);
    }
    std::vector<size_t> places;
    for (size_t i = 0; i < found.size(); ++i) {
      if (!task_should_compute_output(i)) continue;
      wanted.emplace_back(sink, static_cast<uint32_t>(i));
      places.push_back(i);
    }
    if (given.empty() || wanted.empty()) return found;
    const bool is_differentiated = at::GradMode::is_enabled();
    auto arrived = torch::autograd::Engine::get_default_engine().execute(from, given, /*keep_graph=*/is_differentiated,
                                                                         /*create_graph=*/is_differentiated,
                                                                         /*accumulate_grad=*/false, wanted);
    for (size_t i = 0; i < places.size(); ++i) found[places[i]] = std::move(arrived[i]);
    return found;
  }

  torch::autograd::edge_list exits_;  // as they were first: those of the node are another checkpoint's to change
  std::vector<torch::autograd::SavedVariable> inputs_;
  std::shared_ptr<const Again> again_;
};

/// What a function of tensors may return, as a list and back.
template <class Result>
struct ResultList {
  static_assert(std::is_same_v<Result, at::Tensor>,
                "lora::checkpoint: the function has to return a tensor, or a std::vector, std::tuple or std::pair of "
                "tensors");
  static Checkpoint::Tensors pack(Result result) { return {std::move(result)}; }
  static Result unpack(Checkpoint::Tensors list) { return std::move(list.front()); }
};

template <>
struct ResultList<std::vector<at::Tensor>> {
  static Checkpoint::Tensors pack(std::vector<at::Tensor> result) { return result; }
  static std::vector<at::Tensor> unpack(Checkpoint::Tensors list) { return list; }
};

template <class Result, size_t... i>
struct ResultTuple {
  static_assert((std::is_same_v<std::tuple_element_t<i, Result>, at::Tensor> && ...),
                "lora::checkpoint: everything that the function returns has to be a tensor");
  static Checkpoint::Tensors pack(const Result& result) { return {std::get<i>(result)...}; }
  static Result unpack(const Checkpoint::Tensors& list) { return {list[i]...}; }
};

template <class Result, size_t... i>
ResultTuple<Result, i...> result_tuple(std::index_sequence<i...>);

template <class... Each>
struct ResultList<std::tuple<Each...>>
    : decltype(result_tuple<std::tuple<Each...>>(std::index_sequence_for<Each...>())) {};
template <class First, class Second>
struct ResultList<std::pair<First, Second>>
    : decltype(result_tuple<std::pair<First, Second>>(std::index_sequence_for<First, Second>())) {};

template <class Run, size_t... i>
auto call_with(Run& run, const Checkpoint::Tensors& inputs, std::index_sequence<i...> /*places*/) {
  return run(inputs[i]...);
}

}  // namespace detail

/// Runs a function of tensors without keeping its activations: backward computes them again.
///
///   auto y = lora::checkpoint([&](const at::Tensor& x) { return block->forward(x); }, x);
///
/// Shapes: any number of tensors -> a tensor, or a std::vector, std::tuple or std::pair of tensors. Values and
/// gradients are bit by bit those of `run(inputs...)` (where adapted layers in a scope share their input, up to
/// rounding), at the price of one more forward pass; of all activations inside, those of one checkpoint exist at a
/// time, beside the inputs of all. Gradients reach the inputs and everything else that `run` uses: parameters, and
/// tensors it captured. Where nothing requires one, and with gradient mode off, it just runs.
///
/// In backward the function has what it had first: the random numbers (of the CPU and of the inputs' devices; the
/// generators are then again where they were), autocast and the scopes of adapters, also where these have ended and on
/// autograd's threads. Checkpoints nest; second derivatives and torch::autograd::grad work.
///
/// `run` is copied; what it holds by reference has to live until backward. It must do the same both times: a counter in
/// it counts twice, as do running statistics. Throws c10::Error when it wrote to an input, and in backward when an
/// input was written to since, or when it used other parameters than before.
template <class Run, class... Inputs>
auto checkpoint(Run run, const Inputs&... inputs) {
  static_assert(sizeof...(Inputs) > 0 && (std::is_convertible_v<const Inputs&, at::Tensor> && ...),
                "lora::checkpoint: the inputs are one tensor or several; the function may capture everything else");
  using Places = std::index_sequence_for<Inputs...>;
  using Tensors = detail::Checkpoint::Tensors;
  using List = detail::ResultList<std::decay_t<decltype(detail::call_with(run, Tensors(), Places()))>>;
  auto function = [run = std::move(run)](const Tensors& all) mutable {
    return List::pack(detail::call_with(run, all, Places()));
  };
  return List::unpack(detail::Checkpoint::run(std::move(function), {at::Tensor(inputs)...}));
}

}  // namespace LORA_ABI
}  // namespace lora
