#pragma once

#include <lora/layers/layer_weight.hpp>
#include <lora/version.hpp>

#include <memory>
#include <string>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// One module of a model, as the rules of selection see it.
struct ModelPart {
  std::string name;
  std::string type;                        ///< for errors: "torch::nn::LinearImpl"
  bool is_linear = false;                  ///< whether `all_linear` means it
  LayerWeights weights;                    ///< those that can be adapted
  std::vector<std::shared_ptr<Site>> own;  ///< the same where the module brings them

  /// Calls `visit(place)` for each of them.
  template <class Visit>
  void for_each_place(const Visit& visit) const {
    for (const auto& weight : weights) visit(weight.place);
    for (const auto& site : own) visit(site->place());
  }
};

/// A parameter as `named_parameters` has it.
struct NamedParameter {
  std::string name;
  at::Tensor tensor;
};

namespace detail {

inline constexpr const char* kRunningMean = "running_mean";

inline std::string joined(const std::string& owner, const std::string& name) {
  return owner.empty() ? name : owner + "." + name;
}

}  // namespace detail

/// What `Adapters` have to know of a model, whatever it is written with.
class Model {
 public:
  virtual ~Model() = default;
  /// Every module below the model itself, each once, under its first name.
  virtual std::vector<ModelPart> parts() const = 0;
  /// Every parameter, each once, under its first name.
  virtual std::vector<NamedParameter> parameters() const = 0;
  /// Every parameter and buffer of every module, as something that is trained whole.
  virtual LayerWeights tensors() const = 0;
  /// The mean of every module that keeps running statistics, which it updates in training mode (BatchNorm).
  virtual std::vector<Place> running_means() const = 0;
  /// The parameter of that name as something that can be adapted whatever it is used for.
  virtual LayerWeight parameter(const std::string& name) const = 0;
  /// Tells the layer of the parameter of that name that it has another number of rows.
  virtual void note_rows(const std::string& /*name*/) const {}
  /// Whether the model was destroyed, as far as that can be known.
  virtual bool is_gone() const = 0;
  /// Whether it has parts that TorchScript would optimize anew whenever they run, and differentiate on its own.
  virtual bool needs_plain_scripts() const { return false; }
  /// What is to live as long as the model has adapters, if anything is.
  virtual std::shared_ptr<const void> while_adapted() const { return nullptr; }
};

}  // namespace LORA_ABI
}  // namespace lora
