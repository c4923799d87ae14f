// Checkpoints: values, gradients, random numbers and scopes are those of the function as it is.
#include "support/testing.hpp"

#include <lora/attach.hpp>
#include <lora/modules/linear.hpp>
#include <lora/train/checkpointing.hpp>

#include <thread>

namespace {

using testing::contains;
using testing::error_of;
using testing::on_device;
using torch::Tensor;
using Tensors = std::vector<Tensor>;

Tensor random(at::IntArrayRef sizes) { return torch::randn(sizes, on_device(torch::kDouble)); }

/// A block with all kinds of parameters, dropout, and a tensor that it captured.
struct Block {
  Block() { net->to(testing::device(), torch::kDouble); }

  Tensor operator()(const Tensor& x) const { return net->forward(x) * factor; }

  mutable torch::nn::Sequential net{torch::nn::Linear(5, 7), torch::nn::ReLU(), torch::nn::Dropout(0.4),
                                    torch::nn::LayerNorm(torch::nn::LayerNormOptions({7})), torch::nn::Linear(7, 5)};
  Tensor factor = random({5}).requires_grad_();

  Tensors parameters() const {
    auto all = net->parameters();
    all.push_back(factor);
    return all;
  }
};

/// What one backward pass leaves: the value, the gradients, and the next random number.
Tensors trace(const std::function<Tensor()>& loss, const Tensors& tensors) {
  torch::manual_seed(3);
  for (const auto& tensor : tensors) tensor.mutable_grad() = Tensor();
  const auto value = loss();
  value.backward();
  Tensors all{value.detach(), torch::rand({3})};
  for (const auto& tensor : tensors) all.push_back(tensor.grad().defined() ? tensor.grad().clone() : Tensor());
  return all;
}

bool are_equal(const Tensors& a, const Tensors& b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](const Tensor& x, const Tensor& y) {
           return x.defined() == y.defined() && (!x.defined() || torch::equal(x.cpu(), y.cpu()));
         });
}

/// Checks that `loss(run)` leaves the same when `run` is the block, and when it is the block in a checkpoint.
template <class Run, class Loss>
void check_same(const Run& run, const Tensors& tensors, const Loss& loss) {
  const auto kept = trace([&] { return loss(run); }, tensors);
  const auto again =
      trace([&] { return loss([&](const auto&... inputs) { return lora::checkpoint(run, inputs...); }); }, tensors);
  CHECK(are_equal(kept, again));
  CHECK(testing::distance(kept[2], torch::zeros_like(kept[2])) > 0);
}

}  // namespace

TEST_CASE("A checkpoint leaves the value, the gradients and the generator that the function leaves") {
  torch::manual_seed(0);
  const Block block, other;
  const auto x = random({4, 3, 5}).requires_grad_();
  auto tensors = block.parameters();
  tensors.push_back(x);
  const auto run = [&](const Tensor& input) { return block(input); };

  SECTION("one") {
    check_same(run, tensors, [&](const auto& f) { return f(x).pow(2).sum(); });
  }
  SECTION("one of which a view is the input, and the result is changed in place") {
    check_same(run, tensors, [&](const auto& f) { return f(x.transpose(0, 1)).mul_(2).pow(2).sum(); });
  }
  SECTION("an input without gradient") {
    const auto fixed = x.detach();
    check_same(run, block.parameters(), [&](const auto& f) { return f(fixed).pow(2).sum(); });
  }
  SECTION("one after the other, with the same parameters, which are also used outside") {
    check_same(run, tensors, [&](const auto& f) { return (f(f(x)) * block.factor).pow(2).sum(); });
  }
  SECTION("nested") {
    const auto both = [&](const Tensor& input) { return other(lora::checkpoint(run, input)).sin(); };
    const auto plain = [&](const Tensor& input) { return other(run(input)).sin(); };
    const auto loss = [&](const auto& f) { return f(x).pow(2).sum(); };
    CHECK(
        are_equal(trace([&] { return loss(plain); }, tensors),
                  trace([&] { return loss([&](const Tensor& in) { return lora::checkpoint(both, in); }); }, tensors)));
  }
  SECTION("a tensor with a history that the function captured") {
    check_same(run, tensors, [&](const auto& f) {
      const auto hidden = block.factor.exp();
      const auto with = [&run, hidden](const Tensor& input) { return run(input) + hidden * input; };
      const bool is_checkpoint = !std::is_same_v<std::decay_t<decltype(f)>, std::decay_t<decltype(run)>>;
      const auto y = is_checkpoint ? lora::checkpoint(with, lora::checkpoint(with, x)) : with(with(x));
      return (y * hidden).pow(2).sum();
    });
  }
  SECTION("a function that a scope of autocast surrounds, which ends before backward") {
    if (!testing::device().is_cpu()) return;
    const auto xf = x.detach().to(torch::kFloat).requires_grad_();
    const auto w = block.net->parameters()[0].detach().to(torch::kFloat).requires_grad_();
    check_same([&](const Tensor& in) { return torch::relu(torch::linear(in, w)); }, {xf, w},
               [&](const auto& f) {
                 at::autocast::set_autocast_enabled(at::kCPU, true);
                 at::autocast::set_autocast_dtype(at::kCPU, torch::kHalf);
                 const auto y = f(xf);
                 at::autocast::set_autocast_enabled(at::kCPU, false);
                 at::autocast::set_autocast_dtype(at::kCPU, torch::kBFloat16);
                 CHECK(y.scalar_type() == torch::kHalf);
                 return y.to(torch::kFloat).pow(2).sum();
               });
    CHECK(at::autocast::get_autocast_dtype(at::kCPU) == torch::kBFloat16);
  }
}

TEST_CASE("A parameter that autocast has cast already, and a tensor of another thread's graph") {
  torch::manual_seed(0);
  const auto x = random({4, 5}).requires_grad_(), w = random({5}).requires_grad_();
  SECTION("cast") {
    if (!testing::device().is_cpu()) return;
    const auto xf = x.detach().to(torch::kFloat).requires_grad_();
    const auto v = torch::randn({5, 5}).requires_grad_();
    at::autocast::set_autocast_enabled(at::kCPU, true);
    at::autocast::increment_nesting();
    const auto before = torch::linear(xf, v);
    const auto y = lora::checkpoint([&](const Tensor& in) { return torch::linear(in, v); }, xf);
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, false);
    const auto found = torch::autograd::grad({y.to(torch::kFloat).pow(2).sum()}, {xf, v});
    const auto expected = torch::autograd::grad({before.to(torch::kFloat).pow(2).sum()}, {xf, v});
    CHECK(are_equal(found, expected));
  }
  SECTION("another thread") {
    Tensor hidden;
    std::thread([&, made_here = at::sequence_number::peek()] {  // with a later number than the nodes of this thread
      while (at::sequence_number::peek() < made_here + 1000) hidden = w.exp();
    })
        .join();
    const auto y = lora::checkpoint([hidden](const Tensor& in) { return in.sin() * hidden; }, x);
    const auto found = torch::autograd::grad({(y * hidden).sum()}, {x, w});
    const auto same = w.exp();
    CHECK(are_equal(found, torch::autograd::grad({(x.sin() * same * same).sum()}, {x, w})));
  }
  SECTION("a result that is an input is changed in place") {
    const auto y = lora::checkpoint([](const Tensor& /*in*/, const Tensor& other) { return other.view(-1); }, x, w);
    const auto before = w.detach().clone();
    y.mul_(3).pow(2).sum().backward();
    CHECK(torch::equal(w, before));
    CHECK(testing::distance(w.grad(), 18 * before) < 1e-12);
  }
}

TEST_CASE("A checkpoint takes several tensors and returns several, of which not all have a gradient or get one") {
  torch::manual_seed(0);
  const Block block;
  const auto x = random({4, 5}).requires_grad_(), y = random({4, 5}).requires_grad_();
  const auto rows = torch::tensor({2, 0, 3}, on_device(torch::kLong));
  auto tensors = block.parameters();
  tensors.insert(tensors.begin(), {x, y});

  SECTION("a tuple, with numbers among the inputs and the results, and an input among the results") {
    const auto run = [&](const Tensor& a, const Tensor& b, const Tensor& indices) {
      const auto z = block(a * b).index_select(0, indices);
      return std::make_tuple(z, z.argmax(-1), b, z.detach());
    };
    check_same(run, tensors, [&](const auto& f) {
      const auto [z, best, same, fixed] = f(x, y, rows);
      CHECK((z.requires_grad() && same.requires_grad() && !best.requires_grad() && !fixed.requires_grad()));
      CHECK(torch::equal(same, y));
      return (z * best.unsqueeze(-1)).sum() + same.pow(3).sum() + fixed.sum();
    });
  }
  SECTION("a list, of which one result is not used") {
    const auto run = [&](const Tensor& a, const Tensor& b) {
      return Tensors{block(a), a.sin() * b, b.exp(), Tensor()};
    };
    check_same(run, tensors, [&](const auto& f) {
      const auto all = f(x, y);
      CHECK((all.size() == 4 && !all[3].defined()));
      return all[0].pow(2).sum() + all[1].sum();
    });
  }
  SECTION("a pair") {
    const auto run = [&](const Tensor& a) { return std::make_pair(block(a), a.sum()); };
    check_same(run, {x}, [&](const auto& f) {
      const auto both = f(x);
      return (both.first * both.second).sum();
    });
  }
}

TEST_CASE("Where nothing requires a gradient, and without gradient mode, the function just runs") {
  const auto x = random({2, 3}), learned = random({2, 3}).requires_grad_();
  int runs = 0;
  const auto run = [&runs](const Tensor& input) { return ++runs, input.exp(); };
  CHECK_FALSE(lora::checkpoint(run, x).requires_grad());
  {
    torch::NoGradGuard no_grad;
    CHECK_FALSE(lora::checkpoint(run, learned).requires_grad());
  }
  CHECK(runs == 2);
  const auto y = lora::checkpoint(run, learned);
  CHECK(y.grad_fn()->name() == "lora::Checkpoint");
  y.sum().backward();
  CHECK(runs == 4);
  CHECK(torch::equal(learned.grad(), learned.exp()));
}

TEST_CASE("What is computed inside is let go, and the inputs are kept") {
  const auto x = random({2, 3}).requires_grad_();
  c10::weak_intrusive_ptr<c10::StorageImpl> inside(c10::intrusive_ptr<c10::StorageImpl>{});
  const auto run = [&](const Tensor& input) {
    const auto hidden = input.exp();  // kept for its own gradient
    inside = hidden.storage().getWeakStorageImpl();
    return hidden.sin();
  };
  const auto kept = run(x);
  CHECK_FALSE(inside.expired());
  const auto y = lora::checkpoint(run, x);
  CHECK(inside.expired());
}

TEST_CASE("Backward has the scopes of adapters in which the function ran first, also when they have ended") {
  torch::manual_seed(0);
  Block block;
  auto adapters = lora::attach(*block.net, lora::LoRAConfig(2).alpha(5).dropout(0.3).target_modules(lora::all_linear));
  for (const auto& parameter : adapters.parameters()) torch::nn::init::normal_(parameter, 0.0, 0.5);
  const auto x = random({4, 5}).requires_grad_();
  auto tensors = adapters.parameters();
  tensors.push_back(x);
  const auto run = [&](const Tensor& input) { return block(input); };
  const auto forward = [&](bool recompute) {
    torch::manual_seed(3);
    for (const auto& tensor : tensors) tensor.mutable_grad() = Tensor();
    const auto active = adapters.activate();
    return (recompute ? lora::checkpoint(run, x) : run(x)).pow(2).sum();
  };
  const auto gradients = [&] {
    Tensors all;
    for (const auto& tensor : tensors) all.push_back(tensor.grad().clone());
    return all;
  };
  testing::Warnings warnings;
  forward(false).backward();
  const auto kept = gradients();
  SECTION("on this thread") { forward(true).backward(); }
  SECTION("on another thread") {
    const auto loss = forward(true);
    std::thread([&] { loss.backward(); }).join();
  }
  SECTION("inside of the scope of another adapter") {
    const auto loss = forward(true);
    adapters.add("other", lora::LoRAConfig(1).target_modules({"0"}));
    const auto active = adapters.activate("other");
    block(x);
    loss.backward();
  }
  CHECK(are_equal(gradients(), kept));
  CHECK(warnings.texts.empty());
}

TEST_CASE("A layer of this library inside of a checkpoint") {
  torch::manual_seed(0);
  torch::nn::Linear base(5, 5);
  base->to(testing::device(), torch::kDouble);
  lora::LoRALinear<> layer(base, lora::LoRAOptions(2).alpha(5).dropout(0.5));
  for (const auto& parameter : layer->parameters()) {
    if (parameter.requires_grad()) torch::nn::init::normal_(parameter.detach(), 0.0, 0.5);
  }
  const auto x = random({4, 5}).requires_grad_();
  Tensors tensors{x};
  for (const auto& parameter : layer->parameters()) {
    if (parameter.requires_grad()) tensors.push_back(parameter);
  }
  CHECK(tensors.size() == 3);
  check_same([&](const Tensor& input) { return layer->forward(input); }, tensors,
             [&](const auto& f) { return f(x).pow(2).sum(); });
}

TEST_CASE("Gradients of some of the tensors, hooks, retained gradients, second passes and second derivatives") {
  torch::manual_seed(0);
  const auto w = random({5, 5}).requires_grad_(), v = random({5}).requires_grad_(), x = random({3, 5}).requires_grad_();
  const auto run = [&](const Tensor& in) { return (in.mm(w).tanh() * v).sin(); };
  const auto grad = [](const Tensor& y, const Tensors& of, bool create = false) {
    return torch::autograd::grad({y.pow(2).sum()}, of, {}, {}, create);
  };
  SECTION("torch::autograd::grad leaves .grad alone") {
    CHECK(are_equal(grad(lora::checkpoint(run, x), {w}), grad(run(x), {w})));
    CHECK(are_equal(grad(lora::checkpoint(run, x), {v, x}), grad(run(x), {v, x})));
    CHECK_FALSE(w.grad().defined());
  }
  SECTION("a hook runs once, and what it returns counts") {
    int calls = 0;
    w.register_hook([&](const Tensor& gradient) { return ++calls, gradient * 3; });
    const auto input = x * 2;
    input.register_hook([&](const Tensor& gradient) { return ++calls, gradient * 5; });
    input.retain_grad();
    lora::checkpoint(run, input).pow(2).sum().backward();
    CHECK(calls == 2);
    const Tensors found{w.grad(), x.grad(), input.grad()};
    const auto plain = x.detach().mul(2).requires_grad_();
    const auto once = torch::autograd::grad({run(plain).pow(2).sum()}, {plain})[0];
    CHECK(torch::equal(found[1], once * 5 * 2));
    CHECK(torch::equal(found[2], once * 5));
  }
  SECTION("a second pass") {
    const auto y = lora::checkpoint(run, x);
    const auto loss = y.pow(2).sum();
    loss.backward({}, /*retain_graph=*/true);
    const auto first = w.grad().clone();
    loss.backward();
    CHECK(torch::equal(w.grad(), first * 2));
    CHECK_THAT(error_of([&] { y.sum().backward(); }),
               contains("lora::checkpoint: a second backward pass needs the inputs, which the first one let go"));
  }
  SECTION("a second derivative") {
    const auto second = [&](const Tensor& y) {
      const auto slopes = grad(y, {x, w, v}, true);
      return torch::autograd::grad({slopes[0].pow(2).sum() + slopes[1].pow(3).sum() + slopes[2].sin().sum()},
                                   {x, w, v});
    };
    const auto found = second(lora::checkpoint(run, x)), expected = second(run(x));
    for (size_t i = 0; i < found.size(); ++i) CHECK(testing::distance(found[i], expected[i]) < 1e-12);
    const auto twice = [&](const Tensor& in) { return lora::checkpoint(run, in) + in; };
    const auto nested = second(lora::checkpoint(twice, x)), plain = second(run(x) + x);
    for (size_t i = 0; i < found.size(); ++i) CHECK(testing::distance(nested[i], plain[i]) < 1e-12);
  }
}

TEST_CASE("What would make gradients wrong in silence is refused") {
  const auto x = random({3, 5}).requires_grad_(), w = random({5}).requires_grad_(), v = random({5}).requires_grad_();
  SECTION("the function writes to its input") {
    const auto run = [&](const Tensor& a, const Tensor& b) { return a * b.mul_(2); };
    CHECK_THAT(error_of([&] { lora::checkpoint(run, x, x * 2); }),
               contains("lora::checkpoint: the function wrote to its input 1, of which backward needs"));
  }
  SECTION("an input is written to before backward") {
    const auto input = x * 2;
    const auto y = lora::checkpoint([&](const Tensor& in) { return in + w; }, input);
    input.mul_(2);
    CHECK_THAT(error_of([&] { y.sum().backward(); }), contains("modified by an inplace operation"));
  }
  SECTION("the function uses other parameters the second time") {
    int runs = 0;
    const auto y = lora::checkpoint([&](const Tensor& in) { return in * (++runs == 1 ? w : v); }, x);
    CHECK_THAT(error_of([&] { y.sum().backward(); }),
               contains("lora::checkpoint: in backward the function did not compute what it computed first"));
  }
  SECTION("part of the graph is made on another thread") {
    const auto y = lora::checkpoint(
        [&](const Tensor& in) {
          Tensor product;
          std::thread([&] { product = in * w; }).join();
          return product.exp();
        },
        x);
    CHECK_THAT(error_of([&] { y.sum().backward(); }), contains("may make no part of the graph on a thread of its own"));
  }
}
