#pragma once

#include <lora/layers/target.hpp>

namespace lora::layers {

/// How a bare parameter is seen that is used in any way: two dimensions are (out, in), three are experts (E, out, in).
/// Errors: c10::Error for any other number of dimensions.
inline MatrixView parameter_view(const std::string& name, const at::Tensor& parameter) {
  TORCH_CHECK(parameter.dim() == 2 || parameter.dim() == 3, "lora::attach: the parameter \"", name, "\" has shape ",
              parameter.sizes(), "; target_parameters takes those of two dimensions, or three (experts, out, in)");
  return MatrixView::plain(parameter.sizes());
}

}  // namespace lora::layers
