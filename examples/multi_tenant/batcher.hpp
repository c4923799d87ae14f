// One thread that answers requests for different adapters together: each pass of the model has rows of several.
//
// Batching is continuous: a request that arrives gets its keys and values in a pass of its own, together with those
// whose prompts are of the same length, and then joins the rows that are being answered, in a cache in which they end
// together. What is in front of shorter texts is masked, so that no row sees anything but its own text. From then on
// each pass is one more token for all, and rows that are finished leave.
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

  /// Texts that go on together. The cache lacks the last token of each answer.
  struct Batch {
    std::vector<Row> rows;
    gpt::KeyValueCache cache;
  };

  void serve() {
    const torch::NoGradGuard no_grad;
    for (;;) {
      auto arrived = take();
      if (arrived.empty() && running_.rows.empty()) return;
      for (auto& item : arrived) {
        Batch start{std::move(item.second), {}};
        guarded(start, [&] { pass(start); });
        guarded(start, [&] { join(start); });
      }
      guarded(running_, [&] { pass(running_); });
    }
  }

  /// Requests for which there is room, by the length of their prompts. Waits when there is nothing else to do; nothing
  /// comes any more when the batcher is closed.
  std::map<size_t, std::vector<Row>> take() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (running_.rows.empty()) changed_.wait(lock, [&] { return is_closed_ || !waiting_.empty(); });
    const auto room = options_.max_rows - running_.rows.size();
    const auto count = static_cast<std::ptrdiff_t>(std::min(room, waiting_.size()));
    std::map<size_t, std::vector<Row>> taken;
    for (auto row = waiting_.begin(); row != waiting_.begin() + count; ++row)
      taken[row->prompt.size()].push_back(std::move(*row));
    waiting_.erase(waiting_.begin(), waiting_.begin() + count);
    return taken;
  }

  /// When the model itself fails, for example without memory, those of the batch are told, and others go on.
  template <class Work>
  static void guarded(Batch& batch, const Work& work) {
    try {
      if (!batch.rows.empty()) work();
    } catch (...) {
      for (auto& row : batch.rows) row.promise.set_exception(std::current_exception());
      batch = {};
    }
  }

  /// One more token for each row. What goes wrong with an adapter concerns its rows alone.
  void pass(Batch& batch) {
    std::map<std::string, std::string> failures;
    const auto tokens = next_tokens(batch, failures);
    const auto staying = answer(batch.rows, tokens, failures);
    if (staying.size() < tokens.size()) batch.cache.keep_texts(staying);
  }

  /// The adapters are asked for anew in each pass: the pool holds those of open scopes, and between passes it may drop
  /// some to make room for others. (So an adapter that was reloaded in the middle of an answer would go on with the
  /// keys and values of the former one.) A row whose adapter cannot be had goes along with the base model this once.
  Tokens next_tokens(Batch& batch, std::map<std::string, std::string>& failures) {
    std::vector<std::string> adapters;
    Tokens ids;
    for (const auto& row : batch.rows) {
      adapters.push_back(row.adapter);
      if (row.answer.empty()) ids.insert(ids.end(), row.prompt.begin(), row.prompt.end());
      if (!row.answer.empty()) ids.push_back(row.answer.back());
    }
    const auto count = static_cast<int64_t>(batch.rows.size());
    const auto input = torch::tensor(ids, torch::kLong).view({count, -1}).to(model_.lm_head->weight.device());
    note(count);
    auto active = pool_.activate(adapters, failures);
    const auto last = model_.hidden_states(input, &batch.cache).select(1, -1);  // (B, C)
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

  /// Puts a batch behind the running one.
  void join(Batch& batch) {
    running_.cache.append_texts(batch.cache);
    std::move(batch.rows.begin(), batch.rows.end(), std::back_inserter(running_.rows));
    batch = {};
  }

  void note(int64_t rows) {
    std::lock_guard<std::mutex> lock(mutex_);
    ++metrics_.passes;
    metrics_.rows += rows;
  }

  gpt::LanguageModelImpl& model_;
  const lora::AdapterPool& pool_;
  const BatcherOptions options_;
  Batch running_;             // of the batcher's thread alone
  mutable std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  std::vector<Row> waiting_;
  bool is_closed_ = false;
  BatcherMetrics metrics_;
  std::thread thread_;  // the last member, since it uses all others
};
