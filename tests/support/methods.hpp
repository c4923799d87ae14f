// Methods alone, without modules or models.
#pragma once

#include "support/testing.hpp"

#include <lora/functional.hpp>

namespace testing {

/// A method with uninitialized tensors for a weight (out, in).
template <class M>
lora::MethodOf<M> make_method(const lora::LoRAOptions& options, int64_t out, int64_t in,
                              torch::ScalarType type = torch::kFloat, M prototype = M()) {
  lora::MethodOf<M> method(std::move(prototype), options, lora::MatrixShape{{}, out, in}, on_device(type));
  for (const auto& item : method.tensors()) item.tensor->requires_grad_(false);
  return method;
}

/// y = x W'^T + b, as the one function for products computes it.
inline torch::Tensor linear_with(const lora::AnyMethod& method, const torch::Tensor& x, const torch::Tensor& weight,
                                 const torch::Tensor& bias = {}, bool training = false) {
  const lora::WeightBase base(weight);
  const lora::Update update{&method, &base, lora::detail::whole_part(weight), training};
  const auto run = [](const torch::Tensor& x, const torch::Tensor& w, const torch::Tensor& b) {
    return torch::linear(x, w, b);
  };
  return lora::adapted_product({x, weight, bias, run, lora::linear_times}, update);
}

}  // namespace testing
