#pragma once

#include <torch/csrc/jit/api/module.h>

#include <lora/adapters.hpp>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace lora {
namespace detail {

/// A weight that is an attribute of a TorchScript module.
class ScriptSlot final : public WeightSlot {
 public:
  ScriptSlot(torch::jit::Module module, std::string attribute)
      : module_(std::move(module)), attribute_(std::move(attribute)) {}

  at::Tensor read() const override { return module_.attr(attribute_).toTensor(); }
  Handles handles() const override { return {read(), read()}; }
  void set(const Handles& handles) const override {
    auto module = module_;  // another handle of the same module
    module.setattr(attribute_, handles.member);
  }

 private:
  torch::jit::Module module_;
  std::string attribute_;
};

/// The weights of one TorchScript module. Its class says what they are; of a class that is not one of torch.nn's, every
/// parameter of two or three dimensions can be adapted, whatever it is used for.
class ScriptModule {
 public:
  ScriptModule(std::string name, torch::jit::Module module)
      : name_(std::move(name)), module_(std::move(module)), type_(module_.type()->name()->name()) {}

  const std::string& type() const { return type_; }
  bool is_linear() const { return type_ == "Linear" || type_ == "NonDynamicallyQuantizableLinear"; }

  /// What the module does with its weight.
  Use use() const {
    if (is_linear()) return Use::kProduct;
    return type_ == "Embedding" || type_ == "EmbeddingBag" ? Use::kLookup : Use::kAny;
  }

  std::vector<Target> targets() const {
    if (is_linear()) return weight(MatrixView::plain);
    if (type_ == "Bilinear") return weight(MatrixView::rows);
    if (type_ == "Embedding" || type_ == "EmbeddingBag") return table();
    if (type_.find("Conv") != std::string::npos && module_.hasattr("weight")) return kernel();
    if (type_ == "MultiheadAttention") return attention();
    if (type_.find("LSTM") == 0 || type_.find("GRU") == 0 || type_.find("RNN") == 0) return matrices(Use::kProduct);
    return matrices(Use::kAny);
  }

  Target parameter(const std::string& attribute, std::string name, MatrixView view, Use use) const {
    return {name,
            name,
            use == Use::kAny ? "Parameter" : type_,
            [module = module_] { return module.is_training(); },
            std::make_shared<ScriptSlot>(module_, attribute),
            std::make_shared<Site>(std::move(view)),
            use};
  }

 private:
  at::Tensor tensor(const std::string& attribute) const { return module_.attr(attribute).toTensor(); }

  std::vector<Target> weight(MatrixView (*view)(at::IntArrayRef)) const {
    return {parameter("weight", name_, view(tensor("weight").sizes()), Use::kProduct)};
  }

  std::vector<Target> table() const {
    auto target = parameter("weight", name_, MatrixView::lookup(tensor("weight").sizes()), Use::kLookup);
    target.files = layers::embedding_files();
    return {std::move(target)};
  }

  /// A traced convolution does not know its groups any more; then the groups share one A.
  std::vector<Target> kernel() const {
    const auto sizes = tensor("weight").sizes().vec();
    const auto constant = module_.type()->findConstant("groups");
    const auto groups = constant.has_value() && constant->isInt() ? constant->toInt() : 1;
    auto view = MatrixView::kernel(sizes, groups, type_.find("Transpose") != std::string::npos);
    auto files = layers::ConvolutionFiles(view.shape(), {sizes.begin() + 2, sizes.end()}).layout();
    auto target = parameter("weight", name_, std::move(view), Use::kProduct);
    target.files = std::move(files);
    return {std::move(target)};
  }

  std::vector<Target> attention() const {
    auto targets = matrices(Use::kProduct);
    if (targets.size() == 1) targets.front().name = targets.front().file_name = name_;  // in_proj_weight
    const ScriptModule out_proj(name_ + ".out_proj", module_.attr("out_proj").toModule());
    targets.push_back(out_proj.weight(MatrixView::plain).front());
    targets.back().file_name = name_ + ".base_layer.out_proj";
    return targets;
  }

  std::vector<Target> matrices(Use use) const {
    std::vector<Target> targets;
    for (const auto& item : module_.named_parameters(/*recurse=*/false)) {
      if (item.value.dim() != 2 && (use != Use::kAny || item.value.dim() != 3)) continue;
      targets.push_back(parameter(item.name, name_ + "." + item.name, MatrixView::plain(item.value.sizes()), use));
    }
    return targets;
  }

  std::string name_;
  torch::jit::Module module_;
  std::string type_;
};

/// A model that TorchScript runs.
class ScriptModel final : public Model {
 public:
  explicit ScriptModel(torch::jit::Module model) : model_(std::move(model)) {
    TORCH_CHECK(
        model_.parameters().size() > 0, "lora::attach: this TorchScript module has no parameters; freezing it (",
        "torch.jit.freeze, torch.jit.optimize_for_inference) made constants of them. Attach to the module as it ",
        "was before, merge, and freeze the merged one");
  }

  std::vector<ModelPart> parts() const override {
    std::vector<ModelPart> parts;
    std::set<const void*> seen;
    for (const auto& item : model_.named_modules()) {
      if (item.name.empty() || !seen.insert(item.value._ivalue().get()).second) continue;
      const ScriptModule module(item.name, item.value);
      parts.push_back({item.name, module.type(), module.is_linear(), module.targets()});
    }
    return parts;
  }

  std::vector<NamedParameter> parameters() const override {
    std::vector<NamedParameter> parameters;
    std::set<const c10::TensorImpl*> seen;
    for (const auto& item : model_.named_parameters()) {
      if (seen.insert(item.value.unsafeGetTensorImpl()).second) parameters.push_back({item.name, item.value});
    }
    return parameters;
  }

  std::vector<ModelTensor> tensors() const override {
    std::vector<ModelTensor> tensors;
    for (const auto& item : model_.named_modules()) {
      const auto prefix = item.name.empty() ? "" : item.name + ".";
      const auto use = ScriptModule(item.name, item.value).use();
      for (const auto& parameter : item.value.named_parameters(/*recurse=*/false))
        tensors.push_back({prefix + parameter.name, std::make_shared<ScriptSlot>(item.value, parameter.name), use});
      for (const auto& buffer : item.value.named_buffers(/*recurse=*/false))
        tensors.push_back({prefix + buffer.name, std::make_shared<ScriptSlot>(item.value, buffer.name), use, true});
    }
    return tensors;
  }

  Target parameter_target(const std::string& name) const override {
    const auto dot = name.rfind('.');
    const auto owner = dot == std::string::npos ? std::string() : name.substr(0, dot);
    for (const auto& item : model_.named_modules()) {
      if (item.name != owner) continue;
      const auto attribute = name.substr(dot + 1);
      const auto view = layers::parameter_view(name, item.value.attr(attribute).toTensor());
      return ScriptModule(owner, item.value).parameter(attribute, name, view, Use::kAny);
    }
    TORCH_CHECK(false, "lora::attach: no module has the parameter \"", name, "\"");
  }

  bool is_gone() const override { return false; }  // it shares the ownership
  bool is_script() const override { return true; }

 private:
  torch::jit::Module model_;
};

}  // namespace detail

/// Adapts a TorchScript module, as torch.jit.script or torch.jit.trace exported it, by the names of its modules (or, by
/// `target_parameters`, of its parameters). Training, merging and files are those of any other model; a merged module
/// is saved with `save` and needs nothing of this library. Inside a scope TorchScript's optimizing executor is off,
/// since its own derivatives know nothing of the adapters.
///
/// Errors: c10::Error when an entry of the configuration matches nothing, or when the module was frozen.
inline Adapters attach(torch::jit::Module& model, const LoRAConfig& config) {
  Adapters adapters(std::make_shared<detail::ScriptModel>(model));
  adapters.add("default", config);
  return adapters;
}

}  // namespace lora
