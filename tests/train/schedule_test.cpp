// Schedules beside the numbers of Python's transformers, and what they do to an optimizer.
#include "support/testing.hpp"

#include <lora/train/optimizer.hpp>
#include <lora/train/schedule.hpp>

namespace {

using lora::Schedule;
using testing::Approx;
using testing::contains;
using testing::error_of;

}  // namespace

TEST_CASE("Factors of the learning rate are those of transformers") {
  struct Row {
    const char* name;
    Schedule schedule;
    std::vector<double> factors;  // of the steps 0, 1, 2, ...
  };
  // get_..._schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=6), lambda of the steps
  const std::vector<Row> rows{
      {"constant", Schedule::constant(), {1, 1, 1, 1}},
      {"constant with warmup", Schedule::constant().warmup(4), {0, 0.25, 0.5, 0.75, 1, 1, 1}},
      {"linear", Schedule::linear(4), {1, 0.75, 0.5, 0.25, 0, 0}},
      {"linear with warmup", Schedule::linear(6).warmup(2), {0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0}},
      {"cosine", Schedule::cosine(4), {1, 0.8535533905932737, 0.5, 0.14644660940672627, 0, 0}},
      {"cosine with warmup",
       Schedule::cosine(6).warmup(2),
       {0, 0.5, 1, 0.8535533905932737, 0.5, 0.14644660940672627, 0}},
      {"cosine with a floor",
       Schedule::cosine(6).warmup(2).floor(0.2),
       {0, 0.5, 1, 0.882842712474619, 0.6, 0.317157287525381, 0.2, 0.2}},
      {"linear with a floor", Schedule::linear(2).floor(0.5), {1, 0.75, 0.5, 0.5}},
      {"nothing but warmup", Schedule::linear(2).warmup(2), {0, 0.5, 1, 0}},
      {"no steps", Schedule::cosine(0), {1, 0, 0}},
  };
  for (const auto& row : rows) {
    for (size_t step = 0; step < row.factors.size(); ++step) {
      INFO(row.name << ", step " << step);
      CHECK(row.schedule.factor(static_cast<int64_t>(step)) == Approx(row.factors[step]).margin(1e-15));
    }
  }
  CHECK_THAT(error_of([] { Schedule::linear(-1); }), contains("lora::Schedule: it takes at least 0 steps, but got -1"));
  CHECK_THAT(error_of([] { Schedule::constant().warmup(-1); }),
             contains("warmup has to be at least 0 steps, but got -1"));
  CHECK_THAT(error_of([] { Schedule::constant().floor(2); }), contains("floor has to be in [0, 1], but got 2"));
}

TEST_CASE("The rates of every group follow, for LibTorch's optimizers, too") {
  const auto p = torch::ones({2}).requires_grad_(), q = torch::ones({2}).requires_grad_();
  const auto check = [](torch::optim::Optimizer& optimizer) {
    lora::ScheduledRates rates(optimizer, Schedule::linear(6).warmup(2));
    for (const double factor : {0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0}) {
      CHECK(optimizer.param_groups()[0].options().get_lr() == Approx(0.1 * factor));
      CHECK(optimizer.param_groups()[1].options().get_lr() == Approx(0.4 * factor));
      rates.step();
    }
    rates.go_to(3);
    CHECK(optimizer.param_groups()[1].options().get_lr() == Approx(0.3));
  };
  const auto groups = [&](auto first, auto second) {
    std::vector<torch::optim::OptimizerParamGroup> all;
    all.emplace_back(std::vector<torch::Tensor>{p}, std::make_unique<decltype(first)>(first));
    all.emplace_back(std::vector<torch::Tensor>{q}, std::make_unique<decltype(second)>(second));
    return all;
  };
  lora::AdamW ours(groups(lora::AdamWOptions(0.1), lora::AdamWOptions(0.4)));
  check(ours);
  torch::optim::SGD plain(groups(torch::optim::SGDOptions(0.1), torch::optim::SGDOptions(0.4)),
                          torch::optim::SGDOptions(1));
  check(plain);
}
