#pragma once

#include <ATen/ops/addmm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

// How the stock layers of an unchanged model are adapted: while a table of weights is active on a thread, a dispatch
// key that lies above autograd and autocast sends the products of that thread here first. Every other operator falls
// through the key at no cost.

namespace lora::detail {

/// A key that no backend uses; any other build of LibTorch code that claims it can be avoided with this macro.
#ifndef LORA_DISPATCH_KEY
#define LORA_DISPATCH_KEY TESTING_ONLY_GenericMode
#endif
inline constexpr auto kInterceptionKey = c10::DispatchKey::LORA_DISPATCH_KEY;

/// The rows [first, first + count) of a weight, as a product uses them.
struct Rows {
  int64_t first, count;
};

/// What happens to a product with an adapted weight.
class ProductHandler {
 public:
  virtual ~ProductHandler() = default;
  /// Given y = x W[rows]^T + bias (bias may be undefined), returns the adapted output.
  virtual at::Tensor adapt(const at::Tensor& x, const at::Tensor& y, const at::Tensor& bias, Rows rows) = 0;
};

/// The weights of one scope, found by the memory they lie in.
class WeightTable {
 public:
  void add(const at::Tensor& weight, ProductHandler& handler) {
    entries_[key(weight)].push_back({weight, weight.storage(), &handler});
  }

  struct Match {
    ProductHandler* handler;
    Rows rows;
  };

  /// The handler of the weight of which the matrix with this shape is a block of whole rows.
  std::optional<Match> find(const at::Tensor& operand, int64_t rows, int64_t columns, int64_t row_stride,
                            int64_t column_stride) const {
    const auto found = entries_.find(key(operand));
    if (found == entries_.end()) return std::nullopt;
    for (const auto& [weight, storage, handler] : found->second) {
      if (!weight.is_alias_of(operand)) continue;  // moved elsewhere since the scope opened
      if (weight.size(1) != columns || weight.stride(0) != row_stride || weight.stride(1) != column_stride) continue;
      const auto offset = operand.storage_offset() - weight.storage_offset();
      if (offset < 0 || offset % row_stride != 0 || offset / row_stride + rows > weight.size(0)) continue;
      return Match{handler, {offset / row_stride, rows}};
    }
    return std::nullopt;
  }

 private:
  struct Entry {
    at::Tensor weight;
    c10::Storage storage;  // kept alive, so that no other tensor gets its address while the table lives
    ProductHandler* handler;
  };

  static const void* key(const at::Tensor& tensor) {
    return tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  }

  std::unordered_map<const void*, std::vector<Entry>> entries_;
};

/// One active scope of a thread. `owner` tells whose adapters they are: of several scopes of one owner the innermost
/// decides, those of different owners add up.
struct ActiveTable {
  const void* owner;
  const WeightTable* table;
};

__attribute__((visibility("default"))) inline std::vector<ActiveTable>& active_tables() {
  thread_local std::vector<ActiveTable> tables;
  return tables;
}

/// Passes y through every active table that knows the matrix W (rows, columns) inside `operand`.
inline at::Tensor adapt_product(const at::Tensor& operand, bool transposed, const at::Tensor& x, at::Tensor y,
                                const at::Tensor& bias) {
  if (operand.dim() != 2 || !operand.has_storage()) return y;
  const int rows = transposed ? 1 : 0, columns = 1 - rows;
  const auto& tables = active_tables();
  for (auto active = tables.begin(); active != tables.end(); ++active) {
    const auto same_owner = [&](const ActiveTable& inner) { return inner.owner == active->owner; };
    if (std::any_of(std::next(active), tables.end(), same_owner)) continue;  // the innermost scope of an owner decides
    auto match = active->table->find(operand, operand.size(rows), operand.size(columns), operand.stride(rows),
                                     operand.stride(columns));
    if (match) y = match->handler->adapt(x, y, bias, match->rows);
  }
  return y;
}

inline at::Tensor linear_kernel(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  c10::impl::ExcludeDispatchKeyGuard below(kInterceptionKey);
  auto y = at::linear(x, weight, bias);
  return adapt_product(weight, /*transposed=*/false, x, std::move(y), bias.value_or(at::Tensor()));
}

inline at::Tensor addmm_kernel(const at::Tensor& bias, const at::Tensor& x, const at::Tensor& matrix,
                               const at::Scalar& beta, const at::Scalar& alpha) {
  c10::impl::ExcludeDispatchKeyGuard below(kInterceptionKey);
  auto y = at::addmm(bias, x, matrix, beta, alpha);
  if (!beta.equal(1) || !alpha.equal(1)) return y;
  return adapt_product(matrix, /*transposed=*/true, x, std::move(y), bias);
}

inline at::Tensor matmul_kernel(const at::Tensor& x, const at::Tensor& matrix) {
  c10::impl::ExcludeDispatchKeyGuard below(kInterceptionKey);
  auto y = at::matmul(x, matrix);
  return adapt_product(matrix, /*transposed=*/true, x, std::move(y), {});
}

/// Registers the kernels once in the process. Only one fallback may be registered for a key, so it is done when the
/// first scope opens, not when a shared library is loaded; and it is visible, so that libraries with hidden symbols
/// share it.
__attribute__((visibility("default"))) inline void register_kernels() {
  static const auto libraries = [] {
    std::vector<torch::Library> made;
    made.emplace_back(torch::Library::IMPL, "_", kInterceptionKey, __FILE__, __LINE__);
    made.back().fallback(torch::CppFunction::makeFallthrough());
    made.emplace_back(torch::Library::IMPL, "aten", kInterceptionKey, __FILE__, __LINE__);
    made.back().impl("linear", &linear_kernel);
    made.back().impl("addmm", &addmm_kernel);
    made.back().impl("matmul", &matmul_kernel);
    return made;
  }();
  (void)libraries;
}

/// Makes a table active on this thread while it lives, and leaves the thread as it found it. Scopes end on the thread
/// they began on, in reverse order.
class Interception {
 public:
  Interception(const void* owner, const WeightTable& table) : include_(registered_key()), table_(&table) {
    active_tables().push_back({owner, &table});
  }
  ~Interception() {
    auto& tables = active_tables();
    const auto is_own = [&](const ActiveTable& active) { return active.table == table_; };
    const auto own = std::find_if(tables.rbegin(), tables.rend(), is_own);
    if (own != tables.rend()) tables.erase(std::next(own).base());
  }
  Interception(const Interception&) = delete;
  Interception& operator=(const Interception&) = delete;

 private:
  static c10::DispatchKey registered_key() {
    register_kernels();
    return kInterceptionKey;
  }

  c10::impl::IncludeDispatchKeyGuard include_;
  const WeightTable* table_;
};

}  // namespace lora::detail
