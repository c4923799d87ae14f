// Two `Adapters` of one model whose scopes are nested: their updates add up, whatever the methods, and whichever scope
// is the inner one.
#include "support/models.hpp"

#include <lora/attach.hpp>

#include <algorithm>
#include <utility>

namespace {

using torch::Tensor;
namespace nn = torch::nn;
namespace F = torch::nn::functional;

/// A method, and those of its tensors whose gradients are those of finite differences, since no constant hides in them.
struct Method {
  lora::MethodKind kind;
  std::vector<std::string> exact;
};

const std::vector<Method>& methods() {
  static const std::vector<Method> all{
      {lora::LowRank(), {"lora_A", "lora_B"}},
      {lora::DoRA(), {"lora_magnitude_vector"}},  // the norm is a constant
      {lora::VeRA(), {"vera_lambda_b", "vera_lambda_d"}},
      {lora::IA3(), {"ia3_l"}},
  };
  return all;
}

/// A layer, and what it computes with a weight, written down without the library.
struct Kind {
  const char* name;
  std::function<std::shared_ptr<nn::Module>()> make;
  Tensor (*run)(nn::Module& layer, const Tensor& x);
  Tensor (*by_hand)(const Tensor& x, const Tensor& weight, const Tensor& bias);
  std::vector<std::vector<int64_t>> sizes;  // of the inputs
};

template <class Impl>
Tensor forward(nn::Module& layer, const Tensor& x) {
  return layer.as<Impl>()->forward(x);
}

const std::vector<Kind>& kinds() {
  static const std::vector<Kind> all{
      {"Linear",
       [] { return nn::Linear(5, 4).ptr(); },
       forward<nn::LinearImpl>,
       [](const Tensor& x, const Tensor& w, const Tensor& b) { return F::linear(x, w, b); },
       {{5}, {3, 5}, {2, 3, 5}, {2, 2, 3, 5}}},
      {"Linear without bias",
       [] { return nn::Linear(nn::LinearOptions(5, 4).bias(false)).ptr(); },
       forward<nn::LinearImpl>,
       [](const Tensor& x, const Tensor& w, const Tensor&) { return F::linear(x, w); },
       {{5}, {3, 5}, {2, 3, 5}}},
      {"Conv1d",
       [] { return nn::Conv1d(nn::Conv1dOptions(5, 4, 3).padding(1)).ptr(); },
       forward<nn::Conv1dImpl>,
       [](const Tensor& x, const Tensor& w, const Tensor& b) {
         return F::conv1d(x, w, F::Conv1dFuncOptions().bias(b).padding(1));
       },
       {{5, 6}, {2, 5, 6}}},
      {"Embedding",
       [] { return nn::Embedding(7, 4).ptr(); },
       forward<nn::EmbeddingImpl>,
       [](const Tensor& x, const Tensor& w, const Tensor&) { return F::embedding(x, w); },
       {{4}, {2, 3}, {2, 3, 2}}},
  };
  return all;
}

/// Two layers of one kind, used side by side, in float64.
struct PairImpl : nn::Module {
  explicit PairImpl(const Kind& kind) : kind(kind) {
    for (const auto* name : {"left", "right"}) register_module(name, kind.make());
    to(testing::device(), torch::kDouble);
  }

  Tensor forward(const Tensor& x) {
    return kind.run(*named_children()["left"], x) + 3 * kind.run(*named_children()["right"], x).tanh();
  }

  /// The same with `changed(name of a parameter)` in the places of the parameters.
  Tensor by_hand(const Tensor& x, const std::function<Tensor(const std::string& name)>& changed) {
    const auto run = [&](const std::string& layer) {
      return kind.by_hand(x, changed(layer + ".weight"), changed(layer + ".bias"));
    };
    return run("left") + 3 * run("right").tanh();
  }

  const Kind& kind;
};
TORCH_MODULE(Pair);

using Names = std::vector<std::string>;

/// Which layers each of the two adapts.
struct Layers {
  Names first, second;

  bool is_one_each() const { return first.size() == 1 && second.size() == 1; }
};

/// Two `Adapters` of a pair, of different ranks and scales, with values in every tensor.
struct Fixture {
  Fixture(const Kind& kind, const Method& of_first, const Method& of_second, Layers places, double dropout = 0)
      : model(kind), layers(std::move(places)), first(*model), second(*model) {
    first.add("default",
              lora::LoRAConfig(2).alpha(5).dropout(dropout).method(of_first.kind).target_modules(layers.first));
    second.add("default",
               lora::LoRAConfig(3).alpha(2).dropout(dropout).method(of_second.kind).target_modules(layers.second));
    for (const auto* adapters : {&first, &second}) testing::randomize(adapters->parameters(), 0.3);
    model->train(dropout == 0);
  }

  /// Base + (delta_1 + delta_2) x, of those that are asked for. IA3 changes biases, too.
  Tensor expected(const Tensor& x, bool with_first = true, bool with_second = true) {
    return model->by_hand(x, [&](const std::string& name) {
      const auto parameters = model->named_parameters();
      const auto* parameter = parameters.find(name);
      if (parameter == nullptr) return Tensor();
      auto sum = *parameter;
      for (const auto& [adapters, is_asked_for] : {std::pair(&first, with_first), std::pair(&second, with_second)}) {
        for (const auto& part : adapters->adapter("default")->parts) {
          const auto& site = part.site->name();
          const bool is_it = site == name || site + ".weight" == name;
          if (is_asked_for && is_it) sum = sum + adapters->delta("default", site);
        }
      }
      return sum;
    });
  }

  Tensor run(const Tensor& x, bool first_is_outer) {
    auto outer = (first_is_outer ? first : second).activate();
    auto inner = (first_is_outer ? second : first).activate();
    return model->forward(x);
  }

  static bool contains(const Names& names, const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  }

  Pair model;
  Layers layers;
  lora::Adapters first, second;
};

Tensor input(const Kind& kind, const std::vector<int64_t>& sizes) {
  if (kind.name == std::string("Embedding")) return torch::randint(7, sizes, testing::on_device(torch::kLong));
  return torch::randn(sizes, testing::on_device(torch::kDouble));
}

/// Where the two meet: on one layer, on different ones, on some of them.
const std::vector<Layers> kPlaces{{{"left"}, {"left"}},
                                  {{"left"}, {"right"}},
                                  {{"left", "right"}, {"right"}},
                                  {{"left", "right"}, {"left", "right"}}};

/// Calls `check(kind, first, second)` for every kind of layer and every pair of methods.
void for_every_pair(const std::function<void(const Kind&, const Method&, const Method&)>& check) {
  const auto& kind = kinds()[GENERATE(range(size_t{0}, kinds().size()))];
  for (const auto& first : methods()) {
    for (const auto& second : methods()) {
      torch::manual_seed(0);
      INFO(kind.name << ": " << first.kind.info().name << ", then " << second.kind.info().name);
      check(kind, first, second);
    }
  }
}

}  // namespace

TEST_CASE("Every method is among those that are nested here") {
  for (const auto& kind : lora::all_methods()) {
    const auto is_it = [&](const Method& method) { return method.kind.info().name == kind.info().name; };
    INFO(kind.info().name);
    CHECK(std::any_of(methods().begin(), methods().end(), is_it));
  }
}

TEST_CASE("The updates of two scopes add up in both orders of nesting, also in evaluation mode with dropout") {
  for_every_pair([](const Kind& kind, const Method& first, const Method& second) {
    for (const auto& places : kPlaces) {
      for (const double dropout : {0.0, 0.5}) {
        Fixture f(kind, first, second, places, dropout);
        INFO("on " << places.first << " and " << places.second << ", dropout " << dropout);
        for (const auto& sizes : kind.sizes) {
          INFO("input " << sizes);
          const auto x = input(kind, sizes), expected = f.expected(x);
          CHECK(testing::distance(expected, f.model->forward(x)) > 0.02);
          CHECK(testing::distance(f.run(x, /*first_is_outer=*/true), expected) < 1e-12);
          CHECK(testing::distance(f.run(x, /*first_is_outer=*/false), expected) < 1e-12);
        }
      }
    }
  });
}

TEST_CASE("What the inner scope added is gone when it is left") {
  for_every_pair([](const Kind& kind, const Method& first, const Method& second) {
    Fixture f(kind, first, second, kPlaces[0]);
    const auto x = input(kind, kind.sizes.back()), base = f.model->forward(x);
    const auto with_first = f.expected(x, true, false), with_both = f.expected(x);
    {
      auto outer = f.first.activate();
      CHECK(testing::distance(f.model->forward(x), with_first) < 1e-12);
      {
        auto inner = f.second.activate();
        CHECK(testing::distance(f.model->forward(x), with_both) < 1e-12);
      }
      CHECK(testing::distance(f.model->forward(x), with_first) < 1e-12);
    }
    CHECK(torch::equal(f.model->forward(x), base));
  });
}

TEST_CASE("The gradients of both adapters and of the input are those of the sum") {
  for_every_pair([](const Kind& kind, const Method& first, const Method& second) {
    for (const auto& places : kPlaces) {
      for (const bool first_is_outer : {true, false}) {
        INFO("on " << places.first << " and " << places.second << (first_is_outer ? "" : ", the second one outside"));
        Fixture f(kind, first, second, places);
        auto x = input(kind, kind.sizes.back());
        const auto loss = [&] { return f.run(x, first_is_outer).sin().sum(); };
        std::vector<Tensor> all, exact;
        for (const auto& [adapters, method] : {std::pair(&f.first, &first), std::pair(&f.second, &second)}) {
          for (const auto& item : adapters->named_parameters()) {
            const auto name = item.key().substr(item.key().rfind('.') + 1);
            all.push_back(item.value());
            if (Fixture::contains(method->exact, name)) exact.push_back(item.value());
          }
        }
        if (x.is_floating_point()) {
          all.push_back(x.requires_grad_());
          exact.push_back(x);
        }
        const auto expected = torch::autograd::grad({f.expected(x).sin().sum()}, all);
        const auto gradients = torch::autograd::grad({loss()}, all);
        for (size_t i = 0; i < all.size(); ++i) CHECK(testing::distance(gradients[i], expected[i]) < 1e-11);
        if (places.is_one_each()) CHECK(testing::gradient_error(loss, exact) < 1e-7);
      }
    }
  });
}
