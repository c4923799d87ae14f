#pragma once

#include <torch/nn/module.h>

#include <lora/detail/registry.hpp>
#include <lora/site.hpp>

#include <memory>
#include <string>

namespace lora {

/// One weight of a model that can be adapted, as a kind of layer (`layers/linear.hpp`, ...) finds it.
struct Target {
  std::string name;                           ///< of the layer in the model: "encoder.self_attn"
  std::string file_name;                      ///< of the layer in PEFT's files, where that differs from `name`
  std::string kind;                           ///< for reports and errors: "Linear"
  std::shared_ptr<torch::nn::Module> module;  ///< the layer; alive as long as something may be merged into it
  detail::WeightSlot slot;                    ///< where the weight is
  std::shared_ptr<Site> site;                 ///< its adapters
};

}  // namespace lora
