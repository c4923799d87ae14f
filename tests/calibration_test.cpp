// Codes of four bits that are chosen in view of what a weight is multiplied with, beside the formula of optimal brain
// surgery, one input after the other, in double.
#include "support/models.hpp"

#include <lora/lora.hpp>

namespace {

using testing::contains;
using testing::error_of;
using torch::Tensor;

/// Inputs that go together: mixtures of a few patterns, and some noise.
Tensor inputs(int64_t rows, int64_t width) {
  const auto mixed = torch::randn({rows, 5}, testing::on_device(torch::kFloat))
                         .mm(torch::randn({5, width}, testing::on_device(torch::kFloat)));
  return mixed + 0.1 * torch::randn({rows, width}, testing::on_device(torch::kFloat));
}

lora::SeenInputs seen(const Tensor& x, int64_t dim = 1) { return {x.t().mm(x), dim}; }

/// What the products with x lose, as a share of the products.
double loss(const lora::FourBitTensor& packed, const Tensor& weight, const Tensor& x) {
  const auto lost = lora::dequantize(packed) - weight;
  return (x.mm(lost.t()).norm() / x.mm(weight.t()).norm()).item<double>();
}

/// The formula: the inputs in the order of their squares; what one loses changes those that are left, by the inverse of
/// the moments of those alone.
Tensor rounded(const lora::FourBitTensor& packed, const Tensor& weight, const Tensor& moments) {
  auto all = packed;
  std::vector<Tensor> values;
  for (int code = 0; code < 16; ++code) {
    all.codes = torch::full_like(packed.codes, code * 17);
    values.push_back(lora::dequantize(all).to(torch::kDouble));
  }
  const auto candidates = torch::stack(values);  // (16, out, in)
  auto w = weight.to(torch::kDouble).clone();
  auto H = moments.to(torch::kDouble);
  H = H + 0.01 * H.diagonal().mean() * torch::eye(H.size(0), H.options());
  const auto order = moments.diagonal().argsort(/*stable=*/true, 0, /*descending=*/true);
  for (int64_t i = 0; i < w.size(1); ++i) {
    const auto left = order.narrow(0, i, w.size(1) - i);
    const auto j = left[0].item<int64_t>();
    const auto inverse = H.index_select(0, left).index_select(1, left).inverse();
    const auto choices = candidates.select(2, j);  // (16, out)
    const auto best = (choices - w.select(1, j)).abs().argmin(0, /*keepdim=*/true);
    const auto q = choices.gather(0, best).squeeze(0);
    const auto step = (w.select(1, j) - q) / inverse[0][0];
    w.index_add_(1, left, step.unsqueeze(1) * inverse[0].unsqueeze(0), -1);
    w.select(1, j).copy_(q);
  }
  return w;
}

}  // namespace

TEST_CASE("Codes for inputs that were seen follow the formula, with the scales that they had") {
  const auto width = GENERATE(32, 96, 7);  // with whole blocks, more than are computed together, and an odd one
  const bool nested = GENERATE(true, false);
  torch::manual_seed(width);
  const auto weight = torch::randn({5, width}, testing::on_device(torch::kFloat)), x = inputs(200, width);
  const auto options = lora::NF4().block_size(32).double_quantization(nested);
  const auto nearest = lora::quantize_nf4(weight, options);
  const auto packed = lora::quantize_nf4(weight, options, seen(x));
  CHECK(torch::equal(packed.absmax, nearest.absmax));
  CHECK(testing::distance(lora::dequantize(packed), rounded(packed, weight, seen(x).moments)) < 1e-5);
  CHECK(loss(packed, weight, x) < 0.6 * loss(nearest, weight, x));
  // The transpose, as some layers keep it, has blocks of its own.
  const auto other = lora::quantize_nf4(weight.t().contiguous(), options);
  const auto turned = lora::quantize_nf4(weight.t().contiguous(), options, seen(x, 0));
  const auto change = [&](const lora::FourBitTensor& tensor) {
    return x.mm(lora::dequantize(tensor) - weight.t()).norm().item<double>();
  };
  CHECK(change(turned) < 0.75 * change(other));
  const auto fp4 = lora::FP4().block_size(32).double_quantization(nested);
  CHECK(loss(lora::quantize_fp4(weight, fp4, seen(x)), weight, x) <
        0.8 * loss(lora::quantize_fp4(weight, fp4), weight, x));
}

TEST_CASE("Inputs that have nothing to do with each other leave every number the nearest value") {
  torch::manual_seed(0);
  auto weight = torch::randn({9, 64}, testing::on_device(torch::kFloat));
  weight[3].zero_();  // a block without numbers
  const auto options = lora::NF4().double_quantization(false);
  const auto moments = torch::diag(torch::arange(64, testing::on_device(torch::kFloat)));  // one input is never there
  CHECK(testing::distance(lora::dequantize(lora::quantize_nf4(weight, options, {moments})),
                          lora::dequantize(lora::quantize_nf4(weight, options))) == 0);
}

TEST_CASE("Moments that do not fit are refused") {
  const auto weight = torch::randn({4, 32}, testing::on_device(torch::kFloat));
  const auto moments = torch::eye(32, testing::on_device(torch::kFloat));
  const auto error = [&](const Tensor& wrong, int64_t dim = 1) {
    return error_of([&] { lora::quantize_nf4(weight, lora::NF4(), {wrong, dim}); });
  };
  CHECK_THAT(error(moments.narrow(0, 0, 4)), contains("[4, 32] with inputs in dimension 1 needs their moments"));
  CHECK_THAT(error(moments, 0), contains("with inputs in dimension 0"));
  CHECK_THAT(error(moments.to(torch::kDouble)), contains("as a matrix of Float"));
  CHECK_THAT(error(Tensor()), contains("needs their moments"));
  CHECK_THAT(error(moments * std::numeric_limits<float>::infinity()), contains("are not finite"));
}

namespace {

/// Linear layers, of which one is used in part and one in other ways beside, and a matrix of its own.
struct NetImpl : torch::nn::Module {
  NetImpl() { to(testing::device()); }
  Tensor forward(const Tensor& x) {
    return down(up(x).tanh().unsqueeze(0)).squeeze(0).matmul(turned) + x.matmul(parts->weight.narrow(0, 0, 32).t()) +
           penalized(x) + (penalized->weight * penalized->weight).sum(0);
  }
  torch::nn::Linear up = register_module("up", torch::nn::Linear(32, 64));
  torch::nn::Linear down = register_module("down", torch::nn::Linear(64, 32));
  torch::nn::Linear parts = register_module("parts", torch::nn::Linear(32, 64));
  torch::nn::Linear penalized = register_module("penalized", torch::nn::Linear(32, 32));
  Tensor turned = register_parameter("turned", torch::randn({32, 32}));
};
TORCH_MODULE(Net);

}  // namespace

TEST_CASE("A model is held in few bits in view of what passes through it") {
  torch::manual_seed(0);
  Net model, other;
  {
    torch::NoGradGuard no_grad;
    for (const auto& item : model->named_parameters()) other->named_parameters()[item.key()].copy_(item.value());
  }
  const auto x = inputs(100, 32), exact = model->forward(x).detach();
  int passes = 0;
  const auto run = [&] {
    ++passes;
    CHECK(torch::equal(model->forward(x), exact));
    CHECK(!torch::GradMode::is_enabled());
  };
  const auto options = lora::QuantizeOptions().target_modules({"up", "down"});
  const auto scheme = lora::NF4().block_size(32);
  lora::quantize(*other, scheme, options);
  const auto report = lora::quantize(*model, scheme, lora::QuantizeOptions(options).calibration(run));
  CHECK(passes == 1);
  CHECK(report.layers == std::vector<std::string>{"up", "down"});
  CHECK(report.uncalibrated.empty());
  lora::dequantize(*model);
  lora::dequantize(*other);
  CHECK((model->forward(x) - exact).norm().item<double>() < 0.7 * (other->forward(x) - exact).norm().item<double>());
}

TEST_CASE("What a calibration does not see is said, or refused where it sees nothing") {
  torch::manual_seed(0);
  Net model;
  const auto x = inputs(10, 32);
  const auto run = [&] { model->forward(x); };
  const auto all = lora::QuantizeOptions().target_modules({"up", "down", "parts", "penalized"}).calibration(run);
  const auto before = model->parts->weight.detach().clone();
  const auto fails = [&](const lora::Quantization& scheme, const lora::QuantizeOptions& options) {
    const auto text = error_of([&] { lora::quantize(*model, scheme, options); });
    CHECK(torch::equal(model->parts->weight, before));
    return text;
  };
  CHECK_THAT(fails(lora::Int8(), all), contains("a calibration has no effect on it"));
  const auto nothing = lora::QuantizeOptions(all).calibration([] {});
  CHECK_THAT(fails(lora::NF4(), nothing), contains("with none of the weights as a whole: up, down, parts, penalized"));
  const auto breaks = lora::QuantizeOptions(all).calibration([&] { model->forward(x * INFINITY); });
  CHECK_THAT(fails(lora::NF4(), breaks), contains("the inputs of up are not finite"));
  const auto throws = lora::QuantizeOptions(all).calibration([] { TORCH_CHECK(false, "no more rows"); });
  CHECK_THAT(fails(lora::NF4(), throws), contains("no more rows"));
  CHECK(lora::quantize(*model, lora::NF4(), all).uncalibrated == std::vector<std::string>{"parts", "penalized"});
}
