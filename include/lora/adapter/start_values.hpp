#pragma once

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <lora/method/contract.hpp>
#include <lora/selection/text.hpp>
#include <lora/site.hpp>
#include <lora/version.hpp>
#include <lora/weight/key.hpp>
#include <lora/weight/stamp.hpp>

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// What an adapter took from the weights of the model when it started (`follow` of its methods: DoRA's magnitudes, the
/// copies of what is trained in full), and whether these are the weights still. A checkpoint that is read after
/// `attach` changes them.
class StartValues {
 public:
  /// Notes a method that has its first values, from the weight of that site.
  void note(std::shared_ptr<const Site> site, std::shared_ptr<AnyMethod> method) {
    auto stamp = site->stamp();
    auto values = stamps(*method);
    starts_.push_back({std::move(site), std::move(method), std::move(stamp), std::move(values)});
  }

  bool empty() const { return starts_.empty(); }

  /// Takes anew what was taken from weights that have other values now, so that an adapter that was not trained yet is
  /// the base model again. Where it was trained already, warns once and leaves it as it is.
  void follow() {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<std::string> trained;
    for (auto& start : starts_) {
      auto now = start.site->stamp();
      if (now == start.weight) continue;
      const bool was_moved = now.is_elsewhere(start.weight);  // or cast, which changes no value but by rounding
      start.weight = std::move(now);
      if (was_moved) continue;
      if (stamps(*start.method) != start.values) {
        trained.push_back(start.site->name());
        continue;
      }
      const BelowInterception below;
      at::NoGradGuard no_grad;
      start.method->follow(start.site->base());
      start.values = stamps(*start.method);
    }
    if (trained.empty() || std::exchange(warned_, true)) return;
    TORCH_WARN("lora::activate: the weights of ", list(trained), " were written to since the adapter was made, which ",
               "took its first values from them and was trained since. It goes on from the former ones; read the ",
               "model's weights before the adapter is attached, or attach it anew");
  }

 private:
  struct Start {
    std::shared_ptr<const Site> site;
    std::shared_ptr<AnyMethod> method;
    Stamp weight;
    std::vector<Stamp> values;  // of the method's tensors
  };

  static std::vector<Stamp> stamps(AnyMethod& method) {
    std::vector<Stamp> all;
    for (const auto& item : method.tensors()) all.emplace_back(*item.tensor);
    return all;
  }

  std::mutex mutex_;
  std::vector<Start> starts_;
  bool warned_ = false;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
