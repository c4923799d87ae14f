#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>
#include <c10/util/accumulate.h>

#include <lora/linkage.hpp>
#include <lora/system/process_wide.hpp>
#include <lora/version.hpp>
#include <lora/weight/key.hpp>
#include <lora/weight/quantized.hpp>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

// What stands in a model for a weight whose numbers are held in few bits: a tensor that has the sizes, type and place
// of the weight, and no memory. Whoever reads or writes its numbers is told by LibTorch what the matter is; what knows
// such tensors finds the numbers through its storage, as views of it do.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// What the storage of a placeholder holds in the place of memory.
struct HeldNumbers {
  HeldNumbers(std::shared_ptr<const QuantizedWeight> held, std::string of)
      : weight(std::move(held)), name(std::move(of)) {}

  std::shared_ptr<const QuantizedWeight> weight;
  std::string name;  // of the weight in its model

  /// The sum of the squares of each row (size(0)), in double; worked out once, since the numbers do not change.
  const at::Tensor& row_squares() const;

 private:
  mutable std::once_flag squares_flag_;
  mutable at::Tensor squares_;
};

/// By which such a storage is known.
struct DeleterOfHeldNumbers {
  static constexpr const char* kName = "held_numbers";
  void (*function)(void*) = [](void* held) { delete static_cast<HeldNumbers*>(held); };
};

/// What the placeholder holds of which `tensor` is a view; null where it is none.
inline const HeldNumbers* held_numbers(const at::Tensor& tensor) {
  if (!tensor.defined() || !is_marked(tensor) || !tensor.has_storage()) return nullptr;
  auto* storage = tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  const auto& memory = storage->_mutable_data_ptr_no_checks();
  return memory.get_deleter() == process_wide<DeleterOfHeldNumbers>().function
             ? static_cast<const HeldNumbers*>(memory.get_context())
             : nullptr;
}

/// The quantized weight of which `tensor` is a view; null for one that has its numbers.
inline const QuantizedWeight* quantized(const at::Tensor& tensor) {
  const auto* held = held_numbers(tensor);
  return held == nullptr ? nullptr : held->weight.get();
}
inline bool is_quantized(const at::Tensor& tensor) { return held_numbers(tensor) != nullptr; }

/// Whether `tensor` is a placeholder itself and not a part of one, or one seen in another way.
inline bool is_whole_placeholder(const at::Tensor& tensor) {
  const auto* weight = quantized(tensor);
  return weight != nullptr && tensor.sizes() == weight->sizes() && tensor.is_contiguous() &&
         tensor.storage_offset() == 0;
}

/// A tensor of the type `dtype` for a weight that is called `name`.
LORA_INLINE at::Tensor placeholder(std::shared_ptr<const QuantizedWeight> weight, at::ScalarType dtype,
                                   const std::string& name);

/// Rows of a quantized matrix, or of a batch of them one below the other, or the transpose of these.
struct HeldRows {
  const QuantizedWeight* weight;
  int64_t first, count, columns;
  bool is_transposed;
};

/// What an operand of two dimensions is of a quantized matrix; nothing where it is something else.
LORA_INLINE std::optional<HeldRows> held_rows(const at::Tensor& operand);

/// So many numbers of a weight from `first` on, in the order of memory, as a tensor of these sizes.
LORA_INLINE at::Tensor dequantized(const QuantizedWeight& weight, int64_t first, at::IntArrayRef sizes,
                                   at::ScalarType type);

/// Whether two tensors lie in the same memory; of placeholders, whether they are views of the same one.
LORA_INLINE bool share_memory(const at::Tensor& a, const at::Tensor& b);

/// How many numbers of a weight are written out at a time: few enough to stay in a cache, and so many that products
/// with them are as fast as those with all (768 x 768, 512 rows: 1.21 of the time in panels of 2^16, 1.06 of 2^18, 1.04
/// here).
inline constexpr int64_t kPanel = 1 << 20;

/// Calls `visit(first, numbers)` for one panel of rows after the other.
template <class Visit>
void for_each_panel(const QuantizedWeight& weight, at::ScalarType type, const Visit& visit) {
  auto sizes = weight.sizes().vec();
  const auto rows = sizes.empty() ? 1 : sizes.front();
  const auto columns = c10::multiply_integers(sizes) / std::max<int64_t>(1, rows);
  const bool is_here = weight.device() == at::kCPU;  // elsewhere all numbers are written out in any case
  const auto height = is_here ? std::max<int64_t>(1, kPanel / std::max<int64_t>(1, columns)) : rows;
  for (int64_t row = 0; row < rows; row += height) {
    if (!sizes.empty()) sizes.front() = std::min(height, rows - row);
    visit(row, dequantized(weight, row * columns, sizes, type));
  }
}

/// The numbers of a placeholder, or of a view of one; any other tensor as it is.
LORA_INLINE at::Tensor dequantized(const at::Tensor& operand);

/// `tensor.to(device, type)`, of a placeholder another one; `copies` says whether that is so where nothing changes,
/// too. Copies share their numbers, which do not change.
LORA_INLINE at::Tensor moved(const at::Tensor& tensor, at::Device device, at::ScalarType type, bool copies = false);

/// The memory that the numbers of a tensor take.
LORA_INLINE int64_t held_bytes(const at::Tensor& tensor);

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/TensorOperators.h>
#include <ATen/TracerMode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

LORA_INLINE at::Tensor placeholder(std::shared_ptr<const QuantizedWeight> weight, at::ScalarType dtype,
                                   const std::string& name) {
  const auto device = weight->device();
  const auto bytes = static_cast<size_t>(c10::multiply_integers(weight->sizes())) * c10::elementSize(dtype);
  const auto sizes = weight->sizes().vec();
  const auto text =
      c10::str("lora: ", name.empty() ? "this weight" : name, " is held in ", weight->bits(), " bits (",
               weight->scheme(), "), so an operator that takes its numbers finds none. Inside of a scope of adapters, ",
               "auto active = adapters.activate(), products with it are computed; activate(\"\") is that of the base ",
               "model alone. lora::dequantize gives the model its numbers back, and lora::save_quantized writes it");
  auto held = std::make_unique<HeldNumbers>(std::move(weight), name);
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, at::DataPtr(nullptr, device), /*allocator=*/nullptr,
                       /*resizable=*/false);
  storage.unsafeGetStorageImpl()->release_data_and_set_meta_custom_data_ptr_error_msg_(text);
  storage.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks() =
      at::DataPtr(nullptr, held.release(), process_wide<DeleterOfHeldNumbers>().function, device);
  const c10::DispatchKeySet keys(c10::computeDispatchKey(dtype, at::kStrided, device));
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, c10::scalarTypeToTypeMeta(dtype));
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  mark(tensor);
  return tensor;
}

LORA_INLINE std::optional<HeldRows> held_rows(const at::Tensor& operand) {
  const auto* weight = quantized(operand);
  if (weight == nullptr || operand.dim() != 2 || weight->sizes().size() < 2) return std::nullopt;
  const auto columns = weight->sizes().back();
  const auto rows = columns == 0 ? 0 : c10::multiply_integers(weight->sizes()) / columns;
  const auto block = [&](int64_t row, int64_t column) -> std::optional<std::pair<int64_t, int64_t>> {
    const auto count = operand.size(row), offset = operand.storage_offset();
    const bool fits = operand.size(column) == columns && (columns == 1 || operand.stride(column) == 1) &&
                      (count == 1 || operand.stride(row) == columns);
    if (!fits || columns == 0 || offset % columns != 0 || offset / columns + count > rows) return std::nullopt;
    return std::pair(offset / columns, count);
  };
  if (const auto own = block(0, 1)) return HeldRows{weight, own->first, own->second, columns, false};
  if (const auto own = block(1, 0)) return HeldRows{weight, own->first, own->second, columns, true};
  return std::nullopt;
}

LORA_INLINE at::Tensor dequantized(const QuantizedWeight& weight, int64_t first, at::IntArrayRef sizes,
                                   at::ScalarType type) {
  const auto count = c10::multiply_integers(sizes);
  if (weight.device() != at::kCPU) return weight.dense().flatten().narrow(0, first, count).view(sizes).to(type);
  auto numbers = at::empty(sizes, at::TensorOptions(at::kFloat).device(at::kCPU));
  weight.unpack(first, count, numbers.mutable_data_ptr<float>());
  return numbers.to(type);
}

LORA_INLINE const at::Tensor& HeldNumbers::row_squares() const {
  std::call_once(squares_flag_, [&] {
    const BelowInterception below;
    at::NoGradGuard no_grad;
    std::vector<at::Tensor> squares;
    for_each_panel(*weight, at::kDouble,
                   [&](int64_t, const at::Tensor& numbers) { squares.push_back(numbers.flatten(1).square().sum(1)); });
    squares_ = at::cat(squares);
  });
  return squares_;
}

LORA_INLINE at::Tensor dequantized(const at::Tensor& operand) {
  const auto* weight = quantized(operand);
  if (weight == nullptr) return operand;
  const BelowInterception below;
  const at::tracer::impl::NoTracerDispatchMode untraced;  // the numbers are a constant of what is traced
  at::NoGradGuard no_grad;
  const auto type = operand.scalar_type();
  const auto first = operand.storage_offset();
  if (operand.is_contiguous()) return dequantized(*weight, first, operand.sizes(), type);
  if (operand.dim() == 2 && operand.t().is_contiguous())
    return dequantized(*weight, first, operand.t().sizes(), type).t();
  return weight->dense().to(type).as_strided(operand.sizes(), operand.strides(), first);
}

LORA_INLINE bool share_memory(const at::Tensor& a, const at::Tensor& b) {
  if (!a.has_storage() || !b.has_storage()) return false;
  if (a.storage().unsafeGetStorageImpl() == b.storage().unsafeGetStorageImpl()) return true;
  return !is_quantized(a) && !is_quantized(b) && a.is_alias_of(b);
}

LORA_INLINE at::Tensor moved(const at::Tensor& tensor, at::Device device, at::ScalarType type, bool copies) {
  const auto* held = held_numbers(tensor);
  if (held == nullptr || !is_whole_placeholder(tensor)) return tensor.to(device, type, /*non_blocking=*/false, copies);
  if (!copies && device == tensor.device() && type == tensor.scalar_type()) return tensor;
  return placeholder(device == tensor.device() ? held->weight : held->weight->to(device), type, held->name);
}

LORA_INLINE int64_t held_bytes(const at::Tensor& tensor) {
  const auto* weight = quantized(tensor);
  if (weight == nullptr) return static_cast<int64_t>(tensor.nbytes());
  const auto whole = std::max<int64_t>(1, c10::multiply_integers(weight->sizes()));
  return weight->nbytes() * tensor.numel() / whole;  // of a part its share
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
