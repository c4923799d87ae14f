#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/bernoulli.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>

#include <lora/adapter/combine_options.hpp>
#include <lora/version.hpp>

#include <cstdint>
#include <tuple>
#include <vector>

// Updates of which only some entries are kept, as vectors.

namespace lora {
inline namespace LORA_ABI {

namespace detail {

/// The floor(density * n) entries of a vector that are largest in magnitude; the others are zero.
inline at::Tensor largest_entries(const at::Tensor& vector, double density) {
  if (density >= 1) return vector;
  const auto count = static_cast<int64_t>(density * static_cast<double>(vector.numel()));
  const auto places = std::get<1>(vector.abs().topk(count));
  return at::zeros_like(vector).scatter_(0, places, vector.gather(0, places));
}

/// Entries of a vector, each with the probability `density`, divided by it; the others are zero. The choice is made on
/// the CPU, so that it is the same for every device.
inline at::Tensor random_entries(const at::Tensor& vector, double density, const at::Generator& generator) {
  if (density >= 1) return vector;
  const auto chances = at::full(vector.sizes(), density, vector.options().device(at::kCPU));
  return vector * at::bernoulli(chances, generator).to(vector.device()) / density;
}

/// sum_i w_i v_i.
inline at::Tensor weighted_sum(const std::vector<at::Tensor>& vectors, const std::vector<double>& weights) {
  auto sum = vectors.front() * weights.front();
  for (size_t i = 1; i < vectors.size(); ++i) sum = sum.add(vectors[i], weights[i]);
  return sum;
}

/// Of each entry the mean of those w_i v_i whose v_i has the elected sign; where none has, zero. Of equal votes plus
/// wins.
inline at::Tensor disjoint_mean(const std::vector<at::Tensor>& vectors, const std::vector<double>& weights,
                                MajoritySign election) {
  const auto signs = at::stack(vectors).sign();
  const auto votes = election == MajoritySign::kTotal ? at::stack(vectors).sum(0) : signs.sum(0);
  const auto elected = votes.ge(0).to(signs.scalar_type()) * 2 - 1;
  const auto agrees = signs.eq(elected).to(signs.scalar_type());
  std::vector<at::Tensor> agreeing;
  for (size_t i = 0; i < vectors.size(); ++i) agreeing.push_back(vectors[i] * agrees[static_cast<int64_t>(i)]);
  return weighted_sum(agreeing, weights) / agrees.sum(0).clamp_min(1);
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
