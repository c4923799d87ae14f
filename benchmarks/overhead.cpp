// What does attaching cost beside the arithmetic of the adapters? Measured in turns in one run:
//   an operator that has nothing to do with an adapter, outside a scope and inside one of 200 layers; the same where
//   the adapter also trains their biases in full, for which a scope has to look at every operator;
//   an adapted product of 16 x 16, computed by hand and by an attached stock layer in a scope;
//   opening and leaving a scope of 200 layers.
// Prints the medians, and for each pair the difference and the ratio.
#include <torch/torch.h>

#include <lora/lora.hpp>

#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <map>
#include <optional>

namespace {

struct Setup {
  Setup() {
    torch::manual_seed(0);
    for (int i = 0; i < 200; ++i) {
      model->push_back(torch::nn::Linear(16, 16));
      with_biases->push_back(torch::nn::Linear(16, 16));
    }
    const auto config = lora::LoRAConfig(4).target_modules(lora::all_linear);
    adapters.emplace(lora::attach(*model, config));
    biased.emplace(lora::attach(*with_biases, lora::LoRAConfig(config).bias(lora::Bias::kAll)));
    auto active = adapters->activate(), second = biased->activate();
    with_biases->forward(model->forward(x));  // the first pass, in which every operator is looked at
  }
  torch::nn::Sequential model, with_biases;
  std::optional<lora::Adapters> adapters, biased;
  torch::Tensor x = torch::randn({16, 16}), y = torch::randn({16, 16});
  torch::nn::Linear layer() {
    return torch::nn::Linear(std::dynamic_pointer_cast<torch::nn::LinearImpl>(model->ptr(0)));
  }
};

Setup& setup() {
  static Setup the_setup;
  return the_setup;
}

void unrelated(benchmark::State& state) {
  torch::NoGradGuard no_grad;
  std::optional<lora::Activation> active;
  if (state.range(0) == 1) active.emplace(setup().adapters->activate());
  for (auto _ : state) benchmark::DoNotOptimize(at::add(setup().x, setup().y));
}

void unrelated_beside_biases(benchmark::State& state) {
  torch::NoGradGuard no_grad;
  std::optional<lora::Activation> active;
  if (state.range(0) == 1) active.emplace(setup().biased->activate());
  for (auto _ : state) benchmark::DoNotOptimize(at::add(setup().x, setup().y));
}

void product(benchmark::State& state) {
  torch::NoGradGuard no_grad;
  auto layer = setup().layer();
  auto tensors = setup().adapters->named_parameters();
  const auto a = tensors["0.lora_A"], b = tensors["0.lora_B"];
  const auto scaling = setup().adapters->scaling("0");
  const auto x = setup().x;
  if (state.range(0) == 0) {
    for (auto _ : state)
      benchmark::DoNotOptimize(at::addmm(layer->forward(x), at::linear(x, a), b.t(), /*beta=*/1, scaling));
  } else {
    auto active = setup().adapters->activate();
    for (auto _ : state) benchmark::DoNotOptimize(layer->forward(x));
  }
}

void opening(benchmark::State& state) {
  for (auto _ : state) auto active = setup().adapters->activate();
}

/// Collects the medians.
class Medians : public benchmark::ConsoleReporter {
 public:
  Medians() : ConsoleReporter(OO_None) {}
  void ReportRuns(const std::vector<Run>& runs) override {
    for (const auto& run : runs) {
      if (run.aggregate_name == "median") nanoseconds_[run.run_name.str()] = run.GetAdjustedRealTime();
    }
    ConsoleReporter::ReportRuns(runs);
  }
  void print() {
    for (auto name : {"unrelated", "unrelated_beside_biases", "product"}) {
      const auto without = nanoseconds_[fmt::format("{}/0", name)], with = nanoseconds_[fmt::format("{}/1", name)];
      fmt::print("{:<24} {:7.1f} ns -> {:7.1f} ns in a scope: {:+.1f} ns, ratio {:.4f}\n", name, without, with,
                 with - without, with / without);
    }
    fmt::print("opening                  {:7.1f} us for a scope of 200 layers\n", nanoseconds_["opening"] / 1000);
  }

 private:
  std::map<std::string, double> nanoseconds_;
};

}  // namespace

BENCHMARK(unrelated)->Arg(0)->Arg(1);
BENCHMARK(unrelated_beside_biases)->Arg(0)->Arg(1);
BENCHMARK(product)->Arg(0)->Arg(1);
BENCHMARK(opening);

int main(int argc, char** argv) {
  std::vector<std::string> defaults{"overhead", "--benchmark_repetitions=401", "--benchmark_min_time=0.004",
                                    "--benchmark_enable_random_interleaving=true",
                                    "--benchmark_report_aggregates_only=true"};
  std::vector<char*> arguments;
  for (auto& text : defaults) arguments.push_back(text.data());
  arguments.insert(arguments.end(), argv + 1, argv + argc);
  int count = static_cast<int>(arguments.size());
  benchmark::Initialize(&count, arguments.data());
  if (benchmark::ReportUnrecognizedArguments(count, arguments.data())) return 2;
  at::set_num_threads(1);
  setup();  // not within the first measurement, from which the number of repetitions is estimated
  Medians medians;
  benchmark::RunSpecifiedBenchmarks(&medians);
  medians.print();
}
