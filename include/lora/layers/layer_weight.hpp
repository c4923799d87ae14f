#pragma once

#include <torch/nn/module.h>

#include <lora/linkage.hpp>
#include <lora/site.hpp>
#include <lora/version.hpp>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// One weight of a layer, as a kind of layer finds it: where it is, and how it is to be seen. Nothing is made for it
/// before somebody wants to adapt it.
struct LayerWeight {
  /// How its dimensions are outputs and inputs.
  enum class Form : uint8_t { kPlain, kRows, kLookup, kKernel, kTransposedKernel, kNone };

  Place place;
  Form form = Form::kPlain;
  int64_t groups = 1;      ///< of a kernel
  bool is_buffer = false;  ///< no parameter

  MatrixView view() const;

  FileLayout files(const MatrixView& view) const;

  std::shared_ptr<Site> site() const;
};

using LayerWeights = std::vector<LayerWeight>;

namespace layers {

/// The weight in the member `weight` of a layer, registered under the name `parameter`.
inline LayerWeight member_weight(std::string name, const char* kind, torch::nn::Module& module, at::Tensor& weight,
                                 const char* parameter) {
  LayerWeight found;
  found.place = {name, name, kind, std::make_shared<detail::MemberSlot>(module, weight, parameter)};
  return found;
}

/// The same with the bias that belongs to it, where there is one.
inline LayerWeight member_weight(std::string name, const char* kind, torch::nn::Module& module, at::Tensor& weight,
                                 const char* parameter, at::Tensor& bias, const char* bias_parameter) {
  auto found = member_weight(std::move(name), kind, module, weight, parameter);
  if (bias.defined()) found.place.bias = std::make_shared<detail::MemberSlot>(module, bias, bias_parameter);
  return found;
}

/// The tensor registered under the name `name`, whose member is out of reach.
inline LayerWeight registered_weight(std::string name, const char* kind, torch::nn::Module& module,
                                     const at::Tensor& tensor) {
  LayerWeight found;
  found.place = {name, name, kind, std::make_shared<detail::TensorSlot>(module, tensor)};
  return found;
}

/// The list of one weight.
inline LayerWeights only(LayerWeight weight) {
  LayerWeights weights;
  weights.push_back(std::move(weight));  // which a list in braces would copy
  return weights;
}

}  // namespace layers
}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <lora/layers/files.hpp>

namespace lora {
inline namespace LORA_ABI {

LORA_INLINE MatrixView LayerWeight::view() const {
  const auto sizes = place.slot->read().sizes();
  switch (form) {
    case Form::kRows:
      return MatrixView::rows(sizes);
    case Form::kLookup:
      return MatrixView::lookup(sizes);
    case Form::kKernel:
      return MatrixView::kernel(sizes, groups, /*is_transposed=*/false);
    case Form::kTransposedKernel:
      return MatrixView::kernel(sizes, groups, /*is_transposed=*/true);
    case Form::kNone:
      return MatrixView::none(sizes);
    default:
      return MatrixView::plain(sizes);
  }
}

LORA_INLINE FileLayout LayerWeight::files(const MatrixView& view) const {
  if (form == Form::kLookup) return layers::embedding_files();
  const bool is_kernel = form == Form::kKernel || form == Form::kTransposedKernel;
  if (is_kernel) return layers::ConvolutionFiles(view.shape(), place.slot->read().sizes().slice(2).vec()).layout();
  return {};
}

LORA_INLINE std::shared_ptr<Site> LayerWeight::site() const {
  auto matrix = view();
  auto layout = files(matrix);
  return std::make_shared<Site>(place, std::move(matrix), std::move(layout));
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
