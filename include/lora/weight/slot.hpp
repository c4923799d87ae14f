#pragma once

#include <torch/nn/module.h>

#include <lora/version.hpp>

#include <string>
#include <utility>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Reaches the registered parameters of any module. LibTorch lets no one replace a registered parameter, which merging
/// has to do when a weight is tied; a derived class may name the protected member.
struct Registry : torch::nn::Module {
  static torch::OrderedDict<std::string, at::Tensor>& parameters(torch::nn::Module& module) {
    return module.*(&Registry::parameters_);
  }
};

/// Where the weight of a frozen layer lives, and how another tensor is put in its place.
class WeightSlot {
 public:
  /// The weight as forward passes see it, and as saving, moving and optimizers see it.
  struct Handles {
    at::Tensor member, registered;
  };

  virtual ~WeightSlot() = default;
  /// The weight that forward passes use.
  virtual at::Tensor read() const = 0;
  virtual Handles handles() const = 0;
  /// What `set` changes: equal for two slots of one place.
  virtual const void* place() const = 0;
  virtual void set(const Handles& handles) const = 0;
  /// Throws when forward passes would not see what is put here; `layer` is for the error.
  virtual void check_replaceable(const std::string& /*layer*/) const {}
  /// Whether `weight` is what was put here last.
  virtual bool holds(const at::Tensor& weight) const { return read().is_same(weight); }
  /// Lets the weight that is here now stay for good, trainable if `former` was.
  virtual void keep(const Handles& former) const { read().requires_grad_(former.member.requires_grad()); }
};

/// A weight that is a member of its layer. The member and the parameter registered under a name are two handles: after
/// `head->weight = tokens->weight` the registry of `head` still holds the tensor it was born with. So both are written,
/// and put back, separately, and what the weight is tied to is not touched.
class MemberSlot final : public WeightSlot {
 public:
  MemberSlot(torch::nn::Module& module, at::Tensor& member, std::string parameter)
      : module_(&module), member_(&member), parameter_(std::move(parameter)) {}

  at::Tensor read() const override { return *member_; }
  Handles handles() const override { return {*member_, Registry::parameters(*module_)[parameter_]}; }
  const void* place() const override { return member_; }
  void set(const Handles& handles) const override {
    *member_ = handles.member;
    Registry::parameters(*module_)[parameter_] = handles.registered;
  }

 private:
  torch::nn::Module* module_;
  at::Tensor* member_;
  std::string parameter_;
};

/// A weight whose member is out of reach: a parameter of a user's own module, or of a recurrent layer. The tensor stays
/// the same object for everyone who holds it, and gets other values.
class ParameterSlot final : public WeightSlot {
 public:
  ParameterSlot(torch::nn::Module& module, std::string parameter)
      : module_(&module), parameter_(std::move(parameter)) {}

  at::Tensor read() const override { return Registry::parameters(*module_)[parameter_]; }
  Handles handles() const override {
    const auto values = read().detach();  // another object over the same memory, which keeps it
    return {values, values};
  }
  const void* place() const override { return read().unsafeGetTensorImpl(); }
  void set(const Handles& handles) const override { read().set_data(handles.member); }
  bool holds(const at::Tensor& weight) const override {
    const auto now = read();
    const bool moved = now.device() != weight.device() || now.dtype() != weight.dtype();
    return moved || now.is_alias_of(weight);
  }
  void keep(const Handles& /*former*/) const override {}  // the parameter itself was never replaced

 private:
  torch::nn::Module* module_;
  std::string parameter_;
};

/// A tensor of which there is only this handle, e.g. a buffer. It gets other values, too.
class TensorSlot final : public WeightSlot {
 public:
  explicit TensorSlot(at::Tensor tensor) : tensor_(std::move(tensor)) {}

  at::Tensor read() const override { return tensor_; }
  Handles handles() const override { return {tensor_.detach(), tensor_.detach()}; }
  const void* place() const override { return tensor_.unsafeGetTensorImpl(); }
  void set(const Handles& handles) const override { tensor_.set_data(handles.member); }
  bool holds(const at::Tensor& /*weight*/) const override { return true; }
  void keep(const Handles& /*former*/) const override {}

 private:
  at::Tensor tensor_;
};

/// Puts back what was in a slot. When the module was moved to another device or type meanwhile, it follows.
inline void put_back(const WeightSlot& slot, WeightSlot::Handles handles) {
  const auto options = slot.read().options();
  for (auto* handle : {&handles.member, &handles.registered}) {
    if (handle->device() != options.device() || handle->dtype() != options.dtype())
      handle->set_data(handle->detach().to(options.requires_grad(false)));
  }
  slot.set(handles);
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
