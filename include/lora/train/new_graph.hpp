#pragma once

#include <ATen/SequenceNumber.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/function.h>

#include <lora/shared_input.hpp>
#include <lora/system/node.hpp>
#include <lora/version.hpp>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The nodes of autograd that are made on this thread from now on, and where they lead.
class NewGraph {
 public:
  using Edges = torch::autograd::edge_list;

  /// Calls `visit(edge)` for every edge, of `roots` or of a new node that they lead to, which ends at an older node or
  /// at a leaf. The order is the same for the same graph. `visit` may write another edge there.
  template <class Visit>
  void for_each_exit(Edges& roots, const Visit& visit) const {
    std::unordered_set<const torch::autograd::Edge*> seen;
    std::vector<std::pair<torch::autograd::Edge*, size_t>> open;
    const auto follow = [&](Edges& edges, size_t first, size_t count) {
      if (count > 0 && seen.insert(&edges[first]).second) open.emplace_back(&edges[first], count);
    };
    follow(roots, 0, roots.size());
    while (!open.empty()) {
      const auto [first, count] = open.back();
      open.pop_back();
      for (auto* edge = first; edge != first + count; ++edge) {
        auto* node = edge->function.get();
        if (node == nullptr) continue;
        if (!is_new(*node)) {
          visit(*edge);
        } else if (dynamic_cast<const SharedInputNode*>(node) != nullptr) {  // of its factors only those that are used
          for (const size_t own : {size_t{0}, size_t{edge->input_nr}}) follow(node->next_edges(), own, 1);
        } else {
          follow(node->next_edges(), 0, node->next_edges().size());
        }
      }
    }
  }

 private:
  bool is_new(const torch::autograd::Node& node) const {
    const bool is_leaf = node.sequence_nr() == std::numeric_limits<uint64_t>::max();
    return !is_leaf && node.thread_id() == thread_ && node.sequence_nr() >= first_;
  }

  uint64_t thread_ = at::RecordFunction::currentThreadId();
  uint64_t first_ = at::sequence_number::peek();
};

/// Different edges, each with its place.
class Exits {
 public:
  using Edge = torch::autograd::Edge;

  Exits() = default;
  /// Those have theirs already.
  explicit Exits(const torch::autograd::edge_list& edges) {
    for (const auto& edge : edges) place(edge);
  }

  uint32_t place(const Edge& edge) {
    const auto [found, is_new] = places_.emplace(edge, static_cast<uint32_t>(edges_.size()));
    if (is_new) edges_.push_back(edge);
    return found->second;
  }
  torch::autograd::edge_list edges() const { return edges_; }

 private:
  torch::autograd::edge_list edges_;
  std::unordered_map<Edge, uint32_t> places_;
};

/// Where gradients arrive that are wanted.
struct Sink : torch::autograd::Node {
  void add(const torch::autograd::InputMetadata& metadata) { input_metadata_.push_back(metadata); }
  torch::autograd::variable_list apply(torch::autograd::variable_list&& /*gradients*/) override { return {}; }
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
