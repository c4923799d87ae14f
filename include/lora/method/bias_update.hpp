#pragma once

#include <lora/method/contract.hpp>
#include <lora/version.hpp>

#include <memory>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The part of a layer's bias in the update of a method; it has no tensors of its own.
struct BiasUpdate : Method {
  static constexpr MethodInfo info{"BiasUpdate", "", "", "", "", ""};

  BiasUpdate() = default;
  explicit BiasUpdate(std::shared_ptr<AnyMethod> of) : method(std::move(of)) {}

  std::vector<MethodField<BiasUpdate>> fields() const { return {}; }
  void initialize(const Base& /*base*/) {}
  at::Tensor delta(const Base& base) const { return method->bias_delta(base.dense()); }

  std::shared_ptr<AnyMethod> method;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
