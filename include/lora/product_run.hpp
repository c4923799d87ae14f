#pragma once

#include <ATen/core/Tensor.h>

#include <lora/linkage.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

// How it is found out which products have one input: it is looked at what follows what.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Which factors took one input after the other, the last time that a layer's product was the first of them.
class Followers : public std::enable_shared_from_this<Followers> {
 public:
  std::vector<at::Tensor> factors() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return factors_;
  }
  void set(const std::vector<at::Tensor>& factors) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto is_same = [](const at::Tensor& a, const at::Tensor& b) { return a.is_same(b); };
    if (!std::equal(factors.begin(), factors.end(), factors_.begin(), factors_.end(), is_same)) factors_ = factors;
  }

 private:
  mutable std::mutex mutex_;
  std::vector<at::Tensor> factors_;
};

/// No product of this thread from here on has an input with the last ones in common.
LORA_INLINE void end_product_run();

/// Products before and after have nothing in common with those while it lives.
class OwnProductRun {
 public:
  OwnProductRun() { end_product_run(); }
  ~OwnProductRun() { end_product_run(); }
  OwnProductRun(const OwnProductRun&) = delete;
  OwnProductRun& operator=(const OwnProductRun&) = delete;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/core/grad_mode.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function.h>

#include <lora/shared_input.hpp>

#include <cstddef>
#include <cstdint>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The products of a thread that come one after the other and have one input. What followed a layer's product the last
/// time is expected to follow it again, and computed with it; if something else comes, that was in vain, and is not
/// expected the next time.
class ProductRun {
 public:
  static ProductRun& of_thread() {
    thread_local ProductRun run;
    return run;
  }

  /// What the product of x with a factor has in common with others; null where that is nothing. `followers` are those
  /// of the product's layer, and `as_matrix` gives x as (N, in).
  template <class AsMatrix>
  std::shared_ptr<const SharedInput> next(const at::Tensor& x, const at::Tensor& factor, Followers& followers,
                                          const AsMatrix& as_matrix) {
    if (!is_of_run(x) || has_seen(factor)) {
      end();
      begin(x, followers);
      const auto expected = followers.factors();
      if (expected.size() > 1 && expected.front().is_same(factor)) {
        shared_ = SharedInput::make(as_matrix(), expected);
        left_ = shared_ ? expected.size() : 0;
      }
    }
    seen_.push_back(factor);
    auto shared = shared_;
    if (shared_ && --left_ == 0) shared_.reset();  // so that x is not held longer
    return shared;
  }

  /// As end_product_run.
  void end() {
    if (first_) first_->set(seen_);
    first_.reset();
    input_ = Weak(Strong());
    seen_.clear();
    shared_.reset();
  }

 private:
  using Strong = c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  using Weak = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

  /// What else has to be as it was for a tensor to be the same input.
  struct Seen {
    Seen() = default;
    explicit Seen(const at::Tensor& x)
        : version(x._version()),
          data(x.unsafeGetTensorImpl()->data()),
          is_recorded(at::GradMode::is_enabled()),
          needs_gradient(x.requires_grad()) {
      if (is_recorded) leads_to = x.grad_fn().get();
      const c10::impl::VirtualGuardImpl guard(x.device().type());
      stream = guard.getStream(x.device()).id();
    }

    bool operator==(const Seen& other) const {
      return version == other.version && data == other.data && is_recorded == other.is_recorded &&
             needs_gradient == other.needs_gradient && leads_to == other.leads_to && stream == other.stream;
    }

    int64_t version = -1;
    const void* data = nullptr;
    bool is_recorded = false, needs_gradient = false;
    const torch::autograd::Node* leads_to = nullptr;
    c10::StreamId stream = 0;
  };

  bool has_seen(const at::Tensor& factor) const {
    return std::any_of(seen_.begin(), seen_.end(), [&](const at::Tensor& seen) { return seen.is_same(factor); });
  }

  bool is_of_run(const at::Tensor& x) const {
    return first_ && input_._unsafe_get_target() == x.unsafeGetTensorImpl() && seen_as_ == Seen(x);
  }

  void begin(const at::Tensor& x, Followers& followers) {
    first_ = followers.shared_from_this();
    input_ = Weak(x.getIntrusivePtr());
    seen_as_ = Seen(x);
  }

  std::shared_ptr<Followers> first_;
  Weak input_{Strong()};
  Seen seen_as_;
  std::vector<at::Tensor> seen_;
  std::shared_ptr<const SharedInput> shared_;
  size_t left_ = 0;
};

LORA_INLINE void end_product_run() { ProductRun::of_thread().end(); }

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
