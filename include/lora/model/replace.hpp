#pragma once

#include <torch/nn/modules/container/moduledict.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/pimpl.h>

#include <lora/selection/text.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The module of that name, "" being the model itself; nullptr when there is none.
inline torch::nn::Module* module_named(torch::nn::Module& model, const std::string& name) {
  if (name.empty()) return &model;
  const auto dot = name.find('.');
  for (const auto& child : model.named_children()) {
    if (child.key() != name.substr(0, dot)) continue;
    return dot == std::string::npos ? child.value().get() : module_named(*child.value(), name.substr(dot + 1));
  }
  return nullptr;
}

}  // namespace detail

/// Puts `layer` in the place of an entry of a torch::nn::Sequential, ModuleList or ModuleDict inside `model`:
///
///   lora::replace(*model, "body.0", lora::LoRALinear<>(linear, lora::LoRAOptions(8)));
///
/// Errors: c10::Error when there is no such module, or when it is the member of another kind of module: its owner keeps
/// a handle of its own, which no one can reach, and would go on running the old layer. `lora::attach` adapts such
/// layers where they are.
template <class Impl>
void replace(torch::nn::Module& model, const std::string& name, torch::nn::ModuleHolder<Impl> layer) {
  const auto dot = name.rfind('.');
  const auto entry = dot == std::string::npos ? name : name.substr(dot + 1);
  auto* owner = detail::module_named(model, dot == std::string::npos ? "" : name.substr(0, dot));
  const auto entries = owner == nullptr ? std::vector<std::string>() : owner->named_children().keys();
  const auto place = std::find(entries.begin(), entries.end(), entry) - entries.begin();  // names may be any
  const bool exists = place < static_cast<std::ptrdiff_t>(entries.size());
  TORCH_CHECK(exists, "lora::replace: there is no module \"", name, "\";",
              detail::did_you_mean(name, model.named_modules("", /*include_self=*/false).keys()));
  if (auto* sequential = owner->as<torch::nn::SequentialImpl>()) {
    *(sequential->begin() + place) = torch::nn::AnyModule(layer);
  } else if (auto* list = owner->as<torch::nn::ModuleListImpl>()) {
    *(list->begin() + place) = layer.ptr();
  } else if (auto* dict = owner->as<torch::nn::ModuleDictImpl>()) {
    dict->update({{entry, layer.ptr()}});
  } else {
    TORCH_CHECK(false, "lora::replace: \"", name, "\" is a member of ", owner->name(),
                ", which has a handle of its own ",
                "to it and would go on running the old layer; adapt it where it is, with lora::attach");
  }
  owner->replace_module(entry, layer);
}

}  // namespace LORA_ABI
}  // namespace lora
