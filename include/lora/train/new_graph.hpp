#pragma once

#include <ATen/SequenceNumber.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/function.h>

#include <lora/version.hpp>

#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>
#include <unordered_map>
#include <unordered_set>
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
    std::unordered_set<const torch::autograd::Node*> seen;
    std::vector<Edges*> open{&roots};
    while (!open.empty()) {
      auto& edges = *open.back();
      open.pop_back();
      for (auto& edge : edges) {
        auto* node = edge.function.get();
        if (node == nullptr) continue;
        if (!is_new(*node)) {
          visit(edge);
        } else if (seen.insert(node).second) {
          open.push_back(&node->next_edges());
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

/// How LibTorch holds nodes: by std::shared_ptr, since 2.13 by a pointer of its own.
using NodePointer = decltype(torch::autograd::Edge::function);

template <class Kind, class Pointer = NodePointer>
auto make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<Kind>();
  } else {
    return c10::make_intrusive<Kind>();
  }
}

/// Where gradients arrive that are wanted.
struct Sink : torch::autograd::Node {
  void add(const torch::autograd::InputMetadata& metadata) { input_metadata_.push_back(metadata); }
  torch::autograd::variable_list apply(torch::autograd::variable_list&& /*gradients*/) override { return {}; }
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
