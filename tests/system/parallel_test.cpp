#include "support/testing.hpp"

#include <lora/system/parallel.hpp>

#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>

namespace {

/// So many threads for a test.
struct Threads {
  explicit Threads(int count) : before(torch::get_num_threads()) { torch::set_num_threads(count); }
  ~Threads() { torch::set_num_threads(before); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  const int before;
};

using Part = std::pair<int64_t, int64_t>;

struct Parts {
  std::set<Part> all;
  std::set<std::thread::id> threads;
};

Parts parts(int64_t begin, int64_t end, int64_t grain) {
  Parts found;
  std::mutex mutex;
  lora::detail::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    const std::lock_guard<std::mutex> lock(mutex);
    found.all.emplace(first, last);
    found.threads.insert(std::this_thread::get_id());
  });
  return found;
}

}  // namespace

TEST_CASE("Work is divided among the threads of LibTorch, all of it and each piece once") {
  for (const int count : {1, 2, 3}) {
    const Threads threads(count);
    for (const auto& [begin, end, grain] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{
             {0, 100, 1}, {5, 105, 30}, {7, 9, 1}, {0, 4, 0}, {3, 4, 9}}) {
      INFO(count << " threads, [" << begin << ", " << end << "), grain " << grain);
      const auto found = parts(begin, end, grain);
      auto next = begin;
      for (const auto& [first, last] : found.all) {
        CHECK(first == next);
        CHECK(last > first);
        if (found.all.size() > 1 && last != end) CHECK(last - first >= grain);
        next = last;
      }
      CHECK(next == end);
      const auto most = std::min<int64_t>(count, std::max<int64_t>(1, (end - begin) / std::max<int64_t>(grain, 1)));
      CHECK(static_cast<int64_t>(found.all.size()) <= most);
      CHECK((found.all.size() > 1) == (most > 1));
    }
  }
}

TEST_CASE("Several threads work, each in its own part, and none within the work of another") {
  const Threads threads(2);
  if (torch::get_num_threads() < 2 || at::get_parallel_info().find("OpenMP") == std::string::npos) return;
  CHECK(parts(0, 1000, 1).threads.size() == 2);
  std::mutex mutex;
  std::vector<size_t> inner;
  lora::detail::parallel_for(0, 2, 1, [&](int64_t, int64_t) {
    const auto found = parts(0, 1000, 1);
    const std::lock_guard<std::mutex> lock(mutex);
    inner.push_back(found.all.size());
  });
  CHECK(inner == std::vector<size_t>{1, 1});
}

TEST_CASE("No work is not called for, and what it throws arrives") {
  const Threads threads(2);
  CHECK(parts(4, 4, 1).all.empty());
  CHECK(parts(4, 3, 1).all.empty());
  const auto throws_late = [](int64_t first, int64_t) {
    if (first > 0) throw std::runtime_error("thrown");
  };
  CHECK_THROWS_WITH(lora::detail::parallel_for(0, 100, 1, throws_late), "thrown");
}
