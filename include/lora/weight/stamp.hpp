#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/intrusive_ptr.h>

#include <lora/version.hpp>

#include <cstdint>
#include <utility>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Where the numbers of a tensor lie and how often they were written to, by which is seen whether somebody did so
/// since: in place, as an optimizer does, or with other memory, as torch::load does.
class Stamp {
 public:
  Stamp() = default;
  /// `own_writes` is how many of the writes do not count.
  explicit Stamp(const at::Tensor& tensor, int64_t own_writes = 0)
      : storage_(tensor.has_storage() ? Weak(tensor.storage().getWeakStorageImpl()) : Weak(Storage())),
        writes_(writes(tensor) - own_writes),
        type_(tensor.scalar_type()),
        device_(tensor.device()) {}

  bool operator==(const Stamp& other) const { return has_memory_of(other) && writes_ == other.writes_; }
  bool operator!=(const Stamp& other) const { return !(*this == other); }

  bool has_memory_of(const Stamp& other) const { return storage_ == other.storage_; }
  /// Whether one of the two was moved or cast since, which changes the memory, too.
  bool is_elsewhere(const Stamp& other) const { return type_ != other.type_ || device_ != other.device_; }

  /// Tensors of inference mode do not count; they can only be written to there.
  static int64_t writes(const at::Tensor& tensor) { return tensor.is_inference() ? 0 : tensor._version(); }

 private:
  using Storage = c10::intrusive_ptr<c10::StorageImpl>;
  using Weak = c10::weak_intrusive_ptr<c10::StorageImpl>;  // keeps the address from being another's

  Weak storage_{Storage()};
  int64_t writes_ = 0;
  at::ScalarType type_ = at::ScalarType::Undefined;
  at::Device device_ = at::kCPU;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
