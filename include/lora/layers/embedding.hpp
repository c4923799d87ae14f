#pragma once

#include <torch/nn/modules/embedding.h>

#include <lora/layers/layer_weight.hpp>
#include <lora/version.hpp>

#include <memory>
#include <string>

namespace lora {
inline namespace LORA_ABI {
namespace layers {

template <class Layer>
LayerWeights find_table(const std::string& name, const char* kind, torch::nn::Module& module) {
  auto* layer = module.as<Layer>();
  if (layer == nullptr) return {};
  auto weight = member_weight(name, kind, module, layer->weight, "weight");
  // Each lookup with max_norm writes to the table, a merged one too, which so is another tensor than the frozen one.
  if (layer->options.max_norm())
    weight.place.slot = std::make_shared<detail::MemberSlot>(module, layer->weight, "weight", /*is_apart=*/true);
  weight.form = LayerWeight::Form::kLookup;
  weight.place.use = Use::kLookup;
  return only(std::move(weight));
}

/// The table (entries, width) of a torch::nn::Embedding, adapted as the matrix W = table^T (width, entries): an entry
/// is table[i] + s A[:, i]^T B^T. With max_norm, entries of the adapted table are limited, and the frozen one stays as
/// it is.
inline LayerWeights find_embedding(const std::string& name, torch::nn::Module& module) {
  return find_table<torch::nn::EmbeddingImpl>(name, "Embedding", module);
}

/// The table of a torch::nn::EmbeddingBag, adapted like that of an embedding.
inline LayerWeights find_embedding_bag(const std::string& name, torch::nn::Module& module) {
  return find_table<torch::nn::EmbeddingBagImpl>(name, "EmbeddingBag", module);
}

}  // namespace layers
}  // namespace LORA_ABI
}  // namespace lora
