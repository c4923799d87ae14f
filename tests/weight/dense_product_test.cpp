// Products of float32 by oneDNN, and of one row by vectors of ours, against those by LibTorch's own choice, and against
// the same in double.
#include "support/testing.hpp"

#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>

#include <lora/attach.hpp>
#include <lora/modules/linear.hpp>
#include <lora/quantize.hpp>
#include <lora/train/cross_entropy.hpp>
#include <lora/weight/dense_product.hpp>
#include <lora/weight/four_bit.hpp>
#include <lora/weight/thin_product.hpp>

namespace {

using torch::Tensor;
using Tensors = std::vector<Tensor>;
namespace F = torch::nn::functional;

// Enough for oneDNN, also with a rank of kRank, which is too large for kernels of ours, and such that rows collide in
// the cache.
constexpr int64_t kRows = 96, kInputs = 512, kOutputs = 1024, kRank = 96;

/// Decides for a test who computes products.
struct Computed {
  explicit Computed(bool by_onednn)
      : before(lora::detail::takes_onednn()), is_there(lora::detail::take_onednn(by_onednn)) {}
  ~Computed() { lora::detail::take_onednn(before); }
  Computed(const Computed&) = delete;
  Computed& operator=(const Computed&) = delete;

  const bool before, is_there;
};

/// Counts what oneDNN computes on this thread while it lives.
class CallsOfOneDnn {
 public:
  CallsOfOneDnn() : handle_(at::addThreadLocalCallback(at::RecordFunctionCallback(see))) { count_ = 0; }
  ~CallsOfOneDnn() { at::removeCallback(handle_); }
  CallsOfOneDnn(const CallsOfOneDnn&) = delete;
  CallsOfOneDnn& operator=(const CallsOfOneDnn&) = delete;
  int64_t count() const { return count_; }

 private:
  static std::unique_ptr<at::ObserverContext> see(const at::RecordFunction& function) {
    count_ += function.name() == std::string("mkldnn::_linear_pointwise");
    return nullptr;
  }
  static inline thread_local int64_t count_ = 0;
  const at::CallbackHandle handle_;
};

Tensor random(at::IntArrayRef sizes) { return torch::randn(sizes); }

/// The largest difference, as a share of the largest number.
double error(const Tensor& found, const Tensor& exact) {
  return testing::distance(found, exact) / exact.detach().abs().max().item<double>();
}

TEST_CASE("Of all numbers of rows few are regular, and each is a sum of few of these") {
  std::vector<int64_t> regular;
  for (int64_t rows = 1; rows <= 100; ++rows) {
    if (lora::detail::is_regular(rows)) regular.push_back(rows);
  }
  CHECK(regular == std::vector<int64_t>{1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96});
  for (int64_t rows = 1; rows <= 5000; ++rows) {
    const auto some = lora::detail::regular_rows(rows);
    if (some > rows || 3 * some < 2 * rows) FAIL(some << " of " << rows << " rows");
  }
  CHECK_FALSE(lora::detail::is_regular(0));
}

struct Layout {
  const char* name;
  Tensor matrix;  // (in, out)
};

std::vector<Layout> layouts() {
  return {{"rows", random({kInputs, kOutputs})},
          {"columns", random({kOutputs, kInputs}).t()},
          {"some rows of a larger weight", random({3 * kOutputs, kInputs}).narrow(0, kOutputs, kOutputs).t()}};
}

}  // namespace

TEST_CASE("oneDNN multiplies matrices as they lie in memory") {
  const Computed by(true);
  torch::manual_seed(0);
  for (const auto& [name, matrix] : layouts()) {
    for (const bool has_bias : {false, true}) {
      INFO(name << (has_bias ? " with a bias" : ""));
      const auto bias = has_bias ? random({kOutputs}) : Tensor();
      const auto wide = random({kRows, 2 * kInputs});
      for (const auto& x :
           {random({kRows, kInputs}), random({kInputs, kRows}).t(), wide.narrow(1, 5, kInputs), random({4, kInputs}),
            random({kRows - 1, kInputs}), wide.narrow(1, 5, kInputs).narrow(0, 0, 71), random({kInputs, 101}).t()}) {
        CHECK(lora::detail::is_for_onednn(x, matrix, bias, 0) == by.is_there);
        CHECK(lora::detail::is_for_onednn(x, matrix.t(), bias, 1) == by.is_there);
        if (!by.is_there) continue;
        auto exact = x.to(torch::kDouble).mm(matrix.to(torch::kDouble));
        if (has_bias) exact += bias;
        CHECK(error(lora::detail::onednn_mm(x, matrix, bias), exact) < 3e-6);
      }
    }
  }
}

TEST_CASE("Products that are scaled or added to a sum are the same by both") {
  torch::manual_seed(1);
  const auto a = random({kRank, kRows}).t(), b = random({kRank, kOutputs}), sum = random({kRows, kOutputs});
  const auto exact = a.to(torch::kDouble).mm(b.to(torch::kDouble));
  for (const bool by_onednn : {false, true}) {
    const Computed by(by_onednn);
    INFO(by_onednn);
    CHECK(lora::detail::is_for_onednn(a, b, {}, 0) == (by_onednn && by.is_there));
    CHECK(error(lora::detail::matrix_product(a, b), exact) < 3e-6);
    CHECK(error(lora::detail::thin_mm(b.t(), a), exact.t()) < 3e-6);
    CHECK(error(lora::detail::thin_mm_like(sum, a, b, -1.5), exact * -1.5) < 3e-6);
    auto whole = sum.clone(), columns = torch::cat({sum, sum}, 1), part = columns.narrow(1, 0, kOutputs);
    lora::detail::add_thin_mm(whole, a.t(), b, 0.75);
    lora::detail::add_thin_mm(part, a.t(), b, 0.75);
    CHECK(error(whole, sum + exact * 0.75) < 3e-6);
    CHECK(part.is_alias_of(columns));
    CHECK(error(part, sum + exact * 0.75) < 3e-6);
    CHECK(torch::equal(columns.narrow(1, kOutputs, kOutputs), sum));
  }
}

TEST_CASE("What oneDNN does not compute, or not faster, is left to LibTorch") {
  const Computed by(true);
  const auto x = random({kRows, kInputs}), matrix = random({kInputs, kOutputs}), bias = random({kOutputs});
  const auto is_for = [](const Tensor& x, const Tensor& matrix, const Tensor& bias = {}) {
    return lora::detail::is_for_onednn(x, matrix, bias, /*inputs=*/0);
  };
  REQUIRE(is_for(x, matrix, bias) == by.is_there);
  CHECK(is_for(x.view({4, kRows / 4, kInputs}), matrix) == by.is_there);
  CHECK_FALSE(is_for(x.narrow(0, 0, 3), matrix));
  CHECK_FALSE(is_for(x, matrix.narrow(1, 0, 8)));
  CHECK_FALSE(is_for(x[0], matrix));
  CHECK_FALSE(is_for(x, matrix.t()));
  CHECK_FALSE(is_for(x, matrix.unsqueeze(0)));
  CHECK_FALSE(is_for(x.to(torch::kDouble), matrix.to(torch::kDouble)));
  CHECK_FALSE(is_for(x, matrix.to(torch::kBFloat16)));
  CHECK_FALSE(is_for(x, matrix, bias.to(torch::kDouble)));
  CHECK_FALSE(is_for(x, matrix, bias.narrow(0, 0, 1)));
  CHECK_FALSE(is_for(x, matrix, bias.unsqueeze(0)));
  CHECK_FALSE(is_for(x, random({1, kOutputs}).expand({kInputs, kOutputs})));
  CHECK_FALSE(is_for(x, random({kInputs, 2 * kOutputs}).narrow(1, 0, kOutputs)));
  CHECK_FALSE(is_for(x, random({kOutputs, 2 * kInputs}).narrow(1, 7, kInputs).t()));
  CHECK_FALSE(is_for(x, random({kInputs, 2, kOutputs, 2}).select(3, 0).select(1, 0)));
  CHECK_FALSE(is_for(x, torch::empty({kInputs, kOutputs}, torch::kMeta)));
  CHECK_FALSE(is_for(at::_nested_tensor_from_tensor_list({x, x.narrow(0, 0, 40)}), matrix));
  {
    const auto learning = matrix.clone().requires_grad_();
    CHECK_FALSE(is_for(x, learning));
    const torch::NoGradGuard no_grad;
    CHECK(is_for(x, learning) == by.is_there);
  }
  at::autocast::set_autocast_enabled(at::kCPU, true);
  CHECK_FALSE(is_for(x, matrix));
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::globalContext().setUserEnabledMkldnn(false);
  CHECK_FALSE(is_for(x, matrix));
  at::globalContext().setUserEnabledMkldnn(true);
  lora::detail::take_onednn(false);
  CHECK_FALSE(is_for(x, matrix));
}

namespace {

/// What a case computes, and with gradients by which tensors. The same numbers in every call; `type` is that of all.
struct Run {
  Tensor value;
  Tensors gradients;
};

struct Case {
  const char* name;
  std::function<Run(torch::ScalarType, int64_t rows)> run;
};

Tensor input(torch::ScalarType type, int64_t rows = kRows) {
  torch::manual_seed(3);
  return torch::randn({rows == 1 ? 1 : 4, std::max<int64_t>(rows / 4, 1), kInputs}, torch::kDouble)
      .to(type)
      .requires_grad_();
}

torch::nn::Linear layer(torch::ScalarType type) {
  torch::nn::Linear linear(kInputs, kOutputs);
  torch::manual_seed(4);
  const torch::NoGradGuard no_grad;
  linear->to(type);
  linear->weight.copy_(torch::randn(linear->weight.sizes(), torch::kDouble) / 16);
  linear->bias.copy_(torch::randn(linear->bias.sizes(), torch::kDouble));
  linear->weight.requires_grad_(false);
  return linear;
}

Run derived(const Tensor& y, const Tensors& learning) {
  auto value = (y * torch::arange(y.numel(), y.options()).view(y.sizes()).sin()).sum();
  // And once more by a gradient, where it depends on something.
  const auto first = torch::autograd::grad({value}, learning, {}, /*retain_graph=*/true, /*create_graph=*/true);
  Run run{y.detach(), {}};
  for (const auto& gradient : first) run.gradients.push_back(gradient.detach());
  Tensor sum = torch::zeros({}, y.options());
  for (const auto& gradient : first) sum = sum + gradient.pow(2).sum();
  if (!sum.requires_grad()) return run;
  for (const auto& gradient : torch::autograd::grad({sum}, learning, {}, false, false, /*allow_unused=*/true)) {
    if (gradient.defined()) run.gradients.push_back(gradient);
  }
  return run;
}

Tensors with_start(const lora::Adapters& adapters, torch::ScalarType type) {
  torch::manual_seed(5);
  const torch::NoGradGuard no_grad;
  auto parameters = adapters.parameters();
  for (auto& parameter : parameters) parameter.copy_(torch::randn(parameter.sizes(), torch::kDouble).to(type) / 8);
  return parameters;
}

const Case kCases[] = {
    {"an adapted layer",
     [](torch::ScalarType type, int64_t rows) {
       torch::nn::Sequential model(layer(type));
       auto adapters = lora::attach(*model, lora::LoRAConfig(kRank).alpha(96).target_modules({"0"}));
       auto learning = with_start(adapters, type);
       const auto x = input(type, rows);
       learning.push_back(x);
       learning.push_back(model->parameters()[1].requires_grad_());
       const auto active = adapters.activate();
       return derived(model->forward(x), learning);
     }},
    {"a layer with DoRA",
     [](torch::ScalarType type, int64_t rows) {
       torch::nn::Sequential model(layer(type));
       const auto config = lora::LoRAConfig(8).alpha(12).target_modules({"0"}).method(lora::DoRA());
       auto adapters = lora::attach(*model, config);
       auto learning = with_start(adapters, type);
       const auto x = input(type, rows);
       learning.push_back(x);
       const auto active = adapters.activate();
       return derived(model->forward(x), learning);
     }},
    {"a layer beside adapted ones",
     [](torch::ScalarType type, int64_t rows) {
       torch::nn::Sequential model(layer(type), torch::nn::Linear(kOutputs, 2));
       model->to(type);
       const auto adapters = lora::attach(*model, lora::LoRAConfig(2).target_modules({"1"}));
       const auto x = input(type, rows);
       const auto active = adapters.activate("");
       const auto& first = model[0]->as<torch::nn::Linear>();
       first->bias.requires_grad_();
       return derived(first->forward(x), {x, first->bias});
     }},
    {"a module",
     [](torch::ScalarType type, int64_t rows) {
       lora::LoRALinear<> module(layer(type), lora::LoRAOptions(kRank).alpha(96));
       const torch::AutoGradMode with_gradient(true);
       torch::manual_seed(5);
       Tensors learning;
       for (auto& item : module->named_parameters()) {
         if (!item.value().requires_grad()) continue;
         item.value().set_data(torch::randn(item.value().sizes(), torch::kDouble).to(type) / 8);
         learning.push_back(item.value());
       }
       const auto x = input(type, rows);
       learning.push_back(x);
       return derived(module->forward(x), learning);
     }},
    {"the cross entropy of a head",
     [](torch::ScalarType type, int64_t rows) {
       const auto head = layer(type);
       const auto targets = torch::arange(rows).remainder(kOutputs).view({rows == 1 ? 1 : 4, -1});
       const auto x = input(type, rows);
       const auto options = lora::CrossEntropyOptions().bias(head->bias.detach()).chunk_rows(kRows);
       const auto loss = lora::linear_cross_entropy(x, head->weight, targets, options);
       return Run{loss.detach(), torch::autograd::grad({loss}, {x})};
     }},
};

}  // namespace

TEST_CASE("Layers have the same values and gradients, the first and the second, by whatever they are computed") {
  for (const auto& of : kCases) {
    const auto exact = of.run(torch::kDouble, kRows);
    for (const bool by_onednn : {false, true}) {
      INFO(of.name << (by_onednn ? " by oneDNN" : " by LibTorch's choice"));
      const Computed by(by_onednn);
      const CallsOfOneDnn calls;
      const auto run = of.run(torch::kFloat, kRows);
      CHECK((calls.count() > 0) == (by_onednn && by.is_there));
      CHECK(error(run.value, exact.value) < 2e-6);
      REQUIRE(run.gradients.size() == exact.gradients.size());
      for (size_t i = 0; i < run.gradients.size(); ++i) {
        INFO("gradient " << i);
        CHECK(error(run.gradients[i], exact.gradients[i]) < 1e-5);
      }
    }
  }
}

TEST_CASE("Layers of one row have the same values and gradients, the first and the second") {
  for (const auto& of : kCases) {
    INFO(of.name);
    const auto exact = of.run(torch::kDouble, 1), run = of.run(torch::kFloat, 1);
    CHECK(error(run.value, exact.value) < 2e-6);
    REQUIRE(run.gradients.size() == exact.gradients.size());
    for (size_t i = 0; i < run.gradients.size(); ++i) {
      INFO("gradient " << i);
      CHECK(error(run.gradients[i], exact.gradients[i]) < 1e-5);
    }
  }
}

TEST_CASE("One row is multiplied by a matrix as that lies in memory") {
  torch::manual_seed(2);
  for (const auto& [inputs, outputs] : std::vector<std::pair<int64_t, int64_t>>{{512, 1024}, {519, 83}, {83, 519}}) {
    for (const bool is_transposed : {false, true}) {
      for (const bool has_bias : {false, true}) {
        INFO(inputs << " -> " << outputs << (is_transposed ? " transposed" : "") << (has_bias ? " with a bias" : ""));
        const auto matrix = is_transposed ? random({outputs, inputs}).t() : random({inputs, outputs});
        const auto bias = has_bias ? random({2 * outputs}).slice(0, 0, 2 * outputs, 2) : Tensor();
        for (const auto& x : {random({1, inputs}), random({1, 2 * inputs}).slice(1, 0, 2 * inputs, 2)}) {
          CHECK(lora::detail::is_for_row_kernels(x, matrix, bias, 0) == lora::detail::has_avx2());
          CHECK(lora::detail::is_for_row_kernels(x, matrix.t(), bias, 1) == lora::detail::has_avx2());
          auto exact = x.to(torch::kDouble).mm(matrix.to(torch::kDouble));
          if (has_bias) exact += bias;
          CHECK(error(lora::detail::faster_mm(x, matrix, bias), exact) < 1e-6);
        }
      }
    }
  }
  const auto x = random({1, 512}), matrix = random({512, 1024});
  const auto is_for = [](const Tensor& x, const Tensor& matrix, const Tensor& bias = {}) {
    return lora::detail::is_for_row_kernels(x, matrix, bias, /*inputs=*/0);
  };
  CHECK(is_for(x.view({1, 1, 512}), matrix) == lora::detail::has_avx2());
  CHECK_FALSE(is_for(random({2, 512}), matrix));
  CHECK_FALSE(is_for(x[0], matrix));
  CHECK_FALSE(is_for(x, matrix.narrow(1, 0, 8)));
  CHECK_FALSE(is_for(x, matrix.t()));
  CHECK_FALSE(is_for(x.to(torch::kDouble), matrix.to(torch::kDouble)));
  CHECK_FALSE(is_for(x, matrix, random({1})));
  CHECK_FALSE(is_for(x, matrix.clone().requires_grad_()));
}

TEST_CASE("A product by oneDNN keeps no input for backward, and sees that a weight was written to") {
  const Computed by(true);
  torch::nn::Sequential model(layer(torch::kFloat), torch::nn::Linear(kOutputs, 2));
  const auto adapters = lora::attach(*model, lora::LoRAConfig(2).target_modules({"1"}));
  const auto& first = model[0]->as<torch::nn::Linear>();
  const auto active = adapters.activate("");
  auto x = input(torch::kFloat) * 1;
  const c10::weak_intrusive_ptr<c10::StorageImpl> memory(x.storage().getWeakStorageImpl());
  const auto y = first->forward(x);
  x = Tensor();
  CHECK(memory.expired());
  {
    const torch::NoGradGuard no_grad;
    first->weight.add_(1);
  }
  CHECK_THAT(testing::error_of([&] { y.sum().backward(); }), testing::contains("modified by an inplace operation"));
}

TEST_CASE("A model without adapters has fast products in a scope of its own, and only there") {
  const Computed by(true);
  auto linear = layer(torch::kFloat);
  const auto x = input(torch::kFloat);
  const auto before = linear->forward(x);
  Tensor fast;
  const CallsOfOneDnn calls;
  {
    const auto scope = lora::fast_products();
    fast = linear->forward(x);
    const auto nested = lora::fast_products();
    CHECK(torch::equal(linear->forward(x), fast));
  }
  CHECK(calls.count() == (by.is_there ? 2 : 0));
  CHECK(torch::equal(linear->forward(x), before));
  CHECK(calls.count() == (by.is_there ? 2 : 0));
  CHECK(error(fast, before) < 3e-6);
  const auto gradients = [&](const Tensor& y) { return torch::autograd::grad({y.pow(2).sum()}, {x})[0]; };
  CHECK(error(gradients(fast), gradients(before)) < 5e-6);
}

TEST_CASE("Weights in few bits are found where no adapters act") {
  auto linear = layer(torch::kFloat);
  torch::nn::Sequential model(linear);
  lora::quantize(*model, lora::NF4());
  const auto x = input(torch::kFloat);
  Tensor found;
  {
    const auto scope = lora::fast_products();
    found = linear->forward(x);
  }
  lora::dequantize(*model);
  CHECK(error(found, linear->forward(x)) < 3e-6);
}

TEST_CASE("Panels of a weight in few bits are multiplied by oneDNN, too") {
  torch::manual_seed(6);
  torch::nn::Sequential model(layer(torch::kFloat));
  const auto adapters = lora::attach(*model, lora::LoRAConfig(2).target_modules({"0"}).quantize(lora::NF4()));
  const auto active = adapters.activate();
  Tensors values, gradients;
  for (const bool by_onednn : {false, true}) {
    const Computed by(by_onednn);
    const CallsOfOneDnn calls;
    const auto x = input(torch::kFloat);
    values.push_back(model->forward(x));
    CHECK((calls.count() > 0) == (by_onednn && by.is_there));
    gradients.push_back(torch::autograd::grad({values.back().pow(2).sum()}, {x})[0]);
  }
  CHECK(error(values[1], values[0]) < 2e-6);
  CHECK(error(gradients[1], gradients[0]) < 5e-6);
}

TEST_CASE("Shapes that do not fit have LibTorch's text in a scope as outside of it") {
  torch::nn::Sequential model(layer(torch::kFloat));
  const auto adapters = lora::attach(*model, lora::LoRAConfig(2).target_modules({"0"}));
  const auto x = random({kRows, kInputs + 1});
  const auto outside = testing::error_of([&] { model->forward(x); });
  const auto active = adapters.activate();
  CHECK_THAT(outside, testing::contains("shapes cannot be multiplied"));
  CHECK(testing::error_of([&] { model->forward(x); }) == outside);
}
