#pragma once

#include <torch/nn/module.h>

#include <lora/weight/slot.hpp>
#include <lora/intercept/weight_table.hpp>
#include <lora/site.hpp>
#include <lora/version.hpp>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// How PEFT's files name and shape the tensors of an adapter, where that differs from the tensors themselves. A
/// function that is empty changes nothing.
struct FileLayout {
  std::function<std::string(const NamedTensor& tensor)> name;  ///< without the layer's
  std::function<at::Tensor(const std::string& name, const at::Tensor& tensor)> to_file;
  /// Throws c10::Error when `stored` has no form as the tensor `name`.
  std::function<at::Tensor(const std::string& name, const at::Tensor& stored)> from_file;
};

/// One weight of a model that can be adapted, as a kind of layer (`layers/linear.hpp`, ...) finds it.
struct Target {
  std::string name;                          ///< of the layer in the model: "encoder.self_attn"
  std::string file_name;                     ///< of the layer in PEFT's files, where that differs from `name`
  std::string kind;                          ///< for reports and errors: "Linear"
  std::function<bool()> is_training;         ///< whether dropout acts; keeps the layer alive
  std::shared_ptr<detail::WeightSlot> slot;  ///< where the weight is
  std::shared_ptr<Site> site;                ///< its adapters
  detail::Use use = detail::Use::kProduct;   ///< which uses of the weight are this layer's
  FileLayout files = {};
  std::vector<std::string> tied_to = {};  ///< layers with the same weight, whose uses of it are not adapted here
};

namespace layers {

/// The list of one target.
inline std::vector<Target> only(Target target) {
  std::vector<Target> targets;
  targets.push_back(std::move(target));  // which a list in braces would copy
  return targets;
}

/// `Target::is_training` of a torch::nn module.
inline std::function<bool()> training_of(const std::shared_ptr<torch::nn::Module>& module) {
  return [module] { return module->is_training(); };
}

/// The weight in the member `weight` of a layer, registered under the name `parameter`.
inline Target member_target(std::string name, const char* kind, const std::shared_ptr<torch::nn::Module>& module,
                            at::Tensor& weight, const char* parameter, MatrixView view) {
  return {name,
          name,
          kind,
          training_of(module),
          std::make_shared<detail::MemberSlot>(*module, weight, parameter),
          std::make_shared<Site>(std::move(view))};
}

/// The weight registered under the name `parameter`, whose member is out of reach.
inline Target parameter_target(std::string name, const char* kind, const std::shared_ptr<torch::nn::Module>& module,
                               const std::string& parameter, MatrixView view) {
  return {name,
          name,
          kind,
          training_of(module),
          std::make_shared<detail::ParameterSlot>(*module, parameter),
          std::make_shared<Site>(std::move(view))};
}

}  // namespace layers
}  // namespace LORA_ABI
}  // namespace lora
