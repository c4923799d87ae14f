// A server inside one process: many customers, each with an adapter of its own, and one model for all of them.
//
// Each thread is a customer's client that asks and waits for the answer. Adapters are files, of which a pool holds as
// many as its memory allows; a batcher answers requests for different adapters in the same passes of the model. In the
// end some answers are computed once more, one at a time and without pool and batcher, and have to be the same.
#include <torch/torch.h>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <lora/lora.hpp>
#include <lora/peft/checkpoint.hpp>
#include <lora/pool.hpp>

#include "batcher.hpp"
#include "checkpoint.hpp"
#include "common.hpp"
#include "generation_config.hpp"
#include "progress.hpp"
#include "sampling.hpp"
#include "tokenizer.hpp"

namespace {

struct Options {
  std::filesystem::path model, adapters;
  int64_t customers = 24, threads = 8, requests = 128, tokens = 16, rows = 8, check = 12;
  double budget = 0;
};

void add_options(CLI::App& app, Options& options) {
  app.add_option("--model", options.model, "Hugging Face directory; without it, a tiny model with random weights")
      ->check(CLI::ExistingDirectory)
      ->type_name("DIR");
  app.add_option("--adapters", options.adapters,
                 "where the adapters are, in folders customer-0, customer-1, ...; those that\n"
                 "are missing are made, with random values [a folder for temporary files]")
      ->type_name("DIR");
  app.add_option("--budget", options.budget, "megabytes of adapters in memory [half of those there are]")
      ->check(gpt::between(0));
  app.option_defaults()->always_capture_default();
  app.add_option("--customers", options.customers, "with an adapter each; the first ones ask most")
      ->check(gpt::between(1));
  app.add_option("--threads", options.threads, "that ask, each for one answer at a time")->check(gpt::between(1, 4096));
  app.add_option("--requests", options.requests, "of all threads together")->check(gpt::between(1));
  app.add_option("--tokens", options.tokens, "of an answer, at most")->check(gpt::between(1));
  app.add_option("--rows", options.rows, "answered at a time, at most")->check(gpt::between(1));
  app.add_option("--check", options.check, "answers that are computed once more")->check(gpt::between(1));
}

/// The model, and what customers ask it.
struct Service {
  std::string name;
  gpt::LanguageModel model;
  std::unique_ptr<gpt::Tokenizer> tokenizer;  // null: texts are numbers
  std::vector<Tokens> prompts;
  Tokens stop_ids;

  std::string text(const Tokens& ids) const {  // in one line
    if (!tokenizer) return fmt::format("{}", fmt::join(ids, " "));
    auto text = tokenizer->decode(ids);
    std::replace(text.begin(), text.end(), '\n', ' ');
    return "\"" + text + "\"";
  }
};

/// A Llama of 30,000 random numbers. It says nothing, but what it says depends on every weight.
Service tiny_service() {
  gpt::ModelConfig config;
  config.vocab_size = 96;
  config.hidden_size = 32;
  config.intermediate_size = 64;
  config.num_layers = 2;
  config.num_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 8;
  config.max_positions = 4096;
  Service service{"tiny", gpt::make_model(config), nullptr, {}, {}};
  torch::manual_seed(0);
  for (auto& parameter : service.model->parameters()) {
    const auto deviation = 1 / std::sqrt(static_cast<double>(config.hidden_size));
    parameter.set_data(parameter.dim() == 1 ? torch::ones(parameter.sizes())
                                            : deviation * torch::randn(parameter.sizes()));
  }
  service.model->eval();
  for (const int64_t length : {4, 6, 6, 7, 9, 13}) {
    const auto ids = torch::randint(config.vocab_size, {length}, torch::kLong);
    service.prompts.emplace_back(ids.data_ptr<int64_t>(), ids.data_ptr<int64_t>() + length);
  }
  return service;
}

Service load_service(const std::filesystem::path& directory) {
  if (directory.empty()) return tiny_service();
  Service service{std::filesystem::canonical(directory).filename().string(),
                  gpt::load_model(directory, torch::kFloat, torch::kCPU),
                  std::make_unique<gpt::Tokenizer>(directory / "tokenizer.json"),
                  {},
                  gpt::read_generation_config(directory).eos_token_ids};
  for (const auto* prompt :
       {"The capital of France is", "Water boils at", "Once upon a time, in a small village,",
        "Dear customer, thank you for your letter. We are", "The three primary colours are red,",
        "To make bread you need flour, water, salt and", "The best way to learn a language is", "In the beginning"})
    service.prompts.push_back(service.tokenizer->encode_whole(prompt));
  return service;
}

std::string customer(int64_t number) { return fmt::format("customer-{}", number); }
constexpr const char* kBroken = "customer-with-a-broken-file";
constexpr const char* kFile = "adapter_model.safetensors";

/// Random values, such that the numbers of an update are a fifth of those of the weight it changes.
void randomize(const lora::Adapter& adapter) {
  for (const auto& part : adapter.parts) {
    const auto size = 0.2 * part.site->weight().std().item<double>();
    auto& method = *part.method;
    const auto rank = static_cast<double>(method.options().rank());
    const auto deviation = std::sqrt(size / (method.scaling() * std::sqrt(rank)));
    for (const auto& tensor : method.tensors()) tensor.tensor->detach().normal_(0, deviation);
  }
}

/// The adapters of all customers, where they are not there yet, and one whose file was cut off.
void write_adapters(gpt::LanguageModelImpl& model, const std::filesystem::path& directory, int64_t count) {
  const auto config = lora::LoRAConfig(8).alpha(16).target_modules({"q_proj", "v_proj", "c_attn"});
  std::vector<std::string> unmatched;  // c_attn is GPT-2's
  lora::Adapters adapters(model);
  for (int64_t number = 0; number < count; ++number) {
    if (std::filesystem::exists(directory / customer(number) / kFile)) continue;
    auto adapter = adapters.plan(config, &unmatched);
    torch::manual_seed(number);
    adapter.initialize();
    randomize(adapter);
    adapters.add(customer(number), std::move(adapter));
    adapters.save(directory / customer(number));
    adapters.remove(customer(number));
  }
  adapters.detach();
  std::filesystem::copy(directory / customer(0), directory / kBroken,
                        std::filesystem::copy_options::recursive | std::filesystem::copy_options::overwrite_existing);
  std::filesystem::resize_file(directory / kBroken / kFile, 100);
}

struct Request {
  std::string adapter;
  Tokens prompt;
  Tokens answer = {};
  std::string refusal = {};  // why there is no answer
  double seconds = 0;        // from question to answer
};

/// The customers are Zipf distributed: the first asks twice as often as the second. Now and then comes the broken one.
std::vector<Request> draw_requests(const Service& service, const Options& options) {
  std::mt19937_64 random(0);
  std::vector<double> weights;
  for (int64_t i = 0; i < options.customers; ++i) weights.push_back(1.0 / static_cast<double>(i + 1));
  std::discrete_distribution<int64_t> zipf(weights.begin(), weights.end());
  std::uniform_int_distribution<size_t> any(0, service.prompts.size() - 1);
  std::vector<Request> requests;
  for (int64_t i = 0; i < options.requests; ++i) {
    const bool is_broken = i % 16 == 5;
    requests.push_back({is_broken ? kBroken : customer(zipf(random)), service.prompts[any(random)]});
  }
  return requests;
}

/// Threads that ask what is next until everything was asked. Returns how long that took.
double ask_all(Batcher& batcher, std::vector<Request>& requests, int64_t threads) {
  std::atomic<size_t> next{0};
  const auto ask = [&] {
    for (auto i = next++; i < requests.size(); i = next++) {
      auto& request = requests[i];
      const gpt::Stopwatch watch;
      try {
        request.answer = batcher.ask(request.adapter, request.prompt).get();
      } catch (const std::exception& error) {
        request.refusal = error.what();
      }
      request.seconds = watch.seconds();
    }
  };
  const gpt::Stopwatch watch;
  std::vector<std::thread> clients;
  for (int64_t i = 0; i < threads; ++i) clients.emplace_back(ask);
  for (auto& client : clients) client.join();
  return watch.seconds();
}

/// Of sorted values: the least that `percent` of them do not exceed.
double percentile(const std::vector<double>& sorted, double percent) {
  if (sorted.empty()) return 0;
  const auto rank = static_cast<size_t>(std::ceil(percent / 100 * static_cast<double>(sorted.size())));
  return sorted[std::max<size_t>(rank, 1) - 1];
}

void print_report(const std::vector<Request>& requests, double seconds, const BatcherMetrics& batcher,
                  const lora::AdapterPoolMetrics& pool) {
  std::vector<double> times;
  size_t tokens = 0;
  std::map<std::string, std::vector<std::string>> refusals;
  for (const auto& request : requests) {
    if (!request.refusal.empty()) {
      refusals[request.adapter].push_back(request.refusal);
      continue;
    }
    times.push_back(1e3 * request.seconds);
    tokens += request.answer.size();
  }
  std::sort(times.begin(), times.end());
  fmt::print("{} answers of {} tokens in {:.2f} s: {:.1f} tokens/s\n", times.size(), tokens, seconds,
             static_cast<double>(tokens) / seconds);
  fmt::print("latency: p50 {:.1f} ms, p95 {:.1f} ms, p99 {:.1f} ms\n", percentile(times, 50), percentile(times, 95),
             percentile(times, 99));
  fmt::print("batcher: {} passes of {:.1f} rows\n", batcher.passes,
             static_cast<double>(batcher.rows) / static_cast<double>(batcher.passes));
  fmt::print("pool: {} hits, {} loads, {} evictions, {} failures; holds {} adapters, {:.2f} MB\n", pool.hits,
             pool.loads, pool.evictions, pool.failures, pool.adapters, 1e-6 * static_cast<double>(pool.bytes));
  for (const auto& [name, reasons] : refusals)
    fmt::print("refused: {} requests of {}: {}\n", reasons.size(), name, reasons.front());
}

/// Computes some answers once more, one at a time. Returns how many of them differ.
int64_t count_differences(const Service& service, const std::filesystem::path& directory,
                          const std::vector<Request>& requests, const Options& options) {
  gpt::SamplingOptions greedy;
  greedy.temperature = 0;
  greedy.max_new_tokens = options.tokens;
  const auto alone = [&](const Tokens& prompt) {
    return gpt::generate(*service.model, prompt, greedy, service.stop_ids);
  };
  int64_t checked = 0, different = 0, like_base = 0;
  size_t tokens = 0;
  double seconds = 0;
  for (const auto& request : requests) {
    if (checked == options.check) break;
    if (!request.refusal.empty()) continue;
    auto adapters = lora::load_adapter(*service.model, directory / request.adapter);
    Tokens expected;
    {
      auto active = adapters.activate();
      const gpt::Stopwatch watch;
      expected = alone(request.prompt);
      seconds += watch.seconds();
    }
    adapters.detach();
    const auto base = alone(request.prompt);
    tokens += expected.size();
    ++checked;
    like_base += expected == base;
    const bool is_different = request.answer != expected;
    different += is_different;
    if (checked > 3 && !is_different) continue;
    fmt::print("\n{}: {} ...\n  {}\n", request.adapter, service.text(request.prompt), service.text(request.answer));
    if (is_different) fmt::print("  but computed alone: {}\n", service.text(expected));
    fmt::print("  without adapter: {}\n", service.text(base));
  }
  fmt::print("\n{} answers computed alone, {:.1f} tokens/s: {} differ; {} are those of the base model\n", checked,
             static_cast<double>(tokens) / seconds, different, like_base);
  TORCH_CHECK(checked > 0, "there was no answer to check");
  TORCH_CHECK(like_base < checked, "all answers are those of the base model: the adapters do nothing");
  return different;
}

void run(Options options) {
  const auto service = load_service(options.model);
  if (options.adapters.empty())
    options.adapters = std::filesystem::temp_directory_path() / "multi_tenant_adapters" / service.name;
  write_adapters(*service.model, options.adapters, options.customers);
  auto requests = draw_requests(service, options);

  // The adapters of a pass have to be in memory together, so they limit how many rows it has.
  int64_t adapter_bytes = 0;  // of the largest
  for (int64_t i = 0; i < options.customers; ++i) {
    const auto file = options.adapters / customer(i) / kFile;
    adapter_bytes = std::max(adapter_bytes, static_cast<int64_t>(std::filesystem::file_size(file)));
  }
  const auto chosen =
      options.budget > 0 ? static_cast<int64_t>(1e6 * options.budget) : adapter_bytes * ((options.customers + 1) / 2);
  TORCH_CHECK_VALUE(chosen >= adapter_bytes, "--budget has to hold an adapter, which is of ", adapter_bytes, " bytes");
  const auto rows = std::min(options.rows, chosen / adapter_bytes);
  const lora::AdapterPool pool(*service.model, lora::AdapterPoolOptions(options.adapters).memory_budget(chosen));

  fmt::print("{}: {} customers with adapters of {:.2f} MB, of which {:.2f} MB may be in memory; {} threads\n",
             service.name, options.customers, 1e-6 * static_cast<double>(adapter_bytes),
             1e-6 * static_cast<double>(chosen), options.threads);
  BatcherMetrics metrics;
  double seconds = 0;
  {
    Batcher batcher(*service.model, pool, {static_cast<size_t>(rows), options.tokens, service.stop_ids});
    seconds = ask_all(batcher, requests, options.threads);
    metrics = batcher.metrics();
  }
  print_report(requests, seconds, metrics, pool.metrics());
  const auto wrong = std::count_if(requests.begin(), requests.end(), [](const auto& request) {
    return request.refusal.empty() == (request.adapter == kBroken);
  });
  const auto different = count_differences(service, options.adapters, requests, options);
  TORCH_CHECK(wrong == 0, wrong, " requests were refused without need, or answered without an adapter");
  TORCH_CHECK(different == 0, different, " answers are not those that were computed alone");
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Serves many customers, each with an adapter of its own, with one model.", "multi_tenant");
  Options options;
  add_options(app, options);
  return gpt::run_program(app, argc, argv, [&] { run(options); });
}
