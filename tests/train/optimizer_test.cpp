// AdamW over flat memory, beside LibTorch's: steps, gradients, groups, files; and what else happens to parameters.
#include "support/testing.hpp"

#include <lora/attach.hpp>
#include <lora/method/dora.hpp>
#include <lora/peft/checkpoint.hpp>
#include <lora/train/optimizer.hpp>

#include <sstream>

namespace {

using lora::AdamWOptions;
using testing::contains;
using testing::distance;
using testing::error_of;
using testing::on_device;
using torch::Tensor;
using torch::optim::OptimizerParamGroup;
using Tensors = std::vector<Tensor>;

Tensor random(at::IntArrayRef sizes, torch::ScalarType type = torch::kDouble) {
  return torch::randn(sizes, on_device(type)).requires_grad_();
}

Tensors copies(const Tensors& tensors) {
  Tensors all;
  for (const auto& tensor : tensors) all.push_back(tensor.detach().clone().requires_grad_());
  return all;
}

Tensors some_parameters(torch::ScalarType type = torch::kDouble) {
  torch::manual_seed(0);
  return {random({3, 5}, type), random({7}, type), random({}, type), random({2, 0}, type), random({2, 3, 4}, type)};
}

/// A loss whose gradients differ from step to step and from element to element.
Tensor loss_of(const Tensors& parameters, int step) {
  auto loss = torch::zeros({}, parameters[0].options().requires_grad(false));
  for (const auto& p : parameters) loss = loss + (p * (1.0 + step % 3) + 0.3 * step).sin().sum();
  return loss;
}

template <class Options>
std::vector<OptimizerParamGroup> groups_of(const Tensors& p) {
  std::vector<OptimizerParamGroup> groups;
  groups.emplace_back(Tensors{p[0], p[1]});
  auto own = std::make_unique<Options>(3e-2);
  own->weight_decay(0.2).betas({0.7, 0.95}).eps(1e-4);
  groups.emplace_back(Tensors{p[2], p[3], p[4]}, std::move(own));
  return groups;
}

std::string saved(const torch::optim::Optimizer& optimizer) {
  std::ostringstream out;
  torch::serialize::OutputArchive archive;
  optimizer.save(archive);
  archive.save_to(out);
  return out.str();
}

void load(torch::optim::Optimizer& optimizer, const std::string& bytes) {
  std::istringstream in(bytes);
  torch::serialize::InputArchive archive;
  archive.load_from(in);
  optimizer.load(archive);
}

/// Whether they lie in memory one behind the other.
bool are_together(const Tensors& tensors) {
  const char* next = nullptr;
  for (const auto& tensor : tensors) {
    const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
    if (next != nullptr && begin != next) return false;
    next = begin + (tensor.numel() + 15) / 16 * 16 * tensor.element_size();
  }
  return true;
}

torch::nn::Sequential small_model() {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(4, 6), torch::nn::ReLU(), torch::nn::Linear(6, 3));
  model->to(testing::device(), torch::kDouble);
  return model;
}

}  // namespace

TEST_CASE("A hundred steps are LibTorch's, for all groups, in each type") {
  const auto type = GENERATE(torch::kDouble, torch::kFloat);
  const auto ours = some_parameters(type), theirs = copies(ours);
  const AdamWOptions options = AdamWOptions(1e-2).weight_decay(0.1).betas({0.8, 0.9});
  auto plain_options = torch::optim::AdamWOptions(1e-2);
  plain_options.weight_decay(0.1).betas({0.8, 0.9});
  lora::AdamW optimizer(groups_of<AdamWOptions>(ours), options);
  torch::optim::AdamW plain(groups_of<torch::optim::AdamWOptions>(theirs), plain_options);
  const auto before = copies(ours);
  for (int step = 0; step < 100; ++step) {
    optimizer.zero_grad();
    plain.zero_grad();
    loss_of(ours, step).backward();
    loss_of(theirs, step).backward();
    if (step % 7 == 0) {  // gradients add up
      loss_of(ours, step + 1).backward();
      loss_of(theirs, step + 1).backward();
    }
    optimizer.step();
    plain.step();
    if (step == 50) {
      for (auto* each :
           {static_cast<torch::optim::Optimizer*>(&optimizer), static_cast<torch::optim::Optimizer*>(&plain)})
        each->param_groups()[1].options().set_lr(1e-3);
    }
    CHECK(distance(ours, theirs) < (type == torch::kFloat ? 1e-5 : 1e-13));
  }
  CHECK(distance(ours, before) > 0.1);
}

TEST_CASE("Parameters of one type lie together, are the tensors they were, and gradients are added in place") {
  auto parameters = some_parameters();
  parameters.push_back(random({3}, torch::kFloat));
  const auto before = copies(parameters);
  const auto turned = torch::empty_strided({3, 4}, {1, 3}, on_device(torch::kDouble));  // no rows of memory
  turned.copy_(torch::randn({3, 4})).requires_grad_();
  auto all = parameters;
  all.push_back(turned);
  const auto turned_before = turned.detach().clone();
  const Tensor held = parameters[0], view = held.detach().t();
  lora::AdamW optimizer(all);
  CHECK(distance(parameters, before) == 0);
  CHECK(testing::distance(turned, turned_before) == 0);
  CHECK(are_together({parameters[0], parameters[1], parameters[2], parameters[4], turned}));
  CHECK(turned.strides() == at::IntArrayRef({1, 3}));
  CHECK(held.is_same(parameters[0]));
  CHECK(view.const_data_ptr() == parameters[0].const_data_ptr());
  for (const auto& p : all) CHECK((p.is_leaf() && p.requires_grad() && p.grad().defined()));

  const auto* memory = parameters[4].grad().const_data_ptr();
  loss_of(Tensors(parameters.begin(), parameters.begin() + 5), 1).backward();
  const auto once = parameters[4].grad().clone();
  loss_of(Tensors(parameters.begin(), parameters.begin() + 5), 1).backward();
  CHECK(testing::distance(parameters[4].grad(), once * 2) == 0);
  CHECK(parameters[4].grad().const_data_ptr() == memory);
  CHECK(are_together({parameters[0].grad(), parameters[1].grad(), parameters[2].grad(), parameters[4].grad()}));
  optimizer.zero_grad();
  CHECK(parameters[4].grad().abs().sum().item<double>() == 0);
  CHECK(parameters[4].grad().const_data_ptr() == memory);
  CHECK(optimizer.flat_gradients().size() == 2);
}

TEST_CASE("A parameter without a gradient is passed over, in each way in which it can have none") {
  const auto ours = some_parameters(), theirs = copies(ours);
  lora::AdamW optimizer(ours, AdamWOptions(1e-2).weight_decay(0.5));
  torch::optim::AdamW plain(theirs, torch::optim::AdamWOptions(1e-2).weight_decay(0.5));
  const auto part = [](const Tensors& all, int step) {
    Tensors some;
    for (size_t i = 0; i < all.size(); ++i) {
      if ((static_cast<size_t>(step) + i) % 3 != 0) some.push_back(all[i]);
    }
    return some;
  };
  for (int step = 0; step < 12; ++step) {
    if (step % 4 == 0) {
      static_cast<torch::optim::Optimizer&>(optimizer).zero_grad();  // LibTorch's, which leaves none defined
      CHECK_FALSE(ours[0].grad().defined());
    } else if (step % 4 == 1) {
      for (const auto& p : ours) p.mutable_grad() = Tensor();
    } else {
      optimizer.zero_grad();
    }
    plain.zero_grad();
    loss_of(part(ours, step), step).backward();
    loss_of(part(theirs, step), step).backward();
    if (step % 5 == 0) {  // a gradient that somebody put there
      ours[1].mutable_grad() = torch::ones_like(ours[1]);
      theirs[1].mutable_grad() = torch::ones_like(theirs[1]);
    }
    optimizer.step();
    plain.step();
    if (step % 3 == 0) {  // once more with the same gradients
      optimizer.step();
      plain.step();
    }
    CHECK(distance(ours, theirs) < 1e-13);
  }
  optimizer.zero_grad();
  const auto before = copies(ours);
  optimizer.step();
  CHECK(distance(ours, before) == 0);
}

TEST_CASE("What happens to parameters from outside") {
  const auto ours = some_parameters(), theirs = copies(ours);
  lora::AdamW optimizer(ours);
  torch::optim::AdamW plain(theirs);
  const auto step = [&](int number) {
    optimizer.zero_grad();
    plain.zero_grad();
    loss_of(ours, number).backward();
    loss_of(theirs, number).backward();
    optimizer.step();
    plain.step();
    CHECK(distance(ours, theirs) < 1e-13);
  };
  step(0);
  SECTION("values are read into them") {
    torch::NoGradGuard no_grad;
    for (const auto* all : {&ours, &theirs}) (*all)[0].copy_(torch::ones({3, 5}));
  }
  SECTION("they get other memory") {
    for (const auto* all : {&ours, &theirs}) (*all)[4].set_data(torch::ones({2, 3, 4}, on_device(torch::kDouble)));
    step(1);
    CHECK(are_together({ours[0], ours[1], ours[2], ours[4]}));
  }
  SECTION("they get a part of other memory, or lie in it in another order") {
    const bool is_part = GENERATE(true, false);
    const auto numbers = torch::arange(is_part ? 48 : 24, on_device(torch::kDouble));
    const auto other = [&] {
      return is_part ? numbers.clone().view({2, 4, 3, 2}).select(3, 1).transpose(1, 2)
                     : numbers.clone().view({2, 4, 3}).transpose(1, 2);
    };
    for (const auto* all : {&ours, &theirs}) (*all)[4].set_data(other());
    step(1);
    CHECK(are_together({ours[0], ours[1], ours[2], ours[4]}));
  }
  SECTION("a step is seen by whoever counts writes") {
    const auto before = ours[0]._version();
    step(1);
    CHECK(ours[0]._version() > before);
  }
  SECTION("a graph that was built before a step is refused afterwards") {
    const auto y = (ours[0] * ours[0]).sum();
    optimizer.step();
    plain.step();
    CHECK_THAT(error_of([&] { y.backward(); }), contains("modified by an inplace operation"));
  }
  SECTION("a second optimizer takes over, beside the first one") {
    lora::AdamW second(ours, AdamWOptions(0.1));
    torch::optim::AdamW plain_second(theirs, torch::optim::AdamWOptions(0.1));
    optimizer.zero_grad();
    plain.zero_grad();
    loss_of(ours, 5).backward();
    loss_of(theirs, 5).backward();
    second.step();
    plain_second.step();
    CHECK(distance(ours, theirs) < 1e-13);
  }
  SECTION("another group is added") {
    const auto more = random({4, 2}), same = more.detach().clone().requires_grad_();
    const bool through_base = GENERATE(true, false);
    auto options = AdamWOptions(0.5);
    auto plain_options = torch::optim::AdamWOptions(0.5);
    if (through_base) {
      static_cast<torch::optim::Optimizer&>(optimizer).add_param_group(OptimizerParamGroup({more}));
      plain.add_param_group(OptimizerParamGroup({same}));
    } else {
      optimizer.add_param_group({{more}, std::make_unique<AdamWOptions>(options)});
      plain.add_param_group({{same}, std::make_unique<torch::optim::AdamWOptions>(plain_options)});
    }
    loss_of({more}, 3).backward();
    loss_of({same}, 3).backward();
    optimizer.step();
    plain.step();
    CHECK(testing::distance(more, same) < 1e-13);
    optimizer.zero_grad();
    CHECK(more.grad().abs().sum().item<double>() == 0);
  }
  SECTION("they are cast") {
    ours[1].set_data(ours[1].to(torch::kFloat));
    CHECK_THAT(error_of([&] { optimizer.step(); }),
               contains("lora::AdamW: a parameter is Float [7] on " + testing::device().str() + " and was Double [7]"));
    ours[1].set_data(ours[1].to(torch::kDouble));
    for (const auto* all : {&ours, &theirs}) (*all)[1].detach().fill_(0.5);
  }
  step(2);
  step(3);
}

TEST_CASE("A parameter that is a part of other memory stays there") {
  torch::manual_seed(0);
  const auto table = torch::randn({6, 4}, on_device(torch::kDouble));
  const auto rows = table.narrow(0, 1, 3).requires_grad_(), columns = table.t().narrow(0, 2, 2).detach();
  const auto other = random({5});
  const auto turned = columns.narrow(1, 4, 2).requires_grad_();  // beside the rows, and no rows of memory
  const auto same = copies({rows, turned, other});
  lora::AdamW optimizer({rows, turned, other});
  torch::optim::AdamW plain(same);
  for (int step = 0; step < 5; ++step) {
    optimizer.zero_grad();
    plain.zero_grad();
    loss_of({rows, turned, other}, step).backward();
    loss_of(same, step).backward();
    optimizer.step();
    plain.step();
  }
  CHECK(distance({rows, turned, other}, same) < 1e-13);
  CHECK(testing::distance(table.narrow(0, 1, 3), rows) == 0);
  CHECK(testing::distance(table.t().narrow(0, 2, 2).narrow(1, 4, 2), turned) == 0);
}

TEST_CASE("Adapters: lora_B may learn faster, the model is seen at once, removing an adapter is no fault") {
  auto model = small_model();
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).alpha(5).target_modules({"0", "2"}));
  for (const auto& p : adapters.parameters()) torch::nn::init::normal_(p, 0.0, 0.3);
  const auto x = torch::randn({5, 4}, on_device(torch::kDouble));
  const auto names = adapters.named_parameters().keys();
  const auto ours = adapters.parameters(), theirs = copies(ours);
  std::vector<OptimizerParamGroup> groups;
  groups.emplace_back(Tensors(), std::make_unique<torch::optim::AdamWOptions>(1e-2));
  groups.emplace_back(Tensors(), std::make_unique<torch::optim::AdamWOptions>(5e-2));
  for (size_t i = 0; i < names.size(); ++i)
    groups[names[i].find("lora_B") != std::string::npos].params().push_back(theirs[i]);
  torch::optim::AdamW plain(groups);
  lora::AdamW optimizer(adapters, AdamWOptions(1e-2).b_rate(5));
  CHECK(optimizer.param_groups().size() == 2);
  CHECK(are_together({ours[0], ours[2], ours[1], ours[3]}));
  for (int step = 0; step < 10; ++step) {
    const auto active = adapters.activate();
    optimizer.zero_grad();
    model->forward(x).pow(2).mean().backward();
    for (size_t i = 0; i < ours.size(); ++i) theirs[i].mutable_grad() = ours[i].grad().clone();
    const auto before = model->forward(x).detach();
    optimizer.step();
    plain.step();
    CHECK(testing::distance(model->forward(x), before) > 1e-4);
  }
  CHECK(distance(ours, theirs) < 1e-13);

  adapters.add("other", lora::LoRAConfig(1).target_modules({"2"}));
  lora::AdamW both(adapters, AdamWOptions(1e-2).b_rate(2));
  CHECK(both.param_groups()[1].params().size() == 3);
  CHECK(both.param_groups()[1].options().get_lr() == 2e-2);
  CHECK(static_cast<AdamWOptions&>(both.param_groups()[0].options()).b_rate() == 2);
  adapters.remove("default");
  const auto removed = copies(ours);
  both.zero_grad();
  {
    const auto active = adapters.activate();
    model->forward(x).pow(2).mean().backward();
  }
  both.step();
  CHECK(distance(ours, removed) == 0);
  CHECK(adapters.parameters()[1].abs().sum().item<double>() > 0);
}

TEST_CASE("An optimizer that is made inside of a scope, and adapters that are read from a file afterwards") {
  auto model = small_model();
  const auto config = lora::LoRAConfig(2).alpha(5).target_modules({"0", "2"}).method(lora::DoRA());
  auto adapters = lora::attach(*model, config);
  for (const auto& p : adapters.parameters()) torch::nn::init::normal_(p, 1.0, 0.3);
  const auto x = torch::randn({5, 4}, on_device(torch::kDouble));
  const auto active = adapters.activate();
  const auto before = model->forward(x);
  lora::AdamW optimizer(adapters);
  CHECK(testing::distance(model->forward(x), before) == 0);
  before.pow(2).mean().backward();  // a graph from before the tensors were moved
  const auto gradients = [&] {
    Tensors all;
    for (const auto& p : adapters.parameters()) all.push_back(p.grad().clone());
    return all;
  };
  const auto found = gradients();
  optimizer.zero_grad();
  model->forward(x).pow(2).mean().backward();
  CHECK(distance(found, gradients()) == 0);
  optimizer.step();
  CHECK(testing::distance(model->forward(x), before) > 1e-4);

  const testing::TemporaryFolder folder;
  adapters.save(folder / "adapter");
  adapters.load("read", folder / "adapter");
  const Tensors read = adapters.parameters("read");
  lora::AdamW of_read(read);
  CHECK(are_together(read));
}

TEST_CASE("Weights of the model that are trained and adapted, inside and outside of a scope") {
  auto model = small_model();
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).alpha(5).target_modules({"0", "2"}));
  for (const auto& p : adapters.parameters()) torch::nn::init::normal_(p, 0.0, 0.3);
  const auto x = torch::randn({5, 4}, on_device(torch::kDouble));
  const auto base = model->forward(x);
  const auto weight = model->ptr(2)->as<torch::nn::Linear>()->weight.set_requires_grad(true);
  const auto in_scope = [&] {
    const auto active = adapters.activate();
    return model->forward(x);
  };
  const auto expected = in_scope();
  CHECK(testing::distance(base, expected) > 1e-3);
  {
    const auto active = adapters.activate();
    lora::AdamW optimizer({weight, model->ptr(0)->as<torch::nn::Linear>()->weight});
    CHECK(testing::distance(model->forward(x), expected) == 0);
    CHECK(testing::distance(in_scope(), expected) == 0);
  }
  CHECK(testing::distance(model->forward(x), base) == 0);  // also when the optimizer is gone
  CHECK(testing::distance(in_scope(), expected) == 0);
}

TEST_CASE("Weights that are read after the optimizer was made: an adapter that follows them still does") {
  auto model = small_model();
  auto adapters =
      lora::attach(*model, lora::LoRAConfig(2).target_modules({"0"}).method(lora::DoRA()).modules_to_save({"2"}));
  lora::AdamW optimizer(adapters);
  {
    torch::NoGradGuard no_grad;
    for (const auto& p : model->parameters()) p.mul_(2);
  }
  const auto x = torch::randn({5, 4}, on_device(torch::kDouble));
  const auto base = model->forward(x);
  testing::Warnings warnings;
  const auto active = adapters.activate();
  CHECK(testing::distance(model->forward(x), base) < 1e-12);
  CHECK(warnings.texts.empty());
}

TEST_CASE("A module is written and read with the parameters of an optimizer, each for itself") {
  auto model = small_model();
  lora::AdamW optimizer(model->parameters());
  std::stringstream file;
  torch::save(model, file);
  auto plain = small_model();
  std::stringstream plain_file;
  torch::save(plain, plain_file);
  CHECK(file.str().size() <= plain_file.str().size() + 256);

  auto read = small_model();
  for (const auto& p : read->parameters()) torch::nn::init::zeros_(p);
  lora::AdamW of_read(read->parameters(), AdamWOptions(1e-2));
  torch::load(read, file);
  CHECK(distance(read->parameters(), model->parameters()) == 0);
  const auto x = torch::randn({5, 4}, on_device(torch::kDouble));
  torch::optim::AdamW plain_optimizer(plain->parameters(), torch::optim::AdamWOptions(1e-2));
  for (auto* each : {read.get(), plain.get()}) each->forward(x).pow(2).sum().backward();
  of_read.step();
  plain_optimizer.step();
  CHECK(distance(read->parameters(), plain->parameters()) < 1e-13);
  CHECK(are_together(read->parameters()));
}

TEST_CASE("The state goes through a file: going on is as if nothing had happened, bit by bit") {
  const auto source = some_parameters();
  const auto make = [](const Tensors& p) {
    return lora::AdamW(groups_of<AdamWOptions>(p), AdamWOptions(1e-2).weight_decay(0.1));
  };
  const auto run = [](torch::optim::Optimizer& optimizer, const Tensors& p, int from, int to) {
    for (int step = from; step < to; ++step) {
      optimizer.zero_grad();
      auto some = p;
      if (step % 2 == 0) some.erase(some.begin() + 1);  // steps of parameters differ
      loss_of(some, step).backward();
      optimizer.step();
    }
  };
  const auto uninterrupted = copies(source), first = copies(source);
  auto optimizer = make(uninterrupted), before = make(first);
  run(optimizer, uninterrupted, 0, 20);
  run(before, first, 0, 9);
  before.param_groups()[0].options().set_lr(1e-2);
  const auto bytes = saved(before);
  const auto second = copies(first), third = copies(first);
  auto after = make(second);
  after.param_groups()[0].options().set_lr(5);  // the file's counts
  load(after, bytes);
  run(after, second, 9, 20);
  CHECK(distance(second, uninterrupted) == 0);

  SECTION("LibTorch's optimizer reads it, and the other way round") {
    torch::optim::AdamW plain(groups_of<torch::optim::AdamWOptions>(third));
    load(plain, bytes);
    run(plain, third, 9, 12);
    const auto last = copies(third);
    auto again = make(last);
    load(again, saved(plain));
    run(again, last, 12, 20);
    CHECK(distance(last, uninterrupted) < 1e-12);
  }
  SECTION("what was saved before the first step has no state") {
    auto fresh = make(third);
    load(after, saved(fresh));
    const auto start = copies(second), same = copies(second);
    torch::optim::AdamW plain(groups_of<torch::optim::AdamWOptions>(same),
                              torch::optim::AdamWOptions(1e-2).weight_decay(0.1));
    run(after, second, 0, 3);
    run(plain, same, 0, 3);
    CHECK(distance(second, same) < 1e-13);
  }
  SECTION("what was saved for others is refused, and changes nothing") {
    lora::AdamW fewer({third[0]});
    CHECK_THAT(error_of([&] { load(fewer, bytes); }), contains("different number of parameter groups"));
    auto turned = third;
    std::swap(turned[2], turned[4]);
    auto others = make(turned);
    CHECK_THAT(error_of([&] { load(others, bytes); }),
               contains("lora::AdamW: the saved state of a parameter is []") ||
                   contains("lora::AdamW: the saved state of a parameter is [2, 3, 4], but the parameter is []"));
  }
}

TEST_CASE("Clipping scales all gradients by one norm, as LibTorch does") {
  auto ours = some_parameters();
  ours.push_back(random({9}, torch::kFloat));
  const auto theirs = copies(ours);
  lora::AdamW optimizer(ours);
  for (size_t i = 0; i < ours.size(); ++i) {
    for (const Tensors* all : {&std::as_const(ours), &theirs}) {
      const auto& p = (*all)[i];
      (p * torch::arange(p.numel(), p.options().requires_grad(false)).view(p.sizes())).sum().backward();
    }
  }
  const auto gradients = [](const Tensors& all) {
    Tensors found;
    for (const auto& p : all) found.push_back(p.grad());
    return found;
  };
  CHECK(lora::clip_grad_norm(optimizer, 1e9) ==
        testing::Approx(torch::nn::utils::clip_grad_norm_(theirs, 1e9)).epsilon(1e-6));
  CHECK(distance(gradients(ours), gradients(theirs)) < 1e-6);
  const auto norm = lora::clip_grad_norm(optimizer, 0.5);
  CHECK(norm == testing::Approx(torch::nn::utils::clip_grad_norm_(theirs, 0.5)).epsilon(1e-6));
  CHECK(norm > 1);
  CHECK(distance(gradients(ours), gradients(theirs)) < 1e-7);
  CHECK(lora::clip_grad_norm(optimizer, 0.5) == testing::Approx(0.5).epsilon(1e-4));

  ours[1].mutable_grad() = torch::full({7}, std::numeric_limits<double>::infinity(), on_device(torch::kDouble));
  const auto before = ours[0].grad().clone();
  CHECK_THAT(error_of([&] { lora::clip_grad_norm(optimizer, 1, /*error_if_nonfinite=*/true); }),
             contains("lora::clip_grad_norm: the norm of the gradients is inf; leave out the step"));
  CHECK(testing::distance(ours[0].grad(), before) == 0);
  CHECK(std::isinf(lora::clip_grad_norm(optimizer, 1)));
  CHECK(ours[0].grad().abs().sum().item<double>() == 0);
  CHECK(std::isnan(ours[1].grad()[0].item<double>()));
  CHECK_THAT(error_of([&] { lora::clip_grad_norm(optimizer, -1); }),
             contains("max_norm has to be at least 0, but got -1"));
}

TEST_CASE("A closure is called with gradients, and its loss returned") {
  const auto parameters = some_parameters();
  lora::AdamW optimizer(parameters);
  torch::NoGradGuard no_grad;
  const auto loss = optimizer.step([&] {
    optimizer.zero_grad();
    auto value = loss_of(parameters, 1);
    value.backward();
    return value;
  });
  CHECK(loss.requires_grad());
  CHECK(distance(parameters, some_parameters()) > 1e-4);
}

TEST_CASE("What cannot be optimized so is refused by name") {
  const auto p = random({3, 4}), q = random({2});
  const auto of_options = [&](const AdamWOptions& options) { return error_of([&] { lora::AdamW({p}, options); }); };
  CHECK_THAT(of_options(AdamWOptions(-1)), contains("lora::AdamW: lr has to be at least 0, but got -1"));
  CHECK_THAT(of_options(AdamWOptions().betas({0.9, 1})), contains("betas have to be in [0, 1), but got 0.9 and 1"));
  CHECK_THAT(of_options(AdamWOptions().eps(-1)), contains("eps has to be at least 0, but got -1"));
  CHECK_THAT(of_options(AdamWOptions().weight_decay(-1)), contains("weight_decay has to be at least 0, but got -1"));
  CHECK_THAT(of_options(AdamWOptions().b_rate(0)), contains("b_rate has to be above 0, but got 0"));
  CHECK_THAT(of_options(AdamWOptions().b_rate(4)), contains("b_rate is 4, but bare tensors have no names"));
  CHECK_THAT(error_of([&] {
               lora::AdamW({p, q, p});
             }),
             contains("a parameter [3, 4] is given twice, or has numbers in "));
  const auto part = p.detach().narrow(0, 1, 2).requires_grad_();
  CHECK_THAT(error_of([&] { lora::AdamW({part, q, p}); }), contains("is given twice, or has numbers in common"));
  CHECK_THAT(error_of([&] { lora::AdamW({p * 2}); }), contains("non-leaf"));
  CHECK_THAT(error_of([&] { lora::AdamW({torch::ones({2}, on_device(torch::kLong))}); }),
             contains("a parameter has to be a dense tensor of a floating type, but one is"));
  std::vector<OptimizerParamGroup> groups;
  groups.emplace_back(Tensors{p}, std::make_unique<torch::optim::AdamWOptions>(1e-2));
  CHECK_THAT(error_of([&] { lora::AdamW optimizer(groups); }),
             contains("the options of group 0 are no lora::AdamWOptions"));
  auto model = small_model();
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).target_modules({"0"}));
  CHECK(lora::AdamW(adapters).param_groups().size() == 1);
}
