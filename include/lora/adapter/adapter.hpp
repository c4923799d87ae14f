#pragma once

#include <c10/util/Exception.h>
#include <torch/csrc/api/include/torch/ordered_dict.h>

#include <lora/config.hpp>
#include <lora/fwd.hpp>
#include <lora/linkage.hpp>
#include <lora/method/contract.hpp>
#include <lora/site.hpp>
#include <lora/version.hpp>

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// One tensor of the model that an adapter changes, and how.
struct AdapterPart {
  enum class Role : uint8_t {
    kLayer,  ///< the weight of an adapted layer
    kBias,   ///< the bias of one, where the method changes that, too
    kFull    ///< trained in full: modules_to_save, bias and lora_bias of the configuration
  };

  Role role = Role::kLayer;
  std::shared_ptr<Site> site;
  std::shared_ptr<AnyMethod> method;
  std::string name;       ///< that its tensors have among the adapter's: "fc2" in "fc2.lora_A"
  std::string file_name;  ///< the same in PEFT's files
  std::string module;     ///< by whose name it has its rank and alpha

  /// The name of what it changes: of the layer, or of a parameter that is trained in full.
  const std::string& changed() const {
    const bool is_layer_in_full = role == Role::kFull && !site->kind().empty();
    return is_layer_in_full ? name : site->name();
  }

  /// The name of one of its tensors among the adapter's. What all layers share has no layer's name.
  std::string name_of(const NamedTensor& tensor) const {
    if (tensor.is_shared) return tensor.name;
    return tensor.name.empty() ? name : name + "." + tensor.name;
  }
};

/// One adapter: a configuration, and what it does to each tensor of a model. A value that is not changed once it is
/// part of the adapters of a model, but for the numbers in its tensors, which training changes.
struct Adapter {
  LoRAConfig config;
  std::vector<AdapterPart> parts;  ///< the layers in the order of the model, then what is trained in full
  std::shared_ptr<detail::StartValues> start = nullptr;  ///< what `initialize` took from the weights
  /// What its files hold of the model beside what it changes, as PEFT writes tables that got more tokens: the name in
  /// the file, and that of the tensor in the model.
  std::map<std::string, std::string> frozen = {};

  /// Gives every tensor its first values.
  void initialize();

  /// Calls `visit(part, tensor)` for every tensor, those that are shared once.
  template <class Visit>
  void for_each_tensor(const Visit& visit) const {
    std::set<const c10::TensorImpl*> seen;
    for (const auto& part : parts) {
      for (const auto& tensor : part.method->tensors()) {
        if (!tensor.is_shared || seen.insert(tensor.tensor->unsafeGetTensorImpl()).second) visit(part, tensor);
      }
    }
  }

  /// The trained tensors by name.
  torch::OrderedDict<std::string, at::Tensor> named_parameters() const;

  /// The part that changes the weight of the layer of that name, or the bias or other tensor; null where none does.
  const AdapterPart* part(const std::string& name) const;
};

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <lora/adapter/start_values.hpp>
#include <lora/method/bias_update.hpp>
#include <lora/method/full_delta.hpp>
#include <lora/selection/text.hpp>
#include <lora/weight/key.hpp>

#include <utility>

namespace lora {
inline namespace LORA_ABI {

LORA_INLINE void Adapter::initialize() {
  const detail::BelowInterception below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::NoGradGuard no_grad;
  if (!parts.empty()) parts.front().method->initialize_shared();
  start = std::make_shared<detail::StartValues>();
  for (const auto& part : parts) {
    part.method->initialize(part.site->base());
    if (part.method->follows()) start->note(part.site, part.method);
  }
  if (start->empty()) start.reset();
}

LORA_INLINE torch::OrderedDict<std::string, at::Tensor> Adapter::named_parameters() const {
  torch::OrderedDict<std::string, at::Tensor> all;
  for_each_tensor([&](const AdapterPart& part, const NamedTensor& tensor) {
    if (tensor.is_trained) all.insert(part.name_of(tensor), *tensor.tensor);
  });
  return all;
}

LORA_INLINE const AdapterPart* Adapter::part(const std::string& name) const {
  for (const auto& part : parts) {
    if (part.changed() == name) return &part;
  }
  for (const auto& part : parts) {
    if (part.site->name() == name) return &part;
  }
  return nullptr;
}

namespace detail {

/// The part for the bias of a layer whose method changes it.
inline AdapterPart bias_part(const AdapterPart& layer) {
  TORCH_CHECK(layer.site->view().part_rows().empty(), "lora::attach: ", layer.method->info().name,
              " changes the bias of \"", layer.name,
              "\", too, which is not done for the parts of a fused layer; take the layer out of `fused`");
  auto part = layer;
  part.role = AdapterPart::Role::kBias;
  part.site = layer.site->bias_site();
  part.method = std::make_shared<MethodOf<BiasUpdate>>(BiasUpdate(layer.method));
  return part;
}

/// An adapter is made where its weight is; a model that is moved later leaves it behind.
inline void check_devices(const Adapter& adapter) {
  adapter.for_each_tensor([](const AdapterPart& part, const NamedTensor& tensor) {
    const auto device = part.site->weight().device();
    TORCH_CHECK(tensor.tensor->device() == device,
                "lora::Adapters: the model was moved after it was adapted: ", part.changed(), " is on ", device,
                ", its ", tensor.name.empty() ? "trained copy" : tensor.name, " on ", tensor.tensor->device(),
                "; move the model first, then attach or load the adapter");
  });
}

/// Writes down the rank and alpha of one layer, where they differ from those that `config` gives it so far.
inline void note_options(LoRAConfig& config, const std::string& layer, const LoRAOptions& options,
                         const LoRAOptions& so_far) {
  const auto pattern = escaped(layer);
  auto ranks = config.rank_pattern();
  auto alphas = config.alpha_pattern();  // of which the first that matches counts
  if (options.rank() != so_far.rank()) ranks.insert(ranks.begin(), {"^" + pattern, options.rank()});
  if (options.alpha() != so_far.alpha()) alphas.insert(alphas.begin(), {"^" + pattern, options.alpha()});
  config.rank_pattern(std::move(ranks)).alpha_pattern(std::move(alphas));
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
