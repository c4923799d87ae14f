// A base of a user's own: weights held in half precision; and what it is compared with.
#pragma once

#include "support/testing.hpp"

#include <lora/adapters.hpp>
#include <lora/weight/quantized.hpp>

namespace testing {

class HalvesWeight final : public lora::QuantizedWeight {
 public:
  explicit HalvesWeight(torch::Tensor halves) : halves_(std::move(halves)) {}

  std::string_view scheme() const override { return "halves"; }
  int64_t bits() const override { return 16; }
  at::IntArrayRef sizes() const override { return halves_.sizes(); }
  at::Device device() const override { return halves_.device(); }
  int64_t nbytes() const override { return static_cast<int64_t>(halves_.nbytes()); }

  torch::Tensor dense() const override { return halves_.to(torch::kFloat); }
  void unpack(int64_t first, int64_t count, float* numbers) const override {
    const auto* from = halves_.const_data_ptr<at::Half>() + first;
    std::copy(from, from + count, numbers);
  }
  void dot_rows(int64_t first, int64_t count, const float* x, float* y) const override {
    const auto columns = halves_.numel() / halves_.size(0);
    const auto* row = halves_.const_data_ptr<at::Half>() + first * columns;
    for (int64_t i = 0; i < count; ++i, row += columns) {
      y[i] = 0;
      for (int64_t j = 0; j < columns; ++j) y[i] += static_cast<float>(row[j]) * x[j];
    }
  }

  std::shared_ptr<const QuantizedWeight> to(at::Device device) const override {
    return std::make_shared<HalvesWeight>(halves_.to(device));
  }

 private:
  torch::Tensor halves_;
};

struct Halves {
  std::shared_ptr<const lora::QuantizedWeight> pack(const torch::Tensor& weight) const {
    return std::make_shared<HalvesWeight>(weight.to(torch::kHalf).contiguous());
  }
};

/// Gives a weight the numbers that half precision has for it.
inline void round_to_half(const torch::Tensor& weight) {
  torch::NoGradGuard no_grad;
  weight.copy_(weight.to(torch::kHalf));
}

/// The same for the weights that are adapted.
inline void round_to_halves(const lora::Adapters& adapters) {
  for (const auto& site : adapters.sites()) round_to_half(site->weight());
}

/// Gives an adapter the numbers of another one of the same shapes.
inline void copy_numbers(const lora::Adapters& from, const lora::Adapters& to) {
  torch::NoGradGuard no_grad;
  const auto tensors = to.named_parameters();
  for (const auto& item : from.named_parameters()) tensors[item.key()].copy_(item.value());
}

}  // namespace testing
