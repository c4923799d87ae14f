// The one place that computes with adapters, against y = x W'^T + b written out: every kind of update, alone and
// together, on all of a weight, on rows of it, on parts of a fused one, and in products with several weights.
#include "support/methods.hpp"

#include <lora/method/dora.hpp>
#include <lora/method/full_delta.hpp>
#include <lora/method/ia3.hpp>
#include <lora/method/low_rank.hpp>

#include <numeric>

namespace {

using lora::Update;
using lora::Updates;
using lora::WeightBase;
using lora::detail::Part;
using torch::Tensor;
using Sizes = std::vector<int64_t>;

/// A term with whatever is given.
struct AnyTerm : lora::Method {
  static constexpr lora::MethodInfo info{"AnyTerm"};
  std::vector<lora::MethodField<AnyTerm>> fields() const { return {}; }
  void initialize(const lora::Base& /*base*/) {}
  lora::Term term(const lora::Base& /*base*/) const { return value; }
  lora::Term value;
};

/// W' = W + v u^T, as nothing but a difference.
struct Outer : lora::Method {
  static constexpr lora::MethodInfo info{"Outer"};
  std::vector<lora::MethodField<Outer>> fields() const { return {}; }
  void initialize(const lora::Base& /*base*/) {}
  Tensor delta(const lora::Base& /*base*/) const { return v.unsqueeze(-1) * u; }
  Tensor v, u;
};

/// The same with a cheaper product.
struct QuickOuter : Outer {
  static constexpr lora::MethodInfo info{"QuickOuter"};
  std::vector<lora::MethodField<QuickOuter>> fields() const { return {}; }
  void initialize(const lora::Base& /*base*/) {}
  Tensor forward(const lora::Product& product) const {
    const auto y = product.frozen();
    return (y + lora::in_type(product.x, u.scalar_type()).matmul(u).unsqueeze(-1) * v).to(y.scalar_type());
  }
};

Tensor random(const Sizes& sizes) { return torch::randn(sizes, testing::on_device(torch::kDouble)) * 0.5; }

/// A method with values, its tensors, and W' - W written out.
struct Acting {
  std::shared_ptr<lora::AnyMethod> method;
  std::vector<Tensor> tensors;
  std::function<Tensor(const Tensor& weight)> delta;
};

template <class M>
std::shared_ptr<lora::AnyMethod> as_any(M method, double dropout) {
  method.options = lora::LoRAOptions(2).alpha(5).dropout(dropout);
  return std::make_shared<lora::MethodOf<M>>(std::move(method));
}

struct Kind {
  const char* name;
  std::function<Acting(int64_t out, int64_t in, double dropout)> make;
  bool has_term = true;
};

/// A kind whose term has some of the five.
Kind term_kind(const char* name, bool product, bool gain, bool input_gain) {
  return {name, [=](int64_t out, int64_t in, double dropout) {
            AnyTerm method;
            auto& term = method.value;
            std::vector<Tensor> tensors;
            const auto make = [&](Tensor& tensor, const Sizes& sizes, double start) {
              tensor = (random(sizes) + start).requires_grad_();
              tensors.push_back(tensor);
            };
            if (product) {
              make(term.A, {2, in}, 0);
              make(term.B, {out, 2}, 0);
              term.scale = 2.5;
            }
            if (gain) make(term.gain, {out}, 1);
            if (input_gain) make(term.input_gain, {in}, 1);
            const auto delta = [term](const Tensor& w) {
              auto changed = term.A.defined() ? w + 2.5 * term.B.mm(term.A) : w;
              if (term.gain.defined()) changed = torch::diag(term.gain).mm(changed);
              if (term.input_gain.defined()) changed = changed.mm(torch::diag(term.input_gain));
              return changed - w;
            };
            return Acting{as_any(method, dropout), tensors, delta};
          }};
}

template <class M>
Kind outer_kind(const char* name) {
  return {name,
          [](int64_t out, int64_t in, double dropout) {
            M method;
            method.v = random({out}).requires_grad_();
            method.u = random({in}).requires_grad_();
            const auto v = method.v, u = method.u;
            return Acting{as_any(method, dropout), {v, u}, [=](const Tensor&) { return torch::outer(v, u); }};
          },
          false};
}

const std::vector<Kind>& kinds() {
  static const std::vector<Kind> all{
      term_kind("A and B", true, false, false),
      term_kind("a gain", false, true, false),
      term_kind("an input gain", false, false, true),
      term_kind("both gains", false, true, true),
      term_kind("A, B and a gain", true, true, false),
      term_kind("A, B and an input gain", true, false, true),
      term_kind("A, B and both gains", true, true, true),
      outer_kind<Outer>("a difference"),
      outer_kind<QuickOuter>("a product of its own"),
      {"a tensor in its place",
       [](int64_t out, int64_t in, double /*dropout*/) {
         const auto value = random({out, in}).requires_grad_();
         return Acting{as_any(lora::FullDelta(value), 0), {value}, [=](const Tensor& w) { return value - w; }};
       },
       false},
      {"a scaled tensor that is added",
       [](int64_t out, int64_t in, double /*dropout*/) {
         const auto value = random({out, in}).requires_grad_();
         return Acting{as_any(lora::FullDelta(value, 2.5), 0), {value}, [=](const Tensor&) { return 2.5 * value; }};
       },
       false},
  };
  return all;
}

Tensor run_linear(const Tensor& x, const Tensor& w, const Tensor& b) { return torch::linear(x, w, b); }

/// x M, for an operand that is transposed.
Tensor run_matmul(const Tensor& x, const Tensor& m, const Tensor& b) {
  return b.defined() ? torch::matmul(x, m) + b : torch::matmul(x, m);
}

/// y = x W^T + b + sum of weight * x_i (W' - W)^T, each on its rows: `drop(i, x)` is x_i.
struct ByHand {
  Tensor operator()(const Tensor& x, const std::function<Tensor(const Tensor& x)>& drop = nullptr) const {
    auto y = torch::linear(x, operand, bias);
    for (const auto& [delta, weight, at] : deltas) {
      const auto added = torch::linear(drop ? drop(x) : x, delta) * weight;
      const auto outputs = y.size(-1);
      y = y + torch::constant_pad_nd(added, {at, outputs - at - added.size(-1)});
    }
    return y;
  }

  struct Delta {
    Tensor rows;
    double weight;
    int64_t at;
  };
  Tensor operand, bias;
  std::vector<Delta> deltas;
};

/// Value and gradients of what is computed agree with what is written out.
void check_same(const std::function<Tensor()>& computed, const std::function<Tensor()>& by_hand,
                const std::vector<Tensor>& tensors) {
  const auto value = computed(), expected = by_hand();
  CHECK(testing::distance(value, expected) < 1e-12);
  CHECK(testing::distance(expected, torch::zeros_like(expected)) > 0.01);
  const auto factor = torch::randn(expected.sizes(), expected.options());
  const auto gradients_of = [&](const Tensor& y) {
    return torch::autograd::grad({(y * factor).sin().sum()}, tensors, {}, {}, /*create_graph=*/false,
                                 /*allow_unused=*/true);
  };
  const auto gradients = gradients_of(value), wanted = gradients_of(expected);
  for (size_t i = 0; i < tensors.size(); ++i) {
    INFO("gradient of tensor " << i << ", " << tensors[i].sizes());
    const auto or_zero = [&](const Tensor& g) { return g.defined() ? g : torch::zeros_like(tensors[i]); };
    CHECK(testing::distance(or_zero(gradients[i]), or_zero(wanted[i])) < 1e-11);
  }
}

std::vector<Tensor> tensors_of(const std::vector<Acting>& all) {
  std::vector<Tensor> tensors;
  for (const auto& acting : all) tensors.insert(tensors.end(), acting.tensors.begin(), acting.tensors.end());
  return tensors;
}

/// One weight (6, 5), a bias, and some methods on it.
struct Fixture {
  explicit Fixture(const std::vector<const Kind*>& some, double dropout = 0) {
    for (const auto* kind : some) all.push_back(kind->make(6, 5, dropout));
  }

  Updates updates(const Part& part = {Part::Kind::kRows, 0, 6}, bool training = false) const {
    Updates updates;
    for (size_t i = 0; i < all.size(); ++i)
      updates.push_back({all[i].method.get(), &base, part, training, kWeights[i % 3]});
    return updates;
  }

  ByHand by_hand(bool has_bias, int64_t first = 0, int64_t count = 6) const {
    ByHand hand{weight.narrow(0, first, count), has_bias ? bias.narrow(0, first, count) : Tensor(), {}};
    for (size_t i = 0; i < all.size(); ++i)
      hand.deltas.push_back({all[i].delta(weight).narrow(0, first, count), kWeights[i % 3], 0});
    return hand;
  }

  static constexpr double kWeights[] = {1, -0.7, 1.5};
  Tensor weight = (torch::manual_seed(0), random({6, 5})), bias = random({6}).requires_grad_();
  WeightBase base{weight};
  std::vector<Acting> all;
};

/// The ways in which a product takes its updates.
struct Way {
  const char* name;
  bool adds;
  lora::Product::Form rows,
      columns;  // what is said of an operand that is rows of W, and of one that is these transposed
};

using Form = lora::Product::Form;
const Way kWays[] = {{"added up", true, Form::kOther, Form::kOther},
                     {"one node", true, Form::kRows, Form::kColumns},
                     {"the operator with W'", false, Form::kOther, Form::kOther}};

const std::vector<Sizes> kInputs{{5}, {3, 5}, {2, 3, 5}, {2, 2, 3, 5}, {0, 5}, {2, 0, 5}};

/// Calls `check` for every kind alone, every ordered pair, and some three.
void for_every_mix(const std::function<void(const std::vector<const Kind*>&)>& check) {
  const auto& all = kinds();
  const auto named = [&](const std::vector<const Kind*>& some) {
    std::string names;
    for (const auto* kind : some) names += (names.empty() ? "" : ", then ") + std::string(kind->name);
    INFO(names);
    check(some);
  };
  for (size_t i = 0; i < all.size(); ++i) {
    named({&all[i]});
    for (size_t j = 0; j < all.size(); ++j) named({&all[i], &all[j]});
    named({&all[i], &all[(i + 3) % all.size()], &all[(i + 7) % all.size()]});
  }
}

}  // namespace

TEST_CASE("Updates of every kind, alone and together, each with its weight, are y = x W'^T + b") {
  for_every_mix([](const std::vector<const Kind*>& some) {
    Fixture f(some);
    for (const auto& sizes : kInputs) {
      for (const bool has_bias : {true, false}) {
        const auto x = random(sizes);
        const auto expected = f.by_hand(has_bias)(x);
        for (const auto& way : kWays) {
          INFO("x " << sizes << (has_bias ? "" : ", no bias") << ", " << way.name);
          const auto y = lora::adapted_product(
              {x, f.weight, has_bias ? f.bias : Tensor(), run_linear, lora::linear_times, way.adds, way.rows},
              f.updates());
          CHECK(testing::distance(y, expected) < 1e-12);
        }
      }
    }
  });
}

TEST_CASE("Gradients of the input, the bias and every tensor of a method are those of what is written out") {
  for_every_mix([](const std::vector<const Kind*>& some) {
    Fixture f(some);
    auto tensors = tensors_of(f.all);
    const auto x = random({2, 3, 5}).requires_grad_();
    tensors.insert(tensors.end(), {x, f.bias});
    for (const auto& way : kWays) {
      INFO(way.name);
      const auto computed = [&, &way = way] {
        return lora::adapted_product({x, f.weight, f.bias, run_linear, lora::linear_times, way.adds, way.rows},
                                     f.updates());
      };
      check_same(
          computed, [&] { return f.by_hand(true)(x); }, tensors);
      if (some.size() > 1) continue;
      if (!f.all[0].method->replaces() || tensors.size() < 4)
        CHECK(testing::gradient_error([&] { return computed().sin().sum(); }, tensors) < 1e-7);
    }
  });
}

TEST_CASE("Of rows of a weight only these have updates, as they lie or transposed") {
  for_every_mix([](const std::vector<const Kind*>& some) {
    Fixture f(some);
    const auto x = random({2, 3, 5}).requires_grad_();
    auto tensors = tensors_of(f.all);
    tensors.push_back(x);
    for (const auto& [first, count] : {std::pair<int64_t, int64_t>(0, 2), {2, 3}, {5, 1}}) {
      INFO(count << " rows from " << first);
      const auto rows = f.weight.narrow(0, first, count), bias = f.bias.narrow(0, first, count);
      const auto hand = [&, first = first, count = count] { return f.by_hand(true, first, count)(x); };
      for (const auto& way : kWays) {
        INFO(way.name);
        check_same(
            [&, first = first, count = count] {
              return lora::adapted_product({x, rows, bias, run_linear, lora::linear_times, way.adds, way.rows},
                                           f.updates({Part::Kind::kRows, first, count}));
            },
            hand, tensors);
        check_same(
            [&, first = first, count = count] {
              return lora::adapted_product({x, rows.t(), bias, run_matmul, lora::linear_times, way.adds, way.columns},
                                           f.updates({Part::Kind::kTransposedRows, first, count}));
            },
            hand, tensors);
      }
    }
  });
}

TEST_CASE("Columns of a weight, or another part, have the updates of these numbers") {
  for_every_mix([](const std::vector<const Kind*>& some) {
    Fixture f(some);
    const auto x = random({3, 2});
    const auto columns = f.weight.narrow(1, 2, 2);
    const auto part = lora::detail::part_of(f.weight, columns);
    REQUIRE(part->kind == Part::Kind::kOther);
    auto hand = f.by_hand(true);
    hand.operand = columns;
    for (auto& delta : hand.deltas) delta.rows = delta.rows.narrow(1, 2, 2);
    check_same(
        [&] {
          return lora::adapted_product({x, columns, f.bias, run_linear, lora::linear_times, true}, f.updates(*part));
        },
        [&] { return hand(x); }, tensors_of(f.all));
  });
}

TEST_CASE("In a product with several weights every update is at its own outputs") {
  for_every_mix([](const std::vector<const Kind*>& some) {
    if (std::any_of(some.begin(), some.end(), [](const Kind* kind) { return kind->make(1, 1, 0).method->replaces(); }))
      return;  // nothing is added to a product then, and several weights are no part of one
    torch::manual_seed(0);
    const std::vector<int64_t> rows{3, 1, 6, 4};
    std::vector<Tensor> weights;
    std::vector<WeightBase> bases;
    std::vector<Acting> all;
    Updates updates;
    ByHand hand;
    bases.reserve(8);
    for (const auto count : rows) weights.push_back(random({count, 5}));
    hand.operand = torch::cat(weights);
    hand.bias = random({14});
    for (size_t i = 0; i < some.size() * 2; ++i) {  // of two weights, the one row among them
      const auto which = 1 + i % 3;
      const auto at = std::accumulate(rows.begin(), rows.begin() + static_cast<std::ptrdiff_t>(which), int64_t{0});
      all.push_back(some[i % some.size()]->make(rows[which], 5, 0));
      bases.emplace_back(weights[which]);
      updates.push_back({all.back().method.get(), &bases.back(), lora::detail::whole_part(weights[which]), false,
                         Fixture::kWeights[i % 3], at});
      hand.deltas.push_back({all.back().delta(weights[which]), Fixture::kWeights[i % 3], at});
    }
    const auto x = random({2, 3, 5}).requires_grad_();
    auto tensors = tensors_of(all);
    tensors.push_back(x);
    check_same(
        [&] {
          return lora::adapted_product({x, hand.operand, hand.bias, run_linear, lora::linear_times}, updates);
        },
        [&] { return hand(x); }, tensors);
  });
}

TEST_CASE("Each part of a fused weight has its own update, of which rows that cut the parts have their share") {
  torch::manual_seed(0);
  using Rows = std::vector<int64_t>;
  const auto [rows, chosen] = GENERATE(table<Rows, std::vector<bool>>({
      {{2, 2, 2}, {true, true, true}},
      {{2, 2, 2}, {true, false, true}},
      {{3, 1, 2}, {true, true, true}},
      {{1, 3, 2}, {false, true, true}},
      {{4, 2}, {false, true}},
      {{6}, {true}},
  }));
  const bool has_product = GENERATE(true, false), has_gain = GENERATE(true, false),
             has_input_gain = GENERATE(false, true);
  if (!has_product && !has_gain && !has_input_gain) return;
  const auto weight = random({6, 5}), bias = random({6});
  const auto view = std::make_shared<const lora::MatrixView>(lora::MatrixView::parts({6, 5}, rows, chosen));
  const WeightBase base(weight, view);
  const auto parts = view->shape().batch[0], out = view->shape().out;
  AnyTerm method;
  auto& term = method.value;
  std::vector<Tensor> tensors;
  const auto make = [&](Tensor& tensor, const Sizes& sizes, double start) {
    tensor = (random(sizes) + start).requires_grad_();
    tensors.push_back(tensor);
  };
  if (has_product) {
    make(term.A, {parts, 2, 5}, 0);
    make(term.B, {parts, out, 2}, 0);
    term.scale = 2.5;
  }
  if (has_gain) make(term.gain, {parts, out}, 1);
  if (has_input_gain) make(term.input_gain, {parts, 5}, 1);
  const auto delta = [&, rows = rows, chosen = chosen] {  // part by part
    std::vector<Tensor> deltas;
    int64_t part = 0, first = 0;
    for (size_t i = 0; i < rows.size(); first += rows[i++]) {
      const auto w = weight.narrow(0, first, rows[i]);
      auto changed = w;
      if (chosen[i]) {
        if (has_product) changed = changed + 2.5 * term.B[part].narrow(0, 0, rows[i]).mm(term.A[part]);
        if (has_gain) changed = term.gain[part].narrow(0, 0, rows[i]).unsqueeze(-1) * changed;
        if (has_input_gain) changed = changed * term.input_gain[part];
        ++part;
      }
      deltas.push_back(changed - w);
    }
    return torch::cat(deltas);
  };
  const auto any = as_any(method, 0);
  const auto x = random({2, 3, 5}).requires_grad_();
  tensors.push_back(x);
  for (int64_t first = 0; first < 6; ++first) {
    for (int64_t count = 1; first + count <= 6; ++count) {
      for (const double factor : {1.0, -0.7}) {
        for (const bool adds : {true, false}) {
          INFO(rows << ", " << count << " rows from " << first << (adds ? "" : ", the operator with W'"));
          const Part part{Part::Kind::kRows, first, count};
          const auto operand = weight.narrow(0, first, count), b = bias.narrow(0, first, count);
          check_same(
              [&] {
                return lora::adapted_product({x, operand, b, run_linear, lora::linear_times, adds},
                                             Update{any.get(), &base, part, false, factor});
              },
              [&, first = first, count = count] {
                return ByHand{operand, b, {{delta().narrow(0, first, count), factor, 0}}}(x);
              },
              tensors);
        }
      }
    }
  }
}

TEST_CASE("Dropout acts on the input of each update alone, once for each, and not in evaluation mode") {
  for_every_mix([](const std::vector<const Kind*>& some) {
    Fixture f(some, /*dropout=*/0.4);
    const auto x = random({2, 3, 5}).requires_grad_();
    auto tensors = tensors_of(f.all);
    tensors.push_back(x);
    for (const auto& way : kWays) {
      INFO(way.name);
      for (const bool training : {true, false}) {
        size_t next = 0;
        const auto drop = [&](const Tensor& x) {  // what replaces a weight has no dropout
          const auto p = training ? f.all[next++ % f.all.size()].method->options().dropout() : 0;
          return p > 0 ? lora::detail::dropout(x, p) : x;
        };
        check_same(
            [&] {
              torch::manual_seed(7);
              return lora::adapted_product({x, f.weight, f.bias, run_linear, lora::linear_times, way.adds, way.rows},
                                           f.updates({Part::Kind::kRows, 0, 6}, training));
            },
            [&] {
              torch::manual_seed(7);
              return f.by_hand(true)(x, drop);
            },
            tensors);
      }
    }
  });
}

TEST_CASE("The parts of a fused weight see one dropped input") {
  torch::manual_seed(0);
  const auto weight = random({6, 5});
  const auto view = std::make_shared<const lora::MatrixView>(lora::MatrixView::parts({6, 5}, {2, 4}, {true, true}));
  const WeightBase base(weight, view);
  AnyTerm method;
  method.value = {random({2, 2, 5}), random({2, 4, 2}), 2.5};
  const auto any = as_any(method, 0.5);
  const auto x = random({3, 5});
  torch::manual_seed(7);
  const auto y = lora::adapted_product({x, weight, {}, run_linear, lora::linear_times},
                                       Update{any.get(), &base, lora::detail::whole_part(weight), true});
  torch::manual_seed(7);
  const auto delta = view->weight(2.5 * method.value.B.matmul(method.value.A));
  CHECK(testing::distance(y, x.mm(weight.t()) + lora::detail::dropout(x, 0.5).mm(delta.t())) < 1e-12);
}

TEST_CASE("Of a layer in half precision the update is computed in float, and the output is in its type") {
  const auto type = GENERATE(torch::kBFloat16, torch::kHalf);
  for (const auto& kind : kinds()) {
    INFO(kind.name << " " << type);
    torch::manual_seed(0);
    const auto weight = random({6, 5}).to(type), bias = random({6}).to(type), x = random({2, 3, 5}).to(type);
    const WeightBase base(weight);
    torch::manual_seed(1);
    const auto acting = kind.make(6, 5, 0);
    for (auto tensor : acting.tensors) tensor.set_data(tensor.detach().to(torch::kFloat));
    const auto wide = [](const Tensor& t) { return t.to(torch::kDouble); };
    const auto any = acting.method;
    for (const bool adds : {true, false}) {
      const auto y = lora::adapted_product({x, weight, bias, run_linear, lora::linear_times, adds},
                                           Update{any.get(), &base, lora::detail::whole_part(weight), false});
      CHECK(y.scalar_type() == type);
      const auto expected =
          torch::linear(wide(x), wide(weight) + wide(acting.delta(weight.to(torch::kFloat))), wide(bias));
      CHECK(testing::distance(y, expected) < (type == torch::kHalf ? 0.01 : 0.08));  // a few roundings of numbers < 8
      for (const auto& gradient : torch::autograd::grad({y.to(torch::kFloat).sum()}, acting.tensors))
        CHECK(gradient.scalar_type() == torch::kFloat);
    }
  }
}

TEST_CASE(
    "Of a low-rank update of a layer in half precision each sum is rounded once, each gradient is that of floats") {
  const auto type = GENERATE(torch::kBFloat16, torch::kHalf);
  const auto dropout = GENERATE(0.0, 0.4);
  const double step = type == torch::kHalf ? std::pow(2.0, -11) : std::pow(2.0, -8);  // the largest rounding, relative
  torch::manual_seed(0);
  const auto kind = term_kind("A and B", true, false, false);
  const auto zero = torch::zeros({6, 5}, testing::on_device(type)), bias = random({6}).to(type);
  const auto x = random({2, 3, 5}).to(type).requires_grad_(), slope = random({2, 3, 6}).to(type);
  const WeightBase base(zero);
  Updates updates;
  std::vector<Acting> all;
  std::vector<Tensor> tensors{x};
  for (int64_t i = 0; i < 2; ++i) {
    all.push_back(kind.make(6, 5, dropout));
    for (auto tensor : all.back().tensors) tensor.set_data(tensor.detach().to(torch::kFloat));
    tensors.insert(tensors.end(), all.back().tensors.begin(), all.back().tensors.end());
  }
  for (const auto& acting : all)
    updates.push_back({acting.method.get(), &base, lora::detail::whole_part(zero), true, 0.5});
  torch::manual_seed(7);
  const auto y =
      lora::adapted_product({x, zero, bias, run_linear, lora::linear_times, true, lora::Product::Form::kRows}, updates);
  CHECK(y.grad_fn()->name().find("View") != std::string::npos);  // of one node of two dimensions
  CHECK(y.grad_fn()->next_edge(0).function->name().find("LowRankLinear") != std::string::npos);
  const auto gradients = torch::autograd::grad({y}, tensors, {slope}, /*retain_graph=*/true);
  const auto differentiated = torch::autograd::grad({y}, tensors, {slope}, {}, /*create_graph=*/true);

  torch::manual_seed(7);
  const auto wide_x = x.detach().to(torch::kDouble).requires_grad_();
  std::vector<Tensor> wide{wide_x};
  auto expected = bias.to(torch::kDouble).expand({2, 3, 6});
  double largest = expected.abs().max().item<double>();
  for (const auto& acting : all) {
    const auto dropped = dropout > 0 ? lora::detail::dropout(wide_x.flatten(0, 1), dropout).view({2, 3, 5}) : wide_x;
    const auto term = acting.method->term(base);
    wide.push_back(term.A.detach().to(torch::kDouble).requires_grad_());
    wide.push_back(term.B.detach().to(torch::kDouble).requires_grad_());
    expected = expected + 0.5 * term.scale * dropped.matmul(wide[wide.size() - 2].t()).matmul(wide.back().t());
    largest = std::max(largest, expected.abs().max().item<double>());
  }
  CHECK(y.scalar_type() == type);
  CHECK(testing::distance(y, expected) < 2 * step * largest);  // a rounding for each update
  const auto exact = torch::autograd::grad({expected}, wide, {slope.to(torch::kDouble)});
  for (size_t i = 0; i < exact.size(); ++i) {
    INFO(i);
    CHECK(gradients[i].scalar_type() == (i == 0 ? type : torch::kFloat));
    const auto allowed = (i == 0 ? 2 * step : 1e-5) * exact[i].abs().max().item<double>();
    CHECK(testing::distance(gradients[i], exact[i]) < allowed);
    CHECK(testing::distance(differentiated[i], exact[i]) < allowed);
    CHECK(differentiated[i].scalar_type() == gradients[i].scalar_type());
  }
}

TEST_CASE("A lookup in a table gives the entries of W', whatever the update, and drops nothing") {
  for_every_mix([](const std::vector<const Kind*>& some) {
    torch::manual_seed(0);
    const auto table = random({7, 4});  // W = table^T (4, 7)
    const auto view = std::make_shared<const lora::MatrixView>(lora::MatrixView::lookup({7, 4}));
    const WeightBase base(table, view);
    const auto look_up = [](const Tensor& i, const Tensor& entries, const Tensor&) {
      return torch::embedding(entries, i);
    };
    const auto times = [](const Tensor& i, const Tensor& matrix) { return torch::embedding(matrix.t(), i); };
    Updates updates;
    std::vector<Acting> all;
    auto expected_table = [&] {
      auto changed = table;
      for (size_t i = 0; i < all.size(); ++i)
        changed = changed + Fixture::kWeights[i % 3] * all[i].delta(table.t()).t();
      return changed;
    };
    for (const auto* kind : some) {
      auto acting = kind->make(4, 7, 0.5);
      if (acting.method->replaces()) return;  // laid out as the table, not as the matrix
      if (kind->name != std::string("a gain") && acting.method->has_term()) {
        const auto term = acting.method->term(base);
        if (term.input_gain.defined()) return;  // numbers of columns cannot be scaled
      }
      if (kind->name == std::string("a product of its own")) return;  // nor multiplied
      all.push_back(std::move(acting));
    }
    for (size_t i = 0; i < all.size(); ++i)
      updates.push_back({all[i].method.get(), &base, lora::detail::whole_part(table), true, Fixture::kWeights[i % 3]});
    const auto ids = torch::tensor({{0, 3, 3}, {6, 1, 0}}, testing::device());
    for (const bool adds : {true, false}) {
      INFO((adds ? "" : "in the whole table"));
      check_same(
          [&] {
            return lora::adapted_product({ids, table, {}, look_up, times, adds}, updates);
          },
          [&] { return torch::embedding(expected_table(), ids); }, tensors_of(all));
    }
  });
}

TEST_CASE("Entries that are looked up in the weight of a linear layer are those of W', also in training mode") {
  torch::manual_seed(0);
  const auto kind = term_kind("A and B", true, false, false);
  Fixture f({&kind}, 0.5);
  const auto look_up = [](const Tensor& i, const Tensor& w, const Tensor&) { return torch::embedding(w, i); };
  const auto times = [](const Tensor& i, const Tensor& m) { return torch::embedding(m.t(), i); };
  const auto ids = torch::tensor({{0, 3, 3}, {5, 1, 0}}, testing::device());
  const auto run = [&](bool training) {
    torch::manual_seed(7);
    return lora::adapted_product({ids, f.weight, {}, look_up, times, false},
                                 f.updates({Part::Kind::kRows, 0, 6}, training));
  };
  const auto delta = f.all[0].delta(f.weight);
  CHECK(testing::distance(run(false), torch::embedding(f.weight + delta, ids)) < 1e-12);
  const auto dropped = run(true);
  torch::manual_seed(7);  // whole columns of A: there is no input to drop
  const auto columns = lora::detail::dropout(torch::ones({5}, delta.options()), 0.5);
  CHECK(testing::distance(dropped, torch::embedding(f.weight + delta * columns, ids)) < 1e-12);
}

TEST_CASE("What stands in for an operand is the same part of W + the sum of the updates, rounded once") {
  for_every_mix([](const std::vector<const Kind*>& some) {
    Fixture f(some);
    auto adapted = f.weight;
    for (size_t i = 0; i < f.all.size(); ++i) adapted = adapted + Fixture::kWeights[i] * f.all[i].delta(f.weight);
    for (const auto& view : std::vector<std::function<Tensor(const Tensor&)>>{
             [](const Tensor& w) { return w; }, [](const Tensor& w) { return w.t(); },
             [](const Tensor& w) { return w.narrow(0, 1, 3).t(); }, [](const Tensor& w) { return w.narrow(1, 1, 3); },
             [](const Tensor& w) { return w.select(1, 2); },
             [](const Tensor& w) {
               return w.reshape({5, 6});
             },
             [](const Tensor& w) {
               return w.unsqueeze(0).expand({2, 6, 5});
             }}) {
      const auto operand = view(f.weight);
      const auto part = lora::detail::part_of(f.weight, operand);
      REQUIRE(part);
      const auto value = lora::detail::adapted_operand(operand, f.updates(*part));
      CHECK(testing::distance(value, view(adapted)) < 1e-12);
      CHECK(value.requires_grad());
    }
    CHECK(lora::detail::adapted_operand(f.weight, {}).is_same(f.weight));
  });
  // rounded once: 1 + 2^-8 + 2^-8 is more than one step of bfloat16 from 1, 1 + 2^-8 rounds to 1
  const auto one = torch::ones({1, 1}, testing::on_device(torch::kBFloat16));
  const WeightBase base(one);
  const auto step = as_any(lora::FullDelta(torch::full({1, 1}, 1.0 / 256, testing::on_device(torch::kFloat)), 1.0), 0);
  const Update update{step.get(), &base, lora::detail::whole_part(one), false};
  const auto sum = lora::detail::adapted_operand(one, Updates{update, update});
  CHECK(sum.scalar_type() == torch::kBFloat16);
  CHECK(sum.item<double>() == 1 + 1.0 / 128);
}
