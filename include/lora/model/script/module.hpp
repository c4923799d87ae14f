#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/ir/ir.h>

#include <lora/layers/all.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Whether `predicate(node)` holds for a node of a TorchScript graph, or of a block inside of it.
template <class Predicate>
bool any_node(const torch::jit::Block& block, const Predicate& predicate) {
  const auto in_blocks = [&](const auto& blocks) {
    return std::any_of(blocks.begin(), blocks.end(), [&](auto* inner) { return any_node(*inner, predicate); });
  };
  return std::any_of(block.nodes().begin(), block.nodes().end(),
                     [&](const auto* node) { return predicate(*node) || in_blocks(node->blocks()); });
}

/// A weight that is an attribute of a TorchScript module. Where it has to be told apart from what it is tied to, it is
/// replaced in that module, also in lists it is part of (a recurrent layer computes with a list of its weights); a
/// weight that is adapted in every use is one for the whole model.
class ScriptSlot final : public WeightSlot {
 public:
  ScriptSlot(torch::jit::Module model, torch::jit::Module module, std::string attribute, bool everywhere)
      : model_(std::move(model)),
        module_(std::move(module)),
        attribute_(std::move(attribute)),
        everywhere_(everywhere) {}

  at::Tensor read() const override { return module_.attr(attribute_).toTensor(); }
  bool is_training() const override { return module_.is_training(); }
  /// Each lookup with max_norm writes to the table.
  bool is_apart() const override {
    return module_.hasattr("max_norm") && !module_.attr("max_norm").isNone() && attribute_ == "weight";
  }
  const void* place() const override {
    if (everywhere_) return read().unsafeGetTensorImpl();
    const auto object = module_._ivalue();
    return &object->slots()[object->type()->getAttributeSlot(attribute_)];
  }

  void set(const Handles& handles) const override {
    const auto former = read();
    if (!everywhere_) return replace(module_, former, handles.member);
    for (const auto& module : model_.modules()) replace(module, former, handles.member);
  }

  /// In a trace, layers that share a weight may all read it in the place of one of them.
  void check_replaceable(const std::string& layer) const override {
    if (everywhere_) return;
    const auto weight = read();
    int64_t holders = 0;
    bool all_read = true;
    for (const auto& module : model_.modules()) {
      for (const auto& parameter : module.named_parameters(/*recurse=*/false)) {
        if (!share_memory(parameter.value, weight)) continue;
        ++holders;
        all_read = all_read && is_read(module, parameter.name);
      }
    }
    TORCH_CHECK(holders < 2 || all_read, "lora::merge: ", layer, " shares its weight with another layer, and ",
                "the trace reads it in one place for both, so it cannot be merged into one of them. Export the module ",
                "with torch.jit.script, or trace it with a weight for each, or adapt the parameter in all its uses ",
                "(target_parameters); nothing was merged");
  }

 private:
  static void replace(const torch::jit::Module& module, const at::Tensor& former, const at::Tensor& value) {
    const auto is_former = [&](const c10::IValue& x) { return x.isTensor() && x.toTensor().is_same(former); };
    const auto object = module._ivalue();
    for (size_t i = 0; i < object->slots().size(); ++i) {
      const auto& attribute = object->getSlot(i);
      if (is_former(attribute)) {
        object->setSlot(i, value);
      } else if (attribute.isList()) {
        auto list = attribute.toList();
        for (size_t j = 0; j < list.size(); ++j) {
          if (is_former(list.get(j))) list.set(j, value);
        }
      }
    }
  }

  bool is_read(const torch::jit::Module& owner, const std::string& attribute) const {
    const auto reads = [&](const torch::jit::Node& node) {
      return node.kind() == c10::prim::GetAttr && node.s(c10::attr::name) == attribute &&
             *node.input()->type() == *owner.type();
    };
    for (const auto& module : model_.modules()) {
      for (const auto& method : module.get_methods()) {
        if (any_node(*method.graph()->block(), reads)) return true;
      }
    }
    return false;
  }

  torch::jit::Module model_, module_;
  std::string attribute_;
  bool everywhere_;
};

/// The weights of one TorchScript module. Its class says what they are; of a class that is not one of torch.nn's, every
/// parameter of two or three dimensions can be adapted, whatever it is used for.
class ScriptModule {
 public:
  ScriptModule(torch::jit::Module model, std::string name, torch::jit::Module module)
      : model_(std::move(model)),
        name_(std::move(name)),
        module_(std::move(module)),
        type_((is_quantized(module_) ? "quantized " : "") + module_.type()->name()->name()) {}

  /// Whether it is one of LibTorch's modules that hold their weight as packed integers.
  static bool is_quantized(const torch::jit::Module& module) {
    const auto name = module.type()->name()->qualifiedName();
    return name.find("nn.quantized.") != name.npos;
  }

  const std::string& type() const { return type_; }
  bool is_linear() const { return is_one_of({"Linear", "NonDynamicallyQuantizableLinear"}) && has_weight(2, 2); }

  /// What the module does with its weight.
  Use use() const { return is_linear() ? Use::kProduct : is_table() ? Use::kLookup : Use::kAny; }

  LayerWeights weights() const {
    using Form = LayerWeight::Form;
    if (is_linear()) return layers::only(weight(Form::kPlain, Use::kProduct));
    if (is_one_of({"Bilinear"}) && has_weight(3, 3)) return layers::only(weight(Form::kRows, Use::kProduct));
    if (is_table()) return layers::only(weight(Form::kLookup, Use::kLookup));
    if (is_convolution()) return layers::only(kernel());
    if (is_one_of({"MultiheadAttention"}) && module_.hasattr("out_proj")) return attention();
    return matrices(is_one_of({"RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"}) ? Use::kProduct : Use::kAny);
  }

  LayerWeight parameter(const std::string& attribute, std::string name, Use use) const {
    LayerWeight found;
    found.place = {name, name, use == Use::kAny ? "Parameter" : type_, slot(attribute, use), use};
    return found;
  }

  std::shared_ptr<ScriptSlot> slot(const std::string& attribute, Use use) const {
    return std::make_shared<ScriptSlot>(model_, module_, attribute, /*everywhere=*/use == Use::kAny);
  }

 private:
  bool is_one_of(std::initializer_list<const char*> types) const {
    return std::find(types.begin(), types.end(), type_) != types.end();
  }
  bool is_table() const { return is_one_of({"Embedding", "EmbeddingBag"}) && has_weight(2, 2); }
  bool is_convolution() const {
    return is_one_of({"Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"}) &&
           has_weight(3, 5);
  }

  at::Tensor tensor(const std::string& attribute) const { return module_.attr(attribute).toTensor(); }

  /// Whether there is a weight of so many dimensions; a user's class may have a name of torch.nn's.
  bool has_weight(int64_t least, int64_t most) const {
    if (!module_.hasattr("weight") || !module_.attr("weight").isTensor()) return false;
    const auto weight = tensor("weight");
    return weight.defined() && weight.dim() >= least && weight.dim() <= most;
  }

  LayerWeight weight(LayerWeight::Form form, Use use) const {
    auto found = parameter("weight", name_, use);
    found.form = form;
    const bool has_bias = module_.hasattr("bias") && module_.attr("bias").isTensor();
    if (has_bias && use == Use::kProduct) found.place.bias = slot("bias", Use::kProduct);
    return found;
  }

  LayerWeight kernel() const {
    const bool is_transposed = type_.find("Transpose") != std::string::npos;
    auto found =
        weight(is_transposed ? LayerWeight::Form::kTransposedKernel : LayerWeight::Form::kKernel, Use::kProduct);
    found.groups = groups();
    return found;
  }

  /// The groups of a convolution: a constant of its class or, in a trace, of the operator. One that the trace never
  /// came to is taken for one group.
  int64_t groups() const {
    const auto constant = module_.type()->findConstant("groups");
    if (constant.has_value()) return constant->toInt();
    const auto forward = module_.find_method("forward");
    if (!forward) return 1;
    for (const auto* node : forward->graph()->nodes()) {
      if (node->maybeSchema() == nullptr || !node->hasNamedInput("groups")) continue;
      return torch::jit::toIValue(node->namedInput("groups")).value().toInt();
    }
    return 1;
  }

  LayerWeights attention() const {
    auto found = matrices(Use::kProduct);
    if (found.size() == 1) found.front().place.name = found.front().place.file_name = name_;  // in_proj_weight
    const ScriptModule out_proj(model_, name_ + ".out_proj", module_.attr("out_proj").toModule());
    for (auto& weight : out_proj.weights()) {
      weight.place.file_name = name_ + ".base_layer.out_proj";
      found.push_back(std::move(weight));
    }
    for (auto& weight : found) weight.place.row_axis = std::nullopt;  // its inputs may have the batch first or not
    return found;
  }

  LayerWeights matrices(Use use) const {
    LayerWeights found;
    for (const auto& item : module_.named_parameters(/*recurse=*/false)) {
      if (item.value.dim() != 2 && (use != Use::kAny || item.value.dim() != 3)) continue;
      found.push_back(parameter(item.name, name_ + "." + item.name, use));
    }
    return found;
  }

  torch::jit::Module model_;
  std::string name_;
  torch::jit::Module module_;
  std::string type_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
