// One thread that answers requests for different adapters together: each pass of the model has rows of several.
//
// A pass takes texts of equal length, so that all rows have the same positions and nothing has to be padded or masked:
// attention never looks beyond its own row, and no row can influence another one. A group of such texts shares a cache.
// The group with the shortest texts goes first, and when it has grown to the length of the next one the two go on as
// one. So requests join while others are being answered, and rows that are finished leave.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <future>
#include <iterator>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <lora/pool.hpp>

#include "language_model.hpp"

using Tokens = std::vector<int64_t>;

struct BatcherOptions {
  size_t max_rows = 8;      ///< that are being answered at a time; their adapters have to fit into the pool
  int64_t max_tokens = 16;  ///< of an answer
  Tokens stop_ids;          ///< each of them ends an answer, and is not part of it
};

struct BatcherMetrics {
  int64_t passes = 0;
  int64_t rows = 0;  ///< of all passes
};

/// Continues texts, each with an adapter of a pool, always by the most likely token.
class Batcher {
 public:
  Batcher(gpt::LanguageModelImpl& model, const lora::AdapterPool& pool, BatcherOptions options)
      : model_(model), pool_(pool), options_(std::move(options)), thread_([this] { serve(); }) {}

  /// Answers what was asked before it ends.
  ~Batcher() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_closed_ = true;
    }
    changed_.notify_one();
    thread_.join();
  }
  Batcher(const Batcher&) = delete;
  Batcher& operator=(const Batcher&) = delete;

  /// The answer to a prompt, on any thread; the future throws what the pool says when the adapter cannot be had.
  /// Throws c10::ValueError for a prompt that the model cannot continue: it would fail the rows beside it, too.
  std::future<Tokens> ask(std::string adapter, Tokens prompt) {
    const auto& config = model_.config;
    const auto length = static_cast<int64_t>(prompt.size());
    TORCH_CHECK_VALUE(length > 0 && length + options_.max_tokens <= config.max_positions, "a prompt of ", length,
                      " tokens and an answer of ", options_.max_tokens, " do not fit the model's ",
                      config.max_positions, " positions");
    for (const auto id : prompt)
      TORCH_CHECK_VALUE(id >= 0 && id < config.vocab_size, "the prompt has the token ", id, ", the model only ",
                        config.vocab_size);
    Row row{std::move(adapter), std::move(prompt), {}, {}};
    auto answer = row.promise.get_future();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      waiting_.push_back(std::move(row));
    }
    changed_.notify_one();
    return answer;
  }

  BatcherMetrics metrics() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return metrics_;
  }

 private:
  struct Row {
    std::string adapter;
    Tokens prompt, answer;
    std::promise<Tokens> promise;
  };

  /// Texts of one length: that of the cache, which lacks the last token of each answer.
  struct Group {
    std::vector<Row> rows;
    gpt::KeyValueCache cache;
    int64_t passed_over = 0;
  };

  void serve() {
    const torch::NoGradGuard no_grad;
    for (;;) {
      auto arrived = take();
      if (arrived.empty() && groups_.empty()) return;
      for (auto& [length, rows] : arrived) pass({std::move(rows), {}}, /*is_start=*/true);
      if (!groups_.empty()) pass(next(), /*is_start=*/false);
    }
  }

  /// Requests for which there is room, by the length of their prompts. Waits when there is nothing else to do; nothing
  /// comes any more when the batcher is closed.
  std::map<size_t, std::vector<Row>> take() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (groups_.empty()) changed_.wait(lock, [&] { return is_closed_ || !waiting_.empty(); });
    size_t busy = 0;
    for (const auto& item : groups_) busy += item.second.rows.size();
    const auto count = static_cast<std::ptrdiff_t>(std::min(options_.max_rows - busy, waiting_.size()));
    std::map<size_t, std::vector<Row>> taken;
    for (auto row = waiting_.begin(); row != waiting_.begin() + count; ++row)
      taken[row->prompt.size()].push_back(std::move(*row));
    waiting_.erase(waiting_.begin(), waiting_.begin() + count);
    return taken;
  }

  /// The group that is to go on: the shortest texts, so that they catch up with others, unless those waited for long.
  Group next() {
    auto chosen = std::find_if(groups_.begin(), groups_.end(),
                               [](const auto& item) { return item.second.passed_over >= kPatience; });
    if (chosen == groups_.end()) chosen = groups_.begin();
    auto group = std::move(chosen->second);
    groups_.erase(chosen);
    for (auto& item : groups_) ++item.second.passed_over;
    return group;
  }

  /// One more token for each row of a group. What goes wrong with an adapter concerns its rows alone; when the model
  /// itself fails, those of the pass are told, and the others go on.
  void pass(Group group, bool is_start) {
    try {
      std::map<std::string, std::string> failures;
      const auto tokens = next_tokens(group, is_start, failures);
      const auto staying = answer(group.rows, tokens, failures);
      if (staying.empty()) return;
      if (staying.size() < tokens.size()) group.cache.keep_rows(torch::tensor(staying, torch::kLong));
      rejoin(group);
    } catch (...) {
      for (auto& row : group.rows) row.promise.set_exception(std::current_exception());
    }
  }

  /// The adapters are asked for anew in each pass and may have been dropped in between: the pool holds those of open
  /// scopes, and the groups take turns. (So an adapter that was reloaded in the middle of an answer would go on with
  /// the keys and values of the former one.) A row whose adapter cannot be had goes along with the base model this
  /// once.
  Tokens next_tokens(Group& group, bool is_start, std::map<std::string, std::string>& failures) {
    std::vector<std::string> adapters;
    Tokens ids;
    for (const auto& row : group.rows) {
      adapters.push_back(row.adapter);
      if (is_start) ids.insert(ids.end(), row.prompt.begin(), row.prompt.end());
      if (!is_start) ids.push_back(row.answer.back());
    }
    const auto count = static_cast<int64_t>(group.rows.size());
    const auto input = torch::tensor(ids, torch::kLong).view({count, -1}).to(model_.lm_head->weight.device());
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ++metrics_.passes;
      metrics_.rows += count;
    }
    auto active = pool_.activate(adapters, failures);
    const auto last = model_.hidden_states(input, &group.cache).select(1, -1);  // (B, C)
    const auto best = model_.lm_head->forward(last).argmax(-1).cpu();           // (B)
    return {best.data_ptr<int64_t>(), best.data_ptr<int64_t>() + count};
  }

  /// Answers the rows that are finished or failed, and takes them out. Returns the places of those that stay.
  Tokens answer(std::vector<Row>& rows, const Tokens& tokens, const std::map<std::string, std::string>& failures) {
    std::vector<Row> staying;
    Tokens places;
    for (size_t i = 0; i < rows.size(); ++i) {
      auto& row = rows[i];
      const auto failure = failures.find(row.adapter);
      const auto& stops = options_.stop_ids;
      const bool is_end = std::find(stops.begin(), stops.end(), tokens[i]) != stops.end();
      if (!is_end) row.answer.push_back(tokens[i]);
      if (failure != failures.end()) {
        row.promise.set_exception(std::make_exception_ptr(std::runtime_error(failure->second)));
      } else if (is_end || static_cast<int64_t>(row.answer.size()) == options_.max_tokens) {
        row.promise.set_value(std::move(row.answer));
      } else {
        places.push_back(static_cast<int64_t>(i));
        staying.push_back(std::move(row));
      }
    }
    rows = std::move(staying);
    return places;
  }

  /// Puts a group back, together with the one of the same length if there is one.
  void rejoin(Group& group) {
    const auto [found, is_new] = groups_.try_emplace(group.cache.length());
    auto& others = found->second;
    if (is_new) {
      others.cache = std::move(group.cache);
    } else {
      others.cache.append_rows(group.cache);
    }
    std::move(group.rows.begin(), group.rows.end(), std::back_inserter(others.rows));
  }

  static constexpr int64_t kPatience = 16;  // passes in which a group may be passed over

  gpt::LanguageModelImpl& model_;
  const lora::AdapterPool& pool_;
  const BatcherOptions options_;
  std::map<int64_t, Group> groups_;  // by length; of the batcher's thread alone
  mutable std::mutex mutex_;         // of what follows
  std::condition_variable changed_;
  std::vector<Row> waiting_;
  bool is_closed_ = false;
  BatcherMetrics metrics_;
  std::thread thread_;  // the last member, since it uses all others
};
