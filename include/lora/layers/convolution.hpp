#pragma once

#include <ATen/ops/count_nonzero.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/nn/modules/conv.h>

#include <lora/layers/target.hpp>
#include <lora/version.hpp>

#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace layers {

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
    auto tensor = name == "lora_B" ? stored.flatten(1) : stored.flatten();
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

/// Appends the kernel of `module` where it is a `Layer`.
template <class Layer>
bool take_kernel(const std::string& name, const char* kind, const std::shared_ptr<torch::nn::Module>& module,
                 std::vector<Target>& targets) {
  auto* layer = module->as<Layer>();
  if (layer == nullptr) return false;
  const auto sizes = layer->weight.sizes();
  auto view = MatrixView::kernel(sizes, layer->options.groups(), layer->options.transposed());
  auto files = ConvolutionFiles(view.shape(), sizes.slice(2).vec()).layout();
  targets.push_back(member_target(name, kind, module, layer->weight, "weight", std::move(view)));
  targets.back().files = std::move(files);
  return true;
}

/// The kernel of a convolution or transposed convolution of one to three dimensions: (out, in / groups, k...) or
/// (in, out / groups, k...), adapted as a matrix (out, in * k) for each group. The rank is divided among the groups.
inline std::vector<Target> find_convolution(const std::string& name, const std::shared_ptr<torch::nn::Module>& module) {
  std::vector<Target> found;
  (void)(take_kernel<torch::nn::Conv1dImpl>(name, "Conv1d", module, found) ||
         take_kernel<torch::nn::Conv2dImpl>(name, "Conv2d", module, found) ||
         take_kernel<torch::nn::Conv3dImpl>(name, "Conv3d", module, found) ||
         take_kernel<torch::nn::ConvTranspose1dImpl>(name, "ConvTranspose1d", module, found) ||
         take_kernel<torch::nn::ConvTranspose2dImpl>(name, "ConvTranspose2d", module, found) ||
         take_kernel<torch::nn::ConvTranspose3dImpl>(name, "ConvTranspose3d", module, found));
  return found;
}

}  // namespace layers
}  // namespace LORA_ABI
}  // namespace lora
