// What does attaching cost beside the arithmetic of the adapters? Measured in turns in one run:
//   an operator that has nothing to do with an adapter, outside a scope and inside one of 200 layers; the same where
//   the adapter also trains their biases in full;
//   an adapted product of 16 x 16, computed by hand and by an attached stock layer in a scope;
//   opening and leaving a scope of 200 layers, and one of 60 among the 211 linear layers of SmolLM2, adapted before.
// Prints the medians, and for each pair the difference and the ratio.
#include <torch/torch.h>

#include <lora/lora.hpp>

#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <cstdlib>
#include <map>
#include <optional>

namespace {

/// The linear layers of SmolLM2, thirty blocks and a head, of which q and v are adapted; narrower.
struct BlocksImpl : torch::nn::Module {
  BlocksImpl() {
    for (int i = 0; i < 30; ++i) {
      auto block = register_module(fmt::format("layers_{}", i), std::make_shared<torch::nn::Module>());
      for (auto name : {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
        layers.push_back(block->register_module(name, torch::nn::Linear(16, 16)));
    }
    layers.push_back(register_module("head", torch::nn::Linear(16, 16)));
  }
  torch::Tensor forward(torch::Tensor x) {
    for (auto& layer : layers) x = layer(x);
    return x;
  }
  std::vector<torch::nn::Linear> layers;
};
TORCH_MODULE(Blocks);

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
    of_blocks.emplace(lora::attach(*blocks, lora::LoRAConfig(4).target_modules({"q_proj", "v_proj"})));
    auto active = adapters->activate(), second = biased->activate(), third = of_blocks->activate();
    with_biases->forward(blocks->forward(model->forward(x)));  // the first pass, in which layers are found unreached
  }
  torch::nn::Sequential model, with_biases;
  Blocks blocks;
  std::optional<lora::Adapters> adapters, biased, of_blocks;
  torch::Tensor x = torch::randn({16, 16}), y = torch::randn({16, 16});
  torch::nn::Linear layer() {
    return torch::nn::Linear(std::dynamic_pointer_cast<torch::nn::LinearImpl>(model->ptr(0)));
  }
};

Setup& setup() {
  static Setup the_setup;
  return the_setup;
}

/// An operator that no adapter has to do with, in a scope of `adapters` or outside of it.
void add(benchmark::State& state, const lora::Adapters& adapters) {
  torch::NoGradGuard no_grad;
  // At other addresses in each repetition: which ones they are is worth 2 % of the time, either way.
  const auto padding = torch::empty({1 + std::rand() % 4096});
  const auto x = setup().x.clone(), y = setup().y.clone();
  std::optional<lora::Activation> active;
  if (state.range(0) == 1) active.emplace(adapters.activate());
  for (int i = 0; i < 1000; ++i) benchmark::DoNotOptimize(at::add(x, y));  // opening is measured by itself
  for (auto _ : state) benchmark::DoNotOptimize(at::add(x, y));
}

void unrelated(benchmark::State& state) { add(state, *setup().adapters); }
void unrelated_beside_biases(benchmark::State& state) { add(state, *setup().biased); }

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

void opening_of_smollm2(benchmark::State& state) {
  for (auto _ : state) auto active = setup().of_blocks->activate();
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
    fmt::print("opening_of_smollm2       {:7.1f} us for 60 of 211 layers\n", nanoseconds_["opening_of_smollm2"] / 1000);
  }

 private:
  std::map<std::string, double> nanoseconds_;
};

}  // namespace

BENCHMARK(unrelated)->Arg(0)->Arg(1);
BENCHMARK(unrelated_beside_biases)->Arg(0)->Arg(1);
BENCHMARK(product)->Arg(0)->Arg(1);
BENCHMARK(opening);
BENCHMARK(opening_of_smollm2);

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
