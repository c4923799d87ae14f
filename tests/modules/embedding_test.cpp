#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/modules/embedding.hpp>

using lora::LoRAEmbedding;
using lora::LoRAEmbeddingOptions;
using lora::LoRAOptions;
using torch::nn::EmbeddingOptions;

namespace {

LoRAEmbedding<> make_layer(const EmbeddingOptions& options = EmbeddingOptions(7, 4)) {
  torch::manual_seed(0);
  LoRAEmbedding<> layer(LoRAEmbeddingOptions(options, LoRAOptions(2).alpha(6)));
  layer->to(testing::device());
  testing::randomize({layer->lora_A(), layer->lora_B()});
  return layer;
}

torch::Tensor numbers() { return torch::tensor({0, 6, 2, 2, 5, 0}, testing::device()).view({2, 3}); }

}  // namespace

TEST_CASE("A wrapped Embedding shares its table, freezes it and starts unchanged") {
  torch::nn::Embedding base(7, 4);
  base->to(testing::device());
  LoRAEmbedding layer(base, LoRAOptions(2).alpha(6));
  CHECK(layer->weight.is_same(base->weight));
  CHECK_FALSE(base->weight.requires_grad());
  CHECK(torch::equal(layer->forward(numbers()), base->forward(numbers())));
  CHECK(layer->lora_A().eq(0).all().item<bool>());  // so entries that are never looked up never change
  CHECK(lora::trainable_parameters(*layer).size() == 2);
}

TEST_CASE("An entry is that of the table plus s A[:, i]^T B^T, merged or not") {
  const bool limited = GENERATE(false, true);
  auto layer = make_layer(limited ? EmbeddingOptions(7, 4).max_norm(1.2) : EmbeddingOptions(7, 4));
  auto pristine = layer->weight.clone();
  auto entries = (layer->weight + 3 * layer->lora_A().t().mm(layer->lora_B().t())).index({numbers()});
  if (limited) entries = entries * (1.2 / entries.norm(2, -1, true)).clamp_max(1);
  CHECK(testing::distance(layer->forward(numbers()), entries) < 1e-5);
  CHECK(torch::equal(layer->weight, pristine));  // max_norm does not rewrite the frozen table
  layer->merge();
  CHECK(testing::distance(layer->forward(numbers()), entries) < 1e-5);
  layer->unmerge();
  CHECK(torch::equal(layer->weight, pristine));
}

TEST_CASE("The gradients of an embedding agree with finite differences, and the entry that pads has none") {
  auto layer = make_layer(EmbeddingOptions(7, 4).padding_idx(-1));
  layer->to(torch::kDouble);
  auto inside = torch::tensor({0, 1, 1, 4}, testing::device());
  auto loss = [&] { return layer->forward(inside).sin().sum(); };
  CHECK(testing::gradient_error(loss, {layer->lora_A(), layer->lora_B()}) < 1e-8);
  layer->forward(numbers()).sum().backward();
  CHECK(layer->lora_A().grad().select(1, 6).eq(0).all().item<bool>());
  CHECK(layer->lora_A().grad().select(1, 5).ne(0).all().item<bool>());
}

TEST_CASE("LoRAEmbedding prints what it is and says what it needed") {
  CHECK(c10::str(make_layer()) == "lora::LoRAEmbedding<LowRank>(num_embeddings=7, embedding_dim=4, rank=2, alpha=6)");
  const auto make = [](const EmbeddingOptions& options, int64_t rank) {
    return testing::error_of([&] { LoRAEmbedding<>(LoRAEmbeddingOptions(options, LoRAOptions(rank))); });
  };
  CHECK_THAT(make(EmbeddingOptions(0, 4), 2), testing::contains("but got 0 and 4"));
  CHECK_THAT(make(EmbeddingOptions(7, 4).padding_idx(7), 2), testing::contains("one of the 7 entries, but got 7"));
  CHECK_THAT(make(EmbeddingOptions(7, 4), 0), testing::contains("rank has to be at least 1"));
}

TEST_CASE("A copy of an embedding is frozen, independent and equal") {
  auto layer = make_layer();
  auto expected = layer->forward(numbers());
  auto copy = std::dynamic_pointer_cast<lora::LoRAEmbeddingImpl<>>(layer->clone());
  layer->lora_A().detach().zero_();
  CHECK(torch::equal(copy->forward(numbers()), expected));
  CHECK(lora::trainable_parameters(*copy).size() == 2);
}
