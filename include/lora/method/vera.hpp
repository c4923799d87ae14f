#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>

#include <lora/method/contract.hpp>
#include <lora/version.hpp>

#include <cmath>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// Vector-based random matrix adaptation: a random A and B that are frozen and common to all layers, of which each
/// layer learns to scale the rows.
///
///   W' = W + diag(b) B diag(d) A,   y = x W^T + c + b * (B (d * (A dropout(x))))
///
/// Shapes: W (out, in); A (rank, largest in of all layers) and B (largest out, rank), of which a layer uses the first
/// columns and rows that it needs; b (out), zero at first; d (rank). Alpha has no effect. A and B come from a seed, the
/// same numbers as in PEFT on a CPU.
/// Reference: Kopiczko et al. 2024, "VeRA: Vector-based Random Matrix Adaptation", eq. 2.
struct VeRA : Method {
  static constexpr MethodInfo info{
      "VeRA",
      "VERA",
      "",
      "r",
      "",
      "vera_dropout",
      "init_weights",
      256,
      "target_modules modules_to_save fan_in_fan_out bias layers_to_transform layers_pattern"};

  /// What d starts with. Default: 0.1.
  VeRA& d_initial(double value) { return d_initial_ = value, *this; }
  double d_initial() const { return d_initial_; }
  /// The seed of A and B. Default: 0.
  VeRA& projection_prng_key(int64_t key) { return projection_prng_key_ = key, *this; }
  int64_t projection_prng_key() const { return projection_prng_key_; }
  /// Whether files hold A and B, and not only their seed. Default: true.
  VeRA& save_projection(bool save) { return save_projection_ = save, *this; }
  bool save_projection() const { return save_projection_; }

  static std::vector<MethodOption<VeRA>> peft_options() {
    return {{"d_initial", &VeRA::d_initial_},
            {"projection_prng_key", &VeRA::projection_prng_key_},
            {"save_projection", &VeRA::save_projection_}};
  }

  std::vector<MethodField<VeRA>> fields() const {
    return {{"vera_lambda_b", &VeRA::vera_lambda_b, {kOut}},
            {"vera_lambda_d", &VeRA::vera_lambda_d, {kRank}},
            {"vera_A", &VeRA::vera_A, {kRank, kIn}, "", /*is_trained=*/false, /*is_shared=*/true, save_projection_},
            {"vera_B", &VeRA::vera_B, {kOut, kRank}, "", /*is_trained=*/false, /*is_shared=*/true, save_projection_}};
  }

  void initialize(const Base& /*base*/) {
    vera_lambda_b.zero_();
    vera_lambda_d.fill_(d_initial_);
  }

  /// In float and on the CPU, whatever the layer's type and device, so that they are the same everywhere.
  void initialize_shared() {
    auto generator = at::detail::createCPUGenerator(static_cast<uint64_t>(projection_prng_key_));
    for (auto* matrix : {&vera_A, &vera_B}) {
      const auto bound =
          std::sqrt(3.0) * (std::sqrt(2.0) / std::sqrt(static_cast<double>(matrix->size(1))));  // Kaiming
      matrix->copy_(at::empty(matrix->sizes(), at::kFloat).uniform_(-bound, bound, generator));
    }
  }

  Term term(const Base& /*base*/) const {
    const auto rank = vera_lambda_d.size(-1);
    const auto a = vera_A.narrow(0, 0, rank).narrow(1, 0, shape.in);
    const auto b = vera_B.narrow(0, 0, shape.out).narrow(1, 0, rank);
    // Counted from the front: what TorchScript infers of the shape of unsqueeze(-1) is wrong.
    return {vera_lambda_d.unsqueeze(vera_lambda_d.dim()) * a, vera_lambda_b.unsqueeze(vera_lambda_b.dim()) * b};
  }

  at::Tensor vera_lambda_b, vera_lambda_d;
  at::Tensor vera_A, vera_B;

 private:
  double d_initial_ = 0.1;
  int64_t projection_prng_key_ = 0;
  bool save_projection_ = true;
};

}  // namespace LORA_ABI
}  // namespace lora
