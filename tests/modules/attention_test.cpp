#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/modules/attention.hpp>

#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>

#include <cmath>
#include <limits>
#include <sstream>

using lora::AttentionInputs;
using lora::LoRAAttention;
using lora::LoRAAttentionOptions;
using lora::LoRAOptions;
using lora::Projections;
namespace F = torch::nn::functional;

namespace {

constexpr int64_t kBatch = 2, kWidth = 8, kQueries = 5, kKeys = 7;
const LoRAOptions kAdapter = LoRAOptions(2).alpha(6);

torch::Tensor randn(at::IntArrayRef sizes) { return torch::randn(sizes, testing::device()); }

/// Fills the adapters, so that no update is zero.
template <class Layer>
Layer filled(Layer layer) {
  testing::randomize(lora::trainable_parameters(*layer));
  layer->to(testing::device());
  return layer;
}

/// W + s B A by hand.
template <class Method>
torch::Tensor adapted_weight(const lora::AttentionProjection<Method>& p) {
  return p.adapted ? p->weight + p->scaling() * p->lora_B().matmul(p->lora_A()) : p.weight();
}

template <class Method>
torch::Tensor applied(const lora::AttentionProjection<Method>& p, const torch::Tensor& x) {
  auto y = x.matmul(adapted_weight(p).t());
  return p.bias().defined() ? y + p.bias() : y;
}

/// The attention by hand, one head after the other; `mask` is added to the scores (queries, keys).
torch::Tensor by_hand(const LoRAAttention<>& layer, const torch::Tensor& x, const torch::Tensor& keys,
                      const torch::Tensor& values, const torch::Tensor& mask) {
  const auto& options = layer->options;
  const auto d = options.head_size(), group = options.num_heads() / options.num_kv_heads();
  auto q = applied(layer->q_proj, x), k = applied(layer->k_proj, keys), v = applied(layer->v_proj, values);
  std::vector<torch::Tensor> heads;
  for (int64_t h = 0; h < options.num_heads(); ++h) {
    auto of = [&](const torch::Tensor& t, int64_t head) { return t.narrow(-1, head * d, d); };
    auto scores = of(q, h).matmul(of(k, h / group).transpose(-2, -1)) / std::sqrt(static_cast<double>(d));
    heads.push_back((scores + mask).softmax(-1).matmul(of(v, h / group)));
  }
  return applied(layer->o_proj, torch::cat(heads, -1));
}

/// Zero where key j <= query i, else minus infinity.
torch::Tensor causal_mask(int64_t queries, int64_t keys) {
  auto future = torch::ones({queries, keys}, testing::device()).triu(1).to(torch::kBool);
  return torch::zeros({queries, keys}, testing::device()).masked_fill(future, -std::numeric_limits<float>::infinity());
}

torch::nn::MultiheadAttention make_stock(const torch::nn::MultiheadAttentionOptions& options) {
  torch::manual_seed(0);
  torch::nn::MultiheadAttention stock(options);
  testing::randomize(stock->parameters());  // its biases start at zero
  stock->to(testing::device());
  return stock;
}

/// A stock module whose weights are those of `layer` with the updates added by hand.
torch::nn::MultiheadAttention merged_by_hand(const torch::nn::MultiheadAttention& stock, const LoRAAttention<>& layer) {
  torch::NoGradGuard no_grad;
  torch::nn::MultiheadAttention merged(std::dynamic_pointer_cast<torch::nn::MultiheadAttentionImpl>(stock->clone()));
  const auto q = adapted_weight(layer->q_proj), k = adapted_weight(layer->k_proj), v = adapted_weight(layer->v_proj);
  if (merged->in_proj_weight.defined()) {
    merged->in_proj_weight.copy_(torch::cat({q, k, v}));
  } else {
    merged->q_proj_weight.copy_(q);
    merged->k_proj_weight.copy_(k);
    merged->v_proj_weight.copy_(v);
  }
  merged->out_proj->weight.copy_(adapted_weight(layer->o_proj));
  return merged;
}

torch::Tensor stock_output(torch::nn::MultiheadAttention& stock, const torch::Tensor& x, const torch::Tensor& context,
                           const torch::Tensor& padding = {}, const torch::Tensor& mask = {}) {
  auto first = [](const torch::Tensor& t) { return t.transpose(0, 1); };
  return first(std::get<0>(stock->forward(first(x), first(context), first(context), padding, true, mask)));
}

torch::Tensor padding_mask() {
  auto mask = torch::zeros({kBatch, kKeys}, torch::kBool);
  mask[0].slice(0, 5).fill_(true);
  mask[1][2].fill_(true);
  return mask.to(testing::device());
}

/// How often `call` runs an operator.
template <class Call>
int count(const std::string& name, const Call& call) {
  static thread_local std::string wanted;
  static thread_local int calls;
  wanted = name, calls = 0;
  auto handle = at::addThreadLocalCallback(
      at::RecordFunctionCallback([](const at::RecordFunction& function) -> std::unique_ptr<at::ObserverContext> {
        if (function.name() == wanted) ++calls;
        return nullptr;
      }));
  call();
  at::removeCallback(handle);
  return calls;
}

/// Grouped heads, everything adapted, each with its own rank.
LoRAAttention<> make_grouped(bool bias = true) {
  torch::manual_seed(0);
  auto all = Projections().q(LoRAOptions(3).alpha(6)).k(true).v(LoRAOptions(1).alpha(2)).o(true);
  return filled(LoRAAttention<>(LoRAAttentionOptions(kWidth, 4, kAdapter).num_kv_heads(2).adapted(all).bias(bias)));
}

struct NetImpl : torch::nn::Cloneable<NetImpl> {
  NetImpl() { reset(); }
  void reset() override {
    attention = register_module("attention", LoRAAttention<>(LoRAAttentionOptions(kWidth, 2, kAdapter)));
  }
  LoRAAttention<> attention = nullptr;
};
TORCH_MODULE(Net);

}  // namespace

TEST_CASE("LoRAAttention is torch::nn::MultiheadAttention with W + s B A, for every mask") {
  const int64_t heads = GENERATE(1, 4), key_width = GENERATE(8, 6);
  const bool additive = GENERATE(false, true), padded = GENERATE(false, true);
  auto stock = make_stock(torch::nn::MultiheadAttentionOptions(kWidth, heads).kdim(key_width).vdim(key_width));
  auto layer = filled(LoRAAttention<>(stock, kAdapter, Projections::all()));
  auto expected = merged_by_hand(stock, layer);
  auto x = randn({kBatch, kQueries, kWidth}), context = randn({kBatch, kKeys, key_width});
  auto mask = additive ? randn({kQueries, kKeys}) : torch::Tensor();
  auto padding = padded ? padding_mask() : torch::Tensor();
  auto inputs = AttentionInputs().context(context).attn_mask(mask).key_padding_mask(padding);
  CHECK(testing::distance(layer->forward(x, inputs), stock_output(expected, x, context, padding, mask)) < 1e-5);
}

TEST_CASE("LoRAAttention attends to its own input like torch::nn::MultiheadAttention") {
  const int64_t heads = GENERATE(1, 4);
  const bool bias = GENERATE(true, false);
  auto stock = make_stock(torch::nn::MultiheadAttentionOptions(kWidth, heads).bias(bias));
  auto layer = filled(LoRAAttention<>(stock, kAdapter, Projections().q(true).o(LoRAOptions(1))));
  auto expected = merged_by_hand(stock, layer);
  auto x = randn({kBatch, kQueries, kWidth});
  auto output = layer->forward(x);
  CHECK(testing::distance(output, stock_output(expected, x, x)) < 1e-5);
  CHECK(testing::distance(layer->forward(x[0]), output[0]) < 1e-6);  // without a batch
  CHECK(testing::distance(layer->forward(x, AttentionInputs().context(x.clone())), output) < 1e-5);
}

TEST_CASE("A wrapped MultiheadAttention shares its tensors, freezes them and starts unchanged") {
  const bool packed = GENERATE(true, false);
  const int64_t key_width = packed ? kWidth : 6;
  auto stock = make_stock(torch::nn::MultiheadAttentionOptions(kWidth, 4).kdim(key_width).vdim(key_width));
  LoRAAttention layer(stock, kAdapter);
  auto x = randn({kBatch, kQueries, kWidth}), context = randn({kBatch, kKeys, key_width});
  CHECK(testing::distance(layer->forward(x, AttentionInputs().context(context)), stock_output(stock, x, context)) <
        1e-5);
  CHECK(lora::trainable_parameters(*layer).size() == 4);  // A and B of q and v
  CHECK(lora::trainable_parameters(*stock).empty());
  CHECK(layer->o_proj.weight().is_same(stock->out_proj->weight));
  auto q = packed ? stock->in_proj_weight : stock->q_proj_weight;
  CHECK(layer->q_proj.weight().data_ptr() == q.data_ptr());
  CHECK(layer->q_proj.weight().is_alias_of(layer->k_proj.weight()) == packed);
  CHECK(layer->v_proj.bias().data_ptr() == stock->in_proj_bias.slice(0, 2 * kWidth).data_ptr());
  auto names = layer->named_parameters();
  CHECK(names.contains("q_proj.lora_A"));
  CHECK(names.contains("k_proj.weight"));
  CHECK_FALSE(names.contains("k_proj.lora_A"));
  CHECK(names.contains("o_proj.bias"));
}

TEST_CASE("Grouped heads, causal or not, are those computed by hand") {
  const int64_t kv_heads = GENERATE(1, 2, 4), keys = GENERATE(5, 7, 3);
  const bool causal = GENERATE(false, true), wide = GENERATE(false, true), bias = GENERATE(false, true);
  torch::manual_seed(0);
  auto options = LoRAAttentionOptions(kWidth, 4, kAdapter).num_kv_heads(kv_heads).kdim(6).vdim(5).bias(bias);
  if (wide) options.head_dim(3);  // 4 * 3 != kWidth
  auto layer = filled(LoRAAttention<>(options.adapted(Projections::all())));
  auto x = randn({kBatch, kQueries, kWidth}), k = randn({kBatch, keys, 6}), v = randn({kBatch, keys, 5});
  auto mask = causal ? causal_mask(kQueries, keys) : torch::zeros({1}, testing::device());
  auto expected = by_hand(layer, x, k, v, mask);
  auto inputs = AttentionInputs().context(k).value_context(v).is_causal(causal);
  CHECK(testing::distance(layer->forward(x, inputs), expected) < 1e-5);
  auto single = AttentionInputs().context(k[1]).value_context(v[1]).is_causal(causal);
  CHECK(testing::distance(layer->forward(x[1], single), expected[1]) < 1e-5);
}

TEST_CASE("Masks of every shape act together; true is what is not seen") {
  auto layer = make_grouped();
  auto x = randn({kBatch, kQueries, kWidth}), context = randn({kBatch, kKeys, kWidth});
  const auto shape = GENERATE(table<std::vector<int64_t>>({{{kQueries, kKeys}},
                                                           {{1, kKeys}},
                                                           {{kBatch, kQueries, kKeys}},
                                                           {{1, kQueries, kKeys}},
                                                           {{kBatch * 4, kQueries, kKeys}},
                                                           {{kBatch, 4, kQueries, kKeys}},
                                                           {{kBatch, 1, 1, kKeys}}}));
  const auto& sizes = std::get<0>(shape);
  const bool boolean = GENERATE(true, false), causal = GENERATE(true, false), padded = GENERATE(true, false);
  auto blocked = torch::rand(sizes, testing::device()) < 0.3;
  blocked.select(-1, 0).fill_(false);  // every query sees the first key
  auto mask = boolean ? blocked : randn(sizes);
  auto added =
      boolean ? torch::zeros(sizes, testing::device()).masked_fill(blocked, -std::numeric_limits<float>::infinity())
              : mask;

  // By hand, with the mask written out for every example and head.
  auto full = added;
  if (sizes.size() == 3) full = sizes[0] == kBatch * 4 ? added.view({kBatch, 4, kQueries, kKeys}) : added.unsqueeze(1);
  full = full.expand({kBatch, 4, kQueries, kKeys});
  if (causal) full = full + causal_mask(kQueries, kKeys);
  auto padding = padding_mask();
  if (padded) full = full.masked_fill(padding.view({kBatch, 1, 1, kKeys}), -std::numeric_limits<float>::infinity());
  auto split = [&](const torch::Tensor& t, int64_t heads) {
    return t.view({kBatch, t.size(1), heads, 2}).transpose(1, 2);
  };
  auto q = split(applied(layer->q_proj, x), 4);
  auto k = split(applied(layer->k_proj, context), 2).repeat_interleave(2, 1);
  auto v = split(applied(layer->v_proj, context), 2).repeat_interleave(2, 1);
  auto weights = (q.matmul(k.transpose(2, 3)) / std::sqrt(2.0) + full).softmax(-1);
  auto expected = applied(layer->o_proj, weights.matmul(v).transpose(1, 2).reshape({kBatch, kQueries, kWidth}));

  auto inputs = AttentionInputs().context(context).attn_mask(mask).is_causal(causal);
  if (padded) inputs.key_padding_mask(padding);
  CHECK(testing::distance(layer->forward(x, inputs), expected) < 1e-5);
}

TEST_CASE("A query that sees no key gives the bias of the output, and no NaN") {
  const bool boolean = GENERATE(true, false);
  auto stock = make_stock(torch::nn::MultiheadAttentionOptions(kWidth, 2));
  auto layer = filled(LoRAAttention<>(stock, kAdapter, Projections::all()));
  auto x = randn({kBatch, kQueries, kWidth});
  auto mask = torch::zeros({kQueries, kQueries}, torch::TensorOptions(testing::device()).dtype(torch::kBool));
  mask[1].fill_(true);
  if (!boolean) {
    mask = torch::zeros(mask.sizes(), testing::device()).masked_fill(mask, -std::numeric_limits<float>::infinity());
  }
  auto output = layer->forward(x, AttentionInputs().attn_mask(mask));
  CHECK(testing::distance(output.select(1, 1), layer->o_proj.bias().expand({kBatch, kWidth})) < 1e-6);
  output.sum().backward();
  for (auto& parameter : lora::trainable_parameters(*layer)) CHECK(parameter.grad().isfinite().all().item<bool>());
}

TEST_CASE("The gradients of A and B of every projection, and of the input, agree with finite differences") {
  const bool together = GENERATE(true, false), masked = GENERATE(false, true);
  auto layer = make_grouped();
  layer->to(torch::kDouble);
  auto x = randn({kBatch, 3, kWidth}).to(torch::kDouble).requires_grad_();
  auto mask = randn({3, 3}).to(torch::kDouble).requires_grad_();
  auto inputs = AttentionInputs().is_causal(true);
  if (masked) inputs.attn_mask(mask);
  auto loss = [&] {
    if (!together) inputs.context(x.clone());
    return layer->forward(x, inputs).sin().sum();
  };
  auto tensors = lora::trainable_parameters(*layer);
  CHECK(tensors.size() == 8);
  tensors.push_back(x);
  if (masked) tensors.push_back(mask);  // a learned position bias
  CHECK(testing::gradient_error(loss, tensors) < 1e-7);
}

TEST_CASE("Merging folds all projections or none, leaves the wrapped module alone and is undone bit by bit") {
  const auto subset = GENERATE(0, 1, 2);
  const Projections some[] = {Projections().q(true).v(true), Projections().k(true).o(true), Projections::all()};
  auto stock = make_stock(torch::nn::MultiheadAttentionOptions(kWidth, 4));
  auto layer = filled(LoRAAttention<>(stock, kAdapter, some[subset]));
  auto x = randn({kBatch, kQueries, kWidth});
  auto adapted = layer->forward(x), before = stock_output(stock, x, x);
  std::vector<torch::Tensor> pristine;
  for (const auto* p : {&layer->q_proj, &layer->k_proj, &layer->v_proj, &layer->o_proj}) {
    pristine.push_back(p->weight().clone());
  }
  {
    lora::MergeGuard merged(*layer);
    CHECK(layer->is_merged());
    CHECK(testing::distance(layer->forward(x), adapted) < 1e-5);
    CHECK(torch::equal(stock_output(stock, x, x), before));
    CHECK_THROWS_WITH(layer->merge(), testing::contains("merged already"));
  }
  CHECK_FALSE(layer->is_merged());
  CHECK_THROWS_WITH(layer->unmerge(), testing::contains("not merged"));
  size_t i = 0;
  for (const auto* p : {&layer->q_proj, &layer->k_proj, &layer->v_proj, &layer->o_proj}) {
    CHECK(torch::equal(p->weight(), pristine[i++]));
  }
  CHECK(torch::equal(layer->forward(x), adapted));
}

TEST_CASE("An update that is not finite keeps every projection from being merged") {
  auto layer = make_grouped();
  auto x = randn({kBatch, kQueries, kWidth});
  layer->o_proj->lora_B().detach().fill_(std::numeric_limits<float>::quiet_NaN());
  CHECK_THROWS_WITH(layer->merge(), testing::contains("LoRAAttention.o_proj") && testing::contains("not finite"));
  CHECK_FALSE(layer->is_merged());
  CHECK_FALSE(layer->q_proj->is_merged());
}

TEST_CASE("A part that is merged alone is unmerged with the whole") {
  auto layer = make_grouped();
  auto x = randn({kBatch, kQueries, kWidth});
  auto adapted = layer->forward(x);
  layer->k_proj->merge();
  CHECK(layer->is_merged());
  CHECK(testing::distance(layer->forward(x), adapted) < 1e-5);
  CHECK_THROWS_WITH(layer->merge(), testing::contains("a part of it"));
  layer->unmerge();
  CHECK_FALSE(layer->k_proj->is_merged());
}

TEST_CASE("Projections that share their input are computed together where their weights lie together") {
  auto products = [](auto& layer, const AttentionInputs& inputs = {}) {
    auto x = randn({kBatch, kQueries, kWidth}).to(layer->q_proj.weight().scalar_type());
    return count("aten::unsafe_split_with_sizes", [&] { layer->forward(x, inputs); });
  };
  const bool bias = GENERATE(true, false);
  auto layer = make_grouped(bias);
  CHECK(products(layer) == 1);
  CHECK(products(layer, AttentionInputs().context(randn({kBatch, kKeys, kWidth}))) == 1);  // k and v
  CHECK(products(
            layer,
            AttentionInputs().context(randn({kBatch, kKeys, kWidth})).value_context(randn({kBatch, kKeys, kWidth}))) ==
        0);
  {
    lora::MergeGuard merged(*layer);
    CHECK(products(layer) == 1);  // merged values are written where the weights are
  }
  CHECK(products(layer) == 1);
  layer->to(torch::kDouble);
  CHECK(products(layer) == 1);
  LoRAAttention<> copy(std::dynamic_pointer_cast<lora::LoRAAttentionImpl<>>(layer->clone()));
  CHECK(products(copy) == 1);

  // Weights that are trained keep their gradients.
  copy->k_proj->weight.requires_grad_(true);
  CHECK(products(copy) == 0);
}

TEST_CASE("Four Linears are wrapped, whether each has a bias or not") {
  torch::manual_seed(0);
  auto linear = [](int64_t in, int64_t out, bool bias) {
    torch::nn::Linear layer(torch::nn::LinearOptions(in, out).bias(bias));
    layer->to(testing::device());
    return layer;
  };
  const bool biased = GENERATE(true, false);
  auto q = linear(kWidth, 8, true), k = linear(6, 4, false), v = linear(6, 4, biased), o = linear(8, kWidth, biased);
  auto options = LoRAAttentionOptions(kWidth, 4, kAdapter).num_kv_heads(2).kdim(6).vdim(6);
  auto layer = filled(LoRAAttention<>(q, k, v, o, options.adapted(Projections().k(true).v(true).o(true))));
  CHECK(layer->q_proj.weight().is_same(q->weight));
  CHECK(layer->k_proj.weight().is_same(k->weight));
  CHECK_FALSE(q->weight.requires_grad());
  CHECK(lora::trainable_parameters(*layer).size() == 6);
  auto x = randn({kBatch, kQueries, kWidth}), context = randn({kBatch, kKeys, 6});
  auto inputs = AttentionInputs().context(context);
  auto output = layer->forward(x, inputs);
  CHECK(testing::distance(output, by_hand(layer, x, context, context, torch::zeros({1}, testing::device()))) < 1e-5);
  LoRAAttention<> copy(std::dynamic_pointer_cast<lora::LoRAAttentionImpl<>>(layer->clone()));
  CHECK(testing::distance(copy->forward(x, inputs), output) < 1e-6);
  CHECK(copy->k_proj.bias().defined() == false);
}

TEST_CASE("A copy of an attention is frozen, independent and merged where the original is, alone or inside a model") {
  const bool merged = GENERATE(false, true), inside = GENERATE(false, true);
  torch::manual_seed(0);
  Net net;
  auto layer = filled(net->attention);
  auto x = randn({kBatch, kQueries, kWidth});
  auto pristine = layer->v_proj->weight.clone();
  if (merged) layer->merge();
  auto expected = layer->forward(x);
  auto copy = inside ? std::dynamic_pointer_cast<NetImpl>(net->clone())->attention
                     : LoRAAttention<>(std::dynamic_pointer_cast<lora::LoRAAttentionImpl<>>(layer->clone()));
  layer->v_proj->lora_A().detach().zero_();
  layer->k_proj.weight().zero_();
  CHECK(copy->is_merged() == merged);
  CHECK(torch::equal(copy->forward(x), expected));
  CHECK(lora::trainable_parameters(*copy).size() == 4);
  CHECK(copy->v_proj->lora_B().is_same(copy->named_parameters()["v_proj.lora_B"]));
  if (merged) copy->unmerge();
  CHECK(torch::equal(copy->v_proj->weight, pristine));
}

TEST_CASE("Saving and loading an attention keeps it frozen and its output the same") {
  testing::TemporaryFolder folder;
  const auto file = (folder / "layer.pt").string();
  auto layer = make_grouped();
  auto x = randn({kBatch, kQueries, kWidth});
  torch::save(layer, file);
  auto loaded = make_grouped();
  for (auto& parameter : loaded->parameters()) parameter.detach().zero_();
  torch::load(loaded, file);
  CHECK(torch::equal(loaded->forward(x), layer->forward(x)));
  CHECK(lora::trainable_parameters(*loaded).size() == 8);
  layer->merge();
  CHECK_THROWS_WITH(torch::save(layer, file), testing::contains("LoRAAttention: a merged layer cannot be saved"));
  CHECK_THROWS_WITH(torch::load(layer, file), testing::contains("LoRAAttention: nothing can be loaded"));
}

TEST_CASE("An attention moved to another type computes in it, also between merge and unmerge") {
  auto layer = make_grouped();
  auto x = randn({kBatch, kQueries, kWidth});
  auto before = layer->forward(x);
  layer->to(torch::kBFloat16);
  CHECK(
      layer->forward(x.to(torch::kBFloat16), AttentionInputs().attn_mask(randn({kQueries, kQueries}))).scalar_type() ==
      torch::kBFloat16);
  auto other = make_grouped();
  other->merge();
  other->to(torch::kDouble);
  CHECK(testing::distance(other->forward(x.to(torch::kDouble)), before) < 1e-5);
  other->unmerge();
  CHECK(testing::distance(other->forward(x.to(torch::kDouble)), before) < 1e-5);
}

TEST_CASE("An attention around weights of any type computes in it, and under autocast") {
  const auto type = GENERATE(torch::kDouble, torch::kBFloat16);
  auto stock = make_stock(torch::nn::MultiheadAttentionOptions(kWidth, 2));
  auto x = randn({kBatch, kQueries, kWidth}), mask = randn({kQueries, kQueries});
  auto expected = stock_output(stock, x, x, {}, mask);
  stock->to(type);
  LoRAAttention layer(stock, kAdapter, Projections().k(true));
  auto inputs = AttentionInputs().attn_mask(mask);  // in float
  auto output = layer->forward(x.to(type), inputs);
  CHECK(output.scalar_type() == type);
  CHECK(testing::distance(output, expected) < 0.05);
  CHECK(layer->v_proj.weight().data_ptr() == stock->in_proj_weight.slice(0, 2 * kWidth).data_ptr());

  layer->to(torch::kFloat);
  const auto device = testing::device().type();
  at::autocast::set_autocast_dtype(device, torch::kBFloat16);
  at::autocast::set_autocast_enabled(device, true);
  output = layer->forward(x, inputs);
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(device, false);
  CHECK(output.scalar_type() == torch::kBFloat16);
  CHECK(testing::distance(output, expected) < 0.05);
}

TEST_CASE("Attention weights are dropped in training mode only") {
  torch::manual_seed(0);
  auto layer = filled(LoRAAttention<>(LoRAAttentionOptions(kWidth, 2, kAdapter).dropout(0.5)));
  auto x = randn({kBatch, 16, kWidth});
  CHECK(testing::distance(layer->forward(x), layer->forward(x)) > 1e-3);
  std::vector<torch::Tensor> samples;
  for (int i = 0; i < 400; ++i) samples.push_back(layer->forward(x).detach());
  layer->eval();
  auto expected = layer->forward(x);
  CHECK(torch::equal(layer->forward(x), expected));
  CHECK(testing::distance(torch::stack(samples).mean(0), expected) < 0.1);  // what is kept is scaled up
}

TEST_CASE("Another method adapts an attention as well") {
  auto stock = make_stock(torch::nn::MultiheadAttentionOptions(kWidth, 2));
  LoRAAttention<lora::DoRA> layer(stock, kAdapter, Projections::all());
  auto x = randn({kBatch, kQueries, kWidth});
  CHECK(testing::distance(layer->forward(x), stock_output(stock, x, x)) < 1e-5);
  filled(layer);
  auto adapted = layer->forward(x);
  CHECK(testing::distance(adapted, stock_output(stock, x, x)) > 1e-2);
  auto separate = layer->forward(x, AttentionInputs().context(x.clone()).value_context(x.clone()));
  CHECK(testing::distance(separate, adapted) < 1e-5);
  layer->merge();
  CHECK(testing::distance(layer->forward(x), adapted) < 1e-5);
}

TEST_CASE("An adapter that is attached to a frozen projection is not passed over by the common product") {
  auto layer = filled(LoRAAttention<>(LoRAAttentionOptions(kWidth, 2, kAdapter)));
  auto adapters = lora::attach(*layer, lora::LoRAConfig(2).alpha(6).target_modules({"k_proj"}));
  testing::randomize(adapters.parameters());
  auto x = randn({kBatch, kQueries, kWidth});
  auto base = layer->forward(x);
  torch::Tensor adapted;
  {
    auto active = adapters.activate();
    adapted = layer->forward(x);
  }
  CHECK(testing::distance(adapted, base) > 1e-3);
  adapters.merge();
  CHECK(testing::distance(layer->forward(x), adapted) < 1e-5);
}

TEST_CASE("An attention is an entry of a Sequential") {
  auto layer = make_grouped();
  auto x = randn({kBatch, kQueries, kWidth});
  torch::nn::Sequential model(layer, torch::nn::ReLU());
  CHECK(torch::equal(model->forward(x), layer->forward(x).relu()));
}

TEST_CASE("Projections say what is adapted, with options of its own or not") {
  auto layer = make_grouped();
  CHECK(layer->q_proj->lora_A().size(0) == 3);
  CHECK(layer->k_proj->lora_A().size(0) == 2);
  CHECK(layer->v_proj->scaling() == 2);
  CHECK(Projections().q(4).q().options(kAdapter)->rank() == 4);  // a rank, not "true"
  CHECK_FALSE(Projections().q(false).q().adapted());
}

TEST_CASE("LoRAAttention says what has to hold for its options") {
  const auto good = LoRAAttentionOptions(kWidth, 4, kAdapter);
  auto with = [&](auto change) {
    auto options = good;
    change(options);
    return LoRAAttention<>(options);
  };
  CHECK_THROWS_WITH(with([](auto& o) { o.num_heads(3); }), testing::contains("num_heads 3 and width 8"));
  CHECK_THROWS_WITH(with([](auto& o) { o.num_heads(0); }),
                    testing::contains("num_heads has to be at least 1, but got 0"));
  CHECK_THROWS_WITH(with([](auto& o) { o.num_kv_heads(3); }), testing::contains("num_kv_heads 3 and num_heads 4"));
  CHECK_THROWS_WITH(with([](auto& o) { o.kdim(-1); }), testing::contains("kdim has to be at least 1, but got -1"));
  CHECK_THROWS_WITH(with([](auto& o) { o.head_dim(0); }), testing::contains("head_dim has to be at least 1"));
  CHECK_THROWS_WITH(with([](auto& o) { o.dropout(1); }), testing::contains("dropout has to be in [0, 1), but got 1"));
  CHECK_THROWS_WITH(with([](auto& o) { o.adapted(Projections()); }), testing::contains("adapted names no projection"));
  CHECK_THROWS_WITH(with([](auto& o) { o.adapted(Projections().k(LoRAOptions(0))); }),
                    testing::contains("k_proj: rank has to be at least 1, but got 0"));
}

TEST_CASE("LoRAAttention says what it cannot wrap, and freezes nothing then") {
  using Options = torch::nn::MultiheadAttentionOptions;
  for (auto& options : {Options(8, 2).add_bias_kv(true), Options(8, 2).add_zero_attn(true)}) {
    torch::nn::MultiheadAttention stock(options);
    CHECK_THROWS_WITH(LoRAAttention<>(stock, kAdapter), testing::contains("lora::attach"));
    CHECK(stock->in_proj_weight.requires_grad());
  }
  torch::nn::Linear square(8, 8), narrow(8, 4);
  auto options = LoRAAttentionOptions(8, 4, kAdapter);
  CHECK_THROWS_WITH(LoRAAttention<>(square, square, narrow, square, options),
                    testing::contains("v_proj has to be [8, 8]") && testing::contains("but is [4, 8]"));
  CHECK(square->weight.requires_grad());
}

TEST_CASE("LoRAAttention says what its inputs have to be") {
  torch::manual_seed(0);
  auto layer = filled(LoRAAttention<>(LoRAAttentionOptions(kWidth, 4, kAdapter).kdim(6).vdim(6)));
  auto x = randn({kBatch, kQueries, kWidth}), context = randn({kBatch, kKeys, 6});
  auto with = [&](const AttentionInputs& inputs) { return layer->forward(x, inputs); };
  auto masked = [&](const torch::Tensor& mask) { return with(AttentionInputs().context(context).attn_mask(mask)); };
  CHECK_THROWS_WITH(with({}), testing::contains("kdim = 6") && testing::contains("[2, 5, 8]"));
  CHECK_THROWS_WITH(with(AttentionInputs().context(context[0])),
                    testing::contains("same batch as the input, [2, 5, 8]"));
  CHECK_THROWS_WITH(with(AttentionInputs().context(context.repeat({2, 1, 1}))),
                    testing::contains("shape is [4, 7, 6]"));
  CHECK_THROWS_WITH(with(AttentionInputs().context(context).value_context(context.slice(1, 1))),
                    testing::contains("equally many") && testing::contains("[2, 6, 6]"));
  CHECK_THROWS_WITH(masked(randn({kKeys, kQueries})), testing::contains("(2, 4, 5, 7)") && testing::contains("[7, 5]"));
  CHECK_THROWS_WITH(masked(randn({3, kQueries, kKeys})), testing::contains("[3, 5, 7]"));
  CHECK_THROWS_WITH(masked(randn({kKeys})), testing::contains("attn_mask has to be (5, 7)"));
  CHECK_THROWS_WITH(masked(torch::ones({kQueries, kKeys}, torch::kLong)),
                    testing::contains("attn_mask has to be boolean") && testing::contains("Long"));
  CHECK_THROWS_WITH(
      with(AttentionInputs().context(context).key_padding_mask(torch::ones({kBatch, kQueries}, torch::kBool))),
      testing::contains("key_padding_mask has to be (batch, keys) = (2, 7)"));
  CHECK_THROWS_WITH(layer->forward(randn({kWidth})), testing::contains("(batch, length, width)"));
  CHECK_THROWS_WITH(layer->forward(context), testing::contains("width = 8") && testing::contains("[2, 7, 6]"));
  CHECK_THROWS_WITH(layer->k_proj->lora_A(), testing::contains("not adapted"));
}

TEST_CASE("LoRAAttention prints what it is") {
  LoRAAttention<> layer(LoRAAttentionOptions(kWidth, 4, kAdapter).num_kv_heads(2).kdim(6).dropout(0.1));
  std::ostringstream stream;
  layer->pretty_print(stream);
  CHECK(stream.str() ==
        "lora::LoRAAttention<LowRank>(width=8, num_heads=4, num_kv_heads=2, head_dim=2, kdim=6, vdim=8, dropout=0.1)");
  CHECK(c10::str(layer).find("(q_proj): lora::LoRALinear<LowRank>(in_features=8") != std::string::npos);
}
