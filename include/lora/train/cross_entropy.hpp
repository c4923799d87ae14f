#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Reduction.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/arg.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/enum.h>

#include <lora/intercept/in_scope.hpp>
#include <lora/intercept/scope.hpp>
#include <lora/train/checkpointing.hpp>
#include <lora/version.hpp>
#include <lora/weight/dense_product.hpp>
#include <lora/weight/frozen_product.hpp>
#include <lora/weight/key.hpp>
#include <lora/weight/optional.hpp>
#include <lora/weight/placeholder.hpp>
#include <lora/weight/plain.hpp>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// Options of `linear_cross_entropy`; the first three are those of LibTorch's cross entropy.
struct CrossEntropyOptions {
  using reduction_t = std::variant<torch::enumtype::kNone, torch::enumtype::kMean, torch::enumtype::kSum>;

  /// The target of a row that does not count. Default: -100.
  TORCH_ARG(int64_t, ignore_index) = -100;
  /// How much of a target is spread evenly over all classes; in [0, 1]. Default: 0.
  TORCH_ARG(double, label_smoothing) = 0;
  /// torch::kNone, kMean or kSum. Default: torch::kMean, over the rows that count.
  TORCH_ARG(reduction_t, reduction) = torch::kMean;
  /// (classes), added to the logits. Default: none.
  TORCH_ARG(at::Tensor, bias);
  /// How many rows of logits exist at a time, at most. Default: 0, as many as take 32 MB in float, but 64 at least.
  TORCH_ARG(int64_t, chunk_rows) = 0;
};

namespace detail {

/// What the cross entropy is of: rows that all count, and how it is summed up.
struct CrossEntropyRows {
  at::Tensor hidden;   ///< (rows, features)
  at::Tensor weight;   ///< (classes, features)
  at::Tensor bias;     ///< (classes), or undefined
  at::Tensor targets;  ///< (rows), each in [0, classes)
  double label_smoothing;
  bool sums;      ///< the result is one number, and else one for each row
  double scale;   ///< a factor for that number
  int64_t chunk;  ///< the most rows of logits at a time

  int64_t count() const { return hidden.size(0); }

  /// The rows of a chunk: all, or such a number that products are fast.
  int64_t chunk_size() const { return count() <= chunk ? count() : regular_rows(chunk); }

  /// Calls `visit(first, rows)` for one chunk after the other.
  template <class Visit>
  void for_each_chunk(const Visit& visit) const {
    const auto size = chunk_size();
    for (int64_t first = 0; first < count(); first += size) visit(first, std::min(size, count() - first));
  }
};

/// The cross entropy of rows, with their gradients computed beside it. For a row with the logits z = W h + b and the
/// target t, and the smoothing e:
///
///   loss = log sum exp z - (1 - e) z_t - e mean(z),   dloss/dz = softmax(z) - (1 - e) onehot(t) - e / classes
///
/// The logits of a chunk become their exponents and these dloss/dz times sum exp z, each in place; that factor is taken
/// back where the numbers are fewer, on the rows of hidden and of its gradient.
class LinearCrossEntropy : public torch::autograd::Function<LinearCrossEntropy> {
  using Tensors = torch::autograd::variable_list;

 public:
  static at::Tensor compute(const CrossEntropyRows& rows) {
    const bool needs_any = needs_gradient(rows.hidden) || needs_gradient(rows.weight) || needs_gradient(rows.bias);
    if (!needs_any || !at::GradMode::is_enabled()) return Pass(rows, /*learns=*/false).result();
    return apply(rows.hidden, rows.weight, optional(rows.bias), rows);
  }

  /// Whether it can be computed so: no adapter acts on the operands, which have their numbers, or in a scope those of
  /// the weight in few bits, and what comes in backward can be multiplied with gradients that are there already.
  static bool is_for(const CrossEntropyRows& rows) {
    for (const auto* operand : {&rows.hidden, &rows.weight, &rows.bias}) {
      if (!operand->defined()) continue;
      if (!is_plain(*operand) || is_in_scope(*operand)) return false;
      const bool is_here = operand == &rows.weight && ActiveScopes::current() != nullptr;
      if (is_quantized(*operand) && (!is_here || torch::jit::tracer::isTracing())) return false;
    }
    const bool head_learns = needs_gradient(rows.weight) || needs_gradient(rows.bias);
    return rows.sums || !head_learns || !at::GradMode::is_enabled();
  }

  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& /*hidden*/,
                            const at::Tensor& /*weight*/, const std::optional<at::Tensor>& /*bias*/,
                            const CrossEntropyRows& rows) {
    Pass pass(rows, /*learns=*/true);
    auto loss = pass.result();
    context->save_for_backward(pass.gradients());
    return loss;
  }

  static Tensors backward(torch::autograd::AutogradContext* context, Tensors arriving) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "lora::linear_cross_entropy: its gradient is computed ",
                                "with the loss and has no derivative of its own; where a second one is needed (",
                                "create_graph), take at::linear and at::cross_entropy_loss");
    const BelowInterception below;
    const bool is_last = !torch::autograd::get_current_graph_task_keep_graph();
    auto gradients = context->get_saved_variables();
    const auto& factor = arriving[0];
    for (auto& gradient : gradients) {
      if (!gradient.defined()) continue;
      const auto by = factor.dim() == 0 ? factor : factor.unsqueeze(-1).to(gradient.scalar_type());
      gradient = is_last ? gradient.mul_(by) : gradient.mul(by);
    }
    gradients.emplace_back();  // of what is no tensor
    return gradients;
  }

 private:
  static bool needs_gradient(const at::Tensor& tensor) {
    return tensor.defined() && tensor.requires_grad() && !is_quantized(tensor);
  }

  /// One pass over the rows.
  class Pass {
   public:
    Pass(const CrossEntropyRows& rows, bool learns)
        : rows_(rows),
          learns_(learns),
          type_(rows.hidden.scalar_type()),
          wide_(type_ == at::kDouble ? at::kDouble : at::kFloat) {
      const BelowInterception below;
      c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      at::NoGradGuard no_grad;
      const auto& h = rows.hidden;
      if (learns && needs_gradient(h)) d_hidden_ = at::empty(h.sizes(), h.options());
      if (learns && needs_gradient(rows.weight)) d_weight_ = at::zeros(rows.weight.sizes(), h.options().dtype(wide_));
      if (learns && needs_gradient(rows.bias)) d_bias_ = at::zeros(rows.bias.sizes(), h.options().dtype(wide_));
      losses_ = at::empty({rows.count()}, h.options().dtype(wide_));
      rows.for_each_chunk([&](int64_t first, int64_t count) { add(first, count); });
      result_ = rows.sums ? losses_.sum().mul_(rows.scale) : losses_;
    }

    const at::Tensor& result() const { return result_; }
    /// Those of hidden, weight and bias; undefined where nobody learns.
    Tensors gradients() const {
      const auto typed = [&](const at::Tensor& tensor) { return tensor.defined() ? tensor.to(type_) : tensor; };
      return {d_hidden_, typed(d_weight_), typed(d_bias_)};
    }

   private:
    void add(int64_t first, int64_t count) {
      const auto hidden = rows_.hidden.narrow(0, first, count);  // (rows, features)
      const auto z = logits(hidden);                             // (rows, classes)
      const auto totals = at::empty({count, 1}, z.options());
      const auto tile = rows_at_once(z);
      for (int64_t row = 0; row < count; row += tile) {
        const auto some = [&, row, size = std::min(tile, count - row)](const at::Tensor& tensor, int64_t from = 0) {
          return tensor.narrow(0, from + row, size);
        };
        add_losses(some(z), some(rows_.targets, first).unsqueeze(-1), some(losses_, first), some(totals));
      }
      if (learns_) add_gradients(first, hidden, z, totals.reciprocal_().mul_(rows_.sums ? rows_.scale : 1));
    }

    /// On a CPU the passes over logits are faster over some rows after the other, which a cache holds.
    static int64_t rows_at_once(const at::Tensor& z) {
      constexpr int64_t kNumbers = 1 << 18;
      return z.is_cpu() ? std::max<int64_t>(1, kNumbers / std::max<int64_t>(z.size(1), 1)) : z.size(0);
    }

    /// Turns logits into dloss/dz, but for a factor of each row: `total`, the sum of exp z over that of the highest.
    void add_losses(at::Tensor z, const at::Tensor& targets, const at::Tensor& losses, const at::Tensor& total) const {
      const auto kept = 1 - rows_.label_smoothing;
      const auto spread = rows_.label_smoothing / static_cast<double>(z.size(-1));
      auto loss = z.gather(-1, targets).mul_(-kept);  // (rows, 1)
      if (spread > 0) loss.sub_(z.sum(-1, true), spread);
      const auto highest = z.amax(-1, true);
      total.copy_(z.sub_(highest).exp_().sum(-1, true));
      losses.copy_(loss.add_(highest).add_(total.log()).squeeze(-1));
      if (!learns_) return;
      z.scatter_add_(-1, targets, total * -kept);
      if (spread > 0) z.sub_(total * spread);
    }

    /// In the type in which it is summed up; of one chunk at a time.
    at::Tensor logits(const at::Tensor& hidden) {
      const auto matrix = rows_.weight.t();
      if (is_quantized(matrix)) {
        logits_.reset();  // so that those of one chunk are there
        logits_ = quantized_mm_value(hidden, matrix, rows_.bias);
        return logits_.to(wide_);
      }
      if (is_for_onednn(hidden, matrix, rows_.bias, /*inputs=*/0)) return onednn_mm(hidden, matrix, rows_.bias);
      if (!logits_.defined()) logits_ = at::empty({rows_.chunk_size(), matrix.size(1)}, hidden.options());
      auto z = logits_.narrow(0, 0, hidden.size(0));
      if (rows_.bias.defined()) {
        at::addmm_out(z, rows_.bias, hidden, matrix);
      } else {
        at::mm_out(z, hidden, matrix);
      }
      return z.to(wide_);
    }

    /// `dz` is dloss/dz but for a factor of each row.
    void add_gradients(int64_t first, const at::Tensor& hidden, const at::Tensor& dz, const at::Tensor& factor) {
      if (d_bias_.defined()) d_bias_.addmv_(dz.t(), factor.squeeze(-1));
      const bool is_half = type_ != wide_;
      const auto left = is_half ? in_half(dz, factor) : dz;
      if (d_hidden_.defined()) {
        const auto gradient = matrix_product(left, rows_.weight);
        auto own = d_hidden_.narrow(0, first, hidden.size(0));
        at::mul_out(own, gradient, is_half ? at::scalar_tensor(factor_of_half(), gradient.options()) : factor);
      }
      if (!d_weight_.defined()) return;
      if (is_half) {
        d_weight_.add_(left.t().mm(hidden), factor_of_half());
      } else {
        d_weight_.addmm_(left.t(), hidden * factor);
      }
    }

    /// In half precision what is multiplied has to lie around 1, so the scale comes last.
    at::Tensor in_half(const at::Tensor& dz, const at::Tensor& factor) {
      auto half = logits_.narrow(0, 0, dz.size(0));
      at::mul_out(half, dz, factor / factor_of_half());
      return half;
    }
    double factor_of_half() const { return rows_.sums ? rows_.scale : 1; }

    const CrossEntropyRows& rows_;
    const bool learns_;
    const at::ScalarType type_, wide_;
    at::Tensor logits_, losses_, result_;
    at::Tensor d_hidden_, d_weight_, d_bias_;
  };
};

/// The same by LibTorch's operators, chunk by chunk, each of which is computed again in backward.
inline at::Tensor checkpointed_cross_entropy(const CrossEntropyRows& rows) {
  std::vector<at::Tensor> losses;
  rows.for_each_chunk([&](int64_t first, int64_t count) {
    const auto targets = rows.targets.narrow(0, first, count);
    const auto run = [weight = rows.weight, bias = optional(rows.bias), targets, smoothing = rows.label_smoothing,
                      reduction = rows.sums ? at::Reduction::Sum : at::Reduction::None](const at::Tensor& hidden) {
      auto z = at::linear(hidden, weight, bias);
      if (z.scalar_type() != at::kDouble) z = z.to(at::kFloat);
      return at::cross_entropy_loss(z, targets, {}, reduction, /*ignore_index=*/-100, smoothing);
    };
    const auto loss = checkpoint(run, rows.hidden.narrow(0, first, count));
    losses.push_back(rows.sums ? loss.unsqueeze(0) : loss);
  });
  if (losses.empty())
    losses.push_back(rows.hidden.sum(-1).to(at::promote_types(rows.hidden.scalar_type(), at::kFloat)));
  const auto all = at::cat(losses);
  return rows.sums ? all.sum() * rows.scale : all;
}

/// Throws where shapes, types, devices or options do not fit.
inline void check_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                                const CrossEntropyOptions& options) {
  constexpr const char* who = "lora::linear_cross_entropy: ";
  TORCH_CHECK(hidden.dim() >= 1 && weight.dim() == 2 && hidden.size(-1) == weight.size(1), who, "hidden ",
              hidden.sizes(), " and weight ", weight.sizes(), " do not fit; they have to be (..., features) and ",
              "(classes, features)");
  TORCH_CHECK(targets.sizes() == hidden.sizes().slice(0, static_cast<size_t>(hidden.dim()) - 1), who, "targets ",
              targets.sizes(), " do not fit hidden ", hidden.sizes(), "; each row has one");
  TORCH_CHECK_TYPE(at::isIntegralType(targets.scalar_type(), /*includeBool=*/false), who, "targets have to be ",
                   "numbers of classes (torch::kLong), but are ", targets.scalar_type());
  TORCH_CHECK_TYPE(at::isFloatingType(hidden.scalar_type()) && at::isFloatingType(weight.scalar_type()), who,
                   "hidden and weight have to be of a floating type, but are ", hidden.scalar_type(), " and ",
                   weight.scalar_type());
  const auto& bias = options.bias();
  TORCH_CHECK(!bias.defined() || (bias.dim() == 1 && bias.size(0) == weight.size(0)), who, "the bias ",
              bias.defined() ? bias.sizes() : at::IntArrayRef(), " does not fit the weight ", weight.sizes(),
              "; it has to be (classes)");
  for (const auto* tensor : {&weight, &targets, &bias}) {
    TORCH_CHECK(!tensor->defined() || tensor->device() == hidden.device(), who,
                "all tensors have to be on one device, ", "but hidden is on ", hidden.device(), " and another one on ",
                tensor->device());
  }
  const bool casts = at::autocast::is_autocast_enabled(hidden.device().type());
  TORCH_CHECK_TYPE(casts || (hidden.scalar_type() == weight.scalar_type() &&
                             (!bias.defined() || bias.scalar_type() == weight.scalar_type())),
                   who, "hidden, weight and bias have to be of one type, but hidden is ", hidden.scalar_type(),
                   " and the weight ", weight.scalar_type(), "; cast one of them, or use autocast");
  TORCH_CHECK_VALUE(options.label_smoothing() >= 0 && options.label_smoothing() <= 1, who,
                    "label_smoothing has to be in [0, 1], but got ", options.label_smoothing());
  TORCH_CHECK_VALUE(options.chunk_rows() >= 0, who, "chunk_rows has to be at least 1, or 0 for the default, but got ",
                    options.chunk_rows());
}

/// Throws when a target is no class.
inline void check_targets(const at::Tensor& targets, const at::Tensor& counts, int64_t classes) {
  const auto wrong = (targets.lt(0) | targets.ge(classes)) & counts;
  if (!wrong.any().item<bool>()) return;
  const auto row = wrong.nonzero()[0].item<int64_t>();
  TORCH_CHECK_INDEX(false, "lora::linear_cross_entropy: target ", row, " is ", targets[row].item<int64_t>(), ", but ",
                    "there are ", classes, " classes, the rows of the weight; a row that is not to count has the ",
                    "target ignore_index");
}

inline int64_t chunk_rows(const CrossEntropyOptions& options, int64_t classes) {
  if (options.chunk_rows() > 0) return options.chunk_rows();
  constexpr int64_t kNumbers = 8 << 20, kLeast = 64;  // with fewer rows it is reading the weight that takes the time
  return std::max(kLeast, kNumbers / std::max<int64_t>(classes, 1));
}

}  // namespace detail

/// The cross entropy of a linear head, of whose logits only some rows exist at a time:
///
///   cross_entropy(hidden weight^T + bias, targets)
///
/// Shapes: hidden (..., features); weight (classes, features); targets (...), numbers of classes -> a number, or with
/// torch::kNone (...). In float and double it is F::cross_entropy, in half precision the softmax is computed in float
/// and the loss is float. Rows that do not count cost nothing.
///
/// Where hidden, weight (tied or not) or bias require gradients, these are computed with the loss, while the logits of
/// a chunk are there, and are multiplied with what arrives in backward. Where that cannot be (adapters act on the head;
/// a head that learns, and torch::kNone), each chunk is a `checkpoint`, at the price of one more product.
///
/// Throws c10::Error when shapes, types or devices do not fit, c10::IndexError for a target that is no class,
/// c10::ValueError for an option out of its range, and in backward for a second derivative.
inline at::Tensor linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                                       const CrossEntropyOptions& options = {}) {
  detail::check_cross_entropy(hidden, weight, targets, options);
  const auto classes = weight.size(0), all = targets.numel();
  auto flat_targets = targets.reshape({all}).to(at::kLong);
  const auto counts = flat_targets.ne(options.ignore_index());
  detail::check_targets(flat_targets, counts, classes);
  const auto places = counts.nonzero().squeeze(-1);
  const auto count = places.size(0);

  auto rows = hidden.reshape({all, hidden.size(-1)});
  if (count < all) {
    rows = rows.index_select(0, places);
    flat_targets = flat_targets.index_select(0, places);
  }
  const auto device = hidden.device().type();
  const auto cast = [&](const at::Tensor& tensor) {
    if (!tensor.defined() || detail::is_quantized(tensor) || !at::autocast::is_autocast_enabled(device)) return tensor;
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
  };
  const bool sums = !std::holds_alternative<torch::enumtype::kNone>(options.reduction());
  const bool averages = std::holds_alternative<torch::enumtype::kMean>(options.reduction());
  detail::CrossEntropyRows of{rows,
                              weight,
                              options.bias(),
                              flat_targets,
                              options.label_smoothing(),
                              sums,
                              averages ? 1 / static_cast<double>(count) : 1,
                              detail::chunk_rows(options, classes)};
  at::Tensor loss;
  if (detail::LinearCrossEntropy::is_for(of)) {
    of.hidden = cast(rows);
    of.weight = cast(weight);
    of.bias = cast(options.bias());
    if (of.bias.defined() && detail::is_quantized(weight)) of.bias = of.bias.to(of.hidden.scalar_type());
    loss = detail::LinearCrossEntropy::compute(of);
  } else {
    loss = detail::checkpointed_cross_entropy(of);
  }
  if (sums) return loss;
  return (count < all ? at::zeros({all}, loss.options()).index_copy(0, places, loss) : loss).view(targets.sizes());
}

}  // namespace LORA_ABI
}  // namespace lora
