#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <lora/version.hpp>

#include <memory>
#include <type_traits>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

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

/// Where the gradient of a tensor goes; nowhere, where it has none or is undefined.
inline torch::autograd::Edge edge_of(const at::Tensor& tensor) {
  return tensor.defined() && tensor.requires_grad() ? torch::autograd::impl::gradient_edge(tensor)
                                                    : torch::autograd::Edge();
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
