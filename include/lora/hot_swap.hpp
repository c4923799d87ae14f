#pragma once

#include <torch/csrc/jit/api/module.h>

#include <lora/adapters.hpp>
#include <lora/linkage.hpp>
#include <lora/method/low_rank.hpp>
#include <lora/model/model.hpp>
#include <lora/peft/load_options.hpp>
#include <lora/version.hpp>

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// What is traced: a function of tensors that calls the model. It returns a tensor, or a tuple, list or dictionary.
using TracedFunction = std::function<c10::IValue(const std::vector<at::Tensor>& inputs)>;

/// Traces a function of a model into a TorchScript module in which adapters can be put one after the other, without
/// tracing anew (`HotSwap`): of all layers that `room` selects, up to the rank that it gives each.
///
///   auto compiled = lora::trace(*model, lora::LoRAConfig(/*rank=*/16).target_modules({"q_proj", "v_proj"}), {x},
///                               [&](const std::vector<at::Tensor>& in) { return model->forward(in[0]); });
///   compiled.save("model.pt");
///
/// The module shares the model's tensors, and until something is put in it computes what the base model does. It is a
/// trace: branches and sizes that the model takes from its inputs as numbers are those of `inputs`, and so is whether
/// the model is in training mode; types are those of the model. Adapters of the model may stay, but what runs in a
/// scope of theirs, the tracing or the module itself, has theirs beside what was put in. Freezing the module
/// (torch::jit::freeze) makes constants of what is to be swapped.
///
/// A TorchScript module is traced as std::make_shared<ScriptModel>(module), into another one.
///
/// Errors: c10::Error when `room` asks for anything but low-rank updates, or selects a layer that the function does not
/// compute with; when a weight is held in few bits; those of `Adapters::add`. The model is as before.
LORA_INLINE torch::jit::Module trace(std::shared_ptr<const Model> model, const LoRAConfig& room,
                                     const std::vector<at::Tensor>& inputs, const TracedFunction& function);
LORA_INLINE torch::jit::Module trace(torch::nn::Module& model, const LoRAConfig& room,
                                     const std::vector<at::Tensor>& inputs, const TracedFunction& function);

/// Puts adapters into a module that `trace` made, here or in another process that saved it:
///
///   auto compiled = torch::jit::load("model.pt");
///   lora::HotSwap swap(compiled);
///   swap.load("customers/anna");
///   auto y = compiled.forward({x});
///   swap.put(adapters, "otto");  // of Adapters, or of a pool's
///   swap.clear();                // the base model
///
/// The numbers of an adapter are copied into the tensors that the graph reads, filled up with zeros to the rank that
/// there is room for; layers that it does not have get zero. So nothing is compiled anew, and what computes with the
/// module sees the change, wherever its handle is: no pass may run meanwhile.
///
/// Errors: c10::Error with the name of the adapter and of the layer, when it is no plain low-rank update, when its rank
/// is larger than the room, or when it changes a layer for which there is none; the former adapter is there still.
class HotSwap {
 public:
  /// Throws when the module is none of `trace`, or was frozen.
  explicit HotSwap(const torch::jit::Module& compiled);

  /// Puts in an adapter of those of a model, with the scales that it has there.
  void put(const Adapters& adapters, const std::string& name);

  /// Puts in the adapter of a PEFT directory, for which nothing is needed but the module. Of models with layers that
  /// are no Linear, Embedding or convolution, an adapter that is loaded with these is put in instead.
  void load(const std::filesystem::path& directory, const LoadOptions& options = {});

  /// Takes out what is in: the module is the base model.
  void clear();

  /// The layers for which there is room, and the largest rank of an adapter of each.
  std::map<std::string, int64_t> room() const;

 private:
  /// The tensors of one layer, which the graph reads.
  struct Layer {
    std::string name;
    at::Tensor A, B, scale;

    int64_t rank() const { return A.size(-2); }
    void clear();
    void set(const LowRank& update, double factor);
  };

  using Scale = std::function<double(const AdapterPart& part)>;

  void put(const std::string& what, const Adapter& adapter, const Scale& scale);

  /// Where a part of an adapter goes, and what.
  std::pair<Layer*, const LowRank*> room_for(const std::string& what, const AdapterPart& part);

  /// Whether the shapes are the same but for that dimension, the rank.
  static bool is_alike(const at::Tensor& tensor, const at::Tensor& place, int64_t rank);

  std::vector<std::string> names() const;

  torch::jit::Module model_;
  std::vector<Layer> layers_;
};

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/jit/ir/ir.h>

#include <lora/method/swappable.hpp>
#include <lora/model/script/model.hpp>
#include <lora/peft/checkpoint.hpp>

#include <algorithm>
#include <set>

namespace lora {
inline namespace LORA_ABI {

namespace detail {

/// Builds a TorchScript module that has a model's tensors under their names in `model`, and those of an adapter in
/// `lora`, each in the module of its layer.
class TracedTree {
 public:
  TracedTree(const Model& model, const Adapter& room) {
    root_.register_module("model", torch::jit::Module("Model"));
    root_.register_module("lora", torch::jit::Module("Adapter"));
    note_kinds(model);
    for (const auto& tensor : model.tensors()) {
      const auto& name = tensor.place.name;
      const auto value = tensor.place.slot->read();
      TORCH_CHECK(!is_quantized(value), "lora::trace: the weight \"", name, "\" is held in few bits, which no graph ",
                  "of TorchScript can read; give it numbers first (lora::dequantize)");
      auto owner = at("model", owner_of(name));
      const auto attribute = name.substr(name.rfind('.') + 1);  // npos + 1 is 0
      if (tensor.is_buffer) {
        owner.register_buffer(attribute, value);
      } else {
        owner.register_parameter(attribute, value, /*is_buffer=*/false);
      }
    }
    room.for_each_tensor([&](const AdapterPart& part, const NamedTensor& tensor) {
      at("lora", part.site->name()).register_buffer(tensor.name, *tensor.tensor);
    });
  }

  torch::jit::Module root() const { return root_; }

 private:
  /// The class of each module that is one layer, by which ScriptModel knows it again, and the groups of convolutions.
  void note_kinds(const Model& model) {
    for (const auto& part : model.parts()) {
      part.for_each_place([&](const Place& place) {
        if (place.name == part.name && !place.kind.empty()) kinds_[part.name] = place.kind;
      });
      for (const auto& weight : part.weights) groups_[part.name] = weight.groups;
      for (const auto& site : part.own) groups_[part.name] = std::max<int64_t>(1, site->view().shape().rank_shares);
    }
  }

  /// The module of that name below `part`, with all above it, made where there was none.
  torch::jit::Module at(const std::string& part, const std::string& name) {
    if (name.empty()) return root_.attr(part).toModule();
    const auto full = part + "." + name;
    const auto known = modules_.find(full);
    if (known != modules_.end()) return known->second;
    auto owner = at(part, owner_of(name));
    const auto kind = kinds_.find(name);
    torch::jit::Module made(part == "model" && kind != kinds_.end() ? kind->second : std::string("Module"));
    if (part == "model" && groups_[name] > 1) made.type()->addConstant("groups", groups_[name]);
    owner.register_module(name.substr(name.rfind('.') + 1), made);
    return modules_.emplace(full, made).first->second;
  }

  torch::jit::Module root_{"SwappableModel"};
  std::map<std::string, torch::jit::Module> modules_;
  std::map<std::string, std::string> kinds_;
  std::map<std::string, int64_t> groups_;
};

/// Throws when the graph does not read the tensors of every layer of the adapter.
inline void check_reached(const torch::jit::Graph& graph, const Adapter& room, const torch::jit::Module& lora) {
  std::set<const c10::Type*> reached;
  for (const auto* node : graph.nodes()) {
    const bool reads = node->kind() == c10::prim::GetAttr && node->s(c10::attr::name) == "lora_A";
    if (reads && !node->output()->uses().empty()) reached.insert(node->input()->type().get());
  }
  for (const auto& item : lora.named_modules()) {
    const bool is_missed = item.value.hasattr("lora_A") && reached.count(item.value.type().get()) == 0;
    TORCH_CHECK(!is_missed, "lora::trace: the traced function did not compute with the layer \"", item.name,
                "\"; leave it out of the configuration, or trace a function that calls it. Adapted are ",
                room.parts.size(), " layers");
  }
}

}  // namespace detail

LORA_INLINE torch::jit::Module trace(std::shared_ptr<const Model> model, const LoRAConfig& room,
                                     const std::vector<at::Tensor>& inputs, const TracedFunction& function) {
  const auto& info = room.method().info();
  TORCH_CHECK_VALUE(info.name == LowRank::info.name, "lora::trace: only low-rank updates can be put into a graph, but ",
                    "the configuration is of a ", info.name);
  TORCH_CHECK_VALUE(room.dropout() == 0, "lora::trace: a graph of adapters that are swapped has no dropout, but the ",
                    "configuration asks for ", room.dropout());
  Adapters adapters(model);
  const std::string name = "room";
  adapters.add(name, LoRAConfig(room).method(Swappable()));
  try {
    const auto adapter = adapters.adapter(name);
    for (const auto& part : adapter->parts) {
      TORCH_CHECK_VALUE(part.role == AdapterPart::Role::kLayer, "lora::trace: the configuration trains \"",
                        part.changed(), "\" in full, for which a graph has no place");
    }
    const detail::TracedTree tree(*model, *adapter);
    auto root = tree.root();
    torch::jit::Stack stack(inputs.begin(), inputs.end());
    {
      const auto active = adapters.activate(name);
      const auto run = [&](torch::jit::Stack arguments) {
        std::vector<at::Tensor> tensors;
        for (const auto& argument : arguments) tensors.push_back(argument.toTensor());
        return torch::jit::Stack{function(tensors)};
      };
      const auto graph = torch::jit::tracer::trace(
                             std::move(stack), run, [](const at::Tensor&) { return std::string(); }, /*strict=*/true,
                             /*force_outplace=*/false, &root)
                             .first->graph;
      detail::check_reached(*graph, *adapter, root.attr("lora").toModule());
      const c10::QualifiedName forward(*root.type()->name(), "forward");
      root.type()->addMethod(root._ivalue()->compilation_unit()->create_function(forward, graph));
    }
    adapters.detach();
    return root;
  } catch (...) {
    adapters.detach();
    throw;
  }
}

LORA_INLINE torch::jit::Module trace(torch::nn::Module& model, const LoRAConfig& room,
                                     const std::vector<at::Tensor>& inputs, const TracedFunction& function) {
  return trace(std::make_shared<ModuleModel>(model), room, inputs, function);
}

namespace detail {

template <class Write>
void write_in_place(const at::Tensor& tensor, const Write& write) {
  const c10::InferenceMode mode(tensor.is_inference());
  const at::NoGradGuard no_grad;
  write();
}

}  // namespace detail

LORA_INLINE void HotSwap::Layer::clear() {
  for (auto tensor : {A, B, scale}) detail::write_in_place(tensor, [&] { tensor.zero_(); });
}

LORA_INLINE void HotSwap::Layer::set(const LowRank& update, double factor) {
  const auto used = update.lora_A.size(-2), free = rank() - used;
  detail::write_in_place(A, [&] {
    A.narrow(-2, 0, used).copy_(update.lora_A);
    A.narrow(-2, used, free).zero_();
  });
  detail::write_in_place(B, [&] {
    B.narrow(-1, 0, used).copy_(update.lora_B);
    B.narrow(-1, used, free).zero_();
  });
  detail::write_in_place(scale, [&] { scale.fill_(factor); });
}

LORA_INLINE HotSwap::HotSwap(const torch::jit::Module& compiled) {
  TORCH_CHECK(compiled.hasattr("lora") && compiled.hasattr("model"), "lora::HotSwap: the module has no room for ",
              "adapters; it has to be one that lora::trace made, as it was before it was frozen");
  model_ = compiled.attr("model").toModule();
  for (const auto& item : compiled.attr("lora").toModule().named_modules()) {
    if (!item.value.hasattr("lora_A")) continue;
    const auto tensor = [&](const char* name) { return item.value.attr(name).toTensor(); };
    layers_.push_back({item.name, tensor("lora_A"), tensor("lora_B"), tensor("lora_scale")});
  }
}

LORA_INLINE void HotSwap::put(const Adapters& adapters, const std::string& name) {
  put("the adapter \"" + name + "\"", *adapters.adapter(name),
      [&](const AdapterPart& part) { return adapters.scale(name, part.changed()); });
}

LORA_INLINE void HotSwap::load(const std::filesystem::path& directory, const LoadOptions& options) {
  TORCH_CHECK_VALUE(!options.take_tables(), "lora::HotSwap: take_tables would change the model");
  const Adapters adapters(std::make_shared<ScriptModel>(model_));
  detail::TakenTables tables(adapters);
  const auto adapter = detail::read_plan(adapters, directory, options, tables).first;
  put("the adapter in " + directory.string(), adapter, [](const AdapterPart&) { return 1.0; });
}

LORA_INLINE void HotSwap::clear() {
  for (auto& layer : layers_) layer.clear();
}

LORA_INLINE std::map<std::string, int64_t> HotSwap::room() const {
  std::map<std::string, int64_t> room;
  for (const auto& layer : layers_) room.emplace(layer.name, layer.rank());
  return room;
}

LORA_INLINE void HotSwap::put(const std::string& what, const Adapter& adapter, const Scale& scale) {
  const detail::BelowInterception below;
  std::map<const Layer*, std::pair<const LowRank*, double>> found;
  for (const auto& part : adapter.parts) {
    const auto [layer, update] = room_for(what, part);
    found[layer] = {update, scale(part) * part.method->scaling()};
  }
  for (auto& layer : layers_) {
    const auto own = found.find(&layer);
    own == found.end() ? layer.clear() : layer.set(*own->second.first, own->second.second);
  }
}

LORA_INLINE std::pair<HotSwap::Layer*, const LowRank*> HotSwap::room_for(const std::string& what,
                                                                         const AdapterPart& part) {
  TORCH_CHECK(part.role == AdapterPart::Role::kLayer, "lora::HotSwap: ", what, " has \"", part.changed(),
              "\" trained in full, for which the graph has no place");
  const auto* method = dynamic_cast<const MethodOf<LowRank>*>(part.method.get());
  TORCH_CHECK(method != nullptr, "lora::HotSwap: ", what, " is of the method ", part.method->info().name, " on \"",
              part.changed(), "\", and the graph has places for LowRank");
  const auto& name = part.site->name();
  const auto layer =
      std::find_if(layers_.begin(), layers_.end(), [&](const Layer& other) { return other.name == name; });
  TORCH_CHECK(layer != layers_.end(), "lora::HotSwap: ", what, " changes the layer \"", name,
              "\", which the graph has no place for; it has places for ", detail::list(names()));
  const auto& update = method->value;
  const auto rank = update.lora_A.size(-2);
  TORCH_CHECK(rank <= layer->rank(), "lora::HotSwap: ", what, " has the rank ", rank, " on \"", name,
              "\", and the graph has room for ", layer->rank(), "; trace it with that rank");
  TORCH_CHECK(is_alike(update.lora_A, layer->A, -2) && is_alike(update.lora_B, layer->B, -1), "lora::HotSwap: ", what,
              " has tensors of the shapes ", update.lora_A.sizes(), " and ", update.lora_B.sizes(), " on \"", name,
              "\", and the places of the graph are ", layer->A.sizes(), " and ", layer->B.sizes());
  return {&*layer, &update};
}

LORA_INLINE bool HotSwap::is_alike(const at::Tensor& tensor, const at::Tensor& place, int64_t rank) {
  auto sizes = tensor.sizes().vec();
  if (tensor.dim() != place.dim()) return false;
  sizes[static_cast<size_t>(tensor.dim() + rank)] = place.size(rank);
  return place.sizes() == sizes;
}

LORA_INLINE std::vector<std::string> HotSwap::names() const {
  std::vector<std::string> names;
  for (const auto& layer : layers_) names.push_back(layer.name);
  return names;
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
