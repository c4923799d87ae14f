#pragma once

#include <ATen/core/Tensor.h>

#include <lora/linkage.hpp>
#include <lora/options.hpp>
#include <lora/version.hpp>
#include <lora/weight/four_bit_tensor.hpp>
#include <lora/weight/quantized.hpp>

#include <cstdint>
#include <memory>
#include <string_view>
#include <utility>

namespace lora {
inline namespace LORA_ABI {

/// The options that NF4 and FP4 have in common.
template <class Self>
class FourBitOptions {
  /// How many numbers share a scale: 32, 64, ... or 4096, powers of two. Default: 64, as in bitsandbytes.
  LORA_ARG(int64_t, block_size) = 64;
  /// Whether the scales are held in 8 bits themselves. Default: true, as in the layers of bitsandbytes (Params4bit,
  /// Linear4bit: compress_statistics); its functions, and BitsAndBytesConfig of Transformers, leave it out by default.
  LORA_ARG(bool, double_quantization) = true;

 public:
  bool is_valid() const { return detail::is_block_size(block_size_); }

  /// Throws c10::ValueError, with `who` in front, when an option is out of its range.
  void validate(const char* who) const { detail::check_block_size(who, block_size_); }
};

/// Weights in NF4: `.quantize(lora::NF4().block_size(128))`. For weights that are distributed as a normal distribution,
/// as trained ones are nearly, it is the better one of the two types.
class NF4 : public FourBitOptions<NF4> {
 public:
  std::shared_ptr<const QuantizedWeight> pack(const at::Tensor& weight) const;
  std::shared_ptr<const QuantizedWeight> pack(const at::Tensor& weight, const SeenInputs& seen) const;
};

/// Weights in FP4: `.quantize(lora::FP4())`.
class FP4 : public FourBitOptions<FP4> {
 public:
  std::shared_ptr<const QuantizedWeight> pack(const at::Tensor& weight) const;
  std::shared_ptr<const QuantizedWeight> pack(const at::Tensor& weight, const SeenInputs& seen) const;
};

/// The weight in NF4: Float, Double, Half or BFloat16 of any shape, which becomes float first. Codes and scales are
/// those of bitsandbytes 0.50 on the CPU, to the bit. (The mean of very many scales depends on the number of threads,
/// and on the device, as at::mean does.)
///
/// Throws c10::ValueError for options out of their range and for numbers that are not finite; c10::TypeError for other
/// types; c10::Error for a weight without numbers.
LORA_INLINE FourBitTensor quantize_nf4(const at::Tensor& weight, const NF4& options = NF4());

/// The weight in FP4; see quantize_nf4.
LORA_INLINE FourBitTensor quantize_fp4(const at::Tensor& weight, const FP4& options = FP4());

/// The weight, a matrix, with the same scales, and codes with which it multiplies such inputs most like before: not
/// each number is rounded to the nearest value, GPTQ's way (`SeenInputs`). Throws c10::Error, too, for moments that do
/// not fit the weight or are not finite.
LORA_INLINE FourBitTensor quantize_nf4(const at::Tensor& weight, const NF4& options, const SeenInputs& seen);
LORA_INLINE FourBitTensor quantize_fp4(const at::Tensor& weight, const FP4& options, const SeenInputs& seen);

/// The numbers in float, on the device of the codes.
LORA_INLINE at::Tensor dequantize(const FourBitTensor& packed);

/// A weight that is held in NF4 or FP4.
class FourBitWeight final : public QuantizedWeight {
 public:
  /// Throws c10::Error when the tensors do not fit each other.
  explicit FourBitWeight(FourBitTensor packed);

  const FourBitTensor& packed() const { return packed_; }

  std::string_view scheme() const override;
  int64_t bits() const override { return 4; }
  at::IntArrayRef sizes() const override;
  at::Device device() const override;
  /// The 256 numbers of the map, which the weights of a CPU have in common, are not counted.
  int64_t nbytes() const override;

  at::Tensor dense() const override;
  void unpack(int64_t first, int64_t count, float* numbers) const override;
  void dot_rows(int64_t first, int64_t count, const float* x, float* y) const override;

  std::shared_ptr<const QuantizedWeight> to(at::Device device) const override;

 private:
  FourBitTensor packed_;
};

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/ops/empty.h>

#include <lora/weight/codec/four_bit_packing.hpp>
#include <lora/weight/codec/four_bit_reader.hpp>
#include <lora/weight/codec/input.hpp>

namespace lora {
inline namespace LORA_ABI {

LORA_INLINE FourBitTensor quantize_nf4(const at::Tensor& weight, const NF4& options) {
  constexpr auto who = "lora::quantize_nf4";
  options.validate(who);
  return detail::quantize_four_bit(who, weight, FourBitType::kNF4, options.block_size(), options.double_quantization());
}

LORA_INLINE FourBitTensor quantize_fp4(const at::Tensor& weight, const FP4& options) {
  constexpr auto who = "lora::quantize_fp4";
  options.validate(who);
  return detail::quantize_four_bit(who, weight, FourBitType::kFP4, options.block_size(), options.double_quantization());
}

LORA_INLINE FourBitTensor quantize_nf4(const at::Tensor& weight, const NF4& options, const SeenInputs& seen) {
  auto packed = quantize_nf4(weight, options);
  detail::round_for_inputs("lora::quantize_nf4", packed, weight, seen);
  return packed;
}

LORA_INLINE FourBitTensor quantize_fp4(const at::Tensor& weight, const FP4& options, const SeenInputs& seen) {
  auto packed = quantize_fp4(weight, options);
  detail::round_for_inputs("lora::quantize_fp4", packed, weight, seen);
  return packed;
}

LORA_INLINE at::Tensor dequantize(const FourBitTensor& packed) {
  packed.validate("lora::dequantize");
  if (!packed.codes.is_cpu()) return detail::dequantized_blocks(packed);
  auto numbers = at::empty(packed.sizes, at::kFloat);
  detail::FourBitReader(packed).unpack(0, packed.numel(), numbers.mutable_data_ptr<float>());
  return numbers;
}

LORA_INLINE FourBitWeight::FourBitWeight(FourBitTensor packed) : packed_(std::move(packed)) {
  packed_.validate("lora::FourBitWeight");
}

LORA_INLINE std::string_view FourBitWeight::scheme() const { return detail::code_of(packed_.type).name; }

LORA_INLINE at::IntArrayRef FourBitWeight::sizes() const { return packed_.sizes; }

LORA_INLINE at::Device FourBitWeight::device() const { return packed_.codes.device(); }

LORA_INLINE int64_t FourBitWeight::nbytes() const {
  size_t bytes = packed_.codes.nbytes() + packed_.absmax.nbytes();
  if (packed_.double_quantized()) bytes += packed_.nested_absmax.nbytes() + sizeof(packed_.offset);
  return static_cast<int64_t>(bytes);
}

LORA_INLINE at::Tensor FourBitWeight::dense() const { return dequantize(packed_); }

LORA_INLINE void FourBitWeight::unpack(int64_t first, int64_t count, float* numbers) const {
  detail::check_range("lora::FourBitWeight::unpack", "numbers", first, count, packed_.numel(), device());
  detail::FourBitReader(packed_).unpack(first, count, numbers);
}

LORA_INLINE void FourBitWeight::dot_rows(int64_t first, int64_t count, const float* x, float* y) const {
  const auto rows = detail::rows_of(packed_.sizes);
  detail::check_range("lora::FourBitWeight::dot_rows", "rows", first, count, rows, device());
  detail::FourBitReader(packed_).dot_rows(packed_.numel() / rows, first, count, x, y);
}

LORA_INLINE std::shared_ptr<const QuantizedWeight> FourBitWeight::to(at::Device device) const {
  auto moved = packed_;
  for (auto* tensor : {&moved.codes, &moved.absmax, &moved.nested_absmax, &moved.nested_map})
    if (tensor->defined()) *tensor = tensor->to(device);
  return std::make_shared<FourBitWeight>(std::move(moved));
}

LORA_INLINE std::shared_ptr<const QuantizedWeight> NF4::pack(const at::Tensor& weight) const {
  return std::make_shared<FourBitWeight>(quantize_nf4(weight, *this));
}

LORA_INLINE std::shared_ptr<const QuantizedWeight> NF4::pack(const at::Tensor& weight, const SeenInputs& seen) const {
  return std::make_shared<FourBitWeight>(quantize_nf4(weight, *this, seen));
}

LORA_INLINE std::shared_ptr<const QuantizedWeight> FP4::pack(const at::Tensor& weight) const {
  return std::make_shared<FourBitWeight>(quantize_fp4(weight, *this));
}

LORA_INLINE std::shared_ptr<const QuantizedWeight> FP4::pack(const at::Tensor& weight, const SeenInputs& seen) const {
  return std::make_shared<FourBitWeight>(quantize_fp4(weight, *this, seen));
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
