// Which rank, which learning rate, which alpha? Sixteen trainings over one model in one pass for each step, instead of
// sixteen runs one after another. The batch is the rows of the one training after those of the other, each row has the
// adapter of its training (`adapters.activate(rows)`), and the frozen products, most of the work, are computed for all
// of them at once. sweep.hpp is what other programs can use.
//
// A frozen network is to imitate another one whose layers differ from its own by matrices of rank 4: the table shows
// what a rank that is too small costs. The figure to check: the largest difference between a loss of the sweep and that
// of the same step of the same training alone, an ordinary loop, which the program runs as well.
//
//   sweep [WIDTH [LAYERS [STEPS [AT_ONCE]]]]      2048 3 120 8; draws the losses into sweep.svg
//
// A pass over 128 rows costs less than 8 passes over 16 rows, the more so the larger the weights are beside the caches
// of the processor; the weights are there once, the rows of AT_ONCE trainings at a time. The default took 0.48 of the
// time of 16 runs and 1.28 times the memory of one on one thread (AMD EPYC); `sweep 256 3 120 16`, whose weights stay
// in the cache, 0.7 and 2.6.
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <lora/lora.hpp>

#include "../line_chart.hpp"
#include "peak_memory.hpp"
#include "sweep.hpp"

namespace {

using sweep::Course;
using torch::Tensor;

constexpr int64_t kRows = 16, kTrainingRows = 32 * kRows, kValidationRows = 32, kTrueRank = 4, kEvaluateEvery = 10;

/// The sizes of the network, how many steps a training has at most, and how many trainings a pass.
struct Size {
  int64_t width, layers, steps;
  size_t at_once;
};

/// x <- x + tanh(layer(x)) for each layer.
struct NetworkImpl : torch::nn::Module {
  explicit NetworkImpl(const Size& size) {
    for (int64_t i = 0; i < size.layers; ++i) layers->push_back(torch::nn::Linear(size.width, size.width));
  }
  Tensor forward(Tensor x) {
    for (const auto& layer : *layers) x = x + torch::tanh(layer->as<torch::nn::Linear>()->forward(x));
    return x;
  }
  torch::nn::ModuleList layers = register_module("layers", torch::nn::ModuleList());
};
TORCH_MODULE(Network);

/// Inputs and what is wanted for them, (n, width) each, and the mean square of the base model's errors.
struct Data {
  Tensor x, y;
  double base_error;

  Data rows(int64_t first, int64_t count) const {
    return {x.narrow(0, first, count), y.narrow(0, first, count), base_error};
  }
  Data batch(int64_t step) const { return rows(step * kRows % kTrainingRows, kRows); }
  Data validation() const { return rows(kTrainingRows, kValidationRows); }
};

/// What the network answers with an adapter of rank kTrueRank and random numbers. Inputs are mixtures of 32 patterns.
Data make_data(Network& network, const Size& size) {
  lora::Adapters truth(*network);
  truth.add("truth", lora::LoRAConfig(kTrueRank).alpha(kTrueRank).target_modules(lora::all_linear));
  torch::NoGradGuard no_grad;
  for (auto& tensor : truth.parameters()) tensor.normal_(0, std::pow(kTrueRank * size.width, -0.25));
  const auto patterns = torch::randn({32, size.width}) / std::sqrt(32);
  const auto x = torch::randn({kTrainingRows + kValidationRows, 32}).mm(patterns), base = network->forward(x);
  const auto active = truth.activate();
  const auto y = network->forward(x);
  return {x, y, torch::mse_loss(base, y).item<double>()};
}

/// The loss of each row of `copies` copies of the data: the share of the base model's error that is left.
Tensor losses_of_rows(Network& network, const Data& data, int64_t copies = 1) {
  const auto y = network->forward(data.x.repeat({copies, 1}));
  return (y - data.y.repeat({copies, 1})).pow(2).mean(1) / data.base_error;
}

/// One of the trainings to compare.
struct Candidate {
  int64_t rank;
  double alpha, learning_rate;

  std::string name() const { return fmt::format("rank {}, alpha {}, rate {}", rank, alpha, learning_rate); }
};

std::vector<Candidate> make_candidates() {
  std::vector<Candidate> candidates;
  for (const int64_t rank : {1, 2, 4, 8}) {
    for (const double alpha : {4, 16}) {
      for (const double learning_rate : {1e-3, 5e-3}) candidates.push_back({rank, alpha, learning_rate});
    }
  }
  return candidates;
}

void add_adapter(lora::Adapters& adapters, const Candidate& candidate) {
  torch::manual_seed(candidate.rank);  // the same start wherever it is added
  adapters.add(candidate.name(), lora::LoRAConfig(candidate.rank)
                                     .alpha(candidate.alpha)
                                     .init(lora::Init::kKaiming)
                                     .target_modules(lora::all_linear));
}

std::vector<Course> train_together(Network& network, const Data& data, const std::vector<Candidate>& candidates,
                                   const Size& size) {
  lora::Adapters adapters(*network);
  sweep::Sweep sweep(adapters, {}, size.at_once);
  for (const auto& candidate : candidates) {
    add_adapter(adapters, candidate);
    sweep.add(candidate.name(), candidate.learning_rate);
  }
  for (int64_t step = 0; step < size.steps; ++step) {
    sweep.step(kRows, [&](int64_t copies) { return losses_of_rows(network, data.batch(step), copies); });
    if ((step + 1) % kEvaluateEvery != 0) continue;
    sweep.evaluate(kValidationRows, [&](int64_t copies) { return losses_of_rows(network, data.validation(), copies); });
  }
  adapters.detach();
  return sweep.courses();
}

/// The same training as anybody would write it.
Course train_alone(Network& network, const Data& data, const Candidate& candidate, int64_t steps) {
  lora::Adapters adapters(*network);
  add_adapter(adapters, candidate);
  torch::optim::AdamW optimizer(adapters.parameters(),
                                torch::optim::AdamWOptions(candidate.learning_rate).weight_decay(0));
  Course course;
  sweep::EarlyStop stop;
  for (int64_t step = 0; step < steps; ++step) {
    const auto active = adapters.activate();
    const auto loss = losses_of_rows(network, data.batch(step)).mean();
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    course.training.push_back(loss.item<double>());
    if ((step + 1) % kEvaluateEvery != 0) continue;
    torch::NoGradGuard no_grad;
    course.validation.emplace_back(step + 1, losses_of_rows(network, data.validation()).mean().item<double>());
    if (stop(course.validation.back().second)) break;
  }
  return course;
}

/// The largest difference between two courses' losses of the same step; infinite where one of them is not a number.
double distance(const Course& a, const Course& b) {
  double largest = 0;
  const auto steps = std::min(a.training.size(), b.training.size());  // rounding may stop one of them earlier
  for (size_t i = 0; i < steps; ++i) {
    const auto apart = std::abs(a.training[i] - b.training[i]);
    largest = std::max(largest, std::isnan(apart) ? std::numeric_limits<double>::infinity() : apart);
  }
  return largest;
}

void print_table(const std::vector<Candidate>& candidates, const std::vector<Course>& together,
                 const std::vector<Course>& alone) {
  fmt::print("rank  alpha   rate    first     last  validation  steps  alone\n");
  for (size_t i = 0; i < candidates.size(); ++i) {
    const auto& [rank, alpha, rate] = candidates[i];
    const auto& [training, validation] = together[i];
    fmt::print("{:4}  {:5}  {:5}  {:7.4f}  {:7.4f}  {:10.4f}  {:5}  {:.0e}\n", rank, alpha, rate, training.front(),
               training.back(), validation.back().second, training.size(), distance(together[i], alone[i]));
  }
}

/// Ranks are told apart by colors, learning rates by dashes, alphas by widths.
void draw(const std::vector<Candidate>& candidates, const std::vector<Course>& courses) {
  const std::map<int64_t, std::string> colors{{1, "#d94801"}, {2, "#fdae6b"}, {4, "#6baed6"}, {8, "#08519c"}};
  chart::LineChart picture{"Sixteen trainings in one pass", "step", "validation loss", {}, true};
  for (size_t i = 0; i < candidates.size(); ++i) {
    chart::Curve curve{
        candidates[i].name(), {{0, 1}}, colors.at(candidates[i].rank)};  // untrained it is the base model
    for (const auto& [step, loss] : courses[i].validation) curve.points.emplace_back(step, loss);
    if (candidates[i].learning_rate < 2e-3) curve.dashes = "6 3";
    if (candidates[i].alpha > 10) curve.width = 3;
    picture.curves.push_back(curve);
  }
  chart::write(picture, "sweep.svg");
}

/// What a piece of work takes.
struct Cost {
  double seconds, megabytes;
};

template <class Work>
Cost cost_of(sweep::PeakMemory& memory, const Work& work) {
  memory.reset();
  const auto start = std::chrono::steady_clock::now();
  work();
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
  return {time.count(), static_cast<double>(memory.bytes()) / 1e6};
}

void print_costs(const Cost& together, const Cost& alone) {
  fmt::print("\n                    the sweep   one by one   ratio\n");
  fmt::print("time              {:9.1f} s  {:9.1f} s    {:.2f}\n", together.seconds, alone.seconds,
             together.seconds / alone.seconds);
  fmt::print("tensors at most   {:9.1f} MB {:9.1f} MB   {:.2f}\n", together.megabytes, alone.megabytes,
             together.megabytes / alone.megabytes);
}

}  // namespace

int main(int count, char** arguments) {
  const auto number = [&](int i, int64_t otherwise) { return count > i ? std::atoll(arguments[i]) : otherwise; };
  const Size size{number(1, 2048), number(2, 3), number(3, 120), static_cast<size_t>(number(4, 8))};
  if (size.width < 1 || size.layers < 1 || size.at_once < 1 || size.steps < kEvaluateEvery) {
    fmt::print(stderr, "sweep [WIDTH [LAYERS [STEPS [AT_ONCE]]]]: numbers of at least 1, and at least {} steps\n",
               kEvaluateEvery);
    return 2;
  }
  sweep::PeakMemory memory;
  torch::manual_seed(0);
  Network network(size);
  const auto data = make_data(network, size);
  const auto candidates = make_candidates();

  std::vector<Course> alone, together;
  const auto alone_cost = cost_of(memory, [&] {
    for (const auto& candidate : candidates) alone.push_back(train_alone(network, data, candidate, size.steps));
  });
  const auto together_cost = cost_of(memory, [&] { together = train_together(network, data, candidates, size); });

  print_table(candidates, together, alone);
  print_costs(together_cost, alone_cost);
  draw(candidates, together);
  double largest = 0, best = 1;
  for (size_t i = 0; i < candidates.size(); ++i) {
    largest = std::max(largest, distance(together[i], alone[i]));
    best = std::min(best, together[i].validation.back().second);
  }
  fmt::print("\nlargest |loss - loss of the training alone| over all steps = {:.1e}\n", largest);
  return largest < 1e-5 && best < 0.6 ? 0 : 1;
}
