#pragma once

#include <ATen/ops/linear.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any_value.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <lora/intercept/in_scope.hpp>
#include <lora/modules/attention/mask.hpp>
#include <lora/modules/attention/packed.hpp>
#include <lora/modules/attention/options.hpp>
#include <lora/modules/linear.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// One projection of a `LoRAAttention`: a LoRALinear where it is adapted, a frozen torch::nn::Linear where not.
template <class Method>
struct AttentionProjection {
  std::shared_ptr<LoRALinearImpl<Method>> adapted;
  std::shared_ptr<torch::nn::LinearImpl> frozen;

  const at::Tensor& weight() const { return adapted ? adapted->weight : frozen->weight; }
  const at::Tensor& bias() const { return adapted ? adapted->bias : frozen->bias; }

  at::Tensor forward(const at::Tensor& x) const {
    if (adapted) return adapted->forward(x);
    if (!detail::is_quantized(frozen->weight) || detail::is_in_scope(frozen->weight)) return frozen->forward(x);
    const auto op = [](const at::Tensor& in, const at::Tensor& w, const at::Tensor& b) { return at::linear(in, w, b); };
    return Product{x, frozen->weight, frozen->bias, op, linear_times, /*adds=*/true, Product::Form::kRows}.frozen();
  }
  /// Whether it has an update of its own to add.
  bool acts() const { return adapted && adapted->acts(); }

  /// The adapted layer: `attention->q_proj->lora_A()`.
  LoRALinearImpl<Method>* operator->() const {
    TORCH_CHECK(adapted, "lora::LoRAAttention: this projection is not adapted; ask for it in Projections");
    return adapted.get();
  }
};

/// Attention with frozen projections, any of which carry a trainable update, by default a low-rank one:
///
///   y = concat_h(softmax(q_h k_h^T / sqrt(head_dim) + mask) v_h) W_o'^T + b_o,
///   q = x W_q'^T + b_q,   k = c W_k'^T + b_k,   v = c W_v'^T + b_v,   W' = W + (alpha / rank) B A
///
/// Shapes: input x (batch, queries, width) -> output (batch, queries, width); context c (batch, keys, kdim and vdim),
/// x itself by default; all of them without the first dimension as well. W_q (num_heads * head_dim, width), W_k
/// (num_kv_heads * head_dim, kdim), W_v (num_kv_heads * head_dim, vdim), W_o (width, num_heads * head_dim). The
/// submodules are "q_proj", "k_proj", "v_proj" and "o_proj", the names of Hugging Face's models; an adapted one is a
/// LoRALinear, the others are torch::nn::Linear. Weights that share their input and lie together in memory, as those of
/// a torch::nn::MultiheadAttention and of a layer built from sizes do, are applied in one product; those of layers that
/// are wrapped until they are merged, since what was wrapped stays as it is.
///
/// Errors: c10::ValueError for options out of range; c10::Error for inputs and masks whose shapes do not fit,
/// when merged twice, or when an update is not finite. Reference: Vaswani et al. 2017, "Attention Is All You Need",
/// sec. 3.2; Ainslie et al. 2023, "GQA", sec. 2.2; Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language
/// Models", sec. 4.2.
template <class Method = LowRank>
class LoRAAttentionImpl : public torch::nn::Cloneable<LoRAAttentionImpl<Method>> {
 public:
  using Projection = AttentionProjection<Method>;

  /// A new layer, whose projections are initialized as torch::nn::Linear is.
  explicit LoRAAttentionImpl(LoRAAttentionOptions options_) : options(std::move(options_)) { reset(); }

  /// Wraps `stock`: its weights are shared, not copied, and frozen from now on. Its attention dropout is taken over.
  /// `stock` wants (length, batch, width), this layer (batch, length, width). Once moved to another device or type, the
  /// two no longer share anything.
  LoRAAttentionImpl(torch::nn::MultiheadAttention stock, LoRAOptions adapter,
                    Projections adapted = Projections().q(true).v(true))
      : options(options_of(*stock, std::move(adapter), std::move(adapted))) {
    options.validate();
    TORCH_CHECK(!stock->bias_k.defined() && !stock->bias_v.defined() && !stock->options.add_zero_attn(),
                "lora::LoRAAttention: a torch::nn::MultiheadAttention with bias_k, bias_v or add_zero_attn cannot be "
                "wrapped; adapt it as it is with lora::attach");
    wrap(*stock);
  }

  /// Wraps four linear layers: they are shared, not copied, and frozen from now on. Each has a bias or not, whatever
  /// the options say about biases; its sizes have to be those that the options say.
  LoRAAttentionImpl(torch::nn::Linear q, torch::nn::Linear k, torch::nn::Linear v, torch::nn::Linear o,
                    LoRAAttentionOptions options_)
      : options(std::move(options_)) {
    options.validate();
    const std::array<torch::nn::Linear, 4> layers{std::move(q), std::move(k), std::move(v), std::move(o)};
    for (size_t i = 0; i < 4; ++i) check_sizes(i, layers[i]->weight);
    for (size_t i = 0; i < 4; ++i) wrap(i, layers[i]);
  }

  void reset() override {
    options.validate();
    for (size_t i = 0; i < 4; ++i) build(i);
    pack();
  }

  /// Fills the weights as torch::nn::Linear does, and starts the adapters anew.
  void reset_parameters() {
    for (auto* projection : projections()) {
      projection->adapted ? projection->adapted->reset_parameters() : projection->frozen->reset_parameters();
    }
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "lora::LoRAAttention<" << Method::info.name << ">(width=" << options.width()
           << ", num_heads=" << options.num_heads() << ", num_kv_heads=" << options.num_kv_heads()
           << ", head_dim=" << options.head_size() << ", kdim=" << options.kdim() << ", vdim=" << options.vdim()
           << ", dropout=" << options.dropout() << ")";
  }

  /// The output (batch, queries, width) for x (batch, queries, width), or both without the first dimension.
  at::Tensor forward(const at::Tensor& input, const AttentionInputs& inputs = {}) {
    const auto keys = inputs.context().defined() ? inputs.context() : input;
    const auto values = inputs.value_context().defined() ? inputs.value_context() : keys;
    check_inputs(input, keys, values);
    const auto [q, k, v] = project({input, keys, values});
    const auto attended = attend(q, k, v, inputs);  // (batch, num_heads, queries, head_dim)
    auto sizes = input.sizes().vec();
    sizes.back() = options.num_heads() * options.head_size();
    return o_proj.forward(attended.transpose(1, 2).reshape(sizes));  // (batch, queries, width)
  }

  /// Folds the updates of all projections into their weights or, when one is not finite, none. The weights as they were
  /// are kept; a wrapped layer keeps its own and gives the same output as before.
  void merge() {
    TORCH_CHECK(!is_merged(), "lora::merge: this LoRAAttention, or a part of it, is merged already; unmerge it first");
    std::vector<detail::Merging> all;
    for (auto* projection : projections()) {
      if (!projection->adapted) continue;
      for (auto& merging : projection->adapted->mergings()) all.push_back(std::move(merging));
    }
    detail::merge(all);
  }

  /// Brings back the weights from before `merge`, bit by bit.
  void unmerge() {
    TORCH_CHECK(is_merged(), "lora::unmerge: this LoRAAttention is not merged");
    std::vector<std::shared_ptr<Site>> sites;
    for (auto* projection : projections()) {
      if (!projection->adapted || !projection->adapted->is_merged()) continue;
      for (auto& merging : projection->adapted->mergings()) sites.push_back(std::move(merging.site));
    }
    detail::unmerge(sites);
  }

  bool is_merged() const {
    const auto all = projections();
    return std::any_of(all.begin(), all.end(), [](auto* one) { return one->adapted && one->adapted->is_merged(); });
  }

  /// Copies the layer; the copy is frozen and merged where this one is.
  std::shared_ptr<torch::nn::Module> clone(const std::optional<torch::Device>& device = std::nullopt) const override {
    auto copy = torch::nn::Cloneable<LoRAAttentionImpl>::clone(device);
    auto& layer = *copy->template as<LoRAAttentionImpl>();
    for (auto* projection : layer.projections()) {
      if (projection->frozen) freeze(*projection->frozen);
    }
    if (is_packed()) layer.pack();
    return copy;
  }

  /// Moves the layer; weights that lie together in memory do so afterwards.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override {
    move([&] { torch::nn::Module::to(device, dtype, non_blocking); });
  }
  void to(torch::Dtype dtype, bool non_blocking = false) override {
    move([&] { torch::nn::Module::to(dtype, non_blocking); });
  }
  void to(torch::Device device, bool non_blocking = false) override {
    move([&] { torch::nn::Module::to(device, non_blocking); });
  }

  /// Writes the layer as any module is written. Throws when it is merged, as LoRALinear does.
  void save(torch::serialize::OutputArchive& archive) const override {
    TORCH_CHECK(!is_merged(), "lora::LoRAAttention: a merged layer cannot be saved; unmerge it first");
    torch::nn::Module::save(archive);
  }
  void load(torch::serialize::InputArchive& archive) override {
    TORCH_CHECK(!is_merged(), "lora::LoRAAttention: nothing can be loaded into a merged layer; unmerge it first");
    torch::nn::Module::load(archive);
  }

  LoRAAttentionOptions options;
  Projection q_proj, k_proj, v_proj, o_proj;

 protected:
  // What FORWARD_HAS_DEFAULT_ARGS({1, AnyValue(AttentionInputs())}) declares; clang warns of the macro with -Wpedantic.
  template <typename ModuleType, typename... ArgumentTypes>
  friend struct torch::nn::AnyModuleHolder;
  bool _forward_has_default_args() override { return true; }
  unsigned int _forward_num_required_args() override { return 1; }
  std::vector<torch::nn::AnyValue> _forward_populate_default_args(
      std::vector<torch::nn::AnyValue>&& arguments) override {
    auto all = std::move(arguments);
    if (all.size() < 2) all.emplace_back(AttentionInputs());
    return all;
  }

 private:
  std::array<Projection*, 4> projections() { return {&q_proj, &k_proj, &v_proj, &o_proj}; }
  std::array<const Projection*, 4> projections() const { return {&q_proj, &k_proj, &v_proj, &o_proj}; }

  /// The options of the update of each projection; nothing where it is not adapted.
  std::optional<LoRAOptions> adapter(size_t i) const { return options.adapted().options(i, options.adapter()); }

  /// The sizes (out, in) of the weight of each projection.
  std::array<int64_t, 2> sizes(size_t i) const {
    const auto heads = options.num_heads() * options.head_size(),
               kv_heads = options.num_kv_heads() * options.head_size();
    const std::array<std::array<int64_t, 2>, 4> all{
        {{heads, options.width()}, {kv_heads, options.kdim()}, {kv_heads, options.vdim()}, {options.width(), heads}}};
    return all[i];
  }

  static LoRAAttentionOptions options_of(const torch::nn::MultiheadAttentionImpl& stock, LoRAOptions adapter,
                                         Projections adapted) {
    const auto& o = stock.options;
    return LoRAAttentionOptions(o.embed_dim(), o.num_heads(), std::move(adapter))
        .adapted(std::move(adapted))
        .kdim(o.kdim())
        .vdim(o.vdim())
        .bias(o.bias())
        .dropout(o.dropout());
  }

  void check_sizes(size_t i, const at::Tensor& weight) const {
    const auto wanted = sizes(i);
    TORCH_CHECK_VALUE(weight.sizes() == at::IntArrayRef(wanted), "lora::LoRAAttention: the weight of ",
                      Projections::kNames[i], " has to be ", at::IntArrayRef(wanted),
                      " (out, in) by the options (width ", options.width(), ", num_heads ", options.num_heads(),
                      ", num_kv_heads ", options.num_kv_heads(), ", head_dim ", options.head_size(), ", kdim ",
                      options.kdim(), ", vdim ", options.vdim(), "), but is ", weight.sizes());
  }

  static void freeze(torch::nn::LinearImpl& layer) {
    for (auto& parameter : layer.parameters()) parameter.requires_grad_(false);
  }

  /// A new projection, with a bias where the one it replaces has one.
  void build(size_t i) {
    const auto& before = *projections()[i];
    const bool bias = before.adapted || before.frozen ? before.bias().defined() : options.bias();
    const auto [out, in] = sizes(i);
    if (const auto own = adapter(i)) {
      put(i, LoRALinear<Method>(LoRALinearOptions(in, out, *own).bias(bias)).ptr());
    } else {
      put(i, torch::nn::Linear(torch::nn::LinearOptions(in, out).bias(bias)).ptr());
    }
  }

  void wrap(size_t i, const torch::nn::Linear& layer) {
    const auto own = adapter(i);
    own ? put(i, std::make_shared<LoRALinearImpl<Method>>(layer, *own)) : put(i, layer.ptr());
  }

  /// The projections of `stock` as views of its tensors.
  void wrap(torch::nn::MultiheadAttentionImpl& stock) {
    const std::array<at::Tensor, 3> separate{stock.q_proj_weight, stock.k_proj_weight, stock.v_proj_weight};
    const auto rows = [width = options.width()](const at::Tensor& packed, size_t i) {
      return packed.defined() ? packed.detach().narrow(0, static_cast<int64_t>(i) * width, width) : packed;
    };
    TORCH_CHECK(
        !detail::is_quantized(stock.in_proj_weight), "lora::LoRAAttention: in_proj_weight is held in few bits, of ",
        "which the projections are parts; wrap the layer first, and hold the weights of this one in few bits then");
    for (auto& parameter : stock.parameters()) parameter.requires_grad_(false);
    for (size_t i = 0; i < 3; ++i) {
      const auto weight = stock.in_proj_weight.defined() ? rows(stock.in_proj_weight, i) : separate[i].detach();
      wrap(i, linear_of(weight, rows(stock.in_proj_bias, i)));
    }
    wrap(3, stock.out_proj);
  }

  /// A linear layer with these tensors.
  static torch::nn::Linear linear_of(const at::Tensor& weight, const at::Tensor& bias) {
    // Made small and then given the tensors, since the constructor fills what it allocates.
    torch::nn::Linear layer(torch::nn::LinearOptions(1, 1).bias(bias.defined()));
    layer->options.in_features(weight.size(1)).out_features(weight.size(0));
    freeze(*layer);
    layer->weight.set_data(weight);
    if (bias.defined()) layer->bias.set_data(bias);
    return layer;
  }

  void put(size_t i, const std::shared_ptr<LoRALinearImpl<Method>>& layer) {
    for (const auto& site : layer->own_sites()) site->rename(std::string("LoRAAttention.") + Projections::kNames[i]);
    *projections()[i] = {this->register_module(Projections::kNames[i], layer), nullptr};
  }
  void put(size_t i, const std::shared_ptr<torch::nn::LinearImpl>& layer) {
    freeze(*layer);
    *projections()[i] = {nullptr, this->register_module(Projections::kNames[i], layer)};
  }

  /// The projections whose inputs have one width, so that they may share one.
  std::vector<const Projection*> alike() const {
    if (options.kdim() != options.vdim()) return {};
    if (options.kdim() != options.width()) return {&k_proj, &v_proj};
    return {&q_proj, &k_proj, &v_proj};
  }

  static std::vector<at::Tensor> weights(const std::vector<const Projection*>& some) {
    std::vector<at::Tensor> all;
    for (const auto* one : some) all.push_back(one->weight());
    return all;
  }
  static std::vector<at::Tensor> biases(const std::vector<const Projection*>& some) {
    std::vector<at::Tensor> all;
    for (const auto* one : some) {
      if (one->bias().defined()) all.push_back(one->bias());
    }
    return all;
  }

  /// Lays the weights, and the biases, of projections that may share their input together in memory.
  void pack() {
    const auto some = alike();
    const auto is_held = [](const Projection* one) { return detail::is_quantized(one->weight()); };
    if (some.empty() || std::any_of(some.begin(), some.end(), is_held)) return;
    detail::stack(weights(some));
    if (biases(some).size() == some.size()) detail::stack(biases(some));
  }

  bool is_packed() const {
    const auto some = alike();
    return !some.empty() && detail::stacked(weights(some)).defined();
  }

  template <class Move>
  void move(const Move& do_move) {
    const bool packed = is_packed();
    do_move();
    if (packed && !is_packed()) pack();
  }

  void check_inputs(const at::Tensor& x, const at::Tensor& keys, const at::Tensor& values) const {
    TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "lora::LoRAAttention: the input has to be (batch, length, width) or ",
                "(length, width), but its shape is ", x.sizes());
    check_width("the input", x, "width", options.width());
    check_context("the context", x, keys, "kdim", options.kdim());
    check_context("value_context, or the context in its place,", x, values, "vdim", options.vdim());
    TORCH_CHECK(keys.size(-2) == values.size(-2), "lora::LoRAAttention: keys and values have to be equally many, but ",
                "context has shape ", keys.sizes(), " and value_context ", values.sizes());
  }

  static void check_width(const char* what, const at::Tensor& tensor, const char* option, int64_t width) {
    TORCH_CHECK(tensor.size(-1) == width, "lora::LoRAAttention: the last dimension of ", what, " has to be ", option,
                " = ", width, ", but its shape is ", tensor.sizes());
  }

  static void check_context(const char* what, const at::Tensor& x, const at::Tensor& context, const char* option,
                            int64_t width) {
    TORCH_CHECK(context.dim() == x.dim() && (x.dim() == 2 || context.size(0) == x.size(0)),
                "lora::LoRAAttention: ", what, " has to have as many dimensions and the same batch as the input, ",
                x.sizes(), ", but its shape is ", context.sizes());
    check_width(what, context, option, width);
  }

  /// q, k and v; one product for neighbours that share their input.
  std::array<at::Tensor, 3> project(const std::array<at::Tensor, 3>& inputs) const {
    std::array<at::Tensor, 3> outputs;
    for (size_t first = 0, last = 0; first < 3; first = last) {
      for (last = first + 1; last < 3 && inputs[last].is_same(inputs[first]);) ++last;
      project(inputs[first], first, last, outputs);
    }
    return outputs;
  }

  /// The outputs [first, last), which have the input x in common.
  void project(const at::Tensor& x, size_t first, size_t last, std::array<at::Tensor, 3>& outputs) const {
    const auto all = projections();
    const auto parts = products(x, {all.begin() + first, all.begin() + last});
    for (size_t i = first; i < last; ++i) outputs[i] = parts.empty() ? all[i]->forward(x) : parts[i - first];
  }

  /// x W'^T + b' of each of the projections, from one product; empty where that is not possible.
  static std::vector<at::Tensor> products(const at::Tensor& x, const std::vector<const Projection*>& some) {
    if (some.size() == 1) return {};
    for (const auto* one : some) {
      // A scope looks for the weight of one layer in each product.
      if (detail::is_in_scope(one->weight())) return {};
    }
    const auto weight = detail::stacked(weights(some));
    const auto parts = biases(some);
    const auto bias = parts.size() == some.size() ? detail::stacked(parts) : at::Tensor();
    if (!weight.defined() || bias.defined() == parts.empty()) return {};
    std::vector<WeightBase> bases;
    Updates updates;
    std::vector<int64_t> columns;
    bases.reserve(some.size());
    int64_t row = 0;
    for (const auto* one : some) {
      const auto rows = one->weight().size(0);
      if (one->acts()) {
        if (!one->adapted->joins_products()) return {};
        bases.push_back(one->adapted->own_base());
        updates.push_back(one->adapted->own_update(bases.back()));
        updates.back().at = row;
      }
      columns.push_back(rows);
      row += rows;
    }
    const auto run = [](const at::Tensor& in, const at::Tensor& w, const at::Tensor& b) {
      return at::linear(in, w, b);
    };
    // Unlike `narrow`, whose gradients would be padded and added up; and each part may be written to.
    const Product product{x, weight, bias, run, linear_times, /*adds=*/true, Product::Form::kRows};
    return adapted_product(product, updates).unsafe_split_with_sizes(columns, -1);
  }

  /// (..., length, heads * head_dim) -> (batch, heads, length, head_dim)
  at::Tensor heads(const at::Tensor& x, int64_t count) const {
    const auto batch = x.dim() == 3 ? x.size(0) : 1;
    return x.reshape({batch, x.size(-2), count, options.head_size()}).transpose(1, 2);
  }

  at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionInputs& inputs) {
    const auto queries = heads(q, options.num_heads());
    const auto keys = heads(k, options.num_kv_heads()), values = heads(v, options.num_kv_heads());
    const auto mask = combined_mask(queries, keys, inputs);
    return at::scaled_dot_product_attention(queries, keys, values, mask, this->is_training() ? options.dropout() : 0.0,
                                            /*is_causal=*/inputs.is_causal() && !mask, /*scale=*/std::nullopt,
                                            /*enable_gqa=*/options.num_kv_heads() != options.num_heads());
  }

  /// One mask for all; none where being causal is all that is asked for, which needs no mask.
  std::optional<at::Tensor> combined_mask(const at::Tensor& queries, const at::Tensor& keys,
                                          const AttentionInputs& inputs) const {
    if (!inputs.attn_mask().defined() && !inputs.key_padding_mask().defined()) return std::nullopt;
    detail::AttentionMask mask({queries.size(0), queries.size(1), queries.size(2), keys.size(2)},
                               queries.scalar_type());
    if (inputs.attn_mask().defined()) mask.add_attn_mask(inputs.attn_mask());
    if (inputs.key_padding_mask().defined()) mask.add_key_padding_mask(inputs.key_padding_mask());
    if (inputs.is_causal()) mask.add_causal(queries.device());
    return mask.combined();
  }
};

/// Holder of `LoRAAttentionImpl`: `LoRAAttention<>` as a member, `LoRAAttention layer(stock, options)`.
template <class Method = LowRank>
class LoRAAttention : public torch::nn::ModuleHolder<LoRAAttentionImpl<Method>> {
 public:
  using Impl = LoRAAttentionImpl<Method>;
  using torch::nn::ModuleHolder<Impl>::ModuleHolder;
};

LoRAAttention(LoRAAttentionOptions)->LoRAAttention<>;
LoRAAttention(torch::nn::MultiheadAttention, LoRAOptions)->LoRAAttention<>;
LoRAAttention(torch::nn::MultiheadAttention, LoRAOptions, Projections)->LoRAAttention<>;
LoRAAttention(torch::nn::Linear, torch::nn::Linear, torch::nn::Linear, torch::nn::Linear, LoRAAttentionOptions)
    ->LoRAAttention<>;

}  // namespace LORA_ABI
}  // namespace lora
