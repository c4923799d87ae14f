#pragma once

#include <torch/nn/module.h>

#include <lora/site.hpp>
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
  /// The sites of its weights, which it keeps; with `Site::own`, where it has an adapter of its own.
  virtual std::vector<std::shared_ptr<Site>> own_sites() = 0;
};

}  // namespace LORA_ABI
}  // namespace lora
