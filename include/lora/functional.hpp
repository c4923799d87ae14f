#pragma once

#include <c10/util/ArrayRef.h>
#include <c10/util/SmallVector.h>

#include <lora/batch_rows.hpp>
#include <lora/linkage.hpp>
#include <lora/method/contract.hpp>
#include <lora/product_run.hpp>
#include <lora/version.hpp>
#include <lora/weight/part.hpp>

// The one place that computes with adapters: a product with updates, and a weight with updates.

namespace lora {
inline namespace LORA_ABI {

/// One update that acts on an operand.
struct Update {
  const AnyMethod* method;
  const WeightBase* base;  ///< the whole frozen weight
  detail::Part part;       ///< which part of it the operand is
  bool training;           ///< whether dropout acts
  double weight = 1;       ///< a factor for the update as a whole
  int64_t at = 0;          ///< the first output of the product that is its own, where the operand holds several weights
  detail::RowsOfUpdate rows = {};  ///< on which rows of the batch it acts; all, where nothing is said
  /// Which layers' products are known to follow with the same input; null where nothing is to be known of that.
  detail::Followers* followers = nullptr;
};

using Updates = c10::SmallVector<Update, 4>;

/// y = op(x, W') + b for all updates at once:
///
///   y = x W^T + b + sum_i w_i (x_i W'_i^T - x_i W^T)
///
/// where x_i is x with the dropout of update i, and zero but for the rows of the batch on which it acts. Where updates
/// cannot be added to the operator's result, or are no terms on all of it, the operator runs with W' in the place of W;
/// there, too, dropout acts on the input of the update alone. Rows with other updates are computed apart where they are
/// no plain terms.
LORA_INLINE at::Tensor adapted_product(const Product& product, c10::ArrayRef<Update> updates);

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/ones.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <lora/dropout.hpp>
#include <lora/low_rank_linear.hpp>
#include <lora/shared_input.hpp>
#include <lora/weight/plain.hpp>

#include <algorithm>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

namespace detail {

/// Whether and how an update drops. What is dropped is the input of the adapter alone; a lookup drops nothing.
class Dropout {
 public:
  explicit Dropout(const Update& update)
      : probability_(update.training && !update.base->shape().is_lookup ? update.method->options().dropout() : 0) {}

  bool acts() const { return probability_ > 0; }

  /// The mask for an input that has one of its own kind, or none.
  DropoutMask mask() const { return acts() ? DropoutMask(probability_) : DropoutMask(); }

  at::Tensor of_input(const at::Tensor& x) const { return acts() ? dropout(x, probability_) : x; }

  /// For operators that take a weight whole: whole input features are dropped, A diag(mask / (1 - p)) in place of A.
  /// `delta` is (out, in), or a batch.
  at::Tensor of_columns(const at::Tensor& delta) const {
    return acts() ? delta * dropout(at::ones({delta.size(-1)}, delta.options()), probability_) : delta;
  }

 private:
  double probability_;
};

/// W' - W of one update, in the layout of the weight and the type of the adapter.
inline at::Tensor layout_delta(const Update& update, bool drop_columns) {
  auto delta = update.method->delta(*update.base);
  if (drop_columns) delta = Dropout(update).of_columns(delta);
  delta = update.base->view().weight(delta);
  return update.weight == 1 ? delta : delta * update.weight;
}

/// W' in the place of an operand that is a part of W, for the updates that `wanted` takes: W + the sum of W' - W,
/// rounded once to the type of W.
template <class Wanted>
at::Tensor adapted_operand(const at::Tensor& operand, c10::ArrayRef<Update> updates, bool drop_columns,
                           const Wanted& wanted) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::Tensor sum;
  for (const auto& update : updates) {
    if (!wanted(update)) continue;
    const auto& weight = update.base->weight();
    if (updates.size() == 1 && update.weight == 1 && !update.base->is_merged()) {
      if (auto stand_in = update.method->replacement(weight); stand_in.defined())
        return same_part(stand_in, weight, operand, update.part);
    }
    const auto delta = same_part(layout_delta(update, drop_columns), weight, operand, update.part);
    sum = sum.defined() ? sum + delta : delta;
  }
  return sum.defined() ? (dequantized(operand).to(sum.scalar_type()) + sum).to(operand.scalar_type()) : operand;
}

inline at::Tensor adapted_operand(const at::Tensor& operand, c10::ArrayRef<Update> updates) {
  return adapted_operand(operand, updates, /*drop_columns=*/true, [](const Update&) { return true; });
}

/// The rows [first, first + count) of a term act on the outputs [at, at + count).
struct TermRows {
  int64_t first, at, count;

  at::Tensor of(const at::Tensor& tensor) const {
    return !tensor.defined() || count == tensor.size(0) ? tensor : tensor.narrow(0, first, count);
  }
};

/// The outputs of the weight that are those of the operand. A lookup, which has entries for rows, has them all.
inline TermRows outputs_of(const Update& update) {
  const auto& shape = update.base->shape();
  return shape.is_lookup ? TermRows{0, update.at, shape.out}
                         : TermRows{update.part.first, update.at, update.part.count};
}

/// Calls `visit(term, rows)` for an update. The parts of a fused weight have a term each, which acts on its own outputs
/// as far as these are among those of the operand.
template <class Visit>
void for_each_term(const Update& update, const Term& term, const Visit& visit) {
  if (update.base->shape().batch.empty()) return visit(term, outputs_of(update));
  const auto& view = update.base->view();
  int64_t part = 0, row = 0;
  for (size_t i = 0; i < view.part_rows().size(); row += view.part_rows()[i++]) {
    if (!view.chosen_parts()[i]) continue;
    const auto first = std::max(row, update.part.first);
    const auto last = std::min(row + view.part_rows()[i], update.part.first + update.part.count);
    const auto number = part++;
    if (first >= last) continue;
    const auto of_part = [&](const at::Tensor& batch) { return batch.defined() ? batch[number] : batch; };
    visit(Term{of_part(term.A), of_part(term.B), term.scale, of_part(term.gain), of_part(term.input_gain)},
          TermRows{first - row, update.at + first - update.part.first, last - first});
  }
}

using Terms = c10::SmallVector<Term, 2>;

/// The updates as slices of one node, where each is a plain term on rows of a linear product, all in one type, or those
/// of the adapters in float and the rest in half precision; empty where that is not so. What a frozen A needs is
/// little, so there the products are taken apart.
class FusedProduct {
 public:
  FusedProduct(const Product& product, c10::ArrayRef<Update> updates, const Terms& terms)
      : product_(product), followers_(updates.size() == 1 ? updates.front().followers : nullptr) {
    const bool multiplies = product.form == Product::Form::kRows || product.form == Product::Form::kColumns;
    if (!multiplies || !is_plain(product.x) || !is_plain(product.operand)) return;
    if (!at::isFloatingType(product.x.scalar_type())) return;
    if (product.operand.dim() != 2 || product.operand.requires_grad() || product.x.dim() == 0) return;
    if (product.bias.defined() && (product.bias.dim() != 1 || !is_alike(product.bias))) return;
    if (!is_alike(product.operand) || at::autocast::is_autocast_enabled(product.x.device().type())) return;
    if (torch::jit::tracer::isTracing()) return;
    if (updates.size() == 1 && can_scale(updates.front(), terms.front())) gain_ = terms.front().gain;
    for (size_t i = 0; i < updates.size(); ++i) {
      if (!can_add(updates[i], terms[i])) return;
    }
    for (size_t i = 0; i < updates.size(); ++i) {
      if (!updates[i].rows) {
        add(updates[i], terms[i], Entries());
      } else {
        add_pieces(updates[i], terms[i]);
      }
    }
  }

  bool is_possible() const { return !slices_.empty(); }

  at::Tensor result() {
    const auto& x = product_.x;
    const auto shared = shared_input();
    const auto y = LowRankLinear::compute(product_, shared ? shared->x() : matrix(), slices_, gain_);
    if (x.dim() == 2) return y;
    at::DimVector sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = y.size(1);
    return y.view(sizes);
  }

 private:
  /// x as (N, in).
  at::Tensor matrix() const {
    const auto& x = product_.x;
    if (x.dim() == 2) return x;
    const auto rows = c10::multiply_integers(x.sizes().begin(), x.sizes().end() - 1);  // also where there is no input
    return x.reshape({rows, x.size(-1)});
  }

  /// What the slices have in common with each other, or with other products; then they have their S from it.
  std::shared_ptr<const SharedInput> shared_input() {
    if (slices_.size() == 1 && !followers_) return nullptr;
    if (!SharedInput::is_worth_it(product_.x)) {
      end_product_run();
      return nullptr;
    }
    std::vector<at::Tensor> factors;
    for (const auto& slice : slices_) {
      if (slice.mask.acts() || !slice.rows.are_all() || slice.A.is_inference()) return nullptr;
      if (!slice.A.is_leaf()) return nullptr;  // it is another one each time, and its graph is not to be held
      factors.push_back(slice.A);
    }
    const auto as_matrix = [&] { return matrix(); };
    auto shared = slices_.size() == 1
                      ? ProductRun::of_thread().next(product_.x, factors.front(), *followers_, as_matrix)
                      : SharedInput::make(matrix(), factors);
    if (!shared) return nullptr;
    std::vector<at::Tensor> projected;
    for (const auto& factor : factors) projected.push_back(shared->projected(factor));
    const auto is_defined = [](const at::Tensor& S) { return S.defined(); };
    if (!std::all_of(projected.begin(), projected.end(), is_defined)) return nullptr;
    for (size_t i = 0; i < slices_.size(); ++i) slices_[i].S = projected[i];
    return shared;
  }

  bool can_add(const Update& update, const Term& term) const {
    if (Dropout(update).acts() && !DropoutMask::is_for(product_.x)) return false;
    if (!update.method->has_term() || update.base->shape().is_lookup) return false;
    if (term.scales_weight() && !gain_.defined()) return false;
    if (!fits(term.A) || !fits(term.B) || term.A.scalar_type() != term.B.scalar_type()) return false;
    return !at::GradMode::is_enabled() || term.A.requires_grad() || !product_.x.requires_grad();
  }

  /// Whether the one update may scale the product: all of it, of which x is not dropped.
  bool can_scale(const Update& update, const Term& term) const {
    const bool is_low_rank = term.A.defined() && term.gain.defined() && !term.input_gain.defined();
    if (!is_low_rank || update.rows || update.weight != 1 || Dropout(update).acts()) return false;
    const auto outputs = product_.form == Product::Form::kRows ? product_.operand.size(0) : product_.operand.size(1);
    return update.base->shape().batch.empty() && outputs_of(update).count == outputs && update.at == 0 &&
           outputs == update.base->shape().out && is_alike(term.gain);
  }

  /// Pieces of a batch, each with a mask of its own.
  void add_pieces(const Update& update, const Term& term) {
    const auto& x = product_.x;
    const auto leading = x.dim() - 1;
    const auto layout = update.rows.layout(x.sizes(), leading).joined(x.sizes(), leading);
    update.rows.batch->for_each_piece(update.rows.group, layout, x.device(),
                                      [&](const Entries& entries) { add(update, term, entries); });
  }

  void add(const Update& update, const Term& term, const Entries& entries) {
    const auto mask = Dropout(update).mask();
    for_each_term(update, term, [&](const Term& own, const TermRows& rows) {
      slices_.push_back({own.A, rows.of(own.B), own.scale * update.weight * mask.scale(), rows.at, mask, entries});
    });
  }

  /// Whether a factor of an update is of the type of x, or in float where x is in half precision and nothing is scaled.
  bool fits(const at::Tensor& factor) const {
    const auto type = product_.x.scalar_type();
    const bool may_be_wider = at::isReducedFloatingType(type) && !gain_.defined();
    return is_alike(factor) || (may_be_wider && is_alike_in(factor, at::kFloat));
  }

  bool is_alike(const at::Tensor& tensor) const { return is_alike_in(tensor, product_.x.scalar_type()); }

  bool is_alike_in(const at::Tensor& tensor, at::ScalarType type) const {
    return tensor.scalar_type() == type && tensor.device() == product_.x.device() && is_plain(tensor);
  }

  const Product& product_;
  Followers* followers_;
  LowRankLinear::Slices slices_;
  at::Tensor gain_;
};

/// Adds up a product and the updates that act on it, in the type of the adapters.
class ProductSum {
 public:
  ProductSum(const Product& product, c10::ArrayRef<Update> updates, const Terms& terms)
      : product_(product), single_(updates.size() == 1) {
    // A gain scales x W^T alone, so then the bias comes last.
    const bool scales = std::any_of(terms.begin(), terms.end(), [](const Term& term) { return term.scales_weight(); });
    if (scales) late_bias_ = product.bias;
    for (size_t i = 0; i < updates.size(); ++i) add(updates[i], terms[i]);
  }

  at::Tensor result() {
    if (!y_.defined()) return product_.frozen();
    if (late_bias_.defined()) y_ = y_ + late_bias_;
    return in_type(y_, type_);
  }

 private:
  void add(const Update& update, const Term& term) {
    if (update.method->has_term()) {
      const auto x = Dropout(update).of_input(x_in(term.dtype()));
      return for_each_term(update, term, [&](const Term& own, const TermRows& rows) { add(update, own, rows, x); });
    }
    if (update.method->has_forward() && is_product_of(update)) return add_forward(update);
    const auto rows = outputs_of(update);
    const auto matrix = rows.of(update.method->delta(*update.base));
    const auto added = product_.times(Dropout(update).of_input(x_in(matrix.scalar_type())), matrix) * update.weight;
    y_ = on_rows(start(), rows, [&](const at::Tensor& y) { return y + added; });
  }

  /// The update of a method that computes the whole product by itself.
  void add_forward(const Update& update) {
    const Dropout dropout(update);
    auto product = product_;
    product.x = dropout.of_input(product_.x);
    const auto adapted = update.method->forward(product);
    if (single_ && update.weight == 1 && !dropout.acts()) {
      y_ = adapted;
      type_ = adapted.scalar_type();
    } else {
      y_ = start() + (adapted - product.frozen()) * update.weight;
    }
  }

  /// x W^T, with the bias unless that comes last.
  const at::Tensor& frozen() {
    if (!frozen_.defined()) {
      frozen_ = late_bias_.defined() ? product_.without_bias(product_.x, product_.operand) : product_.frozen();
      type_ = frozen_.scalar_type();
    }
    return frozen_;
  }

  at::Tensor start() { return y_.defined() ? y_ : frozen(); }

  /// Whether the operand is all of the update's weight, and nothing else.
  bool is_product_of(const Update& update) const {
    return product_.operand.numel() == update.base->weight().numel() &&
           outputs_of(update).count == update.base->shape().out;
  }

  /// `x` is that of the adapter, dropped.
  void add(const Update& update, Term term, const TermRows& rows, const at::Tensor& x) {
    term.B = rows.of(term.B);
    term.gain = rows.of(term.gain);
    if (!term.scales_weight()) {
      term.scale *= update.weight;
      const auto projected = project(term, x);
      y_ = on_rows(start(), rows, [&](const at::Tensor& y) { return add_low_rank(y, projected, term); });
    } else {
      add_scaled(update, term, rows, x);
    }
  }

  /// y += gain * (z W^T + s z A^T B^T) - x W^T, where z is x, dropped and scaled.
  void add_scaled(const Update& update, const Term& term, const TermRows& rows, at::Tensor x) {
    const bool same_product = !Dropout(update).acts();
    const auto plain = same_product ? frozen() : again(x);
    if (term.input_gain.defined()) x = x * term.input_gain;
    const auto scaled = term.input_gain.defined() ? again(x) : plain;
    const auto projected = term.A.defined() ? project(term, x) : at::Tensor();
    const auto changed = [&](const at::Tensor& rows_of_product) {
      const auto moved = term.A.defined() ? add_low_rank(rows_of_product, projected, term) : rows_of_product;
      return term.gain.defined() ? term.gain * moved : moved;
    };
    if (same_product && !y_.defined() && update.weight == 1) {
      y_ = term.input_gain.defined() ? on_rows_of(plain, scaled, rows, changed) : on_rows(plain, rows, changed);
      return;
    }
    const auto difference = [&](const at::Tensor& of_scaled, const at::Tensor& of_plain) {
      return (changed(of_scaled) - of_plain) * update.weight;
    };
    const auto update_rows = difference(of_rows(scaled, rows), of_rows(plain, rows));
    y_ = on_rows(start(), rows, [&](const at::Tensor& y) { return y + update_rows; });
  }

  /// x W^T once more, for an x of the adapter's type.
  at::Tensor again(const at::Tensor& x) const {
    const bool is_product = product_.form != Product::Form::kOther;  // whose bits multiply in the type of x
    const auto operand = is_product ? product_.operand : dequantized(product_.operand);
    return product_.without_bias(x, is_quantized(operand) ? operand : in_type(operand, x.scalar_type()));
  }

  /// x in the adapter's type; numbers of columns stay as they are.
  at::Tensor x_in(at::ScalarType type) const {
    return at::isFloatingType(product_.x.scalar_type()) ? in_type(product_.x, type) : product_.x;
  }

  at::Tensor project(const Term& term, const at::Tensor& x) const { return product_.times(x, term.A); }

  /// y (..., count) + scale p B^T for p (..., rank), in the type of p; the scale costs no pass of its own.
  static at::Tensor add_low_rank(const at::Tensor& y, const at::Tensor& p, const Term& term) {
    const auto type = p.scalar_type();
    if (y.dim() == 2) return at::addmm(in_type(y, type), p, term.B.t(), /*beta=*/1, term.scale);
    const auto flat = [&](const at::Tensor& t) { return in_type(t.reshape({-1, t.size(-1)}), type); };
    return at::addmm(flat(y), flat(p), term.B.t(), 1, term.scale).view_as(y);
  }

  /// The outputs of `rows`.
  static at::Tensor of_rows(const at::Tensor& y, const TermRows& rows) {
    return rows.count == y.size(-1) ? y : y.narrow(-1, rows.at, rows.count);
  }

  /// y with `change` applied to the outputs of `rows`.
  template <class Change>
  static at::Tensor on_rows(const at::Tensor& y, const TermRows& rows, const Change& change) {
    return on_rows_of(y, y, rows, change);
  }

  /// y with `change(other)` in the outputs of `rows`.
  template <class Change>
  static at::Tensor on_rows_of(const at::Tensor& y, const at::Tensor& other, const TermRows& rows,
                               const Change& change) {
    const auto outputs = y.size(-1), end = rows.at + rows.count;
    const auto changed = change(of_rows(other, rows));
    if (rows.count == outputs) return changed;
    const auto whole = in_type(y, changed.scalar_type());
    return at::cat({whole.narrow(-1, 0, rows.at), changed, whole.narrow(-1, end, outputs - end)}, -1);
  }

  const Product& product_;
  const bool single_;
  at::Tensor late_bias_, frozen_, y_;
  at::ScalarType type_ = at::kFloat;
};

/// Whether an update can be added to what the operator computes.
inline bool can_add(const Product& product, const Update& update) {
  const auto& shape = update.base->shape();
  const bool is_known = update.part.kind != Part::Kind::kOther && shape.out > 0 &&
                        (!shape.is_lookup || update.part.count == update.base->weight().size(0));
  const bool matrix = shape.batch.empty() || (!update.base->view().part_rows().empty() && update.method->has_term());
  if (!product.adds || !is_known || !matrix || update.method->replaces()) return false;
  // x times the weight is no product with the one that a gain scales, where something is merged into that.
  if (!update.base->is_merged()) return true;
  return update.method->has_term() && !update.method->term(*update.base).scales_weight();
}

/// The first update that acts on some rows of a batch only; null where each acts on all of them.
inline const Update* with_rows(c10::ArrayRef<Update> updates) {
  const auto found = std::find_if(updates.begin(), updates.end(), [](const Update& u) { return bool(u.rows); });
  return found == updates.end() ? nullptr : &*found;
}

/// Those of the updates that act on the rows of a group, as updates of all rows.
inline Updates of_group(c10::ArrayRef<Update> updates, size_t group) {
  Updates own;
  for (const auto& update : updates) {
    if (update.rows && update.rows.group != group) continue;
    own.push_back(update);
    own.back().rows = {};
  }
  return own;
}

/// The terms of these.
inline Terms of_group(const Terms& terms, c10::ArrayRef<Update> updates, size_t group) {
  Terms own;
  for (size_t i = 0; i < updates.size(); ++i) {
    if (!updates[i].rows || updates[i].rows.group == group) own.push_back(terms[i]);
  }
  return own;
}

/// op(x) where each group of rows is computed apart, as `compute(x, group)`; for an operator whose rows are independent
/// of each other, and in the same dimension of x and of the result. `update` has the rows.
template <class Compute>
at::Tensor by_groups(const at::Tensor& x, const Update& update, const Compute& compute) {
  const auto leading = update.base->shape().is_lookup ? x.dim() : x.dim() - 1;
  const auto layout = update.rows.layout(x.sizes(), leading);
  const auto& batch = *update.rows.batch;
  if (batch.groups() == 1) return compute(x, 0);
  std::vector<at::Tensor> parts;
  for (size_t group = 0; group < batch.groups(); ++group)
    parts.push_back(compute(x.index_select(layout.dim, batch.index(group, layout, x.device())), group));
  return at::cat(parts, layout.dim).index_select(layout.dim, batch.inverse(layout, x.device()));
}

/// Throws where the updates are on rows of several batches, which would have to be divided by each of them.
inline void check_one_batch(c10::ArrayRef<Update> updates, const Update& first) {
  for (const auto& update : updates) {
    TORCH_CHECK(!update.rows || update.rows.batch == first.rows.batch,
                "lora: two scopes have adapters for the rows of ", "\"", *first.rows.layer,
                "\", which can be added up only where all are plain low-rank updates in the ", "type of the layer");
  }
}

}  // namespace detail

LORA_INLINE at::Tensor adapted_product(const Product& product, c10::ArrayRef<Update> updates) {
  using detail::Dropout;
  const auto* in_rows = detail::with_rows(updates);
  const auto adds = [&](const Update& update) { return detail::can_add(product, update); };
  const auto apart = [&](const auto& compute) {  // each group of rows
    detail::check_one_batch(updates, *in_rows);
    return detail::by_groups(product.x, *in_rows, [&](const at::Tensor& x, size_t group) {
      auto own = product;
      own.x = x;
      return compute(own, detail::of_group(updates, group), group);
    });
  };
  if (std::all_of(updates.begin(), updates.end(), adds)) {
    detail::Terms terms;
    for (const auto& update : updates)
      terms.push_back(update.method->has_term() ? update.method->term(*update.base) : Term());
    const auto add_up = [](const Product& own, c10::ArrayRef<Update> acting, const detail::Terms& of_these) {
      detail::FusedProduct fused(own, acting, of_these);
      return fused.is_possible() ? fused.result() : detail::ProductSum(own, acting, of_these).result();
    };
    if (in_rows == nullptr) return add_up(product, updates, terms);
    detail::FusedProduct fused(product, updates, terms);
    if (fused.is_possible()) return fused.result();
    return apart([&](const Product& own, const Updates& acting, size_t group) {
      return add_up(own, acting, detail::of_group(terms, updates, group));
    });
  }
  if (in_rows != nullptr)
    return apart([](const Product& own, const Updates& acting, size_t) { return adapted_product(own, acting); });

  // The numbers of columns cannot be dropped.
  const bool is_lookup = !at::isFloatingType(product.x.scalar_type());
  const auto drops = [&](const Update& update) { return Dropout(update).acts() && !is_lookup; };
  auto y = product.run(product.x,
                       detail::adapted_operand(product.operand, updates, /*drop_columns=*/is_lookup,
                                               [&](const Update& update) { return !drops(update); }),
                       product.bias);
  for (const auto& update : updates) {
    if (!drops(update)) continue;
    const auto delta = detail::same_part(detail::layout_delta(update, /*drop_columns=*/false), update.base->weight(),
                                         product.operand, update.part);
    y = y + product.without_bias(Dropout(update).of_input(product.x), delta.to(y.scalar_type()));
  }
  return y;
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
