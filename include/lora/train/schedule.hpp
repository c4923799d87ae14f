#pragma once

#include <c10/util/Exception.h>
#include <torch/optim/optimizer.h>

#include <lora/version.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// How a learning rate goes: `factor(step)` times what it is set to. It rises evenly from 0 in `warmup` steps; then it
/// stays, or falls to `floor` until the step `steps`, and stays there.
///
///   auto schedule = lora::Schedule::cosine(/*steps=*/1000).warmup(100);
///
/// With the floor 0 these are get_constant_, get_linear_ and get_cosine_schedule_with_warmup of Python's transformers;
/// with another one get_cosine_with_min_lr_schedule_with_warmup, whose min_lr_rate it is.
class Schedule {
 public:
  static Schedule constant() { return {Shape::kConstant, 0}; }
  static Schedule linear(int64_t steps) { return {Shape::kLinear, steps}; }
  static Schedule cosine(int64_t steps) { return {Shape::kCosine, steps}; }

  /// The number of steps in which it rises. At least 0. Default: 0.
  Schedule& warmup(int64_t steps) {
    TORCH_CHECK_VALUE(steps >= 0, "lora::Schedule: warmup has to be at least 0 steps, but got ", steps);
    warmup_ = steps;
    return *this;
  }

  /// What it falls to; in [0, 1]. Default: 0.
  Schedule& floor(double factor) {
    TORCH_CHECK_VALUE(factor >= 0 && factor <= 1, "lora::Schedule: floor has to be in [0, 1], but got ", factor);
    floor_ = factor;
    return *this;
  }

  /// That of a step, of which the first is 0.
  double factor(int64_t step) const {
    if (step < warmup_) return static_cast<double>(step) / static_cast<double>(warmup_);
    if (shape_ == Shape::kConstant) return 1;
    const auto length = static_cast<double>(std::max<int64_t>(1, steps_ - warmup_));
    const auto progress = std::min(1.0, static_cast<double>(step - warmup_) / length);
    constexpr double kPi = 3.14159265358979323846;
    const auto left = shape_ == Shape::kLinear ? 1 - progress : (1 + std::cos(kPi * progress)) / 2;
    return floor_ + (1 - floor_) * left;
  }

 private:
  enum class Shape { kConstant, kLinear, kCosine };

  Schedule(Shape shape, int64_t steps) : shape_(shape), steps_(steps) {
    TORCH_CHECK_VALUE(steps >= 0, "lora::Schedule: it takes at least 0 steps, but got ", steps);
  }

  Shape shape_;
  int64_t steps_, warmup_ = 0;
  double floor_ = 0;
};

/// Sets the learning rates of an optimizer's groups by a schedule: each group's is what it was when this was made,
/// times the factor of the step. Any optimizer of LibTorch, which has to outlive it.
///
///   lora::ScheduledRates rates(optimizer, lora::Schedule::linear(1000).warmup(50));
///   for (...) { ...; optimizer.step(); rates.step(); }
///
/// To go on from files, it is made before the optimizer's state is loaded, and told the step afterwards.
class ScheduledRates {
 public:
  ScheduledRates(torch::optim::Optimizer& optimizer, Schedule schedule) : optimizer_(optimizer), schedule_(schedule) {
    for (const auto& group : optimizer.param_groups()) rates_.push_back(group.options().get_lr());
    go_to(0);
  }

  /// To the rates of the next step.
  void step() { go_to(step_ + 1); }

  /// To those of any step.
  void go_to(int64_t step) {
    step_ = step;
    auto& groups = optimizer_.param_groups();
    for (size_t i = 0; i < rates_.size(); ++i) groups[i].options().set_lr(rates_[i] * schedule_.factor(step));
  }

 private:
  torch::optim::Optimizer& optimizer_;
  Schedule schedule_;
  std::vector<double> rates_;
  int64_t step_ = 0;
};

}  // namespace LORA_ABI
}  // namespace lora
