// The templates, with every member compiled, for the warnings of the test `headers`. Two methods for layers: one that
// adds to a product, and one that does not.
#include <lora/method/dora.hpp>
#include <lora/modules/attention.hpp>
#include <lora/modules/conv.hpp>
#include <lora/modules/embedding.hpp>
#include <lora/modules/linear.hpp>
#include <lora/train/checkpointing.hpp>

#include <tuple>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
template class LoRALinearImpl<DoRA>;
template class LoRAEmbeddingImpl<LowRank>;
template class LoRAConvImpl<2, LowRank>;
template class LoRAAttentionImpl<DoRA>;

using Tensors = std::vector<at::Tensor>;
template auto checkpoint(at::Tensor (*)(const at::Tensor&), const at::Tensor&);
template auto checkpoint(Tensors (*)(const at::Tensor&, const at::Tensor&), const at::Tensor&, const at::Tensor&);
template auto checkpoint(std::tuple<at::Tensor, at::Tensor> (*)(const at::Tensor&), const at::Tensor&);
}  // namespace LORA_ABI
}  // namespace lora
