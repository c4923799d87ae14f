#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <lora/batch_rows.hpp>
#include <lora/dropout.hpp>
#include <lora/method/term.hpp>
#include <lora/shared_input.hpp>
#include <lora/system/node.hpp>
#include <lora/version.hpp>
#include <lora/weight/key.hpp>
#include <lora/weight/thin_product.hpp>

#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// A product with low-rank updates as one node of autograd, which owns the frozen product:
///
///   y = x M^T + b,   y[rows_i, at_i : at_i + n_i] += s_i (x_i A_i^T) B_i^T
///
/// Shapes: x (N, in); M (out, in); b (out) or undefined; A_i (rank_i, in); B_i (n_i, rank_i). All of one type, or A_i
/// and B_i in float and the rest in half precision: then products with A_i and B_i are those of floats, and each sum is
/// rounded once. M gets no gradient. x_i are the rows of x on which update i acts, zero where its dropout drops, for
/// which s_i makes up. With g = dL/dy, g_i the rows and columns of update i in it, S_i = A_i x_i^T, G_i = B_i^T g_i^T
/// and d_i the dropout once more:
///
///   dx = g M,  dx[rows_i] += s_i d_i(G_i^T A_i),   dA_i = s_i G_i x_i,   dB_i = s_i g_i^T S_i^T,   db = sum of g over
///   N
///
/// A gain (out) scales the product and its one update, y = gain * (x M^T + s (x A^T) B^T) + b. Then g in the above, but
/// for db, is g * gain, and dgain = sum over N of g * (x M^T + s (x A^T) B^T), which is kept.
///
/// Where S_i is given, since x is a shared input, it is an operand in the place of A_i: then dS_i = s_i G_i, x gets the
/// gradient g M alone, and that in the sum of all products with this input.
///
/// What is kept for backward is S_i (rank_i, N_i) beside the operands; of dropout, the seed. Updates are added in
/// place, and scales are folded into the products.
class LowRankLinear : public torch::autograd::Node {
  using Tensors = torch::autograd::variable_list;

 public:
  struct Slice {
    at::Tensor A, B;
    double scale;       ///< with that of its dropout
    int64_t at;         ///< the first output that it acts on
    DropoutMask mask;   ///< of its rows of x; one and the same for the parts of an update
    Entries rows;       ///< of x that it acts on
    at::Tensor S = {};  ///< given for a shared input, with all rows and without dropout

    bool is_projected() const { return S.defined(); }
    /// The operand by which it depends on x, or on A.
    const at::Tensor& factor() const { return is_projected() ? S : A; }
  };
  using Slices = std::vector<Slice>;

  LowRankLinear() = default;

  /// `gain` may be defined where there is one slice, of all rows and outputs and without dropout.
  static at::Tensor compute(const Product& product, const at::Tensor& x, Slices slices, const at::Tensor& gain = {}) {
    const auto needs_gradient = [](const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); };
    bool needs_any = needs_gradient(x) || needs_gradient(product.bias) || needs_gradient(gain);
    for (const auto& slice : slices) needs_any = needs_any || needs_gradient(slice.factor()) || needs_gradient(slice.B);
    if (!needs_any || !at::GradMode::is_enabled()) return add_all(product, x, slices, gain, /*results=*/nullptr);
    const auto node = make_node<LowRankLinear>();
    auto y = node->forward(product, x, std::move(slices), gain);
    torch::autograd::set_history(y, node);
    return y;
  }

  std::string name() const override { return "lora::LowRankLinear"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& tensor : kept_) tensor.reset_data();
  }

 protected:
  Tensors apply(Tensors&& gradients) override {
    Tensors all(num_outputs());
    if (!gradients[0].defined()) return all;
    const BelowInterception below;  // the frozen matrix is meant, also where the pass runs inside of a scope
    const auto kept = unpacked();
    const auto& x = kept[0];
    const auto matrix = is_transposed_ ? kept[1].t() : kept[1];
    auto g = gradients[0].contiguous();
    const bool is_differentiated = at::GradMode::is_enabled();
    std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
    if (!is_differentiated && is_plain(g)) below_autograd.emplace();

    const auto count = slices_.size();
    const auto first_result = 2 + 2 * count + (has_gain_ ? 1 : 0);
    const auto wants = [&](size_t edge) { return task_should_compute_output(edge); };
    auto& dx = all[0];
    const bool wants_x = wants(0);
    if (wants(1)) all[1] = g.sum(0);
    if (has_gain_) {
      if (wants(2 + 2 * count)) {
        const auto moved = is_differentiated ? moved_product(kept, matrix) : kept.back();
        const auto of_rows = g * moved;
        all[2 + 2 * count] = of_rows.size(0) == 1 ? of_rows[0] : of_rows.sum(0);
      }
      g = g * kept[2 + 2 * count];
    }
    const bool adds_to_shared = wants_x && is_shared_ && !is_differentiated && is_plain(g);
    if (wants_x && !(adds_to_shared && SharedInputNode::add(g, matrix))) dx = matrix_product(g, matrix);
    DroppedInput dropped(x);
    for (size_t i = 0; i < count; ++i) {
      const auto& [unused_A, unused_B, scale, at, mask, rows, unused_S] = slices_[i];
      const auto &A = kept[2 + 2 * i], &B = kept[3 + 2 * i];  // or S in the place of A
      const auto own = rows.of(columns(g, at, B.size(0)));
      auto &dA = all[2 + 2 * i], &dB = all[3 + 2 * i];
      if (is_differentiated) {
        const auto type = B.scalar_type();
        if (is_shared_) {
          const auto g_i = in_type(own, type);
          dA = g_i.mm(B).t() * scale;
          dB = g_i.t().mm(A.t()) * scale;
          continue;
        }
        const auto x_i = in_type(mask.acts() ? kept_of(rows.of(x), mask) : rows.of(x), type);
        const auto g_i = in_type(own, type);
        const auto G = g_i.mm(B) * scale;
        if (wants_x) dx = rows.plus(in_type(dx, type), mask.acts() ? kept_of(G.mm(A), mask) : G.mm(A));
        dA = G.t().mm(x_i);
        dB = g_i.t().mm(x_i.mm(A.t())) * scale;
        continue;
      }
      const auto B_t = B.t();
      const auto g_i = written_out_for(B_t, own);
      const auto G = thin_mm(B_t, g_i);
      if (is_shared_) dA = G * scale;
      if (wants_x && !is_shared_) add_to_input(dx, slices_[i], G, A, dropped);
      if (!is_shared_ && wants(2 + 2 * i)) dA = thin_mm_like(A, G, dropped.by(mask, rows), scale);
      if (wants(3 + 2 * i)) dB = thin_mm_like_t(B, kept[first_result + i], g_i, scale);
    }
    if (dx.defined()) dx = in_type(dx, x.scalar_type());
    return all;
  }

 private:
  /// y. Keeps what backward needs, and leads to x, the bias, the factors of each slice and the gain.
  at::Tensor forward(const Product& product, const at::Tensor& x, Slices slices, const at::Tensor& gain) {
    Tensors results;
    auto y = add_all(product, x, slices, gain, &results);
    is_transposed_ = product.form == Product::Form::kColumns;
    is_shared_ = slices.front().is_projected();  // of one input all are
    has_gain_ = gain.defined();
    torch::autograd::edge_list edges{edge_of(x), edge_of(product.bias)};
    edges.reserve(2 + 2 * slices.size() + 1);
    kept_.reserve(2 + 3 * slices.size() + 2);
    const auto keep = [&](const at::Tensor& tensor) { kept_.emplace_back(tensor, /*is_output=*/false); };
    keep(x);
    keep(product.operand);
    const auto lead_to = [&](const at::Tensor& tensor) {
      edges.push_back(edge_of(tensor));
      keep(tensor);
    };
    for (auto& slice : slices) {
      lead_to(slice.factor());
      lead_to(slice.B);
      slice.A = slice.B = slice.S = at::Tensor();  // from here on they are among what is kept
    }
    if (gain.defined()) lead_to(gain);
    for (const auto& result : results) keep(result);
    slices_ = std::move(slices);
    set_next_edges(std::move(edges));
    return y;
  }

  /// x, the frozen operand, for each slice A, or S in its place, and B; the gain; S_i; and what the gain scales.
  Tensors unpacked() {
    const std::lock_guard<std::mutex> lock(mutex_);
    Tensors kept;
    kept.reserve(kept_.size());
    for (const auto& tensor : kept_) kept.push_back(tensor.unpack());
    return kept;
  }

  /// x_i and where it is kept, computed once for the parts of an update.
  class DroppedInput {
   public:
    explicit DroppedInput(const at::Tensor& x) : x_(x) {}

    at::Tensor by(const DropoutMask& mask, const Entries& rows) {
      if (!mask.acts()) return rows.of(x_);
      take(mask);
      if (!dropped_.defined()) {
        const auto own = rows.of(x_);
        dropped_ = mask.of(own, /*factor=*/1, places(mask, own));
      }
      return dropped_;
    }

    /// Those of x_i, of whose size `like` is.
    const at::Tensor& places(const DropoutMask& mask, const at::Tensor& like) {
      take(mask);
      if (!places_.defined()) places_ = mask.places(like);
      return places_;
    }

   private:
    void take(const DropoutMask& mask) {
      if (mask == mask_) return;
      mask_ = mask;
      dropped_ = places_ = at::Tensor();
    }

    const at::Tensor& x_;
    DropoutMask mask_;
    at::Tensor dropped_, places_;
  };

  /// The outputs of a slice.
  static at::Tensor columns(const at::Tensor& y, int64_t at, int64_t count) {
    return y.size(1) == count ? y : y.narrow(1, at, count);
  }

  /// sum[rows] += scale a^T b
  static void add_product(at::Tensor& sum, const Entries& rows, const at::Tensor& a, const at::Tensor& b,
                          double scale) {
    rows.are_all() ? add_thin_mm(sum, a, b, scale) : add_to_part(sum, rows, a, b, scale);
  }

  /// The same in the memory of the sum, which may be a part of something larger.
  static void add_to_part(const at::Tensor& sum, const Entries& rows, const at::Tensor& a, const at::Tensor& b,
                          double scale) {
    if (a.scalar_type() != sum.scalar_type()) {
      auto own = rows.of(sum);
      add_thin_mm(own, a, b, scale);
      if (rows.are_listed()) sum.index_copy_(0, rows.index(), own);
    } else if (rows.are_listed()) {
      sum.index_add_(0, rows.index(), a.t().mm(b), scale);
    } else {
      add_thin_mm_(rows.of(sum), a, b, scale);
    }
  }

  /// dx[rows] += d(s G^T A)
  static void add_to_input(at::Tensor& dx, const Slice& slice, const at::Tensor& G, const at::Tensor& A,
                           DroppedInput& dropped) {
    const auto& [unused_A, unused_B, scale, at, mask, rows, unused_S] = slice;
    if (!mask.acts()) return add_product(dx, rows, G, A, scale);
    const auto added = at::mm(G.t(), A);
    const auto& places = dropped.places(mask, added);
    if (rows.are_all()) return mask.add(added, dx, scale, places);
    rows.add(dx, mask.of(added, scale, places));
  }

  /// x M^T + s (x A^T) B^T once more, for derivatives of derivatives.
  at::Tensor moved_product(const Tensors& kept, const at::Tensor& matrix) const {
    const auto &x = kept[0], &A = kept[2], &B = kept[3];
    const auto projected = is_shared_ ? A.t() : x.mm(A.t());
    return matrix_product(x, matrix.t()) + projected.mm(B.t()) * slices_.front().scale;
  }

  /// y; and in `results`, if that is given, every S_i, and what a gain scales.
  static at::Tensor add_all(const Product& product, const at::Tensor& x, const Slices& slices, const at::Tensor& gain,
                            Tensors* results) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;  // which would look at each of these calls
    auto y = product.run(x, product.operand, gain.defined() ? at::Tensor() : product.bias);
    DroppedInput dropped(x);
    for (const auto& slice : slices) {
      const auto S = slice.is_projected() ? slice.S : thin_mm(slice.A, dropped.by(slice.mask, slice.rows));
      if (y.size(1) == slice.B.size(0)) {
        add_product(y, slice.rows, S, slice.B.t(), slice.scale);
      } else {
        add_to_part(columns(y, slice.at, slice.B.size(0)), slice.rows, S, slice.B.t(), slice.scale);
      }
      if (results != nullptr) results->push_back(S);
    }
    if (!gain.defined()) return y;
    if (results != nullptr) results->push_back(y);
    return product.bias.defined() ? at::addcmul(product.bias, y, gain) : y * gain;
  }

  Slices slices_;  // without their tensors
  bool is_transposed_ = false, is_shared_ = false, has_gain_ = false;
  std::vector<torch::autograd::SavedVariable> kept_;
  std::mutex mutex_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
