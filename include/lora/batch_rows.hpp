#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/api/include/torch/arg.h>

#include <lora/linkage.hpp>
#include <lora/version.hpp>

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

// A batch whose rows have different adapters: which rows belong together, and where they are in the input of a layer.

namespace lora {
inline namespace LORA_ABI {

/// How the rows of a batch are found in the inputs of layers, for `Adapters::activate(rows)`.
class RowOptions {
  /// Whether any input may have several entries for each row, one after the other: (rows * positions, features).
  /// Without it these are taken where an earlier input of the scope had a dimension of rows and as many positions.
  /// Default: false.
  TORCH_ARG(bool, flattened) = false;

 public:
  using Axes = std::vector<std::pair<std::string, int64_t>>;

  /// The dimension of its inputs that counts rows, for the layers of that name, or whose name ends in a dot and it.
  /// Without it: the first one; of torch::nn::MultiheadAttention the second.
  RowOptions& axis(std::string layer, int64_t dimension) {
    TORCH_CHECK_VALUE(dimension >= 0, "lora::RowOptions: the dimension of \"", layer, "\" is counted from 0, but got ",
                      dimension);
    axes_.emplace_back(std::move(layer), dimension);
    return *this;
  }
  const Axes& axes() const { return axes_; }

 private:
  Axes axes_;
};

namespace detail {

/// Some entries of the first dimension of a tensor: all, every `step`-th of a range, or those of a list.
class Entries {
 public:
  Entries() = default;
  static Entries range(int64_t first, int64_t count, int64_t step = 1) {
    Entries entries;
    entries.first_ = first;
    entries.count_ = count;
    entries.step_ = step;
    return entries;
  }
  static Entries listed(at::Tensor index) {
    auto entries = range(0, index.numel());
    entries.index_ = std::move(index);
    return entries;
  }

  bool are_all() const { return count_ < 0; }
  bool are_listed() const { return index_.defined(); }
  const at::Tensor& index() const { return index_; }

  /// A view, or for a list a copy.
  at::Tensor of(const at::Tensor& tensor) const {
    if (are_all()) return tensor;
    if (are_listed()) return tensor.index_select(0, index_);
    return step_ == 1 ? tensor.narrow(0, first_, count_) : tensor.slice(0, first_, first_ + count_ * step_, step_);
  }

  /// sum with what is added to these entries, as a new tensor, through which autograd can pass.
  at::Tensor plus(const at::Tensor& sum, const at::Tensor& added) const {
    if (are_all()) return sum + added;
    const auto index =
        are_listed() ? index_ : at::arange(first_, first_ + count_ * step_, step_, sum.options().dtype(at::kLong));
    return sum.index_add(0, index, added);
  }

  /// sum[entries] += added, in place.
  void add(const at::Tensor& sum, const at::Tensor& added) const {
    if (are_listed() && added.scalar_type() != sum.scalar_type()) {
      sum.index_copy_(0, index_, of(sum).add_(added));
    } else if (are_listed()) {
      sum.index_add_(0, index_, added);
    } else {
      of(sum).add_(added);
    }
  }

 private:
  int64_t first_ = 0, count_ = -1, step_ = 1;
  at::Tensor index_;
};

/// Where rows are in a tensor: its dimension `dim` has outer * rows * inner entries, and entry (o, r, i) is of row r.
struct RowLayout {
  int64_t dim, outer, rows, inner;

  /// The same when all of the first `leading` dimensions of a tensor of these sizes are joined to one.
  RowLayout joined(at::IntArrayRef sizes, int64_t leading) const {
    const auto count = [&](int64_t first, int64_t last) {
      return c10::multiply_integers(sizes.begin() + first, sizes.begin() + last);
    };
    return {0, outer * count(0, dim), rows, inner * count(dim + 1, leading)};
  }
};

/// The rows of a batch, by the adapter that each of them has. Made once for each activation.
class BatchRows {
 public:
  struct Run {
    int64_t first, count;
  };

  /// `names` has the adapter of each row; the empty one is the base model.
  BatchRows(const std::vector<std::string>& names, RowOptions options);

  int64_t size() const { return size_; }
  const RowOptions& options() const { return options_; }
  /// The different names, in the order of their first rows; groups are named by their places here.
  const std::vector<std::string>& names() const { return names_; }
  size_t groups() const { return names_.size(); }
  const std::vector<Run>& runs(size_t group) const { return runs_[group]; }

  /// Notes an input of a layer without adapters, whose first dimension may be the rows, and the next ones, of the first
  /// `leading`, their positions.
  void note(at::IntArrayRef sizes, int64_t leading) const;

  /// Where the rows are in an input of which the first `leading` dimensions may count them, and `axis` does. Throws
  /// where that cannot be.
  RowLayout layout(at::IntArrayRef sizes, int64_t leading, std::optional<int64_t> axis, const std::string& layer) const;

  /// Calls `visit(entries)` for the entries of a group in a dimension that is laid out so, in as few pieces as is
  /// cheap.
  template <class Visit>
  void for_each_piece(size_t group, const RowLayout& layout, const at::Device& device, const Visit& visit) const {
    const auto& runs = runs_[group];
    if (runs.size() == 1 && runs.front().count == size_) return visit(Entries());
    const bool by_run = layout.outer == 1, by_row = layout.inner == 1;
    const auto rows = rows_of(group);
    const auto pieces = by_run ? static_cast<int64_t>(runs.size()) : rows;
    const bool are_long = pieces == 1 || layout.outer * rows * layout.inner >= kShort * pieces;
    if (!are_long || !(by_run || by_row)) return visit(Entries::listed(index(group, layout, device)));
    for (const auto& run : runs) {
      if (by_run) {
        visit(Entries::range(run.first * layout.inner, run.count * layout.inner));
        continue;
      }
      for (auto row = run.first; row < run.first + run.count; ++row)
        visit(Entries::range(row, layout.outer, layout.rows));
    }
  }

  /// The entries of a group as a tensor of indices.
  at::Tensor index(size_t group, const RowLayout& layout, const at::Device& device) const;

  /// Where each entry is when those of all groups follow each other.
  at::Tensor inverse(const RowLayout& layout, const at::Device& device) const;

  /// The group of each entry.
  at::Tensor groups_of_entries(const RowLayout& layout, const at::Device& device) const;

 private:
  /// Below so many entries a piece costs less in a list than by itself.
  static constexpr int64_t kShort = 16;

  static int64_t count(const std::vector<std::string>& names);

  size_t group_of(const std::string& name);

  /// How many positions each row has, where the dimension `axis` of an input counts rows: as many as all dimensions
  /// behind it have, and the first ones of these.
  void note_positions(at::IntArrayRef sizes, int64_t axis, int64_t leading) const;

  bool was_seen(int64_t positions) const;

  int64_t rows_of(size_t group) const;

  std::vector<int64_t> entries_of(size_t group, const RowLayout& layout) const;

  static at::Tensor numbers(const std::vector<int64_t>& values);

  int64_t size_;
  RowOptions options_;
  std::vector<std::string> names_;
  std::vector<std::vector<Run>> runs_;
  std::map<std::string, size_t> numbers_;
  mutable std::mutex mutex_;             // of what follows
  mutable std::set<int64_t> positions_;  // of a row in the inputs that were seen
  mutable std::map<std::tuple<size_t, int64_t, int64_t, std::string>, at::Tensor> indices_;
};

/// The rows of a batch on which an update acts.
struct RowsOfUpdate {
  const BatchRows* batch = nullptr;  ///< null: all
  size_t group = 0;
  std::optional<int64_t> axis = 0;  ///< of the layer's inputs that counts rows
  const std::string* layer = nullptr;

  explicit operator bool() const { return batch != nullptr; }

  RowLayout layout(at::IntArrayRef sizes, int64_t leading) const { return batch->layout(sizes, leading, axis, *layer); }
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

LORA_INLINE BatchRows::BatchRows(const std::vector<std::string>& names, RowOptions options)
    : size_(count(names)), options_(std::move(options)) {
  for (int64_t row = 0; row < size_; ++row) {
    const auto& name = names[static_cast<size_t>(row)];
    auto& runs = runs_[group_of(name)];
    if (!runs.empty() && runs.back().first + runs.back().count == row) {
      ++runs.back().count;
    } else {
      runs.push_back({row, 1});
    }
  }
}

LORA_INLINE void BatchRows::note(at::IntArrayRef sizes, int64_t leading) const {
  if (leading > 0 && sizes[0] == size_) note_positions(sizes, 0, leading);
}

LORA_INLINE RowLayout BatchRows::layout(at::IntArrayRef sizes, int64_t leading, std::optional<int64_t> axis,
                                        const std::string& layer) const {
  TORCH_CHECK(axis.has_value(), "lora: it is not known which dimension of the inputs of \"", layer,
              "\" counts the rows of the batch; say so with lora::RowOptions().axis(\"", layer, "\", dimension)");
  const auto size = [&](int64_t dimension) { return sizes[static_cast<size_t>(dimension)]; };
  if (*axis < leading && size(*axis) == size_) {
    note_positions(sizes, *axis, leading);
    return {*axis, 1, size_, 1};
  }
  if (leading > 0) {
    const bool is_joined = *axis >= leading;  // with those before it
    const auto dim = is_joined ? 0 : *axis;
    const auto entries = size(dim) / size_;
    bool has_rows = false;  // in another dimension, which these then are not
    for (int64_t other = 0; other < leading; ++other) has_rows = has_rows || (other != dim && size(other) == size_);
    const bool is_known = options_.flattened() || (!has_rows && was_seen(entries));
    if (size(dim) % size_ == 0 && is_known)
      return is_joined ? RowLayout{dim, entries, size_, 1} : RowLayout{dim, 1, size_, entries};
  }
  TORCH_CHECK(false, "lora: the scope names an adapter for each of ", size_, " rows, but the input of \"", layer,
              "\" has shape ", sizes, ", of which dimension ", *axis, " should count them. Give a name for each row; ",
              "for rows in another dimension, or with several entries one after the other, there is lora::RowOptions");
}

LORA_INLINE at::Tensor BatchRows::index(size_t group, const RowLayout& layout, const at::Device& device) const {
  const c10::InferenceMode off(false);  // what is kept is for any mode
  std::lock_guard<std::mutex> lock(mutex_);
  auto& index = indices_[{group, layout.outer, layout.inner, device.str()}];
  if (!index.defined()) index = numbers(entries_of(group, layout)).to(device);
  return index;
}

LORA_INLINE at::Tensor BatchRows::inverse(const RowLayout& layout, const at::Device& device) const {
  std::vector<int64_t> places(static_cast<size_t>(layout.outer * layout.rows * layout.inner));
  int64_t next = 0;
  for (size_t group = 0; group < groups(); ++group) {
    for (const auto entry : entries_of(group, layout)) places[static_cast<size_t>(entry)] = next++;
  }
  const c10::InferenceMode off(false);
  return numbers(places).to(device);
}

LORA_INLINE at::Tensor BatchRows::groups_of_entries(const RowLayout& layout, const at::Device& device) const {
  std::vector<int64_t> numbers_of_groups(static_cast<size_t>(layout.outer * layout.rows * layout.inner));
  for (size_t group = 0; group < groups(); ++group) {
    for (const auto entry : entries_of(group, layout))
      numbers_of_groups[static_cast<size_t>(entry)] = static_cast<int64_t>(group);
  }
  const c10::InferenceMode off(false);
  return numbers(numbers_of_groups).to(device);
}

LORA_INLINE int64_t BatchRows::count(const std::vector<std::string>& names) {
  TORCH_CHECK_VALUE(!names.empty(), "lora::activate: there has to be the name of an adapter for each row of the ",
                    "batch, the empty name for the base model, but there is none");
  return static_cast<int64_t>(names.size());
}

LORA_INLINE size_t BatchRows::group_of(const std::string& name) {
  const auto [place, is_new] = numbers_.emplace(name, names_.size());
  if (is_new) {
    names_.push_back(name);
    runs_.emplace_back();
  }
  return place->second;
}

LORA_INLINE void BatchRows::note_positions(at::IntArrayRef sizes, int64_t axis, int64_t leading) const {
  int64_t before = 1, behind = 1;
  for (int64_t dimension = 0; dimension < axis; ++dimension) before *= sizes[static_cast<size_t>(dimension)];
  std::lock_guard<std::mutex> lock(mutex_);
  positions_.insert(before);
  for (auto dimension = axis + 1; dimension < leading; ++dimension) {
    behind *= sizes[static_cast<size_t>(dimension)];
    positions_.insert(before * behind);
  }
}

LORA_INLINE bool BatchRows::was_seen(int64_t positions) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return positions_.count(positions) > 0;
}

LORA_INLINE int64_t BatchRows::rows_of(size_t group) const {
  int64_t rows = 0;
  for (const auto& run : runs_[group]) rows += run.count;
  return rows;
}

LORA_INLINE std::vector<int64_t> BatchRows::entries_of(size_t group, const RowLayout& layout) const {
  std::vector<int64_t> entries;
  for (int64_t outer = 0; outer < layout.outer; ++outer) {
    for (const auto& run : runs_[group]) {
      const auto first = (outer * layout.rows + run.first) * layout.inner;
      for (int64_t i = 0; i < run.count * layout.inner; ++i) entries.push_back(first + i);
    }
  }
  return entries;
}

LORA_INLINE at::Tensor BatchRows::numbers(const std::vector<int64_t>& values) {
  const c10::InferenceMode off(false);
  auto tensor = at::empty({static_cast<int64_t>(values.size())}, at::kLong);
  std::copy(values.begin(), values.end(), tensor.mutable_data_ptr<int64_t>());
  return tensor;
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
