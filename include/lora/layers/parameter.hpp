#pragma once

#include <lora/layers/target.hpp>
#include <lora/version.hpp>

namespace lora {
inline namespace LORA_ABI {
namespace layers {

/// How a bare parameter is seen that is used in any way: two dimensions are (out, in), three are experts (E, out, in).
/// Errors: c10::Error for any other number of dimensions.
inline MatrixView parameter_view(const std::string& name, const at::Tensor& parameter) {
  TORCH_CHECK(parameter.dim() == 2 || parameter.dim() == 3, "lora::attach: the parameter \"", name, "\" has shape ",
              parameter.sizes(), "; target_parameters takes those of two dimensions, or three (experts, out, in)");
  return MatrixView::plain(parameter.sizes());
}

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

}  // namespace layers
}  // namespace LORA_ABI
}  // namespace lora
