#pragma once

#include <ATen/ops/count_nonzero.h>

#include <lora/layers/target.hpp>
#include <lora/version.hpp>

#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace layers {

/// The tensors of a fused projection of which P parts are adapted, as PEFT reads them: one adapter with the ranks of
/// all parts, A (P * rank, in) and B (out, P * rank), where the rows of a part use its own ranks only and the rest of B
/// is zero.
class PartFiles {
 public:
  explicit PartFiles(MatrixView view) : view_(std::move(view)) {}

  at::Tensor to_file(const std::string& name, const at::Tensor& tensor) const {
    if (name == "lora_A") return tensor.flatten(0, 1);
    if (name != "lora_B") refuse(name);
    const auto rank = tensor.size(2);
    auto stacked = at::zeros({rows(), tensor.size(0) * rank}, tensor.options().requires_grad(false));
    for_each_part([&](int64_t part, int64_t first, int64_t count) {
      stacked.narrow(0, first, count).narrow(1, part * rank, rank).copy_(tensor[part].narrow(0, 0, count));
    });
    return stacked;
  }

  at::Tensor from_file(const std::string& name, const at::Tensor& stored) const {
    const auto parts = view_.shape().batch.front();
    if (name == "lora_A") return stored.unflatten(0, {parts, -1});
    if (name != "lora_B") refuse(name);
    const auto rank = stored.size(1) / parts;
    auto tensor = at::zeros({parts, view_.shape().out, rank}, stored.options());
    for_each_part([&](int64_t part, int64_t first, int64_t count) {
      tensor[part].narrow(0, 0, count).copy_(stored.narrow(0, first, count).narrow(1, part * rank, rank));
    });
    TORCH_CHECK(at::count_nonzero(tensor).equal(at::count_nonzero(stored)),
                "lora_B gives rows of one part ranks of another, or rows that are not adapted; attach without `fused`");
    return tensor;
  }

  FileLayout layout() const {
    FileLayout files;
    files.to_file = [self = *this](auto& name, auto& tensor) { return self.to_file(name, tensor); };
    files.from_file = [self = *this](auto& name, auto& stored) { return self.from_file(name, stored); };
    return files;
  }

 private:
  [[noreturn]] static void refuse(const std::string& name) {
    TORCH_CHECK(false, name, " of a fused projection has no form in PEFT's files; only A and B of LowRank have");
  }

  int64_t rows() const {
    int64_t sum = 0;
    for (auto count : view_.part_rows()) sum += count;
    return sum;
  }

  /// Calls `visit(number among the adapted parts, first row, rows)`.
  template <class Visit>
  void for_each_part(const Visit& visit) const {
    int64_t part = 0, first = 0;
    for (size_t i = 0; i < view_.part_rows().size(); first += view_.part_rows()[i++]) {
      if (view_.chosen_parts()[i]) visit(part++, first, view_.part_rows()[i]);
    }
  }

  MatrixView view_;
};

}  // namespace layers
}  // namespace LORA_ABI
}  // namespace lora
