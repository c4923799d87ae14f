#pragma once

#include <lora/adapters.hpp>
#include <lora/fwd.hpp>
#include <lora/linkage.hpp>
#include <lora/model/model.hpp>
#include <lora/peft/load_options.hpp>
#include <lora/version.hpp>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// Makes the adapter of a name, for a model whose adapters are at hand, e.g. by `Adapters::plan`. It may be called on
/// several threads at a time, for different names. What it throws is thrown to whoever asked for the adapter.
using AdapterLoader = std::function<Adapter(const Adapters& adapters, const std::string& name)>;

/// Where an AdapterPool finds its adapters, and how much memory it may take.
struct AdapterPoolOptions {
  /// The adapter of a name is in the folder of that name, as `Adapters::save_all` writes it.
  AdapterPoolOptions(std::filesystem::path directory) : directory_(std::move(directory)) {}
  explicit AdapterPoolOptions(AdapterLoader loader) : loader_(std::move(loader)) {}

  /// The memory of the tensors of all adapters that are held, in bytes. Default: 1 GiB.
  TORCH_ARG(int64_t, memory_budget) = int64_t{1} << 30;
  /// How the files of a directory are read. `take_tables` is refused: it would change the base of all.
  TORCH_ARG(LoadOptions, load);

 public:
  const std::filesystem::path& directory() const { return directory_; }
  const AdapterLoader& loader() const { return loader_; }

 private:
  std::filesystem::path directory_;
  AdapterLoader loader_;
};

/// What an AdapterPool has done so far, and what it holds now.
struct AdapterPoolMetrics {
  int64_t hits = 0;       ///< adapters that were there when they were asked for
  int64_t loads = 0;      ///< that had to be loaded, or loaded anew
  int64_t failures = 0;   ///< that could not be loaded
  int64_t evictions = 0;  ///< that were dropped to make room
  int64_t adapters = 0;   ///< held now
  int64_t pinned = 0;     ///< of these, in scopes that are open, or held
  int64_t bytes = 0;      ///< of their tensors
};

namespace detail {

class PoolState;

/// Adapters that stay where they are while it lives.
class Pins {
 public:
  explicit Pins(std::shared_ptr<PoolState> pool);
  Pins(Pins&&) = default;
  Pins& operator=(Pins&&) = delete;
  ~Pins();

  void add(const std::string& name);

 private:
  std::shared_ptr<PoolState> pool_;
  std::set<std::string> names_;
};

}  // namespace detail

/// A scope of a pool's adapters, which are held as long as it is open.
class [[nodiscard]] PoolActivation {
 public:
  PoolActivation(detail::Pins pins, Activation activation)
      : pins_(std::move(pins)), activation_(std::move(activation)) {}
  PoolActivation(PoolActivation&&) = default;
  PoolActivation& operator=(PoolActivation&&) = delete;

 private:
  detail::Pins pins_;
  Activation activation_;  // is left first
};

/// Adapters of a pool that stay in memory while it lives, whether a scope has them or not. It may outlive the pool, and
/// end on any thread.
class [[nodiscard]] PoolHold {
 public:
  explicit PoolHold(detail::Pins pins) : pins_(std::move(pins)) {}
  PoolHold(PoolHold&&) = default;
  PoolHold& operator=(PoolHold&&) = delete;

 private:
  detail::Pins pins_;
};

/// Many adapters of one model, of which those that are in use are in memory: loaded when they are first asked for, and
/// dropped when others need the room and nobody has asked for them for longest.
///
///   lora::AdapterPool pool(*model, lora::AdapterPoolOptions("customers").memory_budget(1 << 28));
///   auto active = pool.activate({"anna", "", "otto"});  // of a batch of three rows; "" is the base model
///   auto y = model->forward(x);
///
/// The adapters are for inference: their tensors require no gradients. Any number of threads may use a pool at a time;
/// two that ask for one adapter load it once. Errors: those of loading, with the name of the adapter, and nothing is
/// changed; c10::Error when open scopes and holds leave no room in the budget.
class AdapterPool {
 public:
  AdapterPool(torch::nn::Module& model, AdapterPoolOptions options);
  AdapterPool(std::shared_ptr<const Model> model, AdapterPoolOptions options);

  /// A scope on this thread in which each row of a batch has the adapter of that name (see Adapters::activate).
  PoolActivation activate(const std::vector<std::string>& rows, RowOptions options = {}) const;

  PoolActivation activate(std::initializer_list<std::string> rows) const;

  /// The same, where an adapter that cannot be loaded fails alone: its rows are those of the base model, and `failures`
  /// says why, by its name.
  PoolActivation activate(std::vector<std::string> rows, std::map<std::string, std::string>& failures,
                          RowOptions options = {}) const;

  /// A scope in which all rows have that adapter.
  PoolActivation activate(const std::string& name) const;

  /// Loads adapters that are going to be asked for, e.g. on a thread of its own.
  void prefetch(const std::vector<std::string>& names) const;

  /// Loads adapters where they are not there, and keeps them until what it returns is destroyed: those of customers who
  /// are to wait for no file, or of a conversation between two of its passes. They count in the budget as those of open
  /// scopes do, and are reloaded as others are. When one cannot be loaded, none is held.
  ///
  ///   const auto held = pool.hold({"anna", "otto"});
  PoolHold hold(const std::vector<std::string>& names) const;

  /// Loads an adapter anew, from the file or the loader as it is now: scopes that are open go on with the former one,
  /// later ones have this. When that fails, the former one stays.
  void reload(const std::string& name);

  /// Drops an adapter from memory; false where it was not there. Throws when an open scope has it, or it is held.
  bool drop(const std::string& name);

  /// Those in memory, sorted.
  std::vector<std::string> names() const;
  AdapterPoolMetrics metrics() const;
  /// The adapters in memory, for reports and files.
  const Adapters& adapters() const;

 private:
  std::shared_ptr<detail::PoolState> state_;
};

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <c10/core/InferenceMode.h>

#include <lora/peft/checkpoint.hpp>

#include <algorithm>
#include <future>
#include <mutex>

namespace lora {
inline namespace LORA_ABI {

namespace detail {

/// The adapters that a pool holds, shared by the pool and the scopes it opened.
class PoolState {
 public:
  PoolState(std::shared_ptr<const Model> model, AdapterPoolOptions options)
      : adapters(std::move(model)), options_(std::move(options)) {
    TORCH_CHECK_VALUE(options_.memory_budget() > 0, "lora::AdapterPool: memory_budget has to be positive, but is ",
                      options_.memory_budget());
    TORCH_CHECK_VALUE(!options_.load().take_tables(), "lora::AdapterPool: take_tables changes the model for all ",
                      "adapters; load such an adapter with lora::load_adapter");
    adapters.prepare();
  }

  /// Loads an adapter where it is not there, and keeps it until `unpin`. What another thread is loading is waited for.
  void pin(const std::string& name) {
    std::unique_lock<std::mutex> lock(mutex_);
    auto entry = entries_.find(name);
    if (entry != entries_.end()) {
      ++metrics_.hits;
    } else {
      entry = load_once(lock, name);
    }
    ++entry->second.pins;
    entry->second.last_use = ++clock_;
  }

  void unpin(const std::string& name) {
    std::lock_guard<std::mutex> lock(mutex_);
    --entries_.find(name)->second.pins;
  }

  /// Loads an adapter anew, and puts it in the place of the one that is there.
  void reload(const std::string& name) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (auto begun = loading_.find(name); begun != loading_.end(); begun = loading_.find(name))
      wait(lock, begun->second);
    const auto entry = entries_.find(name);
    load_alone(
        lock, name,
        [&](Adapter loaded) {
          if (entry == entries_.end()) {
            insert(name, std::move(loaded));
          } else {
            replace(*entry, std::move(loaded));
          }
        },
        entry == entries_.end() ? nullptr : &entry->second);
  }

  /// Drops an adapter; false where it is not held. Throws when it is pinned.
  bool drop(const std::string& name) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto entry = entries_.find(name);
    if (entry == entries_.end()) return false;
    TORCH_CHECK(entry->second.pins == 0, "lora::AdapterPool: \"", name, "\" is in use by ", entry->second.pins,
                " open scopes or holds; leave them first");
    erase(entry);
    return true;
  }

  AdapterPoolMetrics metrics() const {
    std::lock_guard<std::mutex> lock(mutex_);
    auto now = metrics_;
    now.adapters = static_cast<int64_t>(entries_.size());
    now.pinned = std::count_if(entries_.begin(), entries_.end(), [](const auto& e) { return e.second.pins > 0; });
    return now;
  }

  std::vector<std::string> names() const {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<std::string> names;
    for (const auto& item : entries_) names.push_back(item.first);
    return names;
  }

  Adapters adapters;

 private:
  struct Entry {
    int64_t bytes;
    int64_t pins = 0;
    uint64_t last_use = 0;
  };
  using Entries = std::map<std::string, Entry>;

  /// The entry of an adapter that was not there, loaded by this thread or by the one that has begun to.
  Entries::iterator load_once(std::unique_lock<std::mutex>& lock, const std::string& name) {
    for (;;) {
      const auto entry = entries_.find(name);
      if (entry != entries_.end()) return entry;
      const auto begun = loading_.find(name);
      if (begun == loading_.end()) {
        load_alone(lock, name, [&](Adapter loaded) { insert(name, std::move(loaded)); });
      } else {
        wait(lock, begun->second);  // and when that has failed, it is tried once more
      }
    }
  }

  static void wait(std::unique_lock<std::mutex>& lock, const std::shared_future<void> ready) {
    lock.unlock();
    ready.wait();
    lock.lock();
  }

  /// Loads an adapter, which no other thread does meanwhile, and hands it to `take`. `held` is its entry, if any.
  template <class Take>
  void load_alone(std::unique_lock<std::mutex>& lock, const std::string& name, const Take& take,
                  Entry* held = nullptr) {
    std::promise<void> ready;
    loading_.emplace(name, ready.get_future().share());
    if (held != nullptr) ++held->pins;  // so that it is not dropped meanwhile
    const auto end = [&] {
      if (held != nullptr) --held->pins;
      loading_.erase(name);
      ready.set_value();
    };
    try {
      take(load(lock, name));
    } catch (...) {
      end();
      throw;
    }
    end();
  }

  /// The adapter from where it is kept; the lock is not held meanwhile.
  Adapter load(std::unique_lock<std::mutex>& lock, const std::string& name) {
    lock.unlock();
    const c10::InferenceMode off(false);  // what is kept is for any mode
    try {
      auto adapter = read(name);
      adapter.for_each_tensor(
          [](const AdapterPart&, const NamedTensor& tensor) { tensor.tensor->requires_grad_(false); });
      lock.lock();
      ++metrics_.loads;
      return adapter;
    } catch (...) {
      lock.lock();
      ++metrics_.failures;
      throw;
    }
  }

  Adapter read(const std::string& name) const {
    try {
      if (options_.loader()) return options_.loader()(adapters, name);
      TakenTables tables(adapters);
      const auto folder = options_.directory() / folder_name(name);
      const bool is_directory = name == "default" && !std::filesystem::exists(folder);  // as `save_all` writes it
      return read_plan(adapters, is_directory ? options_.directory() : folder, options_.load(), tables).first;
    } catch (c10::Error& error) {
      TORCH_RETHROW(error, "lora::AdapterPool: \"", name, "\" was not loaded");
    }
  }

  Entries::iterator insert(const std::string& name, Adapter adapter) {
    const auto size = bytes_of(adapter);
    make_room(name, size);
    adapters.add(name, std::move(adapter));
    metrics_.bytes += size;
    return entries_.emplace(name, Entry{size, 0, ++clock_}).first;
  }

  void replace(Entries::value_type& entry, Adapter adapter) {
    const auto size = bytes_of(adapter);
    make_room(entry.first, size - entry.second.bytes);
    adapters.replace(entry.first, std::move(adapter));
    metrics_.bytes += size - entry.second.bytes;
    entry.second.bytes = size;
  }

  /// Drops what was not used for longest, until there is room; nothing where there cannot be.
  void make_room(const std::string& name, int64_t size) {
    const auto budget = options_.memory_budget();
    int64_t pinned = 0;
    for (const auto& item : entries_) pinned += item.second.pins > 0 ? item.second.bytes : 0;
    TORCH_CHECK(pinned + size <= budget, "lora::AdapterPool: \"", name, "\" takes ", size,
                " bytes more, the adapters in ", "open scopes and holds take ", pinned, ", and memory_budget is ",
                budget, "; allow more, or leave scopes earlier");
    while (metrics_.bytes + size > budget) {
      auto oldest = entries_.end();
      for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
        const bool is_older = oldest == entries_.end() || entry->second.last_use < oldest->second.last_use;
        if (entry->second.pins == 0 && is_older) oldest = entry;
      }
      erase(oldest);
      ++metrics_.evictions;
    }
  }

  void erase(Entries::iterator entry) {
    adapters.remove(entry->first);
    metrics_.bytes -= entry->second.bytes;
    entries_.erase(entry);
  }

  static int64_t bytes_of(const Adapter& adapter) {
    int64_t bytes = 0;
    adapter.for_each_tensor(
        [&](const AdapterPart&, const NamedTensor& tensor) { bytes += static_cast<int64_t>(tensor.tensor->nbytes()); });
    return bytes;
  }

  const AdapterPoolOptions options_;
  mutable std::mutex mutex_;  // of what follows
  Entries entries_;
  std::map<std::string, std::shared_future<void>> loading_;
  AdapterPoolMetrics metrics_;
  uint64_t clock_ = 0;
};

}  // namespace detail

namespace detail {

LORA_INLINE Pins::Pins(std::shared_ptr<PoolState> pool) : pool_(std::move(pool)) {}

LORA_INLINE Pins::~Pins() {
  for (const auto& name : names_) pool_->unpin(name);
}

LORA_INLINE void Pins::add(const std::string& name) {
  if (name.empty() || names_.count(name) > 0) return;
  pool_->pin(name);
  names_.insert(name);
}

}  // namespace detail

LORA_INLINE AdapterPool::AdapterPool(torch::nn::Module& model, AdapterPoolOptions options)
    : AdapterPool(std::make_shared<ModuleModel>(model), std::move(options)) {}

LORA_INLINE AdapterPool::AdapterPool(std::shared_ptr<const Model> model, AdapterPoolOptions options)
    : state_(std::make_shared<detail::PoolState>(std::move(model), std::move(options))) {}

LORA_INLINE PoolActivation AdapterPool::activate(const std::vector<std::string>& rows, RowOptions options) const {
  detail::Pins pins(state_);
  for (const auto& name : rows) pins.add(name);
  auto activation = state_->adapters.activate(rows, std::move(options));
  return {std::move(pins), std::move(activation)};
}

LORA_INLINE PoolActivation AdapterPool::activate(std::initializer_list<std::string> rows) const {
  return activate(std::vector<std::string>(rows));
}

LORA_INLINE PoolActivation AdapterPool::activate(std::vector<std::string> rows,
                                                 std::map<std::string, std::string>& failures,
                                                 RowOptions options) const {
  detail::Pins pins(state_);
  failures.clear();
  for (auto& name : rows) {
    try {
      if (failures.count(name) == 0) pins.add(name);
    } catch (const c10::Error& error) {
      failures.emplace(name, error.what_without_backtrace());
    } catch (const std::exception& error) {
      failures.emplace(name, error.what());
    }
    if (failures.count(name) > 0) name.clear();
  }
  auto activation = state_->adapters.activate(rows, std::move(options));
  return {std::move(pins), std::move(activation)};
}

LORA_INLINE PoolActivation AdapterPool::activate(const std::string& name) const {
  detail::Pins pins(state_);
  pins.add(name);
  auto activation = state_->adapters.activate(name);
  return {std::move(pins), std::move(activation)};
}

LORA_INLINE void AdapterPool::prefetch(const std::vector<std::string>& names) const {
  for (const auto& name : names) detail::Pins(state_).add(name);
}

LORA_INLINE PoolHold AdapterPool::hold(const std::vector<std::string>& names) const {
  detail::Pins pins(state_);
  for (const auto& name : names) pins.add(name);
  return PoolHold(std::move(pins));
}

LORA_INLINE void AdapterPool::reload(const std::string& name) { state_->reload(name); }

LORA_INLINE bool AdapterPool::drop(const std::string& name) { return state_->drop(name); }

LORA_INLINE std::vector<std::string> AdapterPool::names() const { return state_->names(); }

LORA_INLINE AdapterPoolMetrics AdapterPool::metrics() const { return state_->metrics(); }

LORA_INLINE const Adapters& AdapterPool::adapters() const { return state_->adapters; }

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
