// A pool of adapters: what it holds, what it drops, what it says, and many threads that use it at once.
#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/pool.hpp>

#include <atomic>
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
      CHECK_THAT(error_of([&] { pool.drop("1"); }), contains("\"1\" is in use by 1 open scopes"));
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

TEST_CASE("Threads that serve, reload and break adapters: every answer is right, every refusal has a reason") {
  constexpr int kThreads = 6, kPasses = 40, kAdapters = 8;
  Customers customers(kAdapters);
  std::vector<Tensor> expected;
  for (int i = 0; i < kAdapters; ++i) expected.push_back(customers.alone(std::to_string(i)));
  const auto base = customers.alone("");
  auto pool = customers.pool(kAdapters / 2 + kThreads);  // fewer than are asked for, enough for all scopes at once
  std::atomic<int> wrong{0}, answered{0}, refused{0}, without_reason{0};
  std::atomic<bool> serving{true};
  const auto serve = [&](int thread) {
    torch::NoGradGuard no_grad;
    for (int pass = 0; pass < kPasses; ++pass) {
      const auto own = (thread + pass * 3) % (kAdapters + 1);  // one is nobody's
      const auto name = own == kAdapters ? std::string("nobody") : std::to_string(own);
      std::map<std::string, std::string> failures;
      auto active = pool.activate({"", name, name}, failures);
      const auto y = customers.model->forward(customers.x);
      if (distance(y[0], base[0]) > 1e-5) ++wrong;
      if (failures.empty()) {
        ++answered;
        if (own == kAdapters || distance(y[1], expected[static_cast<size_t>(own)][1]) > 1e-5) ++wrong;
      } else {
        ++refused;
        if (failures.at(name).find("\"" + name + "\"") == std::string::npos) ++without_reason;
      }
    }
  };
  std::thread disturber([&] {
    for (int i = 0; serving; ++i) {
      const auto name = std::to_string(i % kAdapters), file = std::string("adapter_model.safetensors");
      const auto path = customers.directory / name / file, aside = customers.directory / name / "aside";
      try {
        if (i % 3 == 0) {
          pool.reload(name);
        } else if (i % 3 == 1) {
          pool.drop(name);
        } else {
          std::filesystem::rename(path, aside);
          std::this_thread::yield();
          std::filesystem::rename(aside, path);
        }
      } catch (const c10::Error&) {  // in use
      }
    }
  });
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(serve, i);
  for (auto& thread : threads) thread.join();
  serving = false;
  disturber.join();
  CHECK(wrong == 0);
  CHECK(without_reason == 0);
  CHECK(answered > kThreads * kPasses / 2);
  CHECK(answered + refused == kThreads * kPasses);
  const auto metrics = pool.metrics();
  CHECK(metrics.pinned == 0);
  CHECK(metrics.bytes == metrics.adapters * Customers::kBytes);
}
