#pragma once

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Generator.h>

#include <lora/version.hpp>

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <vector>

// What a function has to find again when it runs a second time, beside what threads hand on to others (`carry`).

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Where the generators of random numbers were that a function on such tensors draws from: the CPU's and those of the
/// devices of the tensors.
class RandomState {
 public:
  explicit RandomState(const std::vector<at::Tensor>& tensors) {
    note(at::globalContext().defaultGenerator(at::kCPU));
    for (const auto& tensor : tensors) {
      if (!tensor.defined() || tensor.is_cpu() || tensor.is_meta()) continue;
      const auto& generator = at::globalContext().defaultGenerator(tensor.device());
      const auto is_it = [&](const State& state) { return state.generator == generator; };
      if (std::none_of(states_.begin(), states_.end(), is_it)) note(generator);
    }
  }

  /// Where they are now.
  RandomState now() const {
    auto state = *this;
    for (auto& found : state.states_) found.value = value(found.generator);
    return state;
  }

  void set() const {
    for (const auto& state : states_) {
      auto generator = state.generator;
      std::lock_guard<std::mutex> lock(generator.mutex());
      generator.set_state(state.value);
    }
  }

 private:
  struct State {
    at::Generator generator;
    at::Tensor value;
  };

  static at::Tensor value(at::Generator generator) {
    std::lock_guard<std::mutex> lock(generator.mutex());
    return generator.get_state();
  }

  void note(const at::Generator& generator) { states_.push_back({generator, value(generator)}); }

  std::vector<State> states_;
};

/// The types to which autocast casts on the devices of such tensors, which LibTorch before 2.13 does not carry along.
class CastTypes {
 public:
  explicit CastTypes(const std::vector<at::Tensor>& tensors) {
    note(at::kCPU);
    for (const auto& tensor : tensors) {
      if (tensor.defined()) note(tensor.device().type());
    }
  }

  /// Those of now on the same devices.
  CastTypes now() const {
    auto types = *this;
    for (auto& [device, type] : types.types_) type = at::autocast::get_autocast_dtype(device);
    return types;
  }

  void set() const {
    for (const auto& [device, type] : types_) at::autocast::set_autocast_dtype(device, type);
  }

 private:
  void note(at::DeviceType device) { types_[device] = at::autocast::get_autocast_dtype(device); }

  std::unordered_map<at::DeviceType, at::ScalarType> types_;
};

/// While it lives, that state is in effect; then the one that it found.
template <class State>
class Restored {
 public:
  explicit Restored(const State& wanted) : found_(wanted.now()) { wanted.set(); }
  ~Restored() { found_.set(); }
  Restored(const Restored&) = delete;
  Restored& operator=(const Restored&) = delete;

 private:
  State found_;
};

/// While it lives, autocast keeps no casts: those of one run would be nodes of another's graph.
class WithoutCastCache {
 public:
  WithoutCastCache() { at::autocast::set_autocast_cache_enabled(false); }
  ~WithoutCastCache() { at::autocast::set_autocast_cache_enabled(before_); }
  WithoutCastCache(const WithoutCastCache&) = delete;
  WithoutCastCache& operator=(const WithoutCastCache&) = delete;

 private:
  bool before_ = at::autocast::is_autocast_cache_enabled();
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
