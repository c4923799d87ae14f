// The templates of the layers, with every member compiled, for the warnings of the test `headers`. Two methods: one
// that adds to a product, and one that does not.
#include <lora/method/dora.hpp>
#include <lora/modules/attention.hpp>
#include <lora/modules/conv.hpp>
#include <lora/modules/embedding.hpp>
#include <lora/modules/linear.hpp>

namespace lora {
inline namespace LORA_ABI {
template class LoRALinearImpl<DoRA>;
template class LoRAEmbeddingImpl<LowRank>;
template class LoRAConvImpl<2, LowRank>;
template class LoRAAttentionImpl<DoRA>;
}  // namespace LORA_ABI
}  // namespace lora
