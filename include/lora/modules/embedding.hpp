#pragma once

#include <torch/nn/init.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/pimpl.h>

#include <lora/layers/norm_limit.hpp>
#include <lora/modules/adapted.hpp>
#include <lora/version.hpp>

namespace lora {
inline namespace LORA_ABI {

/// Options of a `LoRAEmbedding`: those of the frozen layer, and those of its adapter.
struct LoRAEmbeddingOptions {
  LoRAEmbeddingOptions(torch::nn::EmbeddingOptions embedding, LoRAOptions adapter)
      : embedding_(std::move(embedding)), adapter_(std::move(adapter)) {}

  /// Sizes, padding_idx, max_norm, norm_type, scale_grad_by_freq. `sparse` has no effect: the table is frozen.
  TORCH_ARG(torch::nn::EmbeddingOptions, embedding);
  /// Rank, alpha and so on. Dropout does not act on a lookup.
  TORCH_ARG(LoRAOptions, adapter);
};

/// A table of vectors, frozen, with a trainable update, by default a low-rank one:
///
///   y = W[i] + (alpha / rank) A[:, i]^T B^T
///
/// Shapes: input i (...) of integers -> output (..., embedding_dim); weight W (num_embeddings, embedding_dim); lora_A
/// (rank, num_embeddings), zero at first; lora_B (embedding_dim, rank), standard normal at first, as in PEFT: entries
/// that are never looked up stay as they are. The entry padding_idx gets no gradient. With max_norm, y is scaled down
/// to that norm, a factor that is a constant for the gradient; the frozen table itself is not rewritten, as
/// torch::nn::Embedding would do. Errors: as for LoRALinear. Reference: Hu et al. 2021, "LoRA: Low-Rank Adaptation of
/// Large Language Models", eq. 3, with a row of the identity for x.
template <class Method = LowRank>
class LoRAEmbeddingImpl : public AdaptedModule<LoRAEmbeddingImpl<Method>, Method> {
 public:
  static constexpr const char *kName = "LoRAEmbedding", *kKind = "Embedding";

  /// A new layer, initialized as torch::nn::Embedding is.
  explicit LoRAEmbeddingImpl(LoRAEmbeddingOptions options_) : options(std::move(options_)) {
    reset();
    reset_parameters();
  }

  /// Wraps `base`: its table is shared, not copied, and frozen from now on.
  LoRAEmbeddingImpl(torch::nn::Embedding base, LoRAOptions adapter) : options(base->options, std::move(adapter)) {
    options.adapter().validate("lora::LoRAEmbedding");
    this->build(base->weight, {}, Method(), /*is_shared=*/true);
    this->initialize_adapter();
  }

  void reset() override {
    options.adapter().validate("lora::LoRAEmbedding");
    const auto entries = options.embedding().num_embeddings(), width = options.embedding().embedding_dim();
    TORCH_CHECK_VALUE(entries > 0 && width > 0,
                      "lora::LoRAEmbedding: num_embeddings and embedding_dim have to be at least 1, but got ", entries,
                      " and ", width);
    const auto padding = options.embedding().padding_idx().value_or(0);
    TORCH_CHECK_VALUE(padding >= -entries && padding < entries,
                      "lora::LoRAEmbedding: padding_idx has to be one of the ", entries, " entries, but got ", padding);
    const auto like = weight.defined() ? weight.options().requires_grad(false) : at::TensorOptions();
    this->build(torch::empty({entries, width}, like), {}, Method(), /*is_shared=*/false);
  }

  /// Fills the table as torch::nn::Embedding does, and starts the adapter anew.
  void reset_parameters() {
    torch::NoGradGuard no_grad;
    weight.normal_();
    if (options.embedding().padding_idx()) weight[*options.embedding().padding_idx()].zero_();
    this->initialize_adapter();
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "lora::LoRAEmbedding<" << Method::info.name << ">(num_embeddings=" << options.embedding().num_embeddings()
           << ", embedding_dim=" << options.embedding().embedding_dim() << ", rank=" << options.adapter().rank()
           << ", alpha=" << options.adapter().alpha() << ")";
  }

  at::Tensor forward(const at::Tensor& input) {
    const auto& frozen = options.embedding();
    auto padding = frozen.padding_idx().value_or(-1);
    if (frozen.padding_idx() && padding < 0) padding += frozen.num_embeddings();
    const auto look_up = [&](const at::Tensor& i, const at::Tensor& table, const at::Tensor& /*bias*/) {
      return at::embedding(table, i, padding, frozen.scale_grad_by_freq(), /*sparse=*/false);
    };
    const auto times = [&](const at::Tensor& i, const at::Tensor& matrix) { return look_up(i, matrix.t(), {}); };
    const auto entries = this->adapt(input, look_up, times, /*adds=*/true, Product::Form::kEntries);
    if (!frozen.max_norm()) return entries;
    return detail::NormLimit{*frozen.max_norm(), frozen.norm_type()}.apply(entries);
  }

  void describe(LayerWeight& described) const {
    described.form = LayerWeight::Form::kLookup;
    described.place.use = Use::kLookup;
  }

  using AdaptedModule<LoRAEmbeddingImpl, Method>::weight;

  LoRAEmbeddingOptions options;
};

/// Holder of `LoRAEmbeddingImpl`.
template <class Method = LowRank>
class LoRAEmbedding : public torch::nn::ModuleHolder<LoRAEmbeddingImpl<Method>> {
 public:
  using Impl = LoRAEmbeddingImpl<Method>;
  using torch::nn::ModuleHolder<Impl>::ModuleHolder;
};

LoRAEmbedding(torch::nn::Embedding, LoRAOptions)->LoRAEmbedding<>;

}  // namespace LORA_ABI
}  // namespace lora
