#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <lora/linkage.hpp>
#include <lora/version.hpp>
#include <lora/weight/quantized.hpp>

#include <cstdint>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// A tensor in 8 bits a number, as bitsandbytes 0.50 has it (int8_vectorwise_quant without outliers), bit for bit. It
/// is a matrix (size(0), everything else), each row with its largest absolute value:
///
///   number = code * absmax / 127    code: number * (127 / absmax), rounded, halves to the even neighbour
struct Int8Tensor {
  at::Tensor codes;   ///< Char, shaped as the weight.
  at::Tensor absmax;  ///< Float (rows); bitsandbytes calls it SCB.

  /// Throws c10::Error, with `who` in front, when the tensors do not fit each other.
  void validate(const char* who) const;
};

/// Weights in 8 bits: `.quantize(lora::Int8())`.
class Int8 {
 public:
  std::shared_ptr<const QuantizedWeight> pack(const at::Tensor& weight) const;
};

/// The weight in 8 bits: Float, Double, Half or BFloat16 of any shape, which becomes float first.
///
/// Throws c10::ValueError for numbers that are not finite, or too large for dequantization in float (2.6e36),
/// c10::TypeError for other types, c10::Error for a weight without numbers.
LORA_INLINE Int8Tensor quantize_int8(const at::Tensor& weight);

/// The numbers in float, on the device of the codes.
LORA_INLINE at::Tensor dequantize(const Int8Tensor& packed);

/// A weight that is held in 8 bits.
class Int8Weight final : public QuantizedWeight {
 public:
  /// Throws c10::Error when the tensors do not fit each other.
  explicit Int8Weight(Int8Tensor packed);

  const Int8Tensor& packed() const { return packed_; }

  std::string_view scheme() const override;
  int64_t bits() const override { return 8; }
  at::IntArrayRef sizes() const override;
  at::Device device() const override;
  int64_t nbytes() const override;

  at::Tensor dense() const override;
  void unpack(int64_t first, int64_t count, float* numbers) const override;
  void dot_rows(int64_t first, int64_t count, const float* x, float* y) const override;

  std::shared_ptr<const QuantizedWeight> to(at::Device device) const override;

 private:
  Int8Tensor packed_;
};

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <lora/system/parallel.hpp>
#include <lora/weight/codec/input.hpp>
#include <lora/weight/codec/kernels.hpp>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

namespace lora {
inline namespace LORA_ABI {

namespace detail {

/// 127 / absmax, or nothing where that is more than a float holds: such a row, of zeros or numbers that are nearly that
/// (below 3.8e-37), has zeros as its codes.
inline float int8_factor(float absmax) {
  const float factor = 1.0F / absmax * 127.0F;
  return factor <= std::numeric_limits<float>::max() ? factor : 0.0F;
}

/// Codes and largest values on the CPU; false when a number is not finite.
inline bool quantize_rows(const CodecKernels& kernels, const float* numbers, int64_t rows, int64_t columns,
                          std::int8_t* codes, float* absmax) {
  std::atomic<bool> finite{true};
  parallel_for(0, rows, std::max<int64_t>(1, kNumbersPerThread / columns), [&](int64_t from, int64_t to) {
    for (auto row = from; row < to; ++row) {
      const auto most = finite_absmax(kernels, numbers + row * columns, columns);
      if (!most) {
        finite = false;
        return;
      }
      absmax[row] = *most;
      kernels.quantize8(numbers + row * columns, columns, int8_factor(absmax[row]), codes + row * columns);
    }
  });
  return finite;
}

/// The same by operators that any device has.
inline std::pair<at::Tensor, at::Tensor> quantized_rows(const at::Tensor& matrix) {
  auto absmax = matrix.abs().amax(1);
  auto factors = absmax.reciprocal() * 127.0;
  factors = at::where(at::isfinite(factors), factors, at::zeros_like(factors));
  return {(matrix * factors.unsqueeze(1)).round().to(at::kChar), absmax};
}

}  // namespace detail

LORA_INLINE void Int8Tensor::validate(const char* who) const {
  TORCH_CHECK(codes.defined(), who, ": codes of a packed weight is undefined");
  detail::check_part(who, "codes", codes, at::kChar, codes.numel(), codes.device());
  TORCH_CHECK(codes.numel() > 0, who, ": codes of a packed weight are ", codes.sizes(), ", no numbers");
  detail::check_part(who, "absmax", absmax, at::kFloat, detail::rows_of(codes.sizes()), codes.device());
}

LORA_INLINE Int8Tensor quantize_int8(const at::Tensor& weight) {
  constexpr auto who = "lora::quantize_int8";
  detail::check_can_be_packed(who, weight);
  const auto rows = detail::rows_of(weight.sizes());
  const auto matrix = detail::numbers_of(weight).view({rows, -1});
  Int8Tensor packed;
  bool finite = false;
  if (matrix.is_cpu()) {
    packed.codes = at::empty(weight.sizes(), at::kChar);
    packed.absmax = at::empty({rows}, at::kFloat);
    finite =
        detail::quantize_rows(detail::codec_kernels(), matrix.const_data_ptr<float>(), rows, matrix.size(1),
                              packed.codes.mutable_data_ptr<std::int8_t>(), packed.absmax.mutable_data_ptr<float>());
  } else {
    std::tie(packed.codes, packed.absmax) = detail::quantized_rows(matrix);
    packed.codes = packed.codes.view(weight.sizes());
    finite = at::isfinite(packed.absmax).all().item<bool>();
  }
  if (!finite) detail::refuse_not_finite(who, weight);
  const auto most = packed.absmax.max().item<float>();
  TORCH_CHECK_VALUE(most <= std::numeric_limits<float>::max() / 127, who, ": a number of the weight ", weight.sizes(),
                    " is ", most, ", but times 127 it has to be a float: scale the weight down, or leave it as it is");
  return packed;
}

namespace detail {

/// An Int8Tensor on the CPU, to read.
class Int8Reader {
 public:
  explicit Int8Reader(const Int8Tensor& packed, const CodecKernels& kernels = codec_kernels())
      : kernels_(kernels),
        codes_(packed.codes.const_data_ptr<std::int8_t>()),
        absmax_(packed.absmax.const_data_ptr<float>()),
        columns_(packed.codes.numel() / packed.absmax.numel()) {}

  /// The numbers [first, first + count).
  void unpack(int64_t first, int64_t count, float* numbers) const {
    parallel_for(first, first + count, kNumbersPerThread, [&](int64_t from, int64_t to) {
      while (from < to) {
        const auto row = from / columns_, size = std::min(to, (row + 1) * columns_) - from;
        kernels_.unpack8(codes_ + from, size, absmax_[row], numbers + (from - first));
        from += size;
      }
    });
  }

  /// The products of the rows [first, first + count) with x.
  void dot_rows(int64_t first, int64_t count, const float* x, float* y) const {
    const auto grain = std::max<int64_t>(1, kNumbersPerThread / columns_);
    parallel_for(first, first + count, grain, [&](int64_t from, int64_t to) {
      for (auto row = from; row < to; ++row)
        y[row - first] = kernels_.dot8(codes_ + row * columns_, columns_, x) * absmax_[row] * kPerInt8;
    });
  }

 private:
  const CodecKernels& kernels_;
  const std::int8_t* codes_;
  const float* absmax_;
  int64_t columns_;
};

}  // namespace detail

LORA_INLINE at::Tensor dequantize(const Int8Tensor& packed) {
  packed.validate("lora::dequantize");
  if (packed.codes.is_cpu()) {
    auto numbers = at::empty(packed.codes.sizes(), at::kFloat);
    detail::Int8Reader(packed).unpack(0, numbers.numel(), numbers.mutable_data_ptr<float>());
    return numbers;
  }
  const auto matrix = packed.codes.view({packed.absmax.numel(), -1});
  return (matrix * packed.absmax.unsqueeze(1) * detail::kPerInt8).view(packed.codes.sizes());
}

LORA_INLINE Int8Weight::Int8Weight(Int8Tensor packed) : packed_(std::move(packed)) {
  packed_.validate("lora::Int8Weight");
}

LORA_INLINE std::string_view Int8Weight::scheme() const { return "int8"; }

LORA_INLINE at::IntArrayRef Int8Weight::sizes() const { return packed_.codes.sizes(); }

LORA_INLINE at::Device Int8Weight::device() const { return packed_.codes.device(); }

LORA_INLINE int64_t Int8Weight::nbytes() const {
  return static_cast<int64_t>(packed_.codes.nbytes() + packed_.absmax.nbytes());
}

LORA_INLINE at::Tensor Int8Weight::dense() const { return dequantize(packed_); }

LORA_INLINE void Int8Weight::unpack(int64_t first, int64_t count, float* numbers) const {
  detail::check_range("lora::Int8Weight::unpack", "numbers", first, count, packed_.codes.numel(), device());
  detail::Int8Reader(packed_).unpack(first, count, numbers);
}

LORA_INLINE void Int8Weight::dot_rows(int64_t first, int64_t count, const float* x, float* y) const {
  detail::check_range("lora::Int8Weight::dot_rows", "rows", first, count, packed_.absmax.numel(), device());
  detail::Int8Reader(packed_).dot_rows(first, count, x, y);
}

LORA_INLINE std::shared_ptr<const QuantizedWeight> Int8Weight::to(at::Device device) const {
  return std::make_shared<Int8Weight>(Int8Tensor{packed_.codes.to(device), packed_.absmax.to(device)});
}

LORA_INLINE std::shared_ptr<const QuantizedWeight> Int8::pack(const at::Tensor& weight) const {
  return std::make_shared<Int8Weight>(quantize_int8(weight));
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
