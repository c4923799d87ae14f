#pragma once

#include <c10/core/TensorImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <ATen/core/Tensor.h>

#include <lora/version.hpp>

// The two dispatch keys of the library, which no backend uses and which lie above autograd and autocast. Other macros
// can be set where other code claims them; the second has to be above the first.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

#ifndef LORA_DISPATCH_KEY
#define LORA_DISPATCH_KEY TESTING_ONLY_GenericWrapper
#endif
#ifndef LORA_WEIGHT_DISPATCH_KEY
#define LORA_WEIGHT_DISPATCH_KEY TESTING_ONLY_GenericMode
#endif
#define LORA_KEY_NAMES LORA_TEXT_OF(LORA_DISPATCH_KEY) "_" LORA_TEXT_OF(LORA_WEIGHT_DISPATCH_KEY)

/// On a thread that is in a scope: the products that are known are computed with their updates.
inline constexpr auto kInterceptionKey = c10::DispatchKey::LORA_DISPATCH_KEY;
/// On the adapted weights themselves, and on views of them: every other use is seen. Tensors that are not adapted do
/// not have it, so their operators cost what they always do.
inline constexpr auto kWeightKey = c10::DispatchKey::LORA_WEIGHT_DISPATCH_KEY;

/// While it lives nothing is intercepted on this thread: for what the library itself does with weights.
class BelowInterception {
 public:
  BelowInterception() : below_(c10::DispatchKeySet({kInterceptionKey, kWeightKey})) {}

 private:
  c10::impl::ExcludeDispatchKeyGuard below_;
};

/// Reaches the keys of any tensor.
struct KeysOf : c10::TensorImpl {
  static constexpr auto keys() { return &KeysOf::key_set_; }
};

inline bool is_marked(const at::Tensor& tensor) { return tensor.key_set().has(kWeightKey); }

/// Gives a weight the key. A weight that gets another type or place loses it.
inline void mark(const at::Tensor& tensor) {
  if (!tensor.defined() || is_marked(tensor)) return;
  auto& keys = tensor.unsafeGetTensorImpl()->*KeysOf::keys();
  keys = keys.add(kWeightKey);
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
