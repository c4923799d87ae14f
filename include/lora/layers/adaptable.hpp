#pragma once

#include <lora/layers/target.hpp>
#include <lora/version.hpp>

#include <memory>
#include <string>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// A module that says itself what of it can be adapted: a layer of this library, or one of a user.
class AdaptableModule {
 public:
  virtual ~AdaptableModule() = default;
  /// Its weights; `name` is that of the module in its model.
  virtual std::vector<Target> targets(const std::string& name) = 0;
};

namespace layers {

inline std::vector<Target> find_adaptable(const std::string& name, const std::shared_ptr<torch::nn::Module>& module) {
  auto* adaptable = dynamic_cast<AdaptableModule*>(module.get());
  return adaptable == nullptr ? std::vector<Target>() : adaptable->targets(name);
}

}  // namespace layers
}  // namespace LORA_ABI
}  // namespace lora
