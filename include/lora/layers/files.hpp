#pragma once

#include <ATen/core/grad_mode.h>
#include <ATen/ops/count_nonzero.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <lora/site.hpp>
#include <lora/version.hpp>

#include <string>
#include <utility>
#include <vector>

// How PEFT's files keep the tensors of an adapter on layers that are no plain matrices.

namespace lora {
inline namespace LORA_ABI {
namespace layers {

/// PEFT keeps the matrices of an embedding as bare parameters with names of their own.
inline FileLayout embedding_files() {
  FileLayout files;
  files.name = [](const NamedTensor& tensor) {
    if (tensor.name == "lora_A") return std::string("lora_embedding_A");
    return tensor.name == "lora_B" ? std::string("lora_embedding_B") : tensor.file_name;
  };
  return files;
}

/// The tensors of an adapted convolution with G groups as PEFT keeps them, k being the sizes of the kernel:
///
///   lora_A (rank, in, k...)   lora_B (out, rank / G, 1...)   lora_magnitude_vector (1, out, 1...)
///
/// PEFT's A reads all inputs, whatever group they are in, so that its update is no grouped convolution and cannot be
/// merged. Here the share of a group reads the inputs of that group only; in the file the rest of A is zero, with which
/// PEFT computes the same.
class ConvolutionFiles {
 public:
  /// `shape` as methods see the weight, for a kernel of sizes `kernel`.
  ConvolutionFiles(MatrixShape shape, std::vector<int64_t> kernel)
      : shape_(std::move(shape)), kernel_(std::move(kernel)) {}

  at::Tensor to_file(const std::string& name, const at::Tensor& tensor) const {
    if (name == "lora_A") return groups() == 1 ? unfold(tensor) : spread(tensor);
    if (name == "lora_B") return tensor.reshape(with_ones({outputs(), tensor.size(-1)}));
    return tensor.reshape(with_ones({1, outputs()}));
  }

  at::Tensor from_file(const std::string& name, const at::Tensor& stored) const {
    if (name == "lora_A") return groups() == 1 ? stored.flatten(1) : gathered(stored);
    auto tensor = name == "lora_B" ? stored.flatten(1) : stored.flatten();  // one number for each output
    if (groups() == 1) return tensor;
    auto sizes = tensor.sizes().vec();
    sizes[0] /= groups();
    sizes.insert(sizes.begin(), groups());
    return tensor.reshape(sizes);
  }

  FileLayout layout() const {
    FileLayout files;
    files.to_file = [self = *this](auto& name, auto& tensor) { return self.to_file(name, tensor); };
    files.from_file = [self = *this](auto& name, auto& stored) { return self.from_file(name, stored); };
    return files;
  }

 private:
  int64_t groups() const { return shape_.rank_shares; }
  int64_t outputs() const { return groups() * shape_.out; }
  int64_t inputs_of_a_group() const { return shape_.in / c10::multiply_integers(kernel_); }

  std::vector<int64_t> with_ones(std::vector<int64_t> sizes) const {
    sizes.resize(sizes.size() + kernel_.size(), 1);
    return sizes;
  }

  std::vector<int64_t> with_kernel(std::vector<int64_t> sizes) const {
    sizes.insert(sizes.end(), kernel_.begin(), kernel_.end());
    return sizes;
  }

  at::Tensor unfold(const at::Tensor& a) const { return a.reshape(with_kernel({-1, inputs_of_a_group()})); }

  /// (G, rank / G, in / G * k) -> (rank, in, k...), each group's share beside zeros.
  at::Tensor spread(const at::Tensor& a) const {
    const auto share = a.size(1), inputs = inputs_of_a_group();
    auto full = at::zeros({groups(), share, groups(), inputs, shape_.in / inputs}, a.options().requires_grad(false));
    for (int64_t g = 0; g < groups(); ++g) full.select(0, g).select(1, g).copy_(a[g].reshape({share, inputs, -1}));
    return full.reshape(with_kernel({groups() * share, groups() * inputs}));
  }

  at::Tensor gathered(const at::Tensor& stored) const {
    const auto share = stored.size(0) / groups();
    auto full = stored.reshape({groups(), share, groups(), inputs_of_a_group(), -1});
    std::vector<at::Tensor> shares;
    for (int64_t g = 0; g < groups(); ++g) shares.push_back(full.select(0, g).select(1, g).reshape({share, -1}));
    auto a = at::stack(shares);
    TORCH_CHECK(
        at::count_nonzero(a).equal(at::count_nonzero(stored)),
        "lora_A of a grouped convolution reads inputs of other groups, which no grouped convolution can compute; "
        "an adapter trained that way cannot be used here");
    return a;
  }

  MatrixShape shape_;
  std::vector<int64_t> kernel_;
};

/// PEFT keeps the ranks of all experts in one A (E * rank, in), expert by expert, and one B (out, rank * E), rank by
/// rank.
inline FileLayout parameter_files(const at::Tensor& parameter) {
  if (parameter.dim() == 2) return {};
  FileLayout files;
  files.to_file = [](const std::string& name, const at::Tensor& tensor) {
    TORCH_CHECK(name == "lora_A" || name == "lora_B", name,
                " of experts has no form in PEFT's files; only A and B have");
    return name == "lora_A" ? tensor.flatten(0, 1) : tensor.permute({1, 2, 0}).flatten(1);
  };
  files.from_file = [experts = parameter.size(0)](const std::string& name, const at::Tensor& stored) {
    return name == "lora_A" ? stored.unflatten(0, {experts, -1})
                            : stored.unflatten(1, {-1, experts}).permute({2, 0, 1});
  };
  return files;
}

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
