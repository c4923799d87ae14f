// A method that a program outside the library defines, with everything that the library's own methods can do.
#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/modules/linear.hpp>
#include <lora/peft/checkpoint.hpp>

#include <algorithm>

namespace {

using torch::Tensor;

/// W' = W + v 1^T + 1 h^T / in: a shift of each output, and a smaller one of each input.
struct Shift : lora::Method {
  static constexpr lora::MethodInfo info{"Shift", "SHIFT", "", "", "", "", "init_shift", 8, "target_modules"};

  Shift& strength(double value) { return strength_ = value, *this; }
  static std::vector<lora::MethodOption<Shift>> peft_options() { return {{"shift_strength", &Shift::strength_}}; }

  std::vector<lora::MethodField<Shift>> fields() const {
    return {{"shift_v", &Shift::v, {lora::kOut}}, {"shift_h", &Shift::h, {lora::kIn}, ".weight"}};
  }
  void initialize(const lora::Base&) {
    v.zero_();
    h.zero_();
  }
  Tensor delta(const lora::Base& base) const {
    return strength_ * (v.unsqueeze(-1) + h / static_cast<double>(base.shape().in));
  }

  Tensor v, h;
  double strength_ = 1;
};

/// W' = W + a 1^T, computed from the sum of the inputs and not from W'.
struct Summed : lora::Method {
  static constexpr lora::MethodInfo info{"Summed", "SUMMED", "", "", "", ""};

  std::vector<lora::MethodField<Summed>> fields() const { return {{"summed_a", &Summed::a, {lora::kOut}}}; }
  void initialize(const lora::Base&) { a.zero_(); }
  Tensor delta(const lora::Base& base) const { return a.unsqueeze(-1).expand({-1, base.shape().in}); }
  Tensor forward(const lora::Product& product) const { return product.frozen() + product.x.sum(-1, true) * a; }

  Tensor a;
};

void make_known() {
  static const bool once = [] { return lora::register_method(Shift()), true; }();
  (void)once;
}

/// Two layers with an adapter on each, in float64.
struct Fixture {
  explicit Fixture(const lora::MethodKind& method) {
    torch::manual_seed(0);
    model->push_back("first", torch::nn::Linear(5, 4));
    model->push_back("second", torch::nn::Linear(4, 3));
    model->to(testing::device(), torch::kDouble);
    adapters.emplace(lora::attach(*model, lora::LoRAConfig(2).method(method).target_modules({"first", "second"})));
    testing::randomize(adapters->parameters(), 0.3);
    x = torch::randn({2, 3, 5}, testing::on_device(torch::kDouble));
  }

  Tensor adapted(const std::string& name = "default") {
    auto active = adapters->activate(name);
    return model->forward(x);
  }

  Tensor by_hand(const std::string& name = "default") {
    const auto layer = [&](const char* layer, int64_t i, const Tensor& x) {
      auto* linear = model->ptr(static_cast<size_t>(i))->as<torch::nn::Linear>();
      return torch::linear(x, linear->weight + adapters->delta(name, layer), linear->bias);
    };
    return layer("second", 1, layer("first", 0, x));
  }

  torch::nn::Sequential model;
  std::optional<lora::Adapters> adapters;
  Tensor x;
};

}  // namespace

TEST_CASE("A user's method is attached, trained, merged and unmerged") {
  const auto method = GENERATE(lora::MethodKind(Shift().strength(0.5)), lora::MethodKind(Summed()));
  Fixture f(method);
  INFO(method.info().name);
  const auto base = f.model->forward(f.x), adapted = f.adapted();
  CHECK(testing::distance(adapted, base) > 0.1);
  CHECK(testing::distance(adapted, f.by_hand()) < 1e-12);
  CHECK(testing::gradient_error([&] { return f.adapted().sin().sum(); }, f.adapters->parameters()) < 1e-7);
  f.adapters->merge();
  CHECK(testing::distance(f.model->forward(f.x), adapted) < 1e-12);
  f.adapters->unmerge();
  CHECK(torch::equal(f.model->forward(f.x), base));
}

TEST_CASE("A user's method is one of several adapters") {
  Fixture f{Shift()};
  f.adapters->add("low rank", lora::LoRAConfig(2).alpha(5).target_modules({"first"}));
  f.adapters->add("summed", lora::LoRAConfig(2).method(Summed()).target_modules({"first", "second"}));
  testing::randomize(f.adapters->parameters("low rank"));
  testing::randomize(f.adapters->parameters("summed"));
  CHECK(testing::distance(f.adapted("default"), f.by_hand("default")) < 1e-12);
  CHECK(testing::distance(f.adapted("summed"), f.by_hand("summed")) < 1e-12);
  CHECK(f.adapters->report().layers[0].method == "Shift");
  lora::Adapters others(*f.model);
  others.add("default", lora::LoRAConfig(2).method(Summed()).target_modules({"first"}));
  testing::randomize(others.parameters());
  auto* first = f.model->ptr(0)->as<torch::nn::Linear>();
  const auto both = torch::linear(
      f.x, first->weight + f.adapters->delta("summed", "first") + others.delta("default", "first"), first->bias);
  auto outer = others.activate();
  auto inner = f.adapters->activate("summed");
  CHECK(testing::distance(first->forward(f.x), both) < 1e-12);
}

TEST_CASE("A user's method is the method of a module") {
  torch::manual_seed(0);
  lora::LoRALinear<Shift> layer(torch::nn::Linear(5, 4), lora::LoRAOptions(2));
  layer->to(testing::device());
  CHECK(layer->named_parameters().contains("shift_v"));
  testing::randomize(lora::trainable_parameters(*layer), 0.3);
  auto x = torch::randn({2, 5}, testing::device());
  const auto adapted = layer->forward(x);
  CHECK(testing::distance(adapted, torch::linear(x, layer->weight + layer->delta(), layer->bias)) < 1e-5);
  layer->merge();
  CHECK(testing::distance(layer->forward(x), adapted) < 1e-5);
}

TEST_CASE("A user's method goes to files and comes back, once it is registered") {
  testing::TemporaryFolder folder;
  make_known();
  Fixture f(Shift().strength(0.25));
  const auto adapted = f.adapted();
  f.adapters->save(folder.path());
  const auto tensors = lora::read_safetensors(folder / "adapter_model.safetensors");
  CHECK(tensors.count("base_model.model.first.shift_v") == 1);
  CHECK(tensors.count("base_model.model.second.shift_h.weight") == 1);
  f.adapters->detach();
  auto loaded = lora::load_adapter(*f.model, folder.path());
  CHECK(loaded.config("default").method().info().name == "Shift");
  auto active = loaded.activate();
  CHECK(testing::distance(f.model->forward(f.x), adapted) < 1e-12);
}

TEST_CASE("A method whose name in files is taken is not registered") {
  make_known();
  CHECK_THROWS_WITH(lora::register_method(Shift()), testing::contains("cannot be told from the method \"Shift\""));
}
