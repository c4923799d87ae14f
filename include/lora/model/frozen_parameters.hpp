#pragma once

#include <lora/model/model.hpp>
#include <lora/version.hpp>

#include <set>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The tensors of adapters that layers of this library have registered as parameters of a model.
inline std::set<const c10::TensorImpl*> adapter_tensors(const Model& model) {
  std::set<const c10::TensorImpl*> adapters;
  for (const auto& part : model.parts()) {
    for (const auto& site : part.own) {
      if (!site->own()) continue;
      for (const auto& item : site->own()->tensors()) adapters.insert(item.tensor->unsafeGetTensorImpl());
    }
  }
  return adapters;
}

/// A model's parameters, but for those of adapters, and which of them were trainable before the first adapter came.
class FrozenParameters {
 public:
  /// Remembers what is trainable now, unless something is remembered already.
  void remember(const Model& model) {
    if (!tensors_.empty()) return;
    const auto adapters = adapter_tensors(model);
    for (const auto& parameter : model.parameters()) {
      if (adapters.count(parameter.tensor.unsafeGetTensorImpl()) > 0) continue;
      tensors_.push_back(parameter.tensor);
      were_trainable_.push_back(parameter.tensor.requires_grad());
    }
  }

  void freeze() const {
    for (const auto& tensor : tensors_) {
      if (tensor.requires_grad()) tensor.requires_grad_(false);  // where passes run meanwhile nothing is written
    }
  }

  /// Makes trainable what was, and forgets it.
  void thaw() {
    for (size_t i = 0; i < tensors_.size(); ++i)
      tensors_[i].requires_grad_(were_trainable_[i] && !is_quantized(tensors_[i]));  // few bits are not trained
    tensors_.clear();
    were_trainable_.clear();
  }

  const std::vector<at::Tensor>& tensors() const { return tensors_; }

 private:
  std::vector<at::Tensor> tensors_;
  std::vector<bool> were_trainable_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
