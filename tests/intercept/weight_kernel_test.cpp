// What a program may do with an adapted weight, as one table: in a scope every use computes with W', with gradients for
// the adapter and for everything else in it; outside it is the base, bit by bit; and merged it is what the scope was.
#include "support/halves.hpp"
#include "support/models.hpp"

#include <lora/attach.hpp>

#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>

namespace {

using torch::Tensor;
using torch::indexing::Slice;
namespace nn = torch::nn;
namespace F = torch::nn::functional;

/// What a use may take: the parameters of the model, or others in their places, and tensors that are not adapted.
struct Operands {
  Tensor w;            // (4, 6), of a linear layer or a bare parameter
  Tensor b;            // (4), its bias
  Tensor table;        // (7, 4), of an embedding
  Tensor gain, shift;  // (4), of a layer norm
  Tensor v, mask;      // (4, 6)
  Tensor x, y;         // (3, 6), (3, 4)
  Tensor sequence;     // (2, 2, 5)
  Tensor ids;          // numbers below 4
  Tensor is_upper;     // (4, 6), true above the diagonal
};

/// What is known of a use beyond that it is right.
enum class Known {
  kRight,
  kOnce,        // LibTorch has no second derivative
  kNoGradient,  // no gradient passes through it, with or without a scope
  kOnlyInside,  // what computes once more in the backward pass does so in a scope, or else with the base
  kUnseen,      // what a function of somebody's own does without autograd has no gradient for the adapter
};

struct Row {
  const char* name;
  Tensor (*use)(const Operands& o);
  Known known = Known::kRight;
  double tolerance = 1e-12;
};

/// Saves a weight and computes with it in both passes.
struct SavedProduct : torch::autograd::Function<SavedProduct> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const Tensor& w) {
    context->save_for_backward({x, w});
    return x.mm(w.t());
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    return {gradients[0].mm(saved[1]), gradients[0].t().mm(saved[0])};
  }
};

/// Computes once more in the backward pass, as checkpointing does.
struct Recomputed : torch::autograd::Function<Recomputed> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const Tensor& w) {
    context->save_for_backward({x, w});
    torch::NoGradGuard no_grad;
    return (x.mm(w.t()) + w.sum()).tanh();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    torch::AutoGradMode with_grad(true);
    const auto saved = context->get_saved_variables();
    const auto x = saved[0].detach().requires_grad_();
    const auto y = (x.mm(saved[1].t()) + saved[1].sum()).tanh();
    torch::autograd::backward({y}, {gradients[0]}, /*retain_graph=*/true);
    return {x.grad(), Tensor()};
  }
};

Tensor windows(const Tensor& w) { return w.unfold(1, 3, 1); }

const std::vector<Row>& rows() {
  static const std::vector<Row> all{
      // number by number
      {"w * mask", [](const Operands& o) { return o.w * o.mask; }},
      {"mask * w", [](const Operands& o) { return o.mask * o.w; }},
      {"w + w", [](const Operands& o) { return o.w + o.w; }},
      {"w * w", [](const Operands& o) { return o.w * o.w; }},
      {"w - v", [](const Operands& o) { return o.w - o.v; }},
      {"1 - w", [](const Operands& o) { return 1 - o.w; }},
      {"-w", [](const Operands& o) { return -o.w; }},
      {"w / |w|", [](const Operands& o) { return o.w / o.w.norm(); }},
      {"w / |each row|", [](const Operands& o) { return F::normalize(o.w, F::NormalizeFuncOptions().dim(1)); }},
      {"pow", [](const Operands& o) { return o.w.pow(3); }},
      {"exp", [](const Operands& o) { return o.w.exp(); }},
      {"tanh", [](const Operands& o) { return o.w.tanh(); }},
      {"gelu", [](const Operands& o) { return torch::gelu(o.w); }},
      {"relu", [](const Operands& o) { return o.w.relu(); }},
      {"abs", [](const Operands& o) { return o.w.abs(); }},
      {"clamp", [](const Operands& o) { return o.w.clamp(-0.3, 0.4); }},
      {"softmax", [](const Operands& o) { return o.w.softmax(1); }},
      {"log_softmax", [](const Operands& o) { return o.w.log_softmax(0); }},
      {"where, w first", [](const Operands& o) { return torch::where(o.is_upper, o.w, o.v); }},
      {"where, w second", [](const Operands& o) { return torch::where(o.is_upper, o.v, o.w); }},
      {"masked_fill", [](const Operands& o) { return o.w.masked_fill(o.is_upper, 2.0); }},
      {"masked_select", [](const Operands& o) { return o.w.masked_select(o.is_upper); }},
      {"lerp", [](const Operands& o) { return torch::lerp(o.v, o.w, 0.3); }},
      {"addcmul", [](const Operands& o) { return torch::addcmul(o.v, o.w, o.w, 0.7); }},
      {"addcdiv", [](const Operands& o) { return torch::addcdiv(o.w, o.w, o.v.exp(), 0.7); }},
      {"maximum", [](const Operands& o) { return torch::maximum(o.w, o.v); }},
      {"atan2", [](const Operands& o) { return torch::atan2(o.w, o.v); }},
      {"w > v", [](const Operands& o) { return o.w > o.v; }},
      {"isclose", [](const Operands& o) { return torch::isclose(o.w, o.v, 1e-5, 0.5); }},
      {"sign", [](const Operands& o) { return o.w.sign(); }},
      {"dropout in evaluation mode", [](const Operands& o) { return torch::dropout(o.w, 0.5, false); }},
      {"fake quantization",
       [](const Operands& o) { return torch::fake_quantize_per_tensor_affine(o.w, 0.25, 0, -128, 127); }},
      // copies and casts
      {"clone", [](const Operands& o) { return o.w.clone(); }},
      {"clone, written to", [](const Operands& o) { return o.w.clone().mul_(2).add_(o.v); }},
      {"t, contiguous", [](const Operands& o) { return o.w.t().contiguous() * 2; }},
      {"float and back", [](const Operands& o) { return o.w.to(torch::kFloat).to(torch::kDouble); }, Known::kRight, 1e-6},
      {"bfloat16 and back", [](const Operands& o) { return o.w.to(torch::kBFloat16).to(torch::kDouble); },
       Known::kRight, 5e-2},
      {"cast in linear",
       [](const Operands& o) { return F::linear(o.x.to(torch::kFloat), o.w.to(torch::kFloat)); }, Known::kRight, 1e-5},
      {"its own type", [](const Operands& o) { return o.w.to(torch::kDouble) * 2; }},
      {"type_as", [](const Operands& o) { return o.w.type_as(o.ids.to(torch::kFloat)).to(torch::kDouble); },
       Known::kRight, 1e-6},
      {"copied into another tensor",
       [](const Operands& o) { return torch::zeros_like(o.w).copy_(o.w); }},
      {"copied into a part of another tensor",
       [](const Operands& o) {
         auto other = torch::zeros({8, 6}, o.v.options());
         other.narrow(0, 2, 4).copy_(o.w);
         return other * 2;
       }},
      {"other.add_(w)", [](const Operands& o) { return (o.v * 1).add_(o.w, 0.5); }},
      {"other.mul_(w)", [](const Operands& o) { return (o.v * 1).mul_(o.w); }},
      {"view of its bits", [](const Operands& o) { return o.w.view(torch::kLong).view(torch::kDouble); },
       Known::kNoGradient},
      {"repeat", [](const Operands& o) { return o.w.repeat({2, 3}); }},
      {"repeat_interleave", [](const Operands& o) { return o.w.repeat_interleave(2, 0); }},
      {"pad", [](const Operands& o) { return torch::constant_pad_nd(o.w, {1, 2}, 0.5); }},
      {"cat", [](const Operands& o) { return torch::cat({o.w, o.v, o.w}, 1); }},
      {"stack", [](const Operands& o) { return torch::stack({o.v, o.w}); }},
      {"vstack", [](const Operands& o) { return torch::vstack({o.w, o.b.unsqueeze(0).repeat({1, 2}).narrow(1, 0, 6)}); }},
      {"block_diag", [](const Operands& o) { return torch::block_diag({o.w, o.v}); }},
      {"flip", [](const Operands& o) { return o.w.flip({0, 1}); }},
      {"roll", [](const Operands& o) { return o.w.roll({1, 2}, {0, 1}); }},
      {"rot90", [](const Operands& o) { return o.w.rot90(1, {0, 1}); }},
      {"triu", [](const Operands& o) { return o.w.triu(); }},
      {"sparse and back", [](const Operands& o) { return o.w.to_sparse().to_dense(); }},
      {"broadcast_tensors", [](const Operands& o) { return torch::broadcast_tensors({o.w, o.v.unsqueeze(0)})[0] * 3; }},
      {"meshgrid", [](const Operands& o) { return torch::meshgrid({o.w[0], o.b}, "ij")[0]; }},
      // parts and other shapes
      {"narrow", [](const Operands& o) { return o.w.narrow(0, 1, 2) * 2; }},
      {"narrow of columns", [](const Operands& o) { return o.w.narrow(1, 1, 3) * 2; }},
      {"slice with a step", [](const Operands& o) { return o.w.slice(1, 0, 6, 2).exp(); }},
      {"chunk", [](const Operands& o) { return o.w.chunk(2)[1] * o.w.chunk(2)[0]; }},
      {"split", [](const Operands& o) { return o.w.split(3, 1)[1].exp(); }},
      {"tensor_split", [](const Operands& o) { return o.w.tensor_split(3, 1)[2].exp(); }},
      {"unbind", [](const Operands& o) { return o.w.unbind(1)[4] * 2; }},
      {"select", [](const Operands& o) { return o.w.select(0, 2) * 2; }},
      {"w[1][2]", [](const Operands& o) { return o.w[1][2] * 2; }},
      {"index with a slice", [](const Operands& o) { return o.w.index({Slice(1, 3), 2}) * 2; }},
      {"index with numbers", [](const Operands& o) { return o.w.index({o.ids}); }},
      {"index with a mask", [](const Operands& o) { return o.w.index({o.is_upper}); }},
      {"index_select", [](const Operands& o) { return o.w.index_select(0, o.ids.view(-1)); }},
      {"take", [](const Operands& o) { return o.w.take(o.ids); }},
      {"gather", [](const Operands& o) { return o.w.gather(1, o.ids.view({1, -1}).expand({4, 6})); }},
      {"take_along_dim", [](const Operands& o) { return o.w.take_along_dim(o.w.argsort(int64_t{1}), 1); }},
      {"scatter into w", [](const Operands& o) { return o.w.scatter(1, o.ids.view({1, -1}), o.v.narrow(0, 0, 1)); }},
      {"scatter with w as source",
       [](const Operands& o) { return o.v.scatter_add(0, o.ids.view({1, -1}).expand({4, 6}), o.w); }},
      {"index_add with w as source",
       [](const Operands& o) { return o.v.index_add(0, o.ids.view(-1).narrow(0, 0, 4), o.w, 2); }},
      {"index_put_ on a copy",
       [](const Operands& o) { return (o.v * 1).index_put_({torch::tensor({2, 0}, o.ids.options())}, o.w.narrow(0, 0, 2)); }},
      {"index_put_ with w as values, added up",
       [](const Operands& o) { return (o.v * 1).index_put_({o.ids.view(-1).narrow(0, 0, 4)}, o.w, true); }},
      {"select_scatter", [](const Operands& o) { return o.v.select_scatter(o.w[1], 0, 2); }},
      {"masked_scatter", [](const Operands& o) { return o.v.masked_scatter(o.is_upper, o.w); }},
      {"t", [](const Operands& o) { return o.w.t() * o.v.t(); }},
      {"permute", [](const Operands& o) { return o.w.permute({1, 0}).exp(); }},
      {"movedim", [](const Operands& o) { return o.w.movedim(0, 1).exp(); }},
      {"reshape", [](const Operands& o) { return o.w.reshape({2, 2, 6}).exp(); }},
      {"view", [](const Operands& o) { return o.w.view({3, 8}).exp(); }},
      {"flatten", [](const Operands& o) { return o.w.flatten() * o.v.flatten(); }},
      {"flat after transposing", [](const Operands& o) { return o.w.t().flatten() * o.v.flatten(); }},
      {"unsqueeze, expand", [](const Operands& o) { return o.w.unsqueeze(0).expand({3, 4, 6}) * o.x.unsqueeze(1); }},
      {"expand_as", [](const Operands& o) { return o.w.narrow(0, 1, 1).expand_as(o.v) * o.v; }},
      {"diagonal", [](const Operands& o) { return o.w.diagonal(1) * 2; }},
      {"unfold", [](const Operands& o) { return windows(o.w) * 2; }},
      {"as_strided", [](const Operands& o) { return o.w.as_strided({3, 2}, {6, 2}, 1) * 2; }},
      {"alias", [](const Operands& o) { return o.w.alias() * 2; }},
      {"view_as_complex",
       [](const Operands& o) { return torch::view_as_real(torch::view_as_complex(o.w.view({4, 3, 2})).exp()); }},
      {"complex", [](const Operands& o) { return torch::complex(o.w, o.v).abs(); }},
      {"fft", [](const Operands& o) { return torch::fft::rfft(o.w).abs(); }, Known::kRight, 1e-11},
      // reductions
      {"sum", [](const Operands& o) { return o.w.sum(); }},
      {"sum of a dimension", [](const Operands& o) { return o.w.sum(0); }},
      {"mean", [](const Operands& o) { return o.w.mean(1); }},
      {"var", [](const Operands& o) { return o.w.var(1); }},
      {"prod", [](const Operands& o) { return o.w.prod(1); }},
      {"max", [](const Operands& o) { return o.w.max(); }},
      {"max of a dimension", [](const Operands& o) { return std::get<0>(o.w.max(1)); }},
      {"argmax", [](const Operands& o) { return o.w.argmax(1); }},
      {"amin", [](const Operands& o) { return o.w.amin(0); }},
      {"median", [](const Operands& o) { return std::get<0>(o.w.median(1)); }},
      {"norm", [](const Operands& o) { return torch::linalg_vector_norm(o.w, 3, {1}); }},
      {"logsumexp", [](const Operands& o) { return o.w.logsumexp(1); }},
      {"cumsum", [](const Operands& o) { return o.w.cumsum(1); }},
      {"cumprod", [](const Operands& o) { return o.w.cumprod(0); }},
      {"sort", [](const Operands& o) { return std::get<0>(o.w.sort(1)); }},
      {"topk", [](const Operands& o) { return std::get<0>(o.w.topk(2, 1)); }},
      {"count_nonzero", [](const Operands& o) { return o.w.relu().count_nonzero(at::IntArrayRef{1}); }},
      {"item", [](const Operands& o) { return o.x * o.w[1][2].item<double>(); }, Known::kNoGradient},
      {"item of the norm", [](const Operands& o) { return o.x / o.w.norm().item<double>(); }, Known::kNoGradient},
      // products
      {"linear", [](const Operands& o) { return F::linear(o.x, o.w, o.b); }},
      {"at::linear", [](const Operands& o) { return torch::linear(o.x, o.w, o.b); }},
      {"linear with more dimensions", [](const Operands& o) { return F::linear(o.x.expand({2, 3, 6}), o.w, o.b); }},
      {"linear with a row of w as bias", [](const Operands& o) { return F::linear(o.x, o.v, o.w[0].narrow(0, 1, 4)); }},
      {"linear with itself", [](const Operands& o) { return F::linear(o.w, o.w, o.b); }},
      {"linear on w", [](const Operands& o) { return F::linear(o.w, o.v); }},
      {"linear with rows", [](const Operands& o) { return F::linear(o.x, o.w.narrow(0, 1, 2)); }},
      {"linear with columns", [](const Operands& o) { return F::linear(o.x.narrow(1, 0, 3), o.w.narrow(1, 3, 3)); }},
      {"linear with a contiguous transpose", [](const Operands& o) { return F::linear(o.y, o.w.t().contiguous()); }},
      {"linear with a transpose", [](const Operands& o) { return F::linear(o.y, o.w.t()); }},
      {"x w^T", [](const Operands& o) { return o.x.matmul(o.w.t()); }},
      {"y w", [](const Operands& o) { return o.y.matmul(o.w); }},
      {"w x^T", [](const Operands& o) { return torch::matmul(o.w, o.x.t()); }},
      {"w w^T", [](const Operands& o) { return torch::matmul(o.w, o.w.t()); }},
      {"mm", [](const Operands& o) { return torch::mm(o.x, o.w.t()); }},
      {"mm, w first", [](const Operands& o) { return torch::mm(o.w, o.x.t()); }},
      {"addmm", [](const Operands& o) { return torch::addmm(o.b, o.x, o.w.t()); }},
      {"addmm with factors", [](const Operands& o) { return torch::addmm(o.b, o.x, o.w.t(), 0.5, 2); }},
      {"addmm to w", [](const Operands& o) { return torch::addmm(o.w, o.y.narrow(0, 0, 3).t(), o.x); }},
      {"addmm, w first", [](const Operands& o) { return torch::addmm(o.y.t(), o.w, o.x.t()); }},
      {"bmm", [](const Operands& o) { return torch::bmm(o.x.expand({2, 3, 6}), o.w.view({2, 2, 6}).transpose(1, 2)); }},
      {"baddbmm", [](const Operands& o) { return torch::baddbmm(o.b[0], o.y.unsqueeze(0), o.w.unsqueeze(0)); }},
      {"addbmm", [](const Operands& o) { return torch::addbmm(o.x, o.y.unsqueeze(0), o.w.unsqueeze(0)); }},
      {"mv", [](const Operands& o) { return torch::mv(o.w, o.x[0]); }},
      {"addmv", [](const Operands& o) { return torch::addmv(o.b, o.w, o.x[0]); }},
      {"mv with a row of w", [](const Operands& o) { return torch::mv(o.x, o.w[1]); }},
      {"outer", [](const Operands& o) { return torch::outer(o.w[0], o.w[1]); }},
      {"dot", [](const Operands& o) { return torch::dot(o.w[0], o.w[1]); }},
      {"einsum", [](const Operands& o) { return torch::einsum("bi,oi->bo", {o.x, o.w}); }},
      {"einsum, w twice", [](const Operands& o) { return torch::einsum("oi,pi,bp->bo", {o.w, o.w, o.y}); }},
      {"tensordot", [](const Operands& o) { return torch::tensordot(o.w, o.v, {0, 1}, {0, 1}); }},
      {"inner", [](const Operands& o) { return torch::inner(o.x, o.w); }},
      {"kron", [](const Operands& o) { return torch::kron(o.w, o.y); }},
      {"multi_dot", [](const Operands& o) { return torch::linalg_multi_dot({o.y, o.w, o.x.t()}); }},
      {"bilinear", [](const Operands& o) { return torch::bilinear(o.y, o.x, o.w.unsqueeze(0)); }},
      {"cdist", [](const Operands& o) { return torch::cdist(o.x, o.w); }, Known::kOnce, 1e-11},
      {"cosine similarity", [](const Operands& o) { return torch::cosine_similarity(o.x.unsqueeze(1), o.w, -1); }},
      {"attention to w",
       [](const Operands& o) {
         auto& context = at::globalContext();
         const bool flash = context.userEnabledFlashSDP();
         context.setSDPUseFlash(false);  // of which LibTorch 2.14 knows no second derivative
         auto y = torch::scaled_dot_product_attention(o.x.unsqueeze(0), o.w.unsqueeze(0), o.v.unsqueeze(0));
         context.setSDPUseFlash(flash);
         return y;
       }},
      {"lstm_cell", [](const Operands& o) {
         return std::get<0>(torch::lstm_cell(o.x, {o.y.narrow(1, 0, 1), o.y.narrow(1, 1, 1)}, o.w, o.table.narrow(0, 0, 4).narrow(1, 0, 1)));
       }},
      {"conv1d", [](const Operands& o) { return torch::conv1d(o.sequence, o.w.view({4, 2, 3}), o.b); }},
      {"conv1d, as many outputs", [](const Operands& o) { return torch::conv1d(o.sequence, o.w.view({4, 2, 3}), o.b, 1, "same"); }},
      {"conv2d of one number", [](const Operands& o) { return torch::conv2d(o.x.view({1, 6, 3, 1}), o.w.view({4, 6, 1, 1})); }},
      {"transposed conv1d", [](const Operands& o) { return torch::conv_transpose1d(o.sequence, o.w.view({2, 4, 3})); }},
      {"weight norm", [](const Operands& o) { return torch::_weight_norm(o.w, o.b.unsqueeze(1), 0); }},
      // the singular values, for what is smooth in all numbers
      {"svd", [](const Operands& o) { return torch::linalg_svdvals(o.w); }, Known::kRight, 1e-10},
      {"pinv", [](const Operands& o) { return torch::linalg_pinv(o.w); }, Known::kRight, 1e-9},
      {"solve", [](const Operands& o) { return torch::linalg_solve(o.w.mm(o.w.t()) + torch::eye(4, o.v.options()), o.v); },
       Known::kRight, 1e-10},
      {"matrix_exp", [](const Operands& o) { return torch::matrix_exp(o.w.narrow(1, 0, 4)); }, Known::kRight, 1e-10},
      // lookups
      {"embedding", [](const Operands& o) { return torch::embedding(o.table, o.ids); }},
      {"embedding_bag",
       [](const Operands& o) {
         return std::get<0>(torch::embedding_bag(o.table, o.ids.view(-1), torch::tensor({0, 2}, o.ids.options())));
       },
       Known::kOnce},
      {"embedding in the weight of a linear layer", [](const Operands& o) { return torch::embedding(o.w, o.ids); }},
      {"embedding_bag in the weight of a linear layer",
       [](const Operands& o) {
         return std::get<0>(torch::embedding_bag(o.w, o.ids.view(-1), torch::tensor({0, 2}, o.ids.options())));
       },
       Known::kOnce},
      {"some entries", [](const Operands& o) { return torch::embedding(o.table.narrow(0, 2, 4), o.ids); }},
      {"index of a table", [](const Operands& o) { return o.table.index({o.ids}); }},
      {"index_select of a table", [](const Operands& o) { return o.table.index_select(0, o.ids.view(-1)); }},
      {"linear with a table", [](const Operands& o) { return F::linear(o.y, o.table); }},
      {"linear with entries of a table", [](const Operands& o) { return F::linear(o.y, o.table.narrow(0, 1, 3)); }},
      {"y table^T", [](const Operands& o) { return o.y.matmul(o.table.t()); }},
      {"addmm with a table", [](const Operands& o) { return torch::addmm(o.table.select(1, 0), o.y, o.table.t()); }},
      {"x table", [](const Operands& o) { return torch::constant_pad_nd(o.x, {0, 1}, 1).matmul(o.table); }},
      {"mv of a table", [](const Operands& o) { return torch::mv(o.table, o.y[0]); }},
      {"one hot", [](const Operands& o) { return torch::one_hot(o.ids, 7).to(torch::kDouble).matmul(o.table); }},
      // biases and norms
      {"a bias added by hand", [](const Operands& o) { return o.x.matmul(o.w.t()) + o.b; }},
      {"layer_norm", [](const Operands& o) { return torch::layer_norm(o.y, {4}, o.gain, o.shift); }},
      {"layer_norm with a row of w", [](const Operands& o) { return torch::layer_norm(o.x, {6}, o.w[1], o.w[2]); }},
      {"layer_norm with a column of w", [](const Operands& o) { return torch::layer_norm(o.y, {4}, o.w.select(1, 2)); }},
      {"group_norm", [](const Operands& o) { return torch::group_norm(o.y, 2, o.gain, o.shift); }},
      {"batch_norm",
       [](const Operands& o) { return torch::batch_norm(o.y, o.gain, o.shift, {}, {}, true, 0.1, 1e-5, false); }},
      {"rms norm by hand",
       [](const Operands& o) { return o.y * torch::rsqrt(o.y.pow(2).mean(-1, true) + 1e-6) * o.gain; }},
      {"prelu", [](const Operands& o) { return torch::prelu(o.y, o.gain); }},
      // lists
      {"_foreach_mul", [](const Operands& o) { return torch::_foreach_mul({o.w, o.v}, 2)[0]; }},
      {"_foreach_add", [](const Operands& o) { return torch::_foreach_add({o.v, o.w}, {o.w, o.v}, 2)[0]; }},
      {"_foreach_norm", [](const Operands& o) { return torch::stack(torch::_foreach_norm({o.w, o.v}, 2)); }},
      {"parameters_to_vector", [](const Operands& o) { return nn::utils::parameters_to_vector({o.w, o.b}); }},
      // gradient modes
      {"read without gradient",
       [](const Operands& o) {
         torch::NoGradGuard no_grad;
         return o.w * 2;
       }},
      {"a factor without gradient",
       [](const Operands& o) {
         Tensor norm;
         {
           torch::NoGradGuard no_grad;
           norm = o.w.norm();
         }
         return o.w / norm;
       }},
      {"detached", [](const Operands& o) { return o.w.detach() * o.v; }},
      {"a detached norm", [](const Operands& o) { return o.w / o.w.norm().detach(); }},
      {"a norm of the detached weight", [](const Operands& o) { return o.w / o.w.detach().norm(1, 1, true); }},
      {"linear with the detached weight", [](const Operands& o) { return F::linear(o.x, o.w.detach(), o.b); }},
      {"rows of the detached weight", [](const Operands& o) { return o.x.mm(o.w.detach().t().narrow(1, 1, 2)); }},
      {"out=",
       [](const Operands& o) {
         torch::NoGradGuard no_grad;
         auto out = torch::empty_like(o.v);
         at::mul_out(out, o.w, o.v);
         return out;
       }},
      {"cat, out=",
       [](const Operands& o) {
         torch::NoGradGuard no_grad;
         auto out = torch::empty({8, 6}, o.v.options());
         at::cat_out(out, {o.w, o.v});
         return out;
       }},
      {"gradient of a gradient",
       [](const Operands& o) {
         torch::AutoGradMode with_grad(true);
         const auto x = o.x.detach().requires_grad_();
         const auto y = F::linear(x, o.w, o.b).sin().sum();
         return torch::autograd::grad({y}, {x}, {}, true, true)[0];
       }},
      {"a function that computes once more", [](const Operands& o) { return Recomputed::apply(o.x, o.w); },
       Known::kOnlyInside},
      {"a function that saves w", [](const Operands& o) { return SavedProduct::apply(o.x, o.w); }, Known::kUnseen},
  };
  return all;
}

struct ModelImpl : nn::Module {
  ModelImpl() { to(testing::device(), torch::kDouble); }

  Operands parameters_in(const Operands& others, bool bare) const {
    auto all = others;
    all.w = bare ? matrix : fc->weight;
    all.b = fc->bias;
    all.table = tokens->weight;
    all.gain = norm->weight;
    all.shift = norm->bias;
    return all;
  }

  nn::Linear fc = register_module("fc", nn::Linear(6, 4));
  nn::Embedding tokens = register_module("tokens", nn::Embedding(7, 4));
  nn::LayerNorm norm = register_module("norm", nn::LayerNorm(nn::LayerNormOptions({4})));
  Tensor matrix = register_parameter("matrix", torch::randn({4, 6}));
};
TORCH_MODULE(Model);

/// What is adapted, and how W' is written out.
struct Config {
  const char* name;
  std::function<lora::LoRAConfig()> make;
  bool bare = false;  // whether w is the parameter of no layer
};

lora::LoRAConfig layers() { return lora::LoRAConfig(2).alpha(5).target_modules({"fc", "tokens"}); }

const std::vector<Config>& configs() {
  static const std::vector<Config> all{
      {"low rank", layers},
      {"low rank, with biases", [] { return layers().bias(lora::Bias::kAll); }},
      {"low rank, norms in full", [] { return layers().modules_to_save({"norm"}); }},
      {"in full",
       [] {
         return lora::LoRAConfig(2).alpha(5).target_parameters({"matrix"}).modules_to_save({"fc", "tokens", "norm"});
       }},
      {"a parameter",
       [] {
         return lora::LoRAConfig(2).alpha(5).target_parameters({"matrix", "tokens.weight"});
       },
       true},
      {"DoRA", [] { return layers().method(lora::DoRA()); }},
      {"IA3", [] { return layers().method(lora::IA3()); }},
      {"some rows",
       [] {
         return layers().fused({{"fc", {1, 2, 1}, {true, false, true}}});
       }},
  };
  return all;
}

struct Fixture {
  explicit Fixture(const Config& config) : config(config) {
    torch::manual_seed(3);
    model = Model();
    {
      torch::NoGradGuard no_grad;
      for (auto& parameter : model->parameters()) parameter.copy_(random(parameter.sizes()));
    }
    for (auto* tensor : {&others.v, &others.mask}) *tensor = random({4, 6}).requires_grad_();
    others.x = random({3, 6}).requires_grad_();
    others.y = random({3, 4}).requires_grad_();
    others.sequence = random({2, 2, 5}).requires_grad_();
    others.ids = torch::tensor({{0, 3, 3}, {2, 1, 0}}, testing::device());
    others.is_upper = torch::ones({4, 6}, others.ids.options().dtype(torch::kBool)).triu(1);
    adapters.emplace(*model);
    adapters->add("default", config.make());
    testing::randomize(adapters->parameters(), 0.4);
    auto active = adapters->activate();
    for (const auto& parameter : model->parameters()) parameter.sum();  // so that no scope warns of one left out
  }

  static Tensor random(at::IntArrayRef sizes) { return torch::randn(sizes, testing::on_device(torch::kDouble)); }

  Operands in_model() const { return model->parameters_in(others, config.bare); }

  /// The same with copies of the parameters that nothing knows of: the base, or W'.
  Operands plain(bool adapted) const {
    auto all = in_model();
    const auto copy = [&](Tensor& tensor, const std::string& name) {
      auto value = lora::detail::dequantized(tensor).detach().clone();
      for (const auto& part : adapters->adapter("default")->parts) {
        const auto& site = part.site->name();
        const bool is_it = site == name || site + ".weight" == name;
        if (!adapted || !is_it) continue;
        const auto* full = dynamic_cast<const lora::MethodOf<lora::FullDelta>*>(part.method.get());
        if (full != nullptr && !full->value.scale) {
          value = full->value.value;
        } else {
          // s B A by hand where that is all there is
          const auto* low = dynamic_cast<const lora::MethodOf<lora::LowRank>*>(part.method.get());
          if (low != nullptr && low->value.lora_A.dim() == 2) {
            const auto delta = 2.5 * low->value.lora_B.mm(low->value.lora_A);
            value = value + (part.site->view().shape().is_lookup ? delta.t() : delta);
          } else {
            value = value + adapters->delta("default", site);
          }
        }
      }
      tensor = value;
    };
    copy(all.w, config.bare ? "matrix" : "fc.weight");
    copy(all.b, "fc.bias");
    copy(all.table, "tokens.weight");
    copy(all.gain, "norm.weight");
    copy(all.shift, "norm.bias");
    return all;
  }

  std::vector<Tensor> leaves() const {
    auto all = adapters->parameters();
    for (const auto& tensor : {others.v, others.mask, others.x, others.y, others.sequence}) all.push_back(tensor);
    return all;
  }

  /// The gradients of some function of `value`; zero where there is none.
  std::vector<Tensor> gradients(const Tensor& value, bool create_graph = false) const {
    const auto all = leaves();
    std::vector<Tensor> found(all.size());
    for (auto tensor : all) tensor.mutable_grad().reset();
    if (value.requires_grad()) {
      torch::AutoGradMode with_grad(true);
      const auto factor =
          torch::arange(1, value.numel() + 1, testing::on_device(torch::kDouble)).view(value.sizes()) / value.numel();
      found = torch::autograd::grad({(value * factor).sin().sum()}, all, {}, true, create_graph, true);
    }
    for (size_t i = 0; i < all.size(); ++i) {
      if (!found[i].defined()) found[i] = torch::zeros_like(all[i]);
      if (all[i].grad().defined()) found[i] = found[i] + all[i].grad();  // from a pass within the pass
    }
    return found;
  }

  /// The gradients of the squares of the gradients.
  std::vector<Tensor> second_gradients(const Tensor& value) const {
    Tensor sum = torch::zeros({}, testing::on_device(torch::kDouble));
    for (const auto& gradient : gradients(value, /*create_graph=*/true)) sum = sum + gradient.pow(2).sum();
    return gradients(sum);
  }

  const Config& config;
  Model model{nullptr};
  Operands others;
  std::optional<lora::Adapters> adapters;
};

/// Whether gradients agree, for their size.
bool agree(const std::vector<Tensor>& found, const std::vector<Tensor>& wanted, double tolerance) {
  double size = 1;
  for (const auto& tensor : wanted) size = std::max(size, tensor.abs().max().item<double>());
  return testing::distance(found, wanted) < tolerance * size;
}

/// In the scopes that `open` opens a use is that of the adapted operands, with its gradients.
template <class Open>
void check_use(const Fixture& f, const Row& row, const Operands& in_model, const Operands& adapted, const Open& open) {
  std::vector<Tensor> found;
  {
    const auto scopes = open();
    const auto value = row.use(in_model);
    CHECK(testing::distance(value, row.use(adapted)) < row.tolerance);
    found = f.gradients(value);
  }
  CHECK(agree(found, f.gradients(row.use(adapted)), 10 * row.tolerance));
}

/// The uses that LibTorch has on the device of the suite, with their derivatives; on a CPU all.
std::vector<Row> rows_here(const Fixture& f) {
  if (testing::device().is_cpu()) return rows();
  std::vector<Row> here;
  for (const auto& row : rows()) {
    const auto error = testing::error_of([&] {
      const auto value = row.use(f.plain(true));
      row.known == Known::kRight ? f.second_gradients(value) : f.gradients(value);
    });
    if (error.empty()) here.push_back(row);
  }
  return here;
}

/// Whether a use takes anything that is adapted.
bool takes_weight(const Fixture& f, const Row& row) {
  return testing::distance(row.use(f.plain(false)), row.use(f.plain(true))) > 1e-6;
}

const Config& any_config() { return configs()[GENERATE(range(size_t{0}, configs().size()))]; }

}  // namespace

TEST_CASE("Every use of an adapted weight in a scope is one of W', with its gradients, and outside one of the base") {
  Fixture f(any_config());
  const auto base = f.plain(false), adapted = f.plain(true), in_model = f.in_model();
  size_t different = 0;
  for (const auto& row : rows_here(f)) {
    INFO(row.name << ", " << f.config.name);
    const auto before = row.use(base), expected = row.use(adapted);
    different += testing::distance(before, expected) > 1e-6 ? 1 : 0;
    CHECK(torch::equal(row.use(in_model), before));
    Tensor left_open;
    std::vector<Tensor> inside, second_inside;
    {
      auto active = f.adapters->activate();
      const auto value = row.use(in_model);
      CHECK(testing::distance(value, expected) < row.tolerance);
      inside = f.gradients(value);
      left_open = row.use(in_model);
      if (row.known == Known::kRight) second_inside = f.second_gradients(row.use(in_model));
      torch::NoGradGuard no_grad;
      CHECK(testing::distance(row.use(in_model), expected) < row.tolerance);
    }
    CHECK(torch::equal(row.use(in_model), before));
    if (row.known == Known::kUnseen) continue;
    const auto wanted = f.gradients(row.use(adapted));
    CHECK(agree(inside, wanted, 10 * row.tolerance));
    if (row.known != Known::kOnlyInside) CHECK(agree(f.gradients(left_open), wanted, 10 * row.tolerance));
    if (row.known == Known::kRight)
      CHECK(agree(second_inside, f.second_gradients(row.use(adapted)), 100 * row.tolerance));
  }
  CHECK(different > (f.config.name == std::string("a parameter") ? 100 : 120));
}

TEST_CASE("Every use of a weight that is held in few bits is one of W' in a scope, and refused outside by name") {
  Fixture f(any_config());
  {
    testing::round_to_halves(*f.adapters);
    auto follows = f.adapters->activate();  // what was taken from the weights
  }
  f.adapters->quantize(*f.adapters->adapter("default"), testing::Halves());
  const auto base = f.plain(false), adapted = f.plain(true), in_model = f.in_model();
  int refused = 0;
  for (const auto& row : rows_here(f)) {
    INFO(row.name << ", " << f.config.name);
    if (row.known == Known::kUnseen) continue;
    check_use(f, row, in_model, adapted, [&] { return f.adapters->activate(); });
    {
      auto nothing = f.adapters->activate("");
      CHECK(testing::distance(row.use(in_model), row.use(base)) < row.tolerance);
    }
    bool is_base = false;
    const auto error = testing::error_of([&] { is_base = torch::equal(row.use(in_model), row.use(base)); });
    if (error.empty()) {
      CHECK(is_base);
    } else {
      ++refused;
      CHECK_THAT(error, testing::contains("is held in 16 bits (halves)"));
    }
  }
  const bool adapts_layers = f.config.name != std::string("in full");
  CHECK((refused > 20) == adapts_layers);
}

TEST_CASE("What is merged is what every use in the scope computed") {
  Fixture f(any_config());
  const auto in_model = f.in_model();
  for (const auto& row : rows_here(f)) {
    INFO(row.name << ", " << f.config.name);
    const auto before = row.use(in_model);
    Tensor value;
    {
      auto active = f.adapters->activate();
      value = row.use(in_model);
    }
    f.adapters->merge();
    CHECK(testing::distance(row.use(in_model), value) < row.tolerance);
    {
      auto active = f.adapters->activate();  // what is merged does not act again
      CHECK(testing::distance(row.use(in_model), value) < row.tolerance);
    }
    f.adapters->unmerge();
    CHECK(torch::equal(row.use(in_model), before));
  }
}

TEST_CASE("Every use is told, and all of them as adapted") {
  Fixture f(configs()[0]);
  const auto in_model = f.in_model();
  for (const auto& row : rows_here(f)) {
    INFO(row.name);
    const auto uses = f.adapters->diagnose([&] { row.use(in_model); });
    if (takes_weight(f, row)) CHECK_FALSE(uses.empty());
    for (const auto& use : uses) {
      INFO(use.operation);
      CHECK(use.adapted);
    }
  }
}

TEST_CASE("Every use is that of W' however the weight lies in memory") {
  const auto [layout, lay_out] = GENERATE(table<const char*, Tensor (*)(const Tensor&)>({
      {"kept as (in, out)", [](const Tensor& w) { return w.t().contiguous().t(); }},
      {"some columns of a packed weight",
       [](const Tensor& w) {
         return torch::cat({w, w, w}, 1).narrow(1, 6, 6);
       }},
      {"some rows of a packed weight",
       [](const Tensor& w) {
         return torch::cat({w, w, w}).narrow(0, 4, 4);
       }},
      {"every second number",
       [](const Tensor& w) {
         return torch::stack({w, w}, -1).select(-1, 1);
       }},
  }));
  Fixture f(configs()[GENERATE(size_t{0}, size_t{3})]);
  f.model->fc->weight.set_data(lay_out(f.model->fc->weight.detach()));
  const auto adapted = f.plain(true), in_model = f.in_model();
  int uses = 0;
  for (const auto& row : rows_here(f)) {
    INFO(row.name << ", " << layout << ", " << f.config.name);
    const bool has_such_view = testing::error_of([&] { row.use(in_model); }).empty();
    if (!has_such_view || row.name == std::string("as_strided") || row.known == Known::kUnseen) continue;
    ++uses;
    check_use(f, row, in_model, adapted, [&] { return f.adapters->activate(); });
  }
  CHECK(uses > 130);
}

TEST_CASE("In nested scopes every use is that of W + the sum of the updates, each with its scale") {
  Fixture f(configs()[0]);
  lora::Adapters others(*f.model);
  others.add("default", lora::LoRAConfig(2).target_parameters({"matrix"}).modules_to_save({"fc", "norm"}));
  testing::randomize(others.parameters(), 0.4);
  f.adapters->set_scale("default", -0.7);
  auto adapted = f.plain(false);
  const auto in_model = f.in_model();
  const auto full = others.named_parameters();
  adapted.w = full["fc.weight"] + f.adapters->delta("default", "fc");
  adapted.table = adapted.table + f.adapters->delta("default", "tokens");
  adapted.b = full["fc.bias"];
  adapted.gain = full["norm.weight"];
  adapted.shift = full["norm.bias"];
  for (const auto& row : rows_here(f)) {
    INFO(row.name);
    if (row.known == Known::kUnseen) continue;
    check_use(f, row, in_model, adapted, [&] { return std::array{others.activate(), f.adapters->activate()}; });
  }
  auto unused = others.activate();
  f.model->matrix.sum();
}

TEST_CASE("Batch norms that are trained in full normalize with the adapter's numbers, and count into them") {
  torch::manual_seed(0);
  nn::Sequential model(nn::Linear(6, 4), nn::BatchNorm1d(4));
  model->to(testing::device(), torch::kDouble);
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).alpha(5).target_modules({"0"}).modules_to_save({"1"}));
  testing::randomize(adapters.parameters(), 0.4);
  const auto& norm = *model->ptr(1)->as<nn::BatchNorm1d>();
  const auto named = adapters.named_parameters();
  const auto full = [&](const std::string& name) {
    return *adapters.adapter("default")->part("1." + name)->method->tensors().front().tensor;
  };
  const auto x = torch::randn({5, 4}, testing::on_device(torch::kDouble)).requires_grad_();
  const std::vector<Tensor> before{norm.running_mean.clone(), norm.running_var.clone(),
                                   norm.num_batches_tracked.clone()};
  const std::vector<Tensor> leaves{named["1.weight"], named["1.bias"], x};
  for (const bool training : {true, false}) {
    model->train(training);
    const auto mean = full("running_mean").clone(), var = full("running_var").clone();
    const auto expected =
        torch::batch_norm(x, named["1.weight"], named["1.bias"], mean, var, training, 0.1, 1e-5, false);
    Tensor y;
    {
      auto active = adapters.activate();
      y = model->ptr(1)->as<nn::BatchNorm1d>()->forward(x);
    }
    CHECK(testing::distance(y, expected) < 1e-12);
    CHECK(testing::distance(torch::autograd::grad({y.sin().sum()}, leaves),
                            torch::autograd::grad({expected.sin().sum()}, leaves)) < 1e-11);
    CHECK(torch::equal(full("running_mean"), mean));
    CHECK(torch::equal(full("running_var"), var));
    CHECK(full("num_batches_tracked").item<int64_t>() == 1);
    CHECK(torch::equal(norm.running_mean, before[0]));
    CHECK(torch::equal(norm.running_var, before[1]));
    CHECK(torch::equal(norm.num_batches_tracked, before[2]));
  }
}

TEST_CASE("What is written to an adapted weight in a scope goes into the base, and is told") {
  Fixture f(configs()[0]);
  torch::NoGradGuard no_grad;
  const auto w = f.model->fc->weight;
  const auto [operation, write] = GENERATE(table<const char*, void (*)(const Tensor&)>({
      {"aten::mul_", [](const Tensor& w) { w.mul_(2); }},
      {"aten::add_", [](const Tensor& w) { w.narrow(0, 1, 2).add_(1); }},
      {"aten::zero_", [](const Tensor& w) { w.t().zero_(); }},
      {"aten::copy_", [](const Tensor& w) { w.copy_(torch::ones_like(w)); }},
      {"aten::fill_", [](const Tensor& w) { w[0].fill_(3); }},
      {"aten::index_put_", [](const Tensor& w) { Tensor(w).index_put_({torch::tensor({1, 2}, w.options().dtype(torch::kLong))}, torch::ones({6}, w.options())); }},
      {"aten::mul_", [](const Tensor& w) { w.detach().mul_(2); }},
      {"aten::add", [](const Tensor& w) { auto out = w; at::add_out(out, torch::ones_like(w), torch::ones_like(w)); }},
      {"aten::_foreach_mul_", [](const Tensor& w) { torch::_foreach_mul_({w}, 2); }},
  }));
  INFO(operation);
  auto expected = w.detach().clone();
  write(expected);
  const auto uses = f.adapters->diagnose([&, write = write] { write(w); });
  CHECK(torch::equal(w, expected));
  const auto is_it = [&, operation = operation](const lora::WeightUse& use) {
    return use.layer == "fc" && use.operation == operation && !use.adapted && use.count == 1;
  };
  CHECK(std::any_of(uses.begin(), uses.end(), is_it));
}

TEST_CASE("What is written to a tensor that is trained in full goes into the adapter's own") {
  Fixture f(configs()[3]);
  torch::NoGradGuard no_grad;
  const auto w = f.model->fc->weight, before = w.detach().clone();
  const auto own = f.adapters->named_parameters()["fc.weight"], expected = own.detach() * 2;
  {
    auto active = f.adapters->activate();
    w.mul_(2);
    w[1].add_(1);
  }
  CHECK(torch::equal(w, before));
  CHECK(torch::equal(own[0], expected[0]));
  CHECK(torch::equal(own[1], expected[1] + 1));
}

TEST_CASE("A detached weight is W' as a constant, and outside of the scope the base") {
  Fixture f(configs()[0]);
  const auto w = f.model->fc->weight;
  Tensor detached;
  {
    auto active = f.adapters->activate();
    detached = w.detach();
    CHECK_FALSE((detached * 2).requires_grad());
    CHECK_FALSE(F::linear(f.others.x.detach(), detached).requires_grad());
    CHECK_FALSE(torch::embedding(f.model->tokens->weight.detach(), f.others.ids).requires_grad());
    CHECK((w * 2).requires_grad());
  }
  CHECK(torch::equal(detached, w));
  CHECK(torch::equal(F::linear(f.others.x, detached), F::linear(f.others.x, w)));
  CHECK(detached.is_alias_of(w));
}

TEST_CASE("A function of somebody's own computes with W', but what it does without autograd trains nothing") {
  // Its forward pass has no gradient modes and no operator of its own by which it could be told from a plain read.
  Fixture f(configs()[0]);
  const auto adapted = f.plain(true), in_model = f.in_model();
  const auto wanted = torch::autograd::grad({SavedProduct::apply(adapted.x, adapted.w).sin().sum()}, {adapted.x});
  auto active = f.adapters->activate();
  const auto y = SavedProduct::apply(in_model.x, in_model.w);
  CHECK(testing::distance(y, SavedProduct::apply(adapted.x, adapted.w)) < 1e-12);
  const auto found =
      torch::autograd::grad({y.sin().sum()}, {in_model.x, f.adapters->parameters()[0]}, {}, {}, false, true);
  CHECK(testing::distance(found[0], wanted[0]) < 1e-12);
  CHECK_FALSE(found[1].defined());
  // W' computed before it is given to the function trains.
  const auto explicit_weight = in_model.w + 0;
  for (const auto& gradient : torch::autograd::grad({SavedProduct::apply(in_model.x, explicit_weight).sin().sum()},
                                                    {f.adapters->named_parameters()["fc.lora_A"]}))
    CHECK(gradient.abs().max().item<double>() > 0);
}

TEST_CASE("An operand with numbers of a weight and others is refused, and one beside it is not adapted") {
  torch::manual_seed(0);
  nn::Sequential model(nn::Linear(6, 4));
  model->to(testing::device(), torch::kDouble);
  auto& weight = model->ptr(0)->as<nn::Linear>()->weight;
  const auto packed = torch::randn({12, 6}, testing::on_device(torch::kDouble));
  weight.set_data(packed.narrow(0, 4, 4));
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).alpha(5).target_modules({"0"}));
  testing::randomize(adapters.parameters(), 0.4);
  const auto x = torch::randn({3, 6}, testing::on_device(torch::kDouble));
  const auto beside = F::linear(x, packed.narrow(0, 8, 4)), all = F::linear(x, packed);
  {
    auto active = adapters.activate();
    CHECK(torch::equal(F::linear(x, packed.narrow(0, 8, 4)), beside));
    CHECK_THAT(testing::error_of([&] { torch::linear(x, packed); }),
               testing::contains("aten::linear got a tensor that has some of the numbers of the weight of \"0\""));
    CHECK_THAT(testing::error_of([&] { weight.as_strided({4}, {6}, 18).exp(); }),
               testing::contains("aten::exp got a tensor that has some of the numbers of the weight of \"0\""));
  }
  CHECK(torch::equal(F::linear(x, packed), all));
}

TEST_CASE("Of a tied weight only the use that is adapted is one of W'; a weight for itself has every use") {
  torch::manual_seed(0);
  testing::Tied model;
  model->to(torch::kDouble);
  model->head->weight = model->tokens->weight;
  const auto ids = torch::tensor({1, 5, 0}, testing::device());
  const auto x = torch::randn({2, 4}, testing::on_device(torch::kDouble));
  const auto entries = model->tokens(ids), products = model->head(x);
  const std::string adapted = GENERATE("head", "tokens");
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).alpha(5).target_modules({adapted}));
  testing::randomize(adapters.parameters(), 0.4);
  auto active = adapters.activate();
  CHECK(torch::equal(model->tokens(ids), entries) == (adapted == "head"));
  CHECK(torch::equal(model->head(x), products) == (adapted == "tokens"));
}

TEST_CASE("A use of a tied weight that may be either layer's is refused where both are adapted") {
  torch::manual_seed(0);
  testing::Tied model;
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).alpha(5).target_modules({"head", "tokens"}));
  testing::randomize(adapters.parameters(), 0.4);
  const auto ids = torch::tensor({1, 5, 0}, testing::device());
  const auto weight = model->tokens->weight;
  const auto base = weight * 2;
  {
    auto active = adapters.activate();
    const auto entries = torch::embedding(base / 2 + adapters.delta("default", "tokens"), ids);
    CHECK(testing::distance(model->tokens(ids), entries) < 1e-6);
    const auto error = testing::error_of([&] { weight * 2; });
    CHECK_THAT(error, testing::contains("aten::mul got the weight that") && testing::contains("\"head\"") &&
                          testing::contains("\"tokens\""));
  }
  CHECK(torch::equal(weight * 2, base));
}

TEST_CASE("A convolution drops its input, whichever way its padding is said") {
  torch::manual_seed(0);
  nn::Sequential model(nn::Conv1d(nn::Conv1dOptions(3, 4, 3).padding(1)));
  model->to(testing::device(), torch::kDouble);
  const auto& layer = *model->ptr(0)->as<nn::Conv1d>();
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).alpha(5).dropout(0.5).target_modules({"0"}));
  testing::randomize(adapters.parameters(), 0.4);
  const auto x = torch::randn({2, 3, 6}, testing::on_device(torch::kDouble));
  const auto base = torch::conv1d(x, layer.weight, layer.bias, 1, 1);
  auto active = adapters.activate();
  const auto run = [&](const std::function<Tensor()>& pass) {
    torch::manual_seed(7);
    return pass();
  };
  const auto in_numbers = run([&] { return torch::conv1d(x, layer.weight, layer.bias, 1, 1); });
  CHECK(testing::distance(run([&] { return torch::conv1d(x, layer.weight, layer.bias, 1, "same"); }), in_numbers) <
        1e-12);
  torch::manual_seed(7);
  const auto delta = adapters.delta("default", "0");
  const auto by_hand = base + torch::conv1d(lora::detail::dropout(x, 0.5), delta, {}, 1, 1);
  CHECK(testing::distance(in_numbers, by_hand) < 1e-12);
}

TEST_CASE("What is no operator cannot be seen: memory is that of the base, and data() stops no gradient") {
  Fixture f(configs()[0]);
  const auto w = f.model->fc->weight;
  const auto base = w.detach().clone();
  auto active = f.adapters->activate();
  if (testing::device().is_cpu()) CHECK(w.data_ptr<double>()[8] == base[1][2].item<double>());
  CHECK(w[1][2].item<double>() != base[1][2].item<double>());
  const auto data = w.data() * 2;
  CHECK(testing::distance(data, w * 2) == 0);
  CHECK(data.requires_grad());  // `detach` is an operator, and does
}
