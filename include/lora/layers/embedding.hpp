#pragma once

#include <torch/nn/modules/embedding.h>

#include <lora/layers/target.hpp>
#include <lora/version.hpp>

#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace layers {

/// PEFT keeps the matrices of an embedding as bare parameters with names of their own.
inline FileLayout embedding_files() {
  FileLayout files;
  files.name = [](const NamedTensor& tensor) {
    if (tensor.name == "lora_A") return std::string("lora_embedding_A");
    return tensor.name == "lora_B" ? std::string("lora_embedding_B") : tensor.file_name;
  };
  return files;
}

template <class Layer>
std::vector<Target> find_table(const std::string& name, const char* kind,
                               const std::shared_ptr<torch::nn::Module>& module) {
  auto* layer = module->as<Layer>();
  if (layer == nullptr) return {};
  auto target = member_target(name, kind, module, layer->weight, "weight", MatrixView::lookup(layer->weight.sizes()));
  target.use = detail::Use::kLookup;
  target.files = embedding_files();
  return only(std::move(target));
}

/// The table (entries, width) of a torch::nn::Embedding, adapted as the matrix W = table^T (width, entries): an entry
/// is table[i] + s A[:, i]^T B^T. With max_norm, entries of the adapted table are limited, and the frozen one stays as
/// it is.
inline std::vector<Target> find_embedding(const std::string& name, const std::shared_ptr<torch::nn::Module>& module) {
  return find_table<torch::nn::EmbeddingImpl>(name, "Embedding", module);
}

/// The table of a torch::nn::EmbeddingBag, adapted like that of an embedding.
inline std::vector<Target> find_embedding_bag(const std::string& name,
                                              const std::shared_ptr<torch::nn::Module>& module) {
  return find_table<torch::nn::EmbeddingBagImpl>(name, "EmbeddingBag", module);
}

}  // namespace layers
}  // namespace LORA_ABI
}  // namespace lora
