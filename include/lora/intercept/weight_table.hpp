#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_strided.h>
#include <torch/csrc/autograd/graph_task.h>

#include <lora/intercept/scope.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

// Which operands of an operator are adapted weights, and which part of them. A weight is known by the memory it lies
// in, since operators see views of it: the transpose, a slice, one of the chunks of a packed projection.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// What an operator does with a weight. Of tied weights each kind of layer adapts only its own use.
enum class Use : uint8_t { kProduct = 1, kLookup = 2, kAny = 3 };

inline bool overlap(Use a, Use b) { return (static_cast<int>(a) & static_cast<int>(b)) != 0; }

/// What happens to the uses of one adapted weight.
class WeightHandler {
 public:
  using Multiply = std::function<at::Tensor(const at::Tensor& x, const at::Tensor& matrix)>;

  virtual ~WeightHandler() = default;
  virtual bool accepts(Use use) const = 0;
  virtual void count_use() = 0;
  /// Whether the update can be added to a product with the whole weight, or to a lookup in it; else W' has to be
  /// formed.
  virtual bool adds_to(Use use) const = 0;
  /// Given y = x W^T + bias (bias may be undefined), computed with the whole weight, returns the adapted output.
  virtual at::Tensor adapt(const at::Tensor& x, const at::Tensor& y, const at::Tensor& bias, Multiply multiply) = 0;
  /// W' - W in the layout of W, or undefined when nothing is to be added.
  virtual at::Tensor delta(bool drop_features) = 0;
  /// The probability of dropout that acts now.
  virtual double dropout() const = 0;
};

/// How an operand lies in a weight.
enum class Part : uint8_t { kWhole, kTransposed, kSome };

namespace layout {

/// Whether two tensors have the same sizes and strides, where dimensions of size 1 may have any stride.
inline bool is_same(at::IntArrayRef sizes, at::IntArrayRef strides, at::IntArrayRef other_sizes,
                    at::IntArrayRef other_strides) {
  if (sizes != other_sizes) return false;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] != 1 && strides[i] != other_strides[i]) return false;
  }
  return true;
}

inline bool is_transposed(const at::Tensor& weight, const at::Tensor& operand) {
  return weight.dim() == 2 && operand.dim() == 2 &&
         is_same({weight.size(1), weight.size(0)}, {weight.stride(1), weight.stride(0)}, operand.sizes(),
                 operand.strides());
}

/// Where a block with the strides of `weight` begins in it; nullopt when `operand` is no such block.
inline std::optional<std::vector<int64_t>> block_start(const at::Tensor& weight, const at::Tensor& operand) {
  const auto dimensions = static_cast<size_t>(weight.dim());
  if (operand.dim() != weight.dim()) return std::nullopt;
  std::vector<size_t> by_stride(dimensions);
  for (size_t i = 0; i < dimensions; ++i) by_stride[i] = i;
  std::sort(by_stride.begin(), by_stride.end(),
            [&](size_t a, size_t b) { return weight.strides()[a] > weight.strides()[b]; });
  auto rest = operand.storage_offset() - weight.storage_offset();
  std::vector<int64_t> start(dimensions);
  for (auto i : by_stride) {
    const auto stride = weight.strides()[i], size = operand.sizes()[i];
    if (stride == 0 || (size != 1 && operand.strides()[i] != stride)) return std::nullopt;
    start[i] = rest / stride;
    rest %= stride;
    if (start[i] + size > weight.sizes()[i]) return std::nullopt;
  }
  return rest == 0 ? std::optional(start) : std::nullopt;
}

/// Whether `operand` lies in the memory of `weight`, which has no gaps.
inline bool is_inside(const at::Tensor& weight, const at::Tensor& operand) {
  if (!weight.is_non_overlapping_and_dense()) return false;
  auto last = operand.storage_offset();
  for (int64_t i = 0; i < operand.dim(); ++i) last += (operand.size(i) - 1) * operand.stride(i);
  return last < weight.storage_offset() + weight.numel();
}

}  // namespace layout

/// How `operand`, which shares the storage of `weight`, lies in it; nullopt when it lies elsewhere.
inline std::optional<Part> part_of(const at::Tensor& weight, const at::Tensor& operand) {
  const auto offset = operand.storage_offset() - weight.storage_offset();
  if (offset < 0 || operand.numel() == 0 || operand.scalar_type() != weight.scalar_type()) return std::nullopt;
  if (offset == 0) {
    if (layout::is_same(weight.sizes(), weight.strides(), operand.sizes(), operand.strides())) return Part::kWhole;
    if (layout::is_transposed(weight, operand)) return Part::kTransposed;
  }
  if (layout::block_start(weight, operand) || layout::is_inside(weight, operand)) return Part::kSome;
  return std::nullopt;
}

/// The part of `delta`, which is shaped like `weight`, that `operand` is of `weight`.
inline at::Tensor same_part(const at::Tensor& delta, const at::Tensor& weight, const at::Tensor& operand) {
  const auto part = part_of(weight, operand);
  if (part == Part::kWhole) return delta;
  if (part == Part::kTransposed) return delta.t();
  if (const auto start = layout::block_start(weight, operand)) {
    auto block = delta;
    for (size_t i = 0; i < start->size(); ++i) {
      const auto dimension = static_cast<int64_t>(i);
      if (operand.size(dimension) != block.size(dimension))
        block = block.narrow(dimension, (*start)[i], operand.size(dimension));
    }
    return block;
  }
  auto stored = delta.contiguous();
  if (!weight.is_contiguous()) {
    stored = at::empty_strided(weight.sizes(), weight.strides(), delta.options());
    stored.copy_(delta);
  }
  return stored.as_strided(operand.sizes(), operand.strides(), operand.storage_offset() - weight.storage_offset());
}

/// One adapted weight of which an operand is a part.
struct Match {
  at::Tensor weight;
  WeightHandler* handler;
  Part part;
};

class Matches : public std::vector<Match> {
 public:
  /// Whether each is the whole weight, lying as `part` says, and its update can be added to what is done with it.
  bool can_add(Part part, Use use) const {
    return std::all_of(begin(), end(),
                       [&](const Match& match) { return match.part == part && match.handler->adds_to(use); });
  }
};

/// Tensors of a scope, each with what is to be done where it is used, found by the memory they lie in.
template <class Value>
class StorageTable {
 public:
  struct Entry {
    at::Tensor tensor;
    c10::Storage storage;  // kept alive, so that no other tensor gets its address while the table lives
    Value value;
  };

  void add(const at::Tensor& tensor, Value value) {
    if (tensor.has_storage()) entries_[key(tensor)].push_back({tensor, tensor.storage(), std::move(value)});
  }

  bool is_empty() const { return entries_.empty(); }

  /// Calls `visit(entry)` for every tensor in the storage of `operand`.
  template <class Visit>
  void for_each_in_storage_of(const at::Tensor& operand, const Visit& visit) const {
    if (!operand.defined() || !operand.has_storage()) return;
    const auto found = entries_.find(key(operand));
    if (found == entries_.end()) return;
    for (const auto& entry : found->second) {
      if (entry.tensor.is_alias_of(operand)) visit(entry);  // else moved elsewhere since the scope opened
    }
  }

 private:
  static const void* key(const at::Tensor& tensor) {
    return tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  }

  std::unordered_map<const void*, std::vector<Entry>> entries_;
};

/// The adapted weights of a scope.
using WeightTable = StorageTable<WeightHandler*>;

/// What a scope brings into effect. It is shared by the threads it is carried to, and not changed while it is active.
class Scope {
 public:
  virtual ~Scope() = default;
  /// Whose adapters these are: of several scopes of one owner the innermost decides, those of different owners add up.
  virtual const void* owner() const = 0;
  virtual const WeightTable& weights() const = 0;
  /// Whether it wants to see every operator, and what it does around one.
  virtual bool observes() const = 0;
  virtual void run(const c10::OperatorHandle& op, torch::jit::Stack& stack, const std::function<void()>& run) = 0;

  /// The pass of autograd's backward in which the scope was opened; -1 outside of any.
  const int64_t backward_pass = torch::autograd::get_current_graph_task_id();
};

inline ActiveScopes::ActiveScopes(List all) : all_(std::move(all)) {
  for (auto scope = all_.begin(); scope != all_.end(); ++scope) {
    const auto same_owner = [&](const auto& inner) { return inner->owner() == (*scope)->owner(); };
    if (std::any_of(std::next(scope), all_.end(), same_owner)) continue;
    effective_.push_back(*scope);
    observe_ = observe_ || (*scope)->observes();
  }
}

/// The adapted weights of the active scopes of which `operand` is a part. Operators that autograd's own backward uses
/// are adapted only in the pass in which their scope was opened.
inline Matches find_matches(const at::Tensor& operand, Use use, bool in_backward_too) {
  Matches matches;
  const auto* active = ActiveScopes::current();
  if (active == nullptr) return matches;
  for (const auto& scope : active->effective()) {
    scope->weights().for_each_in_storage_of(operand, [&](const WeightTable::Entry& entry) {
      if (!entry.value->accepts(use)) return;
      if (!in_backward_too && scope->backward_pass != torch::autograd::get_current_graph_task_id()) return;
      if (const auto part = part_of(entry.tensor, operand)) matches.push_back({entry.tensor, entry.value, *part});
    });
  }
  return matches;
}

/// Whether an active scope of this thread adapts the weight.
inline bool is_in_scope(const at::Tensor& weight) { return !find_matches(weight, Use::kAny, true).empty(); }

/// Calls `visit(tensor) -> tensor` for every tensor among the operands of an operator, alone, optional or in a list,
/// and puts what it returns in its place.
template <class Visit>
void for_each_operand(const c10::OperatorHandle& op, torch::jit::Stack& stack, const Visit& visit) {
  const auto count = op.schema().arguments().size();
  for (auto operand = stack.end() - static_cast<std::ptrdiff_t>(count); operand != stack.end(); ++operand) {
    if (operand->isTensor()) {
      *operand = visit(operand->toTensor());
    } else if (operand->isTensorList()) {
      auto list = operand->toTensorVector();
      std::transform(list.begin(), list.end(), list.begin(), visit);
      *operand = std::move(list);
    }
  }
}

/// Sends every operator of the thread through the active scopes that want to see it, and stops coming here when none
/// wants to any more.
inline void observing_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard below(kObservingKey);
  std::function<void()> run = [&] { op.callBoxed(stack); };
  bool observed = false;
  if (const auto* active = ActiveScopes::current()) {
    for (const auto& scope : active->effective()) {
      if (!scope->observes()) continue;
      observed = true;
      run = [&op, stack, scope, inner = std::move(run)] { scope->run(op, *stack, inner); };
    }
  }
  if (!observed) c10::impl::tls_set_dispatch_key_included(kObservingKey, false);
  run();
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
