// The cross entropy of a head in chunks, against LibTorch's of all logits.
#include "support/halves.hpp"

#include <lora/attach.hpp>
#include <lora/quantize.hpp>
#include <lora/train/cross_entropy.hpp>

#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/frontend/tracer.h>

namespace {

using testing::contains;
using testing::error_of;
using testing::on_device;
using torch::Tensor;
using Options = lora::CrossEntropyOptions;
using Tensors = std::vector<Tensor>;
namespace F = torch::nn::functional;

Tensor random(at::IntArrayRef sizes) { return torch::randn(sizes, on_device(torch::kDouble)); }

/// LibTorch's, of all logits at once.
Tensor plain(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const Options& options) {
  const auto logits = torch::linear(hidden, weight, options.bias());
  const auto loss = F::cross_entropy(logits.reshape({-1, logits.size(-1)}), targets.reshape(-1).to(torch::kLong),
                                     F::CrossEntropyFuncOptions()
                                         .ignore_index(options.ignore_index())
                                         .label_smoothing(options.label_smoothing())
                                         .reduction(options.reduction()));
  return loss.dim() == 0 ? loss : loss.view(targets.sizes());
}

struct Reduction {
  const char* name;
  Options::reduction_t value;
};
const Reduction kReductions[] = {{"mean", torch::kMean}, {"sum", torch::kSum}, {"none", torch::kNone}};

/// A head of 11 classes over 5 features, with 4 x 3 rows of which two do not count.
struct Head {
  Head() {
    targets[1][2] = targets[3][0] = -7;
    hidden = hidden.detach().requires_grad_();
  }

  /// The gradients of the sum of the loss, times numbers that differ from row to row.
  Tensors gradients(const Tensor& loss, const Tensors& of) const {
    const auto factor = loss.dim() == 0 ? torch::full({}, -1.7, loss.options())
                                        : torch::arange(loss.numel(), loss.options()).view(loss.sizes()).sin();
    return torch::autograd::grad({(loss * factor).sum()}, of, {}, /*retain_graph=*/true, false, /*allow_unused=*/true);
  }

  Tensor hidden = (torch::manual_seed(1), random({4, 3, 5}));
  Tensor weight = random({11, 5}).requires_grad_(), bias = random({11}).requires_grad_();
  Tensor targets = torch::randint(11, {4, 3}, torch::kLong).to(testing::device());
};

void check_same(const Tensors& found, const Tensors& expected, double tolerance) {
  REQUIRE(found.size() == expected.size());
  for (size_t i = 0; i < found.size(); ++i) {
    INFO("tensor " << i);
    CHECK(testing::distance(found[i], expected[i]) < tolerance);
    CHECK(testing::distance(expected[i], torch::zeros_like(expected[i])) > 1e-4);
  }
}

}  // namespace

TEST_CASE("Value and gradients are those of the cross entropy of all logits, whatever learns") {
  const Head head;
  for (const auto& reduction : kReductions) {
    for (const double smoothing : {0.0, 0.3, 1.0}) {
      for (const int64_t chunk : {0, 1, 4, 10}) {
        for (int learning = 0; learning < 8; ++learning) {
          INFO(reduction.name << ", smoothing " << smoothing << ", chunks of " << chunk << ", learning " << learning);
          Tensors learned;
          const auto part = [&, learning](int bit, const Tensor& tensor) {
            if ((learning & bit) != 0) learned.push_back(tensor);
            return (learning & bit) != 0 ? tensor : tensor.detach();
          };
          const auto hidden = part(1, head.hidden), weight = part(2, head.weight);
          auto options = Options().ignore_index(-7).label_smoothing(smoothing).reduction(reduction.value);
          options.bias(part(4, head.bias)).chunk_rows(chunk);
          const auto loss = lora::linear_cross_entropy(hidden, weight, head.targets, options);
          const auto expected = plain(hidden, weight, head.targets, options);
          CHECK(testing::distance(loss, expected) < 1e-13);
          CHECK(loss.requires_grad() == (learning != 0));
          if (learning == 0) continue;
          check_same(head.gradients(loss, learned), head.gradients(expected, learned), 1e-13);
          check_same(head.gradients(loss, learned), head.gradients(expected, learned), 1e-13);  // a second pass
        }
      }
    }
  }
}

TEST_CASE("Of a head with many classes a few rows of a chunk are looked at together") {
  torch::manual_seed(0);
  const auto weight = random({90000, 3}).requires_grad_(), hidden = random({7, 3}).requires_grad_();
  const auto targets = torch::randint(90000, {7}, torch::kLong).to(testing::device());
  const auto options = Options().label_smoothing(0.1).chunk_rows(5);
  const auto loss = lora::linear_cross_entropy(hidden, weight, targets, options);
  const auto expected = plain(hidden, weight, targets, options);
  CHECK(testing::distance(loss, expected) < 1e-12);
  check_same(torch::autograd::grad({loss}, {hidden, weight}), torch::autograd::grad({expected}, {hidden, weight}),
             1e-11);
}

TEST_CASE("Gradients are slopes") {
  Head head;
  const auto options = Options().ignore_index(-7).label_smoothing(0.2).bias(head.bias).chunk_rows(3);
  const auto loss = [&] { return lora::linear_cross_entropy(head.hidden, head.weight, head.targets, options) * 2; };
  if (testing::device().is_cpu()) CHECK(testing::gradient_error(loss, {head.hidden, head.weight, head.bias}) < 1e-8);
  loss().backward();
  const auto first = head.weight.grad().clone();
  loss().backward();  // adds up, and does not write into what the first pass left
  CHECK(testing::distance(head.weight.grad(), first * 2) < 1e-14);
}

TEST_CASE("A head that is tied to the hidden rows gets both gradients, and other shapes of rows do") {
  torch::manual_seed(0);
  const auto weight = random({6, 4}).requires_grad_();
  const auto targets = torch::tensor({3, 0, 5, 1, 1, 2}, on_device(torch::kLong));
  const auto hidden = weight * 2;
  const auto found = torch::autograd::grad({lora::linear_cross_entropy(hidden, weight, targets)}, {weight})[0];
  const auto expected = torch::autograd::grad({plain(weight * 2, weight, targets, {})}, {weight})[0];
  CHECK(testing::distance(found, expected) < 1e-14);

  const auto row = random({4});
  const auto one = torch::tensor(2, on_device(torch::kInt));  // also of another integral type
  CHECK(testing::distance(lora::linear_cross_entropy(row, weight, one),
                          plain(row.unsqueeze(0), weight, one.unsqueeze(0), {})) < 1e-14);
  const auto turned = random({4, 6}).t();  // rows that are no rows of memory
  CHECK(testing::distance(lora::linear_cross_entropy(turned, weight, targets), plain(turned, weight, targets, {})) <
        1e-14);
}

TEST_CASE("Logits of any size give a finite loss, and no rows give what LibTorch gives") {
  torch::manual_seed(0);
  const auto weight = random({6, 4}), hidden = (random({3, 4}) * 1e4).requires_grad_();
  const auto targets = torch::tensor({3, 0, 5}, on_device(torch::kLong));
  const auto loss = lora::linear_cross_entropy(hidden, weight, targets), expected = plain(hidden, weight, targets, {});
  CHECK(testing::distance(loss, expected) < 1e-9);
  CHECK(loss.item<double>() > 1e3);
  check_same(torch::autograd::grad({loss}, {hidden}), torch::autograd::grad({expected}, {hidden}), 1e-13);

  for (const auto& none : {targets.narrow(0, 0, 0), torch::full_like(targets, -100)}) {
    const auto rows = hidden.narrow(0, 0, none.size(0));
    const auto mean = lora::linear_cross_entropy(rows, weight, none);
    CHECK(std::isnan(mean.item<double>()));
    const auto sum = lora::linear_cross_entropy(rows, weight, none, Options().reduction(torch::kSum));
    CHECK(sum.item<double>() == 0);
    sum.backward();
    const auto each =
        lora::linear_cross_entropy(rows, weight.detach().requires_grad_(), none, Options().reduction(torch::kNone));
    CHECK(testing::distance(each, torch::zeros(none.sizes())) == 0);
  }
  CHECK(hidden.grad().abs().sum().item<double>() == 0);
}

TEST_CASE("In half precision the softmax is in float, and with autocast the products are in half precision") {
  torch::manual_seed(0);
  const auto type = GENERATE(torch::kBFloat16, torch::kHalf);
  const auto smoothing = GENERATE(0.0, 0.1);
  const auto weight = random({300, 16}).to(type).requires_grad_(), bias = random({300}).to(type).requires_grad_();
  const auto hidden = random({70, 16}).to(type).requires_grad_();
  const auto targets = torch::randint(300, {70}, torch::kLong).to(testing::device());
  const auto wide = [](const Tensor& tensor) { return tensor.detach().to(torch::kDouble).requires_grad_(); };
  const auto h = wide(hidden), w = wide(weight), b = wide(bias);
  const auto options = Options().label_smoothing(smoothing).chunk_rows(32);
  const auto expected = plain(h, w, targets, Options(options).bias(b));
  const auto expected_gradients = torch::autograd::grad({expected}, {h, w, b});
  const double digits = type == torch::kHalf ? 1e-3 : 8e-3;

  const auto loss = lora::linear_cross_entropy(hidden, weight, targets, Options(options).bias(bias));
  CHECK(loss.scalar_type() == torch::kFloat);
  CHECK(testing::distance(loss, expected) < digits * 4);
  const auto gradients = torch::autograd::grad({loss}, {hidden, weight, bias});
  for (size_t i = 0; i < gradients.size(); ++i) {
    CHECK(gradients[i].scalar_type() == type);
    const auto largest = expected_gradients[i].abs().max().item<double>();
    CHECK(testing::distance(gradients[i], expected_gradients[i]) < 8 * digits * largest);
  }

  const auto kind = testing::device().type();
  const auto hf = hidden.detach().to(torch::kFloat).requires_grad_();
  const auto wf = weight.detach().to(torch::kFloat).requires_grad_();
  at::autocast::set_autocast_enabled(kind, true);
  const auto before = at::autocast::get_autocast_dtype(kind);
  at::autocast::set_autocast_dtype(kind, type);
  const auto cast = lora::linear_cross_entropy(hf, wf, targets, options);
  at::autocast::set_autocast_enabled(kind, false);
  at::autocast::set_autocast_dtype(kind, before);
  at::autocast::clear_cache();
  CHECK(cast.scalar_type() == torch::kFloat);
  const auto same = lora::linear_cross_entropy(hidden, weight, targets, options);
  CHECK(torch::equal(cast.cpu(), same.cpu()));
  const auto of_cast = torch::autograd::grad({cast}, {hf, wf}),
             of_same = torch::autograd::grad({same}, {hidden, weight});
  for (size_t i = 0; i < of_cast.size(); ++i) {
    CHECK(of_cast[i].scalar_type() == torch::kFloat);
    CHECK(testing::distance(of_cast[i], of_same[i]) == 0);
  }
}

TEST_CASE("An adapter of the head acts in its scope, with gradients, and chunks go through it") {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(5, 5), torch::nn::Linear(5, 11));
  model->to(testing::device(), torch::kDouble);
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).alpha(5).target_modules({"1"}));
  for (const auto& parameter : adapters.parameters()) torch::nn::init::normal_(parameter, 0.0, 0.5);
  const Head head;
  const auto linear = model->ptr(1)->as<torch::nn::Linear>();
  auto learned = adapters.parameters();
  learned.push_back(head.hidden);
  for (const auto& reduction : kReductions) {
    for (const bool has_bias : {true, false}) {
      INFO(reduction.name << (has_bias ? "" : ", no bias"));
      auto options = Options().ignore_index(-7).label_smoothing(0.1).reduction(reduction.value).chunk_rows(4);
      if (has_bias) options.bias(linear->bias);
      Tensor loss, expected;
      {
        const auto active = adapters.activate();
        loss = lora::linear_cross_entropy(head.hidden, linear->weight, head.targets, options);
        expected = plain(head.hidden, linear->weight, head.targets, options);
      }
      CHECK(testing::distance(loss, expected) < 1e-13);
      const auto base = lora::linear_cross_entropy(head.hidden, linear->weight, head.targets, options);
      CHECK(testing::distance(base, expected) > 1e-2);
      CHECK(testing::distance(base, plain(head.hidden, linear->weight, head.targets, options)) < 1e-13);
      check_same(head.gradients(loss, learned), head.gradients(expected, learned), 1e-13);
    }
  }
}

TEST_CASE("In a scope that adapts the layers below, the head is computed as it is") {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(5, 5), torch::nn::Linear(5, 11));
  model->to(testing::device(), torch::kDouble);
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).alpha(5).target_modules({"0"}));
  for (const auto& parameter : adapters.parameters()) torch::nn::init::normal_(parameter, 0.0, 0.5);
  const Head head;
  const auto& weight = model->ptr(1)->as<torch::nn::Linear>()->weight;
  const auto active = adapters.activate();
  const auto hidden = model->ptr(0)->as<torch::nn::Linear>()->forward(head.hidden);
  const auto options = Options().ignore_index(-7);
  const auto loss = lora::linear_cross_entropy(hidden, weight, head.targets, options);
  CHECK(loss.grad_fn()->name().find("LinearCrossEntropy") != std::string::npos);
  const auto expected = plain(hidden, weight, head.targets, options);
  CHECK(testing::distance(loss, expected) < 1e-14);
  check_same(head.gradients(loss, adapters.parameters()), head.gradients(expected, adapters.parameters()), 1e-13);
}

TEST_CASE("A head in few bits is multiplied a part at a time, in scopes") {
  const auto type = GENERATE(torch::kDouble, torch::kFloat, torch::kBFloat16);
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(5, 5), torch::nn::Linear(5, 11));
  model->to(testing::device(), type);
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).alpha(5).target_modules({"0"}));
  auto& held = model->ptr(1)->as<torch::nn::Linear>()->weight;
  lora::quantize(*model, testing::Halves(), lora::QuantizeOptions().target_modules({"1"}));
  const Head head;
  const auto hidden = head.hidden.detach().to(type).requires_grad_();
  const auto bias = head.bias.detach().to(type).requires_grad_();
  for (const auto& reduction : kReductions) {
    for (const bool has_bias : {true, false}) {
      INFO(type << ", " << reduction.name << (has_bias ? "" : ", no bias"));
      auto options = Options().ignore_index(-7).label_smoothing(0.1).reduction(reduction.value).chunk_rows(4);
      if (has_bias) options.bias(bias.detach());
      const auto active = adapters.activate();
      const auto numbers = lora::detail::dequantized(held);
      const auto loss = lora::linear_cross_entropy(hidden, held, head.targets, options);
      const bool is_one = loss.dim() == 0;
      CHECK((!is_one || loss.grad_fn()->name().find("LinearCrossEntropy") != std::string::npos));
      const auto expected = lora::linear_cross_entropy(hidden, numbers, head.targets, options);
      CHECK(testing::distance(loss, expected) < 1e-6);
      check_same(head.gradients(loss, {hidden}), head.gradients(expected, {hidden}), 1e-6);
      if (!has_bias || !is_one) continue;
      options.bias(bias);
      const auto of_bias = lora::linear_cross_entropy(hidden, held, head.targets, options);
      const auto exact = lora::linear_cross_entropy(hidden, numbers, head.targets, options);
      check_same(head.gradients(of_bias, {hidden, bias}), head.gradients(exact, {hidden, bias}), 1e-6);
    }
  }
  held.requires_grad_();  // as a loop over all parameters does; few bits are not trained all the same
  {
    const auto active = adapters.activate();
    const auto options = Options().ignore_index(-7);
    const auto both = torch::autograd::grad({lora::linear_cross_entropy(hidden, held, head.targets, options)},
                                            {hidden, held}, {}, {}, false, /*allow_unused=*/true);
    CHECK((both[0].defined() && !both[1].defined()));
    held.requires_grad_(false);
    const torch::NoGradGuard no_grad;
    const auto run = [&](torch::jit::Stack stack) {
      return torch::jit::Stack{lora::linear_cross_entropy(stack[0].toTensor(), held, head.targets, options)};
    };
    const auto traced = torch::jit::tracer::trace({hidden.detach()}, run, [](const auto&) { return ""; }).first;
    torch::jit::GraphFunction function("loss", traced->graph, nullptr);
    torch::jit::Stack other{hidden.detach() + 1};
    const auto expected = run(other)[0].toTensor();
    function.run(other);
    CHECK(testing::distance(other[0].toTensor(), expected) < 1e-6);
  }
  const auto outside = [&] { lora::linear_cross_entropy(hidden, held, head.targets, Options().ignore_index(-7)); };
  CHECK_THAT(error_of(outside), contains("is held in 16 bits"));
}

TEST_CASE("Without gradient mode there is no graph, and a second derivative is refused") {
  const Head head;
  const auto options = Options().ignore_index(-7);
  {
    torch::NoGradGuard no_grad;
    CHECK_FALSE(lora::linear_cross_entropy(head.hidden, head.weight, head.targets, options).requires_grad());
  }
  const auto loss = lora::linear_cross_entropy(head.hidden, head.weight, head.targets, options);
  CHECK_THAT(error_of([&] { torch::autograd::grad({loss}, {head.hidden}, {}, {}, /*create_graph=*/true); }),
             contains("lora::linear_cross_entropy: its gradient is computed with the loss and has no derivative of its "
                      "own; where a second one is needed"));
}

TEST_CASE("What does not fit is refused by name") {
  const auto hidden = random({2, 3, 4}), weight = random({7, 4}), bias = random({7});
  const auto targets = torch::zeros({2, 3}, on_device(torch::kLong));
  auto wrong = targets.clone();
  wrong[1][0] = 7;
  const auto call = [&](const Tensor& h, const Tensor& w, const Tensor& t, const Options& options = {}) {
    return error_of([&] { lora::linear_cross_entropy(h, w, t, options); });
  };
  CHECK_THAT(call(hidden, random({7, 5}), targets),
             contains("hidden [2, 3, 4] and weight [7, 5] do not fit; they have to be (..., features) and"));
  CHECK_THAT(call(hidden, bias, targets), contains("and weight [7] do not fit"));
  CHECK_THAT(call(hidden, weight, targets.view(-1)), contains("targets [6] do not fit hidden [2, 3, 4]; each row has"));
  CHECK_THAT(call(hidden, weight, targets.to(torch::kDouble)),
             contains("targets have to be numbers of classes (torch::kLong), but are Double"));
  CHECK_THAT(call(hidden, weight.to(torch::kFloat), targets),
             contains("have to be of one type, but hidden is Double and the weight Float; cast one of them"));
  CHECK_THAT(call(hidden.to(torch::kLong), weight, targets), contains("of a floating type, but are Long and Double"));
  CHECK_THAT(call(hidden, weight, targets, Options().bias(random({6}))),
             contains("the bias [6] does not fit the weight [7, 4]; it has to be (classes)"));
  CHECK_THAT(call(hidden, weight, targets, Options().label_smoothing(1.5)),
             contains("label_smoothing has to be in [0, 1], but got 1.5"));
  CHECK_THAT(call(hidden, weight, targets, Options().chunk_rows(-1)),
             contains("chunk_rows has to be at least 1, or 0 for the default, but got -1"));
  CHECK_THAT(call(hidden, weight, wrong), contains("target 3 is 7, but there are 7 classes, the rows of the weight"));
  CHECK_THROWS_AS(lora::linear_cross_entropy(hidden, weight, wrong), c10::IndexError);
  CHECK_THAT(call(hidden, weight, wrong - 8, Options().ignore_index(-8)), contains("target 3 is -1, but there are 7"));
  if (!testing::device().is_cpu()) {
    CHECK_THAT(call(hidden, weight.cpu(), targets), contains("all tensors have to be on one device, but hidden is on"));
  }
}
