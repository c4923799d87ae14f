// What does a service pay that keeps an adapter for each customer? A whole model, with rows of different adapters
// beside the base model, in turns; and a load whose customers are Zipf distributed, of which the pool holds a few,
// beside the same load with one adapter.
//
//   serving MODEL_DIR [CUSTOMERS] [ROUNDS] [ADAPTER_DIR]      1000 30 serving_adapters
#include <torch/torch.h>

#include <lora/lora.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "checkpoint.hpp"
#include "timing.hpp"

namespace {

using torch::Tensor;
using Names = std::vector<std::string>;

int64_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  int64_t pages = 0;
  statm >> pages >> pages;
  return pages * 4096;
}

lora::LoRAConfig config() { return lora::LoRAConfig(8).alpha(16).target_modules({"q_proj", "v_proj"}); }

std::string customer(int64_t number) { return std::to_string(number); }

/// Adapters "0", "1", ... with random values, where they are not there yet.
void write_adapters(gpt::LanguageModelImpl& model, const std::filesystem::path& directory, int64_t count) {
  auto adapters = lora::attach(model, config());
  for (int64_t i = 0; i < count; ++i) {
    if (std::filesystem::exists(directory / customer(i) / "adapter_model.safetensors")) continue;
    torch::manual_seed(i);
    for (auto& tensor : adapters.parameters()) tensor.detach().normal_(0, 0.02);
    adapters.save(directory / customer(i));
  }
  adapters.detach();
}

/// A pass over all rows, beside the same pass of the base model.
void compare(const std::string& what, const lora::AdapterPool& pool, const Names& rows,
             const std::function<void()>& pass, int rounds) {
  std::vector<double> base, ratios;
  for (int round = -2; round < rounds; ++round) {
    const auto time = milliseconds(pass);
    const auto adapted = milliseconds([&] {
      auto active = pool.activate(rows);
      pass();
    });
    if (round < 0) continue;
    base.push_back(time);
    ratios.push_back(time / adapted);
  }
  fmt::print("| {} | {:.1f} | {:.3f} |\n", what, median(base), median(ratios));
  std::fflush(stdout);
}

void compare_passes(gpt::LanguageModelImpl& model, const lora::AdapterPool& pool, int rounds) {
  Names eight, sixteen;
  for (int64_t i = 0; i < 8; ++i) eight.push_back(customer(i));
  for (int64_t i = 0; i < 16; ++i) sixteen.push_back(customer(i));
  fmt::print("| pass | base model, ms | throughput over the base model's |\n|---|---|---|\n");
  const auto prompt = torch::randint(1000, {8, 64}, torch::kLong);
  compare(
      "prefill, 8 rows of 64 tokens, 8 adapters", pool, eight, [&] { model.hidden_states(prompt); }, rounds);
  const auto prompts = torch::randint(1000, {16, 64}, torch::kLong);
  compare(
      "prefill, 16 rows of 64 tokens, 16 adapters", pool, sixteen, [&] { model.hidden_states(prompts); }, rounds / 2);
  gpt::KeyValueCache cache;
  model.hidden_states(prompts, &cache);
  const auto next = torch::randint(1000, {16, 1}, torch::kLong);
  const auto decode = [&] {
    auto own = cache;  // whose buffers are shared, and have room
    model.forward(next, &own);
  };
  compare("decode, 16 rows of 16 adapters", pool, sixteen, decode, rounds * 4);
}

/// Batches of 8 rows of 32 tokens, whose customers are Zipf distributed, beside the same load with one adapter.
void compare_load(gpt::LanguageModelImpl& model, const std::filesystem::path& directory, int64_t customers,
                  int batches) {
  const auto adapter_bytes =
      static_cast<int64_t>(std::filesystem::file_size(directory / customer(0) / "adapter_model.safetensors"));
  const auto budget = 100 * adapter_bytes;
  lora::AdapterPool pool(model, lora::AdapterPoolOptions(directory).memory_budget(budget));
  std::mt19937_64 random(0);
  std::vector<double> weights;
  for (int64_t i = 0; i < customers; ++i) weights.push_back(1.0 / static_cast<double>(i + 1));
  std::discrete_distribution<int64_t> zipf(weights.begin(), weights.end());
  const auto ids = torch::randint(1000, {8, 32}, torch::kLong);
  const auto draw = [&] {
    Names rows;
    for (int64_t row = 0; row < ids.size(0); ++row) rows.push_back(customer(zipf(random)));
    return rows;
  };
  const auto serve = [&](const Names& rows) {
    auto active = pool.activate(rows);
    model.hidden_states(ids);
  };
  for (int i = 0; i < batches; ++i) pool.prefetch(draw());  // as it is when it has run for a while
  const auto before = pool.metrics();
  const auto resident = resident_bytes();
  double one = 0, all = 0;
  for (int batch = 0; batch < batches; ++batch) {
    const auto rows = draw();
    all += milliseconds([&] { serve(rows); });
    one += milliseconds([&] {
      auto active = pool.activate(customer(0));
      model.hidden_states(ids);
    });
  }
  const auto after = pool.metrics();
  fmt::print("\n{} customers, Zipf, budget of 100 adapters ({:.0f} MB): throughput {:.3f} of that with one adapter\n",
             customers, static_cast<double>(budget) * 1e-6, one / all);
  fmt::print(
      "{} batches of 8 rows: {} loads, {} hits, {} evictions; the pool holds {:.1f} MB, and the process grew by "
      "{:.1f} MB\n",
      batches, after.loads - before.loads, after.hits - before.hits, after.evictions - before.evictions,
      static_cast<double>(after.bytes) * 1e-6, static_cast<double>(resident_bytes() - resident) * 1e-6);
  std::vector<double> cold;
  for (int64_t i = 0; i < 50; ++i) {
    const auto name = customer(customers - 1 - i);
    if (pool.drop(name)) continue;  // was there
    cold.push_back(milliseconds([&] { pool.prefetch({name}); }));
  }
  fmt::print("a cold adapter of {:.2f} MB is ready in {:.2f} ms\n", static_cast<double>(adapter_bytes) * 1e-6,
             median(cold));
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) return fmt::print(stderr, "usage: serving MODEL_DIR [CUSTOMERS] [ROUNDS] [ADAPTER_DIR]\n"), 2;
  const int64_t customers = count > 2 ? std::stoll(arguments[2]) : 1000;
  const int rounds = count > 3 ? std::stoi(arguments[3]) : 30;
  const std::filesystem::path directory = count > 4 ? arguments[4] : "serving_adapters";
  torch::NoGradGuard no_grad;
  const auto model = gpt::load_model(arguments[1], torch::kFloat, torch::kCPU);
  model->eval();
  fmt::print("{} threads\n", torch::get_num_threads());
  write_adapters(*model, directory, std::max<int64_t>(customers, 16));
  const lora::AdapterPool pool(*model, directory);
  compare_passes(*model, pool, rounds);
  compare_load(*model, directory, customers, rounds * 4);
}
