#pragma once

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>

#include <lora/adapters.hpp>
#include <lora/peft/tensors.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The tensors of the model of some adapters by name, as they are without what is merged; some may be held in few bits.
inline std::map<std::string, at::Tensor> frozen_tensors(const Adapters& adapters) {
  std::map<const void*, at::Tensor> merged;
  for (const auto& name : adapters.names()) {
    for (const auto& part : adapters.adapter(name)->parts) {
      if (part.site->is_merged()) merged.emplace(part.site->slot().place(), part.site->pristine());
    }
  }
  std::map<std::string, at::Tensor> tensors;
  for (const auto& tensor : adapters.model().tensors()) {
    const auto found = merged.find(tensor.place.slot->place());
    const auto value = found == merged.end() ? tensor.place.slot->read() : found->second;
    if (value.defined()) tensors.emplace(tensor.place.name, value);
  }
  return tensors;
}

/// The tables of a file in a model: embeddings and heads of a model that got more tokens before it was trained. The
/// model's tensors stay the same ones, with other values and more rows, so what is tied stays tied. Unless they are
/// kept, the end of this brings back the former ones.
class TakenTables {
 public:
  explicit TakenTables(const Adapters& adapters) : adapters_(adapters) {}
  ~TakenTables() {
    for (auto former = former_.rbegin(); former != former_.rend(); ++former) former->tensor.set_data(former->value);
    for (const auto& name : resized_) adapters_.model().note_rows(name);
  }
  TakenTables(const TakenTables&) = delete;
  TakenTables& operator=(const TakenTables&) = delete;

  /// Takes over what differs from the model's own. Errors: CheckpointError for a table that is adapted already, or that
  /// the file has twice with different values where the model has it once.
  void take(PeftTensors& file, const LoRAConfig& config) {
    const BelowInterception below;
    at::NoGradGuard no_grad;
    tensors_ = adapters_.model().tensors();
    std::map<std::string, std::string> kinds;
    for (const auto& part : adapters_.model().parts()) {
      for (const auto& weight : part.weights) kinds.emplace(weight.place.name, weight.place.kind);
    }
    for (const auto& tensor : tensors_) {
      const auto owner = owner_of(tensor.place.name);
      const auto kind = kinds.find(owner);
      if (kind != kinds.end() && (kind->second == "Embedding" || kind->second == "Linear")) take(file, config, tensor);
    }
  }

  /// The tables are the model's from now on.
  void keep() {
    for (auto& former : former_) former.tensor.mutable_grad().reset();  // of other rows
    former_.clear();
    resized_.clear();
  }

 private:
  struct Former {
    at::Tensor tensor, value;
  };

  void take(PeftTensors& file, const LoRAConfig& config, const LayerWeight& tensor) {
    const auto& name = tensor.place.name;
    const auto owner = owner_of(name);
    const auto& content = file.content();
    auto found = content.find(owner + ".base_layer" + name.substr(owner.size()));
    if (found == content.end()) found = content.find(name);
    const auto own = tensor.place.slot->read();
    if (found == content.end() || !own.defined() || tensor.is_buffer || !own.is_floating_point()) return;
    const auto& theirs = found->second;
    const bool fits = theirs.is_floating_point() && theirs.dim() > 0 && theirs.dim() == own.dim() &&
                      theirs.sizes().slice(1) == own.sizes().slice(1) && theirs.size(0) >= own.size(0);
    if (!fits || is_same(theirs, own)) return;
    auto values = theirs.to(own.options(), /*non_blocking=*/false, /*copy=*/true);
    if (!saving_entry(config, owner).empty()) {  // the adapter has all of it
      if (theirs.size(0) == own.size(0)) return;
      values = at::cat({dequantized(own).detach(), values.slice(0, own.size(0))});
    }
    check_free(file, name, own);
    put(own, values);
  }

  void check_free(const PeftTensors& file, const std::string& name, const at::Tensor& own) const {
    const auto is_it = [&](const Former& former) { return former.tensor.is_same(own); };
    if (std::any_of(former_.begin(), former_.end(), is_it))
      throw CheckpointError(file.path(), "holds two tables that differ, of which one is \"", name,
                            "\", where the model has one in both places; give the layers tables of their own first");
    for (const auto& adapter : adapters_.names()) {
      for (const auto& part : adapters_.adapter(adapter)->parts) {
        if (share_memory(part.site->weight(), own))
          throw CheckpointError(file.path(), "has another table \"", name, "\" than the model, where the adapter \"",
                                adapter, "\" uses it; load this one first");
      }
    }
  }

  /// Everything that has the table gets the new one. A parameter that its layer does not use any more, since it was
  /// tied to another one, gets its size.
  void put(const at::Tensor& own, const at::Tensor& values) {
    const auto old = own.detach();  // which keeps the former memory
    std::vector<at::Tensor> tables, unused;
    for (const auto& tensor : tensors_) {
      const auto handles = tensor.place.slot->handles();
      if (!is_table(handles.member, old)) continue;
      resized_.push_back(tensor.place.name);
      tables.push_back(handles.member);
      const auto& registered = handles.registered;
      if (registered.defined() && !is_table(registered, old) && registered.sizes() == old.sizes())
        unused.push_back(registered);
    }
    for (const auto& table : tables) {
      if (is_table(table, old)) replace(table, values);  // the same tensor may be in several places
    }
    for (const auto& tensor : unused) replace(tensor, values.clone());
    for (const auto& name : resized_) adapters_.model().note_rows(name);
  }

  static bool is_table(const at::Tensor& tensor, const at::Tensor& table) {
    return tensor.defined() && share_memory(tensor, table) && tensor.sizes() == table.sizes() &&
           tensor.storage_offset() == table.storage_offset();
  }

  void replace(const at::Tensor& tensor, const at::Tensor& values) {
    former_.push_back({tensor, tensor.detach()});
    tensor.set_data(values);
  }

  const Adapters& adapters_;
  LayerWeights tensors_;
  std::vector<Former> former_;
  std::vector<std::string> resized_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
