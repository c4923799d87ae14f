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

/// A tensor of bfloat16 in 12 bits a number, of which nothing is lost. It is a matrix (size(0), everything else). A
/// number of bfloat16 is a sign, 8 bits of exponent and 7 of fraction; the exponents of a trained weight's row are
/// near to the largest of them, so that 4 bits say how far below it one is:
///
///   exponent = largest - below    for below < 15;   0 for 15: zeros, and denormal numbers
///
/// A number further below is rare (of normally distributed ones one in 5,000 to 10,000) and stands in a list; in the
/// bits a zero is in its place.
struct LosslessTensor {
  at::Tensor codes;        ///< Byte, shaped as the weight: sign and fraction.
  at::Tensor below;        ///< Byte (rows, ceil(columns / 2)); of two numbers the first in the low half.
  at::Tensor largest;      ///< Byte (rows).
  at::Tensor far_places;   ///< Long: which numbers of the weight are in the list, ascending.
  at::Tensor far_numbers;  ///< BFloat16: they.

  /// Throws c10::Error, with `who` in front, when the tensors do not fit each other.
  void validate(const char* who) const;
};

/// Weights of bfloat16 in 12 bits: `.quantize(lora::Lossless())`. For models that were published in bfloat16 and
/// compute in float: three eighths of the memory, and the same numbers. (That exponents take a fraction of their bits
/// is what Zhang et al. 2025 use, "70% Size, 100% Accuracy: Lossless LLM Compression for Efficient GPU Inference via
/// Dynamic-Length Float"; here all numbers take the same, so that each is found.)
class Lossless {
 public:
  std::shared_ptr<const QuantizedWeight> pack(const at::Tensor& weight) const;
};

/// The weight in 12 bits: Float, Double, Half or BFloat16 of any shape.
///
/// Throws c10::ValueError for numbers that are not finite, or that bfloat16 does not have, c10::TypeError for other
/// types, c10::Error for a weight without numbers.
LORA_INLINE LosslessTensor pack_lossless(const at::Tensor& weight);

/// The numbers in float, on the device of the codes.
LORA_INLINE at::Tensor dequantize(const LosslessTensor& packed);

/// A weight that is held in 12 bits.
class LosslessWeight final : public QuantizedWeight {
 public:
  /// Throws c10::Error when the tensors do not fit each other.
  explicit LosslessWeight(LosslessTensor packed);

  const LosslessTensor& packed() const { return packed_; }

  std::string_view scheme() const override;
  int64_t bits() const override { return 12; }
  at::IntArrayRef sizes() const override;
  at::Device device() const override;
  int64_t nbytes() const override;

  at::Tensor dense() const override;
  void unpack(int64_t first, int64_t count, float* numbers) const override;
  void dot_rows(int64_t first, int64_t count, const float* x, float* y) const override;

  std::shared_ptr<const QuantizedWeight> to(at::Device device) const override;

 private:
  LosslessTensor packed_;
};

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <lora/system/parallel.hpp>
#include <lora/weight/codec/input.hpp>
#include <lora/weight/codec/kernels.hpp>
#include <lora/weight/finite.hpp>

#include <algorithm>
#include <cstring>
#include <mutex>

namespace lora {
inline namespace LORA_ABI {

namespace detail {

/// The bits of a number that bfloat16 has.
inline std::uint32_t bits_of(at::BFloat16 number) { return number.x; }
inline std::uint32_t bits_of(float number) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &number, sizeof(bits));
  return bits >> 16U;
}

inline bool is_bfloat16(float number) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &number, sizeof(bits));
  return (bits & 0xFFFFU) == 0;
}

/// Throws for a weight on the CPU that has numbers which bfloat16 does not have.
[[noreturn]] inline void refuse_not_bfloat16(const char* who, const at::Tensor& weight) {
  const auto numbers = weight.to(at::kFloat);
  const auto differs = numbers.view(at::kInt).bitwise_and(0xFFFF).ne(0).logical_or(numbers.ne(weight));
  TORCH_CHECK_VALUE(false, who, ": ", differs.sum().item<int64_t>(), " of the ", weight.numel(),
                    " numbers of the weight ", weight.sizes(), " are not numbers of bfloat16, ",
                    first_in_words(weight, differs),
                    "; round them (weight.to(torch::kBFloat16)), or hold the weight in another way");
}

/// Numbers that bfloat16 has, BFloat16 or float, in 12 bits each.
template <class Number>
class LosslessPacking {
 public:
  /// Of a contiguous weight on the CPU.
  explicit LosslessPacking(const at::Tensor& weight)
      : rows_(rows_of(weight.sizes())), columns_(weight.numel() / rows_), numbers_(weight.const_data_ptr<Number>()) {
    packed_.codes = at::empty(weight.sizes(), at::kByte);
    packed_.below = at::zeros({rows_, (columns_ + 1) / 2}, at::kByte);
    packed_.largest = at::empty({rows_}, at::kByte);
  }

  LosslessTensor result() {
    parallel_for(0, rows_, std::max<int64_t>(1, kNumbersPerThread / columns_), [&](int64_t from, int64_t to) {
      std::vector<int64_t> far;
      for (auto row = from; row < to; ++row) pack(row, far);
      const std::lock_guard lock(mutex_);
      far_.insert(far_.end(), far.begin(), far.end());
    });
    std::sort(far_.begin(), far_.end());
    const auto count = static_cast<int64_t>(far_.size());
    packed_.far_places = at::empty({count}, at::kLong);
    packed_.far_numbers = at::empty({count}, at::kBFloat16);
    auto* places = packed_.far_places.mutable_data_ptr<int64_t>();
    auto* numbers = packed_.far_numbers.mutable_data_ptr<at::BFloat16>();
    for (const auto place : far_) {
      *places++ = place;
      *numbers++ = at::BFloat16(static_cast<float>(numbers_[place]));
    }
    return packed_;
  }

 private:
  static std::uint32_t exponent_of(Number number) { return bits_of(number) >> 7U & 0xFFU; }

  void pack(int64_t row, std::vector<int64_t>& far) {
    const auto* numbers = numbers_ + row * columns_;
    auto* codes = packed_.codes.mutable_data_ptr<std::uint8_t>() + row * columns_;
    auto* below = packed_.below.mutable_data_ptr<std::uint8_t>() + row * packed_.below.size(1);
    std::uint32_t largest = 0;
    for (int64_t k = 0; k < columns_; ++k) largest = std::max(largest, exponent_of(numbers[k]));
    packed_.largest.mutable_data_ptr<std::uint8_t>()[row] = static_cast<std::uint8_t>(largest);
    for (int64_t k = 0; k < columns_; ++k) {
      const auto bits = bits_of(numbers[k]), exponent = bits >> 7U & 0xFFU;
      const bool is_near = largest - exponent < kNoExponent12, is_far = !is_near && exponent != 0;
      if (is_far) far.push_back(row * columns_ + k);
      codes[k] = is_far ? std::uint8_t{0} : static_cast<std::uint8_t>((bits >> 8U & 0x80U) | (bits & 0x7FU));
      below[k / 2] |= static_cast<std::uint8_t>((is_near ? largest - exponent : kNoExponent12) << (k % 2 * 4));
    }
  }

  int64_t rows_, columns_;
  const Number* numbers_;
  LosslessTensor packed_;
  std::mutex mutex_;
  std::vector<int64_t> far_;
};

/// A LosslessTensor on the CPU, to read.
class LosslessReader {
 public:
  explicit LosslessReader(const LosslessTensor& packed, const CodecKernels& kernels = codec_kernels())
      : kernels_(kernels),
        codes_(packed.codes.const_data_ptr<std::uint8_t>()),
        below_(packed.below.const_data_ptr<std::uint8_t>()),
        largest_(packed.largest.const_data_ptr<std::uint8_t>()),
        columns_(packed.codes.numel() / packed.largest.numel()),
        bytes_(packed.below.size(1)),
        far_places_(packed.far_places.const_data_ptr<int64_t>()),
        far_numbers_(packed.far_numbers.const_data_ptr<at::BFloat16>()),
        far_count_(packed.far_places.numel()) {}

  /// The numbers [first, first + count).
  void unpack(int64_t first, int64_t count, float* numbers) const {
    parallel_for(first, first + count, kNumbersPerThread, [&](int64_t from, int64_t to) {
      for (auto place = from; place < to;) {
        const auto row = place / columns_, size = std::min(to, (row + 1) * columns_) - place;
        kernels_.unpack12(row_of(row), place - row * columns_, size, numbers + (place - first));
        place += size;
      }
      each_far(from, to, [&](int64_t place, float number) { numbers[place - first] = number; });
    });
  }

  /// The products of the rows [first, first + count) with x.
  void dot_rows(int64_t first, int64_t count, const float* x, float* y) const {
    const auto grain = std::max<int64_t>(1, kNumbersPerThread / columns_);
    parallel_for(first, first + count, grain, [&](int64_t from, int64_t to) {
      for (auto row = from; row < to; ++row) y[row - first] = kernels_.dot12(row_of(row), columns_, x);
      each_far(from * columns_, to * columns_, [&](int64_t place, float number) {
        const auto row = place / columns_;
        y[row - first] += number * x[place - row * columns_];  // zero in the codes
      });
    });
  }

 private:
  Row12 row_of(int64_t row) const { return {codes_ + row * columns_, below_ + row * bytes_, largest_[row]}; }

  /// Calls f(place, number) for those of the list in [first, last).
  template <class F>
  void each_far(int64_t first, int64_t last, const F& f) const {
    const auto* end = far_places_ + far_count_;
    for (const auto* place = std::lower_bound(far_places_, end, first); place != end && *place < last; ++place)
      f(*place, static_cast<float>(far_numbers_[place - far_places_]));
  }

  const CodecKernels& kernels_;
  const std::uint8_t *codes_, *below_, *largest_;
  int64_t columns_, bytes_;
  const int64_t* far_places_;
  const at::BFloat16* far_numbers_;
  int64_t far_count_;
};

/// The numbers, off the CPU by operators that any device has.
inline at::Tensor unpacked(const LosslessTensor& packed) {
  if (packed.codes.is_cpu()) {
    auto numbers = at::empty(packed.codes.sizes(), at::kFloat);
    LosslessReader(packed).unpack(0, numbers.numel(), numbers.mutable_data_ptr<float>());
    return numbers;
  }
  const auto rows = packed.largest.numel();
  const auto codes = packed.codes.view({rows, -1});
  const auto exponents = [&] {
    const auto halves = at::stack({packed.below.bitwise_and(0x0F), packed.below.bitwise_right_shift(4)}, 2);
    const auto below = halves.view({rows, -1}).narrow(1, 0, codes.size(1));
    return at::where(below.eq(kNoExponent12), 0, packed.largest.unsqueeze(1) - below);  // of bytes, as is below
  };
  auto bits = exponents().to(at::kInt).mul_(0x80).add_(codes.bitwise_and(0x7F));
  bits.add_(codes.bitwise_and(0x80), 0x100).bitwise_left_shift_(16);
  auto numbers = bits.view(at::kFloat).view({-1});
  numbers.index_copy_(0, packed.far_places, packed.far_numbers.to(at::kFloat));
  return numbers.view(packed.codes.sizes());
}

inline LosslessTensor moved(const LosslessTensor& packed, at::Device device) {
  const auto& [codes, below, largest, far_places, far_numbers] = packed;
  return {codes.to(device), below.to(device), largest.to(device), far_places.to(device), far_numbers.to(device)};
}

}  // namespace detail

LORA_INLINE void LosslessTensor::validate(const char* who) const {
  TORCH_CHECK(codes.defined(), who, ": codes of a packed weight is undefined");
  const auto device = codes.device();
  detail::check_part(who, "codes", codes, at::kByte, codes.numel(), device);
  TORCH_CHECK(codes.numel() > 0, who, ": codes of a packed weight are ", codes.sizes(), ", no numbers");
  const auto rows = detail::rows_of(codes.sizes());
  detail::check_part(who, "below", below, at::kByte, rows * ((codes.numel() / rows + 1) / 2), device);
  TORCH_CHECK(below.dim() == 2 && below.size(0) == rows, who, ": below of a packed weight has to have a row for each ",
              "of ", rows, ", but is ", below.sizes());
  detail::check_part(who, "largest", largest, at::kByte, rows, device);
  TORCH_CHECK(far_places.defined(), who, ": far_places of a packed weight is undefined");
  detail::check_part(who, "far_places", far_places, at::kLong, far_places.numel(), device);
  detail::check_part(who, "far_numbers", far_numbers, at::kBFloat16, far_places.numel(), device);
  TORCH_CHECK(largest.dim() == 1 && far_places.dim() == 1 && far_numbers.dim() == 1, who, ": largest, far_places and ",
              "far_numbers of a packed weight have to have one dimension, but are ", largest.sizes(), ", ",
              far_places.sizes(), " and ", far_numbers.sizes());
  if (far_places.numel() == 0) return;
  const bool ascend = far_places.slice(0, 1).gt(far_places.slice(0, 0, -1)).all().item<bool>();
  TORCH_CHECK(ascend && far_places[0].item<int64_t>() >= 0 && far_places[-1].item<int64_t>() < codes.numel(), who,
              ": far_places of a packed weight have to ascend and to be of its ", codes.numel(), " numbers");
  auto alone = *this;
  alone.far_places = far_places.slice(0, 0, 0);
  alone.far_numbers = far_numbers.slice(0, 0, 0);
  const auto in_bits = detail::unpacked(alone).view({-1}).index_select(0, far_places);
  TORCH_CHECK(!in_bits.any().item<bool>(), who, ": the bits of a packed weight have to have zeros at far_places");
}

LORA_INLINE LosslessTensor pack_lossless(const at::Tensor& weight) {
  constexpr auto who = "lora::pack_lossless";
  constexpr int kNotFinite = 255;  // the exponent of what is not
  detail::check_can_be_packed(who, weight);
  const auto here = weight.detach().to(at::kCPU).contiguous();  // by one loop, wherever the weight is
  LosslessTensor packed;
  if (here.scalar_type() == at::kBFloat16) {
    packed = detail::LosslessPacking<at::BFloat16>(here).result();
  } else {
    const auto numbers = here.to(at::kFloat);
    const auto* first = numbers.const_data_ptr<float>();
    const bool are_floats = here.scalar_type() != at::kDouble || numbers.eq(here).all().item<bool>();
    if (!are_floats || !std::all_of(first, first + numbers.numel(), detail::is_bfloat16)) {
      if (!detail::is_finite(numbers)) detail::refuse_not_finite(who, weight);
      detail::refuse_not_bfloat16(who, here);
    }
    packed = detail::LosslessPacking<float>(numbers).result();
  }
  if (packed.largest.eq(kNotFinite).any().item<bool>()) detail::refuse_not_finite(who, weight);
  return detail::moved(packed, weight.device());
}

LORA_INLINE at::Tensor dequantize(const LosslessTensor& packed) {
  packed.validate("lora::dequantize");
  return detail::unpacked(packed);
}

LORA_INLINE LosslessWeight::LosslessWeight(LosslessTensor packed) : packed_(std::move(packed)) {
  packed_.validate("lora::LosslessWeight");
}

LORA_INLINE std::string_view LosslessWeight::scheme() const { return "bfloat16 without a loss"; }

LORA_INLINE at::IntArrayRef LosslessWeight::sizes() const { return packed_.codes.sizes(); }

LORA_INLINE at::Device LosslessWeight::device() const { return packed_.codes.device(); }

LORA_INLINE int64_t LosslessWeight::nbytes() const {
  const auto& [codes, below, largest, far_places, far_numbers] = packed_;
  return static_cast<int64_t>(codes.nbytes() + below.nbytes() + largest.nbytes() + far_places.nbytes() +
                              far_numbers.nbytes());
}

LORA_INLINE at::Tensor LosslessWeight::dense() const { return detail::unpacked(packed_); }

LORA_INLINE void LosslessWeight::unpack(int64_t first, int64_t count, float* numbers) const {
  detail::check_range("lora::LosslessWeight::unpack", "numbers", first, count, packed_.codes.numel(), device());
  detail::LosslessReader(packed_).unpack(first, count, numbers);
}

LORA_INLINE void LosslessWeight::dot_rows(int64_t first, int64_t count, const float* x, float* y) const {
  detail::check_range("lora::LosslessWeight::dot_rows", "rows", first, count, packed_.largest.numel(), device());
  detail::LosslessReader(packed_).dot_rows(first, count, x, y);
}

LORA_INLINE std::shared_ptr<const QuantizedWeight> LosslessWeight::to(at::Device device) const {
  auto copy = std::make_shared<LosslessWeight>(*this);  // not checked again
  copy->packed_ = detail::moved(packed_, device);
  return copy;
}

LORA_INLINE std::shared_ptr<const QuantizedWeight> Lossless::pack(const at::Tensor& weight) const {
  return std::make_shared<LosslessWeight>(pack_lossless(weight));
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
