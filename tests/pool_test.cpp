// A pool of adapters: what it holds, what it drops, what it says, and many threads that use it at once.
#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/pool.hpp>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <random>
#include <thread>

namespace {

using torch::Tensor;
using Names = std::vector<std::string>;
using testing::contains;
using testing::distance;
using testing::error_of;

/// Adapters "0" to "5" of a model, in a directory, and what the model computes with each.
class Customers {
 public:
  explicit Customers(int64_t count = 6) {
    model->eval();
    for (int64_t i = 0; i < count; ++i) write(std::to_string(i));
  }

  /// Writes an adapter with new values.
  void write(const std::string& name) {
    auto adapters = lora::attach(*model, config());
    testing::randomize(adapters.parameters());
    adapters.save(directory / name);
    adapters.detach();
  }

  Tensor alone(const std::string& name) {
    torch::NoGradGuard no_grad;
    if (name.empty()) return model->forward(x);
    auto adapters = lora::load_adapter(*model, directory / name);
    auto y = [&] {
      auto active = adapters.activate();
      return model->forward(x);
    }();
    adapters.detach();
    return y;
  }

  static lora::LoRAConfig config() { return lora::LoRAConfig(2).alpha(6).target_modules({"q_proj", "lm_head"}); }
  static constexpr int64_t kBytes = 4 * 2 * (3 * (8 + 8) + (8 + 6));  // of one adapter

  lora::AdapterPool pool(int64_t adapters) {
    return lora::AdapterPool(*model, lora::AdapterPoolOptions(directory.path()).memory_budget(adapters * kBytes));
  }

  testing::Stack model;
  testing::TemporaryFolder directory;
  Tensor x = torch::randn({3, 2, 8}, testing::on_device(torch::kFloat));
};

}  // namespace

TEST_CASE("A pool loads what is asked for, and drops what was not used for longest") {
  Customers customers;
  std::vector<Tensor> expected;
  for (int i = 0; i < 6; ++i) expected.push_back(customers.alone(std::to_string(i)));
  const auto base = customers.alone("");
  auto pool = customers.pool(3);
  torch::NoGradGuard no_grad;
  const auto answer = [&](const Names& rows) {
    auto active = pool.activate(rows);
    return customers.model->forward(customers.x);
  };
  const auto y = answer({"0", "", "1"});
  CHECK(distance(y[0], expected[0][0]) < 1e-5);
  CHECK(distance(y[1], base[1]) < 1e-5);
  CHECK(distance(y[2], expected[1][2]) < 1e-5);
  answer({"2", "2", "2"});
  CHECK(pool.names() == Names{"0", "1", "2"});
  answer({"0", "0", "0"});
  answer({"3", "", "4"});  // 1 and 2 were used before 0
  CHECK(pool.names() == Names{"0", "3", "4"});
  CHECK(distance(answer({"1", "4", "1"})[1], expected[4][1]) < 1e-5);
  const auto metrics = pool.metrics();
  CHECK(metrics.loads == 6);
  CHECK(metrics.hits == 2);
  CHECK(metrics.evictions == 3);
  CHECK(metrics.failures == 0);
  CHECK(metrics.adapters == 3);
  CHECK(metrics.pinned == 0);
  CHECK(metrics.bytes == 3 * Customers::kBytes);
  const auto whole = [&] {
    auto active = pool.activate("5");
    return customers.model->forward(customers.x);
  }();
  CHECK(distance(whole, expected[5]) < 1e-5);
  for (const auto& name : pool.names()) {
    for (const auto& part : pool.adapters().adapter(name)->parts)
      for (const auto& tensor : part.method->tensors()) CHECK_FALSE(tensor.tensor->requires_grad());
  }
}

TEST_CASE("What an open scope has is not dropped") {
  Customers customers;
  auto pool = customers.pool(2);
  {
    auto first = pool.activate("0");
    {
      auto second = pool.activate({"1", "", "1"});
      CHECK(pool.metrics().pinned == 2);
      CHECK_THAT(error_of([&] { (void)pool.activate("2"); }),
                 contains("\"2\" takes") && contains("memory_budget is " + std::to_string(2 * Customers::kBytes)));
      CHECK_THAT(error_of([&] { pool.drop("1"); }), contains("\"1\" is in use by 1 open scopes or holds"));
    }
    pool.prefetch({"2"});
    CHECK(pool.names() == Names{"0", "2"});
    customers.model->forward(customers.x);
  }
  CHECK(pool.drop("0"));
  CHECK_FALSE(pool.drop("0"));
  CHECK(pool.names() == Names{"2"});
  CHECK(pool.metrics().bytes == Customers::kBytes);
  CHECK_THAT(error_of([&] { (void)customers.pool(0); }), contains("memory_budget has to be positive"));
  lora::AdapterPool small(*customers.model, lora::AdapterPoolOptions(customers.directory.path()).memory_budget(10));
  CHECK_THAT(error_of([&] { small.prefetch({"1"}); }), contains("memory_budget is 10"));
  CHECK(small.metrics().bytes == 0);
  CHECK(small.names().empty());
}

TEST_CASE("What is held stays in memory until it is let go") {
  Customers customers;
  std::optional<lora::PoolHold> outliving;
  {
    auto pool = customers.pool(3);
    {
      const auto held = pool.hold({"0", "", "1", "0"});
      CHECK(pool.names() == Names{"0", "1"});
      CHECK(pool.metrics().pinned == 2);
      for (const auto* name : {"2", "3", "4", "5"}) pool.prefetch({name});  // each in the place of the former
      CHECK(pool.names() == Names{"0", "1", "5"});
      CHECK_THAT(error_of([&] { pool.drop("0"); }), contains("\"0\" is in use by 1 open scopes or holds"));
      CHECK_THAT(error_of([&] {
                   (void)pool.hold({"2", "3"});
                 }),
                 contains("\"3\" takes") && contains("memory_budget is"));
      CHECK_THAT(error_of([&] { (void)pool.hold({"2", "nobody"}); }), contains("\"nobody\" was not loaded"));
      CHECK(pool.metrics().pinned == 2);  // of those that failed nothing is held
      const auto before = pool.adapters().adapter("0");
      pool.reload("0");
      CHECK(pool.adapters().adapter("0") != before);
      const auto again = pool.hold({"1"});
      CHECK_THAT(error_of([&] { pool.drop("1"); }), contains("by 2 open scopes or holds"));
    }
    CHECK(pool.metrics().pinned == 0);
    CHECK(pool.drop("0"));
    outliving.emplace(pool.hold({"1", "3"}));
    CHECK(pool.metrics().pinned == 2);
  }
  outliving.reset();
}

TEST_CASE("An adapter that is written anew takes effect with a reload; a broken one leaves the former") {
  Customers customers;
  auto pool = customers.pool(3);
  torch::NoGradGuard no_grad;
  const auto answer = [&] {
    auto active = pool.activate("3");
    return customers.model->forward(customers.x);
  };
  const auto before = answer();
  Tensor during;
  {
    auto active = pool.activate("3");
    std::filesystem::remove_all(customers.directory / "3");
    std::filesystem::copy(customers.directory / "4", customers.directory / "3");
    pool.reload("3");
    during = customers.model->forward(customers.x);
  }
  CHECK(torch::equal(during, before));  // a pass goes on with what it has
  const auto after = answer();
  CHECK(distance(after, before) > 1e-3);
  std::filesystem::resize_file(customers.directory / "3" / "adapter_model.safetensors", 10);
  CHECK_THAT(error_of([&] { pool.reload("3"); }),
             contains("\"3\" was not loaded") && contains("adapter_model.safetensors"));
  CHECK(torch::equal(answer(), after));
  CHECK_THAT(error_of([&] { pool.reload("nobody"); }), contains("nobody"));
  pool.reload("5");  // which was not there
  CHECK(pool.names() == Names{"3", "5"});
  CHECK(pool.metrics().failures == 2);
  CHECK(pool.metrics().bytes == 2 * Customers::kBytes);
}

TEST_CASE("An adapter that cannot be loaded fails alone, with the reason") {
  Customers customers;
  auto pool = customers.pool(3);
  torch::NoGradGuard no_grad;
  const auto expected = customers.alone("1"), base = customers.alone("");
  std::map<std::string, std::string> failures;
  const auto y = [&] {
    auto active = pool.activate({"nobody", "1", "../pool"}, failures);
    return customers.model->forward(customers.x);
  }();
  CHECK(distance(y[1], expected[1]) < 1e-5);
  CHECK(distance(y[0], base[0]) < 1e-5);
  REQUIRE(failures.size() == 2);
  CHECK_THAT(failures.at("nobody"), contains("\"nobody\" was not loaded") && contains("adapter_config.json"));
  CHECK_THAT(failures.at("../pool"), contains("%2E.%2Fpool"));  // inside of the directory
  CHECK_THAT(error_of([&] { (void)pool.activate({"1", "nobody"}); }), contains("nobody"));
  CHECK(pool.metrics().pinned == 0);
}

TEST_CASE("A pool finds what save_all wrote, and what it loads is for any mode") {
  testing::Stack model;
  const testing::TemporaryFolder directory;
  {
    lora::Adapters adapters(*model);
    for (const auto* name : {"default", "other"}) {
      adapters.add(name, Customers::config());
      testing::randomize(adapters.parameters(name));
    }
    adapters.save_all(directory.path());
    adapters.detach();
  }
  const lora::AdapterPool pool(*model, directory.path());
  auto x = torch::randn({2, 8}, testing::on_device(torch::kFloat));
  {
    c10::InferenceMode mode;
    auto active = pool.activate({"default", "other"});
    model->forward(x);
  }
  x.requires_grad_();
  auto active = pool.activate({"other", "default"});
  model->forward(x).sum().backward();
  CHECK(x.grad().abs().sum().item<double>() > 0);
}

TEST_CASE("A pool takes its adapters from a function, too") {
  testing::Stack model;
  std::atomic<int> calls{0};
  lora::AdapterPool pool(*model, lora::AdapterPoolOptions([&](const lora::Adapters& adapters, const std::string& name) {
    ++calls;
    if (name == "odd") throw std::runtime_error("odd is not for sale");
    auto adapter = adapters.plan(Customers::config());
    adapter.initialize();
    adapter.for_each_tensor([&](const lora::AdapterPart&, const lora::NamedTensor& tensor) {
      torch::NoGradGuard no_grad;
      tensor.tensor->fill_(name == "zero" ? 0 : 0.1);
    });
    return adapter;
  }));
  const auto x = torch::randn({2, 8}, testing::on_device(torch::kFloat));
  const auto base = model->forward(x);
  const auto y = [&] {
    auto active = pool.activate({"zero", "one"});
    return model->forward(x);
  }();
  CHECK(distance(y[0], base[0]) < 1e-6);
  CHECK(distance(y[1], base[1]) > 1e-3);
  CHECK(calls == 2);
  CHECK_THROWS_WITH(pool.prefetch({"odd"}), contains("odd is not for sale"));
  std::map<std::string, std::string> failures;
  { auto active = pool.activate({"one", "odd"}, failures); }
  CHECK(failures.at("odd") == "odd is not for sale");
  CHECK_THAT(error_of([&] {
               lora::AdapterPool(*model, lora::AdapterPoolOptions("x").load(lora::LoadOptions().take_tables(true)));
             }),
             contains("take_tables"));
}

namespace {

double setting(const char* name, double otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::stod(value);
}

/// What happened to the requests and the changes of a load, by what was said.
class Outcomes {
 public:
  void add(const std::string& what) {
    std::lock_guard<std::mutex> lock(mutex_);
    ++counts_[what];
  }
  int64_t operator[](const std::string& what) const {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = counts_.find(what);
    return found == counts_.end() ? 0 : found->second;
  }
  std::string text() const {
    std::lock_guard<std::mutex> lock(mutex_);
    std::string text;
    for (const auto& [what, count] : counts_) text += "\n  " + what + ": " + std::to_string(count);
    return text;
  }

 private:
  mutable std::mutex mutex_;
  std::map<std::string, int64_t> counts_;
};

/// Customers whose files are exchanged, taken away and broken while they are served. Each adapter has two versions.
class Unrest {
 public:
  explicit Unrest(int64_t count) : customers(count), base(customers.alone("")) {
    for (int64_t i = 0; i < count; ++i) {
      const auto name = std::to_string(i);
      expected.emplace_back();
      for (const auto* version : {"0", "1"}) {
        customers.write(name);
        std::filesystem::copy_file(file(name), versions_ / (name + "." + version));
        expected.back().push_back(customers.alone(name));
      }
    }
    const auto broken = versions_ / "broken";
    std::filesystem::copy_file(file("0"), broken);
    std::filesystem::resize_file(broken, 100);
  }

  /// One request: the base model, and two customers, of whom one may be nobody.
  void serve(lora::AdapterPool& pool, std::mt19937& random, Outcomes& outcomes) {
    const auto count = static_cast<int>(expected.size());
    std::uniform_int_distribution<int> any(0, count);
    const std::vector<int> drawn{any(random), any(random)};
    const auto name = [&](int own) { return own == count ? std::string("nobody") : std::to_string(own); };
    std::map<std::string, std::string> failures;
    const auto active = pool.activate({"", name(drawn[0]), name(drawn[1])}, failures);
    const auto y = customers.model->forward(customers.x);
    if (!(distance(y[0], base[0]) <= 1e-5)) outcomes.add("wrong: base");
    for (int row = 1; row < 3; ++row) {
      const auto own = drawn[static_cast<size_t>(row) - 1];
      const auto failure = failures.find(name(own));
      if (failure != failures.end()) {
        outcomes.add(reason(failure->second, name(own)));
        if (!(distance(y[row], base[row]) <= 1e-5)) outcomes.add("wrong: refused");
      } else {
        outcomes.add(own == count ? "wrong: nobody" : version(own, row, y[row]));
      }
    }
  }

  /// One change to a customer's files or to what the pool holds, undone but for a new version.
  void disturb(lora::AdapterPool& pool, std::mt19937& random, Outcomes& outcomes) {
    const auto name = std::to_string(random() % expected.size());
    const auto moved = [&](const std::filesystem::path& from, const std::filesystem::path& to) {
      std::filesystem::rename(from, to);
      change(pool, name, outcomes);
      std::filesystem::rename(to, from);
    };
    switch (random() % 5) {
      case 0:
        put(name, name + "." + std::to_string(random() % 2));
        return change(pool, name, outcomes);
      case 1:
        return change(pool, name, outcomes);
      case 2:
        return moved(file(name), versions_ / "aside");
      case 3:
        return moved(customers.directory / name, versions_ / "folder");
      default:
        std::filesystem::copy_file(file(name), versions_ / "kept");
        put(name, "broken");
        change(pool, name, outcomes);
        std::filesystem::rename(versions_ / "kept", file(name));
    }
  }

  Customers customers;
  Tensor base;
  std::vector<std::vector<Tensor>> expected;  // of each adapter and version

 private:
  std::filesystem::path file(const std::string& name) const {
    return customers.directory / name / "adapter_model.safetensors";
  }

  /// In one step, as adapters are saved.
  void put(const std::string& name, const std::string& version) const {
    std::filesystem::copy_file(versions_ / version, versions_ / "next");
    std::filesystem::rename(versions_ / "next", file(name));
  }

  /// Loads it anew or drops it, and gives others the time to find it so.
  void change(lora::AdapterPool& pool, const std::string& name, Outcomes& outcomes) const {
    const auto text = error_of([&] {
      pool.reload(name);
      outcomes.add("changed: reloaded");
    });
    if (!text.empty()) outcomes.add(reason(text, name) + ", by a reload");
    const auto refusal = error_of([&] { outcomes.add(pool.drop(name) ? "changed: dropped" : "changed: not there"); });
    if (!refusal.empty()) outcomes.add(reason(refusal, name) + ", by a drop");
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }

  /// What kind of refusal it is; one without the name of the adapter, or of a kind that is not expected, is wrong.
  static std::string reason(const std::string& text, const std::string& name) {
    const std::vector<std::pair<std::string, std::string>> reasons{
        {"adapter_config.json: cannot be opened", "no configuration"},
        {"adapter_model.safetensors: cannot be opened", "no tensors"},
        {"adapter_model.safetensors", "broken tensors"},
        {"memory_budget is", "no room"},
        {" open scopes or holds; leave them first", "in use"}};
    for (const auto& [part, reason] : reasons) {
      if (text.find(part) != text.npos && text.find("\"" + name + "\"") != text.npos) return "refused: " + reason;
    }
    return "without a reason: " + text;
  }

  std::string version(int own, int row, const Tensor& y) const {
    const auto& versions = expected[static_cast<size_t>(own)];
    for (size_t i = 0; i < versions.size(); ++i) {
      if (distance(y, versions[i][row]) < 1e-5) return "answered: version " + std::to_string(i);
    }
    return "wrong: row";
  }

  testing::TemporaryFolder versions_;
};

}  // namespace

// LORA_TEST_THREADS=64 LORA_TEST_SECONDS=60 make it the load of a service, and print what happened.
TEST_CASE("Threads that serve, reload and break adapters: every answer is right, every refusal has a reason") {
  constexpr int kPasses = 40, kAdapters = 12, kHeld = 9;
  const auto threads = static_cast<int>(setting("LORA_TEST_THREADS", 6));
  const auto seconds = setting("LORA_TEST_SECONDS", 0.5);
  torch::manual_seed(0);
  Unrest unrest(kAdapters);
  auto pool = unrest.customers.pool(kHeld);  // so that scopes of many threads may find no room
  Outcomes outcomes;
  std::atomic<int> serving{threads};
  const auto start = std::chrono::steady_clock::now();
  const auto is_over = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds;
  };
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i) {
    all.emplace_back([&, i] {
      const torch::NoGradGuard no_grad;
      std::mt19937 random(static_cast<uint32_t>(i));
      for (int pass = 0; pass < kPasses || !is_over(); ++pass) unrest.serve(pool, random, outcomes);
      --serving;
    });
  }
  std::mt19937 random(1000);
  for (int change = 0; serving > 0 || change < 200; ++change) unrest.disturb(pool, random, outcomes);
  for (auto& thread : all) thread.join();

  const auto text = outcomes.text();
  CAPTURE(text);
  CHECK_THAT(text, !contains("wrong:") && !contains("without a reason"));
  for (const auto* what :
       {"answered: version 0", "answered: version 1", "refused: no configuration", "changed: reloaded",
        "refused: broken tensors, by a reload", "refused: no tensors, by a reload"})
    CHECK(outcomes[what] > 0);
  const auto metrics = pool.metrics();
  CHECK(metrics.pinned == 0);
  CHECK(metrics.bytes == metrics.adapters * Customers::kBytes);
  if (std::getenv("LORA_TEST_SECONDS") != nullptr) {
    WARN(threads << " threads, " << seconds << " s:" << text << "\n  pool: " << metrics.loads << " loads, "
                 << metrics.hits << " hits, " << metrics.failures << " failures, " << metrics.evictions
                 << " evictions");
  }
}
