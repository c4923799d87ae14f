#pragma once

#include <lora/layers/layer_weight.hpp>
#include <lora/version.hpp>

#include <string>

namespace lora {
inline namespace LORA_ABI {
namespace layers {

/// A bare parameter that is used in any way: two dimensions are (out, in), three are experts (E, out, in).
/// Errors: c10::Error for any other number of dimensions.
inline void check_parameter(const std::string& name, const at::Tensor& parameter) {
  TORCH_CHECK(parameter.dim() == 2 || parameter.dim() == 3, "lora::attach: the parameter \"", name, "\" has shape ",
              parameter.sizes(), "; target_parameters takes those of two dimensions, or three (experts, out, in)");
}

}  // namespace layers
}  // namespace LORA_ABI
}  // namespace lora
