#pragma once

#include <ATen/TensorOperators.h>
#include <c10/core/UndefinedTensorImpl.h>
#include <ATen/ops/linalg_vector_norm.h>

#include <lora/version.hpp>

#include <optional>
#include <utility>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The limit on the norm of its entries that a lookup in an adapted table has to keep. A frozen table is not changed,
/// as a stock embedding with max_norm would do; what is looked up in W' is limited instead.
struct NormLimit {
  double max_norm, norm_type;

  /// Rows of `entries` (..., width), none longer than the limit; the factor is a constant for the gradient.
  at::Tensor apply(const at::Tensor& entries) const {
    const auto norm = at::linalg_vector_norm(entries.detach(), norm_type, {-1}, /*keepdim=*/true);
    return entries * (max_norm / (norm + 1e-7)).clamp_max(1);
  }
};

/// The limit of the next lookup on this thread. An embedding states it right before it looks up the same indices in the
/// same table; where that one threw in between, it is for nothing that comes later.
class PendingLimit {
 public:
  static void set(const at::Tensor& table, const at::Tensor& indices, NormLimit limit) {
    pending() = PendingLimit{limit, Weak(table.getIntrusivePtr()), Weak(indices.getIntrusivePtr())};
  }

  static std::optional<NormLimit> take(const at::Tensor& table, const at::Tensor& indices) {
    const auto pending = std::exchange(PendingLimit::pending(), std::nullopt);
    if (!pending || !is(pending->table_, table) || !is(pending->indices_, indices)) return std::nullopt;
    return pending->limit_;
  }

 private:
  using Weak = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

  PendingLimit(NormLimit limit, Weak table, Weak indices)
      : limit_(limit), table_(std::move(table)), indices_(std::move(indices)) {}

  static bool is(const Weak& known, const at::Tensor& tensor) {
    return known.lock().get() == tensor.unsafeGetTensorImpl();
  }

  static std::optional<PendingLimit>& pending() {
    thread_local std::optional<PendingLimit> limit;
    return limit;
  }

  NormLimit limit_;
  Weak table_, indices_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
