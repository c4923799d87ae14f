#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DispatchKeySet.h>
#include <torch/optim/adamw.h>

#include <lora/version.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Whether a parameter fills its memory, in which nothing else lies; or has none.
inline bool can_move(const at::Tensor& parameter) {
  return parameter.numel() == 0 || (parameter.is_non_overlapping_and_dense() && parameter.storage_offset() == 0 &&
                                    parameter.storage().nbytes() == static_cast<size_t>(parameter.nbytes()));
}

/// One parameter, and what is its own of a flat buffer.
struct FlatSlot {
  FlatSlot(at::Tensor of, size_t of_group)
      : parameter(std::move(of)), group(of_group), strides(parameter.strides().vec()) {}

  at::Tensor parameter;
  size_t group;
  std::vector<int64_t> strides;
  int64_t first = 0, end = 0;  ///< its elements in the buffer; what is behind them up to `end` is nobody's
  at::Tensor value, gradient;
  int64_t steps = 0;
  int64_t writes = 0;  ///< to the gradient, when it was zero last

  int64_t size() const { return parameter.numel(); }
  bool got_gradient() const { return gradient._version() != writes; }
};

/// Parameters of one type on one device, in memory that follows one on another, and their gradients and averages
/// likewise. Each gradient counts the writes to it alone: that tells whether the parameter got one.
///
/// It is the storage of a parameter that is moved, so whoever else holds it (views, scopes, saved graphs) sees the same
/// numbers, and files hold no more than the parameter. One that has only a part of its storage stays where it is.
class FlatBuffer {
 public:
  explicit FlatBuffer(std::vector<FlatSlot> slots) : slots_(std::move(slots)) {
    if (can_move(slots_.front().parameter)) {
      gather();
    } else {
      stay(slots_.front());
    }
    gradients_ = at::zeros(values_.sizes(), values_.options());
    averages_ = at::zeros_like(gradients_);
    squares_ = at::zeros_like(gradients_);
    for (auto& slot : slots_) {
      // A view would count writes together with all others.
      slot.gradient = of(gradients_, slot).variable_data();
      slot.writes = slot.gradient._version();
      collect_gradient(slot);
    }
  }

  const std::vector<FlatSlot>& slots() const { return slots_; }
  std::vector<FlatSlot>& slots() { return slots_; }
  const at::Tensor& gradients() const { return gradients_; }

  /// What is a slot's own of the running averages, shaped as the parameter.
  at::Tensor average(const FlatSlot& slot) const { return of(averages_, slot); }
  at::Tensor square(const FlatSlot& slot) const { return of(squares_, slot); }

  /// Brings here what somebody has given other memory since.
  void collect() {
    for (auto& slot : slots_) {
      collect_value(slot);
      collect_gradient(slot);
    }
  }

  void zero_gradients() {
    gradients_.zero_();
    for (auto& slot : slots_) {
      slot.writes = slot.gradient._version();
      attach(slot);
    }
  }

  /// One step for the parameters of that group which got a gradient.
  void step(size_t group, const torch::optim::AdamWOptions& options) {
    std::vector<Range> ranges;
    for (auto& slot : slots_) {
      if (slot.group != group || !slot.got_gradient()) continue;
      ++slot.steps;
      slot.parameter.unsafeGetTensorImpl()->bump_version();
      const bool follows = !ranges.empty() && ranges.back().end == slot.first && ranges.back().steps == slot.steps;
      if (follows) {
        ranges.back().end = slot.end;
      } else {
        ranges.push_back({slot.first, slot.end, slot.steps});
      }
    }
    if (ranges.empty()) return;
    if (is_fused()) {
      step_fused(ranges, options);
    } else {
      for (const auto& range : ranges) step_plain(range, options);
    }
  }

 private:
  struct Range {
    int64_t first, end, steps;

    at::Tensor of(const at::Tensor& buffer) const {
      const bool is_all = first == 0 && buffer.numel() == end;
      return is_all ? buffer : buffer.narrow(0, first, end - first);
    }
  };

  static constexpr int64_t kAlignment = 16;  // elements, so that each parameter starts where vectors like to

  void gather() {
    int64_t size = 0;
    for (auto& slot : slots_) {
      slot.first = size;
      size += (slot.size() + kAlignment - 1) / kAlignment * kAlignment;
      slot.end = size;
    }
    values_ = at::zeros({size}, slots_.front().parameter.options().requires_grad(false));
    for (auto& slot : slots_) {
      slot.value = of(values_, slot);
      move_in(slot);
    }
  }

  void stay(FlatSlot& slot) {
    slot.value = slot.parameter.detach();
    slot.end = slot.size();
    is_flat_ = slot.value.is_non_overlapping_and_dense();
    values_ = is_flat_ ? slot.value.as_strided({slot.size()}, {1}) : slot.value;
  }

  void move_in(FlatSlot& slot) {
    if (slot.size() == 0) return;
    slot.value.copy_(slot.parameter.detach());
    if (can_move(slot.parameter) && slot.parameter.strides() == slot.value.strides()) {
      slot.parameter.storage().unsafeGetStorageImpl()->set_data_ptr_noswap(memory_of(slot));
    } else {  // somebody gave it a part of other memory
      slot.parameter.set_data(slot.value);
    }
  }

  /// A part of the buffer, which lives as long.
  static c10::DataPtr memory_of(const FlatSlot& slot) {
    auto owner = std::make_unique<c10::Storage>(slot.value.storage());
    const auto let_go = [](void* storage) { delete static_cast<c10::Storage*>(storage); };
    return {slot.value.mutable_data_ptr(), owner.release(), let_go, slot.value.device()};
  }

  at::Tensor of(const at::Tensor& buffer, const FlatSlot& slot) const {
    if (!is_flat_) return buffer;
    return buffer.as_strided(slot.parameter.sizes(), slot.strides, buffer.storage_offset() + slot.first);
  }

  void collect_value(FlatSlot& slot) {
    const auto &now = slot.parameter, &then = slot.value;
    TORCH_CHECK(now.sizes() == then.sizes() && now.scalar_type() == then.scalar_type() && now.device() == then.device(),
                "lora::AdamW: a parameter is ", now.scalar_type(), " ", now.sizes(), " on ", now.device(), " and was ",
                then.scalar_type(), " ", then.sizes(), " on ", then.device(), " when the optimizer was ",
                "made; move and cast a model before");
    const bool is_there = now.const_data_ptr() == then.const_data_ptr() && now.strides() == then.strides();
    if (now.numel() > 0 && !is_there) move_in(slot);
  }

  static void collect_gradient(FlatSlot& slot) {
    const auto gradient = slot.parameter.grad();
    if (gradient.is_same(slot.gradient)) return;
    if (gradient.defined()) {
      slot.gradient.copy_(gradient.layout() == at::kStrided ? gradient : gradient.to_dense());
    } else if (slot.got_gradient()) {
      slot.gradient.zero_();
      slot.writes = slot.gradient._version();
    }
    attach(slot);
  }

  static void attach(FlatSlot& slot) {
    if (!slot.parameter.grad().is_same(slot.gradient)) slot.parameter.mutable_grad() = slot.gradient;
  }

  /// Whether LibTorch has its one operator for such tensors.
  bool is_fused() const {
    static const auto op = c10::Dispatcher::singleton().findSchema({"aten::_fused_adamw_", ""});
    return op.has_value() && is_flat_ && op->hasKernelForDispatchKey(c10::legacyExtractDispatchKey(values_.key_set()));
  }

  void step_fused(const std::vector<Range>& ranges, const torch::optim::AdamWOptions& options) {
    std::vector<at::Tensor> values, gradients, averages, squares, steps;
    for (const auto& range : ranges) {
      values.push_back(range.of(values_));
      gradients.push_back(range.of(gradients_));
      averages.push_back(range.of(averages_));
      squares.push_back(range.of(squares_));
      steps.push_back(at::full({}, static_cast<double>(range.steps), values_.options().dtype(at::kFloat)));
    }
    const auto [beta1, beta2] = options.betas();
    at::_fused_adamw_(values, gradients, averages, squares, /*max_exp_avg_sqs=*/{}, steps, options.lr(), beta1, beta2,
                      options.weight_decay(), options.eps(), /*amsgrad=*/false, /*maximize=*/false);
  }

  void step_plain(const Range& range, const torch::optim::AdamWOptions& options) {
    auto value = range.of(values_), average = range.of(averages_), square = range.of(squares_);
    const auto gradient = range.of(gradients_);
    const auto [beta1, beta2] = options.betas();
    const auto steps = static_cast<double>(range.steps);
    value.mul_(1 - options.lr() * options.weight_decay());
    average.mul_(beta1).add_(gradient, 1 - beta1);
    square.mul_(beta2).addcmul_(gradient, gradient, 1 - beta2);
    const auto root = square.sqrt().div_(std::sqrt(1 - std::pow(beta2, steps))).add_(options.eps());
    value.addcdiv_(average, root, -options.lr() / (1 - std::pow(beta1, steps)));
  }

  std::vector<FlatSlot> slots_;
  bool is_flat_ = true;
  at::Tensor values_, gradients_, averages_, squares_;
};

/// Throws when two parameters have numbers in common, as one that is given twice.
inline void check_apart(std::vector<at::Tensor> parameters) {
  const auto begin = [](const at::Tensor& p) { return static_cast<const char*>(p.const_data_ptr()); };
  const auto is_before = [&](const at::Tensor& a, const at::Tensor& b) { return begin(a) < begin(b); };
  const auto is_empty = [](const at::Tensor& p) { return p.numel() == 0; };
  parameters.erase(std::remove_if(parameters.begin(), parameters.end(), is_empty), parameters.end());
  std::sort(parameters.begin(), parameters.end(), is_before);
  for (size_t i = 1; i < parameters.size(); ++i) {
    const auto& before = parameters[i - 1];
    const bool overlap = before.is_alias_of(parameters[i]) && before.is_contiguous() &&
                         begin(parameters[i]) < begin(before) + before.nbytes();
    TORCH_CHECK(!overlap && !before.is_same(parameters[i]), "lora::AdamW: a parameter ", parameters[i].sizes(),
                " is given twice, or has numbers in common with another one ", before.sizes(),
                "; give tensors that are tied once");
  }
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
