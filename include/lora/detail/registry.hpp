#pragma once

#include <torch/nn/module.h>

#include <string>

namespace lora::detail {

/// Reaches the registered parameters of any module. LibTorch lets no one replace a registered parameter, which merging
/// has to do when a weight is tied; a derived class may name the protected member.
struct Registry : torch::nn::Module {
  static torch::OrderedDict<std::string, at::Tensor>& parameters(torch::nn::Module& module) {
    return module.*(&Registry::parameters_);
  }
};

/// Where the weight of a frozen layer lives. Forward passes read the member of the layer; saving, moving and
/// optimizers see the parameter registered under a name. They are two handles: after `head->weight = tokens->weight`
/// the registry of `head` still holds the tensor it was born with. So both are written, and put back, separately.
class WeightSlot {
 public:
  struct Handles {
    at::Tensor member, registered;
  };

  WeightSlot(torch::nn::Module& module, at::Tensor& member, std::string parameter)
      : module_(&module), member_(&member), parameter_(std::move(parameter)) {}

  /// The weight that forward passes use.
  const at::Tensor& read() const { return *member_; }
  Handles handles() const { return {*member_, Registry::parameters(*module_)[parameter_]}; }
  void set(const Handles& handles) const {
    *member_ = handles.member;
    Registry::parameters(*module_)[parameter_] = handles.registered;
  }

 private:
  torch::nn::Module* module_;
  at::Tensor* member_;
  std::string parameter_;
};

}  // namespace lora::detail
