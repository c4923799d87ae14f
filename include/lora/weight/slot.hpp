#pragma once

#include <torch/nn/module.h>

#include <lora/version.hpp>
#include <lora/weight/key.hpp>
#include <lora/weight/placeholder.hpp>

#include <memory>
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
  virtual Handles handles() const { return {read(), read()}; }
  /// Whether the layer is in training mode.
  virtual bool is_training() const = 0;
  /// Equal for two slots of one place.
  virtual const void* place() const { return read().unsafeGetTensorImpl(); }
  /// Whether merged values go into a tensor of their own: where the tensor is that of another layer, too, which is to
  /// stay as it is, or where the layer writes to it.
  virtual bool is_apart() const { return false; }

  /// Puts another tensor in the place, for a weight that has to be told apart from what it is tied to.
  virtual void set(const Handles& handles) const = 0;
  /// Throws when forward passes would not see what is put here; `layer` is for the error.
  virtual void check_replaceable(const std::string& /*layer*/) const {}
};

/// `tensor.set_data(data)` for a weight of which a graph may need the former data, and is to say so.
inline void exchange_data(at::Tensor tensor, const at::Tensor& data) {
  tensor.set_data(data);
  mark(tensor);
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

/// Puts a weight that is held in few bits in a place, for one of that type. Both handles stay the tensors that they
/// are.
inline void hold(const WeightSlot::Handles& handles, std::shared_ptr<const QuantizedWeight> weight, at::ScalarType type,
                 const std::string& name) {
  const auto put = placeholder(std::move(weight), type, name);
  for (auto handle : {handles.member, handles.registered}) {
    handle.requires_grad_(false);
    handle.mutable_grad() = at::Tensor();
    exchange_data(handle, put);
  }
}

/// Gives a place numbers.
inline void release(const WeightSlot::Handles& handles, const at::Tensor& numbers) {
  for (const auto& handle : {handles.member, handles.registered}) exchange_data(handle, numbers);
}

/// Gives a weight the key of weights, in all its handles.
inline void mark(const WeightSlot& slot) {
  const auto handles = slot.handles();
  mark(handles.member);
  mark(handles.registered);
}

/// A weight that is a member of its layer. The member and the parameter registered under a name are two handles: after
/// `head->weight = tokens->weight` the registry of `head` still holds the tensor it was born with. So both are written,
/// and put back, separately, and what the weight is tied to is not touched.
class MemberSlot final : public WeightSlot {
 public:
  /// `keeps_owner`: whether the layer is to live as long as this. One that holds this itself would live for ever.
  MemberSlot(torch::nn::Module& module, at::Tensor& member, std::string parameter, bool is_apart = false,
             bool keeps_owner = true)
      : module_(&module),
        owner_(keeps_owner ? module.weak_from_this().lock() : nullptr),
        member_(&member),
        parameter_(std::move(parameter)),
        is_apart_(is_apart) {}

  at::Tensor read() const override { return *member_; }
  Handles handles() const override { return {*member_, Registry::parameters(*module_)[parameter_]}; }
  bool is_training() const override { return module_->is_training(); }
  const void* place() const override { return member_; }
  bool is_apart() const override { return is_apart_; }
  void set(const Handles& handles) const override {
    *member_ = handles.member;
    Registry::parameters(*module_)[parameter_] = handles.registered;
  }

 private:
  torch::nn::Module* module_;
  std::shared_ptr<const torch::nn::Module> owner_;  // keeps the layer alive, where something can
  at::Tensor* member_;
  std::string parameter_;
  bool is_apart_;
};

/// A parameter or buffer whose member is out of reach: one of a user's own module, or of a recurrent layer.
class TensorSlot final : public WeightSlot {
 public:
  TensorSlot(torch::nn::Module& module, at::Tensor tensor)
      : module_(&module), owner_(module.weak_from_this().lock()), tensor_(std::move(tensor)) {}

  at::Tensor read() const override { return tensor_; }
  bool is_training() const override { return module_->is_training(); }
  void set(const Handles& handles) const override { tensor_.set_data(handles.member); }

 private:
  torch::nn::Module* module_;
  std::shared_ptr<const torch::nn::Module> owner_;
  at::Tensor tensor_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
