#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>

#include <lora/linkage.hpp>
#include <lora/options.hpp>
#include <lora/version.hpp>
#include <lora/weight/quantized.hpp>

#include <cstdint>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// Which sixteen numbers the 4 bits stand for.
enum class FourBitType {
  kNF4,  ///< Quantiles of the normal distribution: Dettmers et al. 2023, "QLoRA".
  kFP4,  ///< Floating point of a sign, two bits of exponent and one of fraction.
};

/// A tensor in 4 bits a number, as bitsandbytes 0.50 has it on the CPU, bit for bit. The numbers, in the order of a
/// contiguous tensor, lie in blocks, the last of which may be shorter; in a block
///
///   number = value[code] * absmax    code: the nearest of the sixteen values to number / absmax
///
/// with the block's largest absolute value. Double quantized, that is held in 8 bits:
///
///   absmax = nested_map[code of 8 bits] * nested_absmax + offset    offset: the mean of all absmax
///
/// with nested_absmax of 256 blocks together. A number takes 4 + 32 / block_size bits; double quantized
/// 4 + 8 / block_size + 32 / (256 block_size), that is 4.127 in blocks of 64.
struct FourBitTensor {
  FourBitType type = FourBitType::kNF4;
  std::vector<int64_t> sizes;
  int64_t block_size = 64;
  at::Tensor codes;          ///< Byte (ceil(numel / 2)); of two numbers the first in the high half.
  at::Tensor absmax;         ///< Float (ceil(numel / block_size)); Byte, the codes of 8 bits, when double quantized.
  at::Tensor nested_absmax;  ///< Float (ceil(blocks / 256)); undefined unless double quantized.
  at::Tensor nested_map;     ///< Float (256), what the 8 bits stand for; undefined unless double quantized.
  float offset = 0;          ///< Zero unless double quantized.

  bool double_quantized() const { return nested_absmax.defined(); }
  int64_t numel() const { return c10::multiply_integers(sizes); }

  /// Throws c10::Error, with `who` in front, when the tensors do not fit each other.
  void validate(const char* who) const;
};

/// The options that NF4 and FP4 have in common.
template <class Self>
class FourBitOptions {
  /// How many numbers share a scale: 32, 64, ... or 4096, powers of two. Default: 64, as in bitsandbytes.
  LORA_ARG(int64_t, block_size) = 64;
  /// Whether the scales are held in 8 bits themselves. Default: true, as in the layers of bitsandbytes (Params4bit,
  /// Linear4bit: compress_statistics); its functions, and BitsAndBytesConfig of Transformers, leave it out by default.
  LORA_ARG(bool, double_quantization) = true;

 public:
  bool is_valid() const { return block_size_ >= 32 && block_size_ <= 4096 && (block_size_ & (block_size_ - 1)) == 0; }

  /// Throws c10::ValueError, with `who` in front, when an option is out of its range.
  void validate(const char* who) const {
    TORCH_CHECK_VALUE(is_valid(), who, ": block_size has to be 32, 64, 128, 256, 512, 1024, 2048 or 4096, but got ",
                      block_size_);
  }
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
/// each number is rounded to the nearest value, see detail::round_in_turn. Throws c10::Error, too, for moments that do
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

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/bucketize.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>

#include <lora/weight/codec/input.hpp>
#include <lora/weight/codec/kernels.hpp>
#include <lora/weight/codec/statistics.hpp>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <tuple>

namespace lora {
inline namespace LORA_ABI {

namespace detail {

inline const FourBitCode& code_of(FourBitType type) { return type == FourBitType::kNF4 ? kNF4 : kFP4; }

/// The least that a block's largest value is taken for in a division, as in bitsandbytes.
constexpr float kLeastAbsmax = 1e-38F;

/// Codes and largest values on the CPU; false when a number is not finite.
inline bool quantize_blocks(const CodecKernels& kernels, const FourBitCode& code, const float* numbers, int64_t count,
                            int64_t block_size, std::uint8_t* codes, float* absmax) {
  std::atomic<bool> finite{true};
  const auto blocks = (count + block_size - 1) / block_size;
  at::parallel_for(0, blocks, std::max<int64_t>(1, kNumbersPerThread / block_size), [&](int64_t from, int64_t to) {
    for (auto block = from; block < to; ++block) {
      const auto first = block * block_size, size = std::min(block_size, count - first);
      const auto most = finite_absmax(kernels, numbers + first, size);
      if (!most) {
        finite = false;
        return;
      }
      if (size == block_size) {
        absmax[block] = *most;
        kernels.quantize4(code, numbers + first, size, 1.0F / std::max(*most, kLeastAbsmax), codes + first / 2);
      } else {  // bitsandbytes divides here, and raises what it keeps
        absmax[block] = std::max(*most, kLeastAbsmax);
        std::vector<float> scaled(numbers + first, numbers + count);
        for (auto& number : scaled) number /= absmax[block];
        kernels.quantize4(code, scaled.data(), size, 1.0F, codes + first / 2);
      }
    }
  });
  return finite;
}

/// The sixteen values of a scheme on a device, by size.
struct FourBitValues {
  FourBitValues(const FourBitCode& code, at::Device device)
      : bounds(at::empty({15}, at::kFloat)), values(at::empty({16}, at::kFloat)), nibbles(at::empty({16}, at::kByte)) {
    std::copy_n(code.bounds, 15, bounds.mutable_data_ptr<float>());
    std::copy_n(code.ascending, 16, nibbles.mutable_data_ptr<std::uint8_t>());
    for (int i = 0; i < 16; ++i) values.mutable_data_ptr<float>()[i] = code.values[code.ascending[i]];
    for (auto* tensor : {&bounds, &values, &nibbles}) *tensor = tensor->to(device);
  }

  /// Among the values times `scale` (broadcast), the number of the nearest.
  at::Tensor places(const at::Tensor& numbers, const at::Tensor& scale) const {
    return at::bucketize(numbers / scale.masked_fill(scale == 0, 1), bounds);
  }
  at::Tensor at(const at::Tensor& places) const { return values.index_select(0, places.reshape({-1})).view_as(places); }

  /// Two codes a byte.
  at::Tensor bytes(const at::Tensor& places) const {
    const auto pairs = nibbles.index_select(0, places.reshape({-1})).view({-1, 2});
    return pairs.select(1, 0) * 16 + pairs.select(1, 1);
  }

  at::Tensor bounds, values, nibbles;
};

/// The same by operators that any device has.
inline std::pair<at::Tensor, at::Tensor> quantized_blocks(const FourBitCode& code, const at::Tensor& numbers,
                                                          int64_t block_size) {
  const auto rest = numbers.numel() % block_size, whole = numbers.numel() - rest;
  const auto rows = numbers.narrow(0, 0, whole).view({-1, block_size});
  auto absmax = rows.abs().amax(1);
  auto scaled = (rows * absmax.clamp_min(kLeastAbsmax).reciprocal().unsqueeze(1)).view({-1});
  if (rest != 0) {
    const auto last = numbers.narrow(0, whole, rest);
    const auto most = last.abs().amax(0, true).clamp_min(kLeastAbsmax);
    absmax = at::cat({absmax, most});
    scaled = at::cat({scaled, last / most});
  }
  if (numbers.numel() % 2 != 0) scaled = at::constant_pad_nd(scaled, {0, 1});
  const FourBitValues values(code, numbers.device());
  return {values.bytes(at::bucketize(scaled.clamp(-1, 1), values.bounds)), absmax};
}

inline FourBitTensor quantize_four_bit(const char* who, const at::Tensor& weight, FourBitType type, int64_t block_size,
                                       bool double_quantization) {
  check_can_be_packed(who, weight);
  const auto numbers = numbers_of(weight);
  const auto blocks = (numbers.numel() + block_size - 1) / block_size;
  FourBitTensor packed;
  packed.type = type;
  packed.sizes = weight.sizes().vec();
  packed.block_size = block_size;
  bool finite = false;
  if (numbers.is_cpu()) {
    packed.codes = at::empty({(numbers.numel() + 1) / 2}, at::kByte);
    packed.absmax = at::empty({blocks}, at::kFloat);
    finite =
        quantize_blocks(codec_kernels(), code_of(type), numbers.const_data_ptr<float>(), numbers.numel(), block_size,
                        packed.codes.mutable_data_ptr<std::uint8_t>(), packed.absmax.mutable_data_ptr<float>());
  } else {
    std::tie(packed.codes, packed.absmax) = quantized_blocks(code_of(type), numbers, block_size);
    finite = at::isfinite(packed.absmax).all().item<bool>();
  }
  if (!finite) refuse_not_finite(who, weight);
  if (!double_quantization) return packed;

  packed.offset = packed.absmax.cpu().mean().item<float>();  // devices add up in another order, to another number
  const auto differences = packed.absmax - packed.offset;
  TORCH_CHECK_VALUE(std::isfinite(packed.offset), who, ": the weight ", weight.sizes(),
                    " has numbers of which the largest of each block have a mean that no float holds; it can be packed "
                    "with double_quantization(false), or scaled down");
  packed.nested_map = dynamic_map_tensor().to(numbers.device());
  if (numbers.is_cpu()) {
    packed.absmax = at::empty({blocks}, at::kByte);
    packed.nested_absmax = at::empty({(blocks + kNestedBlockSize - 1) / kNestedBlockSize}, at::kFloat);
    quantize_statistics(differences.const_data_ptr<float>(), blocks, packed.absmax.mutable_data_ptr<std::uint8_t>(),
                        packed.nested_absmax.mutable_data_ptr<float>());
  } else {
    std::tie(packed.absmax, packed.nested_absmax) = quantized_statistics(differences);
  }
  return packed;
}

/// The scales of the blocks, in float.
inline at::Tensor scales_of(const FourBitTensor& packed) {
  if (!packed.double_quantized()) return packed.absmax;
  const auto values = in_rows(packed.nested_map.index_select(0, packed.absmax.to(at::kLong)), kNestedBlockSize);
  const auto scales = (values * packed.nested_absmax.unsqueeze(1)).view({-1}).narrow(0, 0, packed.absmax.numel());
  return scales + packed.offset;
}

/// Chooses the codes of a packed matrix anew, for the inputs that were seen.
inline void round_for_inputs(const char* who, FourBitTensor& packed, const at::Tensor& weight, const SeenInputs& seen) {
  const auto& moments = seen.moments;
  TORCH_CHECK(weight.dim() == 2 && (seen.dim == 0 || seen.dim == 1) && moments.defined() &&
                  moments.sizes() == at::IntArrayRef({weight.size(seen.dim), weight.size(seen.dim)}) &&
                  moments.scalar_type() == at::kFloat && moments.device() == weight.device(),
              who, ": the weight ", weight.sizes(), " with inputs in dimension ", seen.dim,
              " needs their moments as a matrix of Float on its device, as wide as that");
  TORCH_CHECK_VALUE(at::isfinite(moments).all().item<bool>(), who, ": the moments of the inputs of a weight ",
                    weight.sizes(), " are not finite");
  const FourBitValues values(code_of(packed.type), weight.device());
  const auto by_input = [&](const at::Tensor& matrix) { return (seen.dim == 0 ? matrix : matrix.t()).contiguous(); };
  const auto of_blocks = scales_of(packed).repeat_interleave(packed.block_size).narrow(0, 0, packed.numel());
  const auto scales = by_input(of_blocks.view(packed.sizes));
  auto places = at::empty(scales.sizes(), scales.options().dtype(at::kLong));
  round_in_turn(by_input(weight.detach().to(at::kFloat)), moments, [&](int64_t input, const at::Tensor& numbers) {
    const auto scale = scales.select(0, input), place = places.select(0, input);
    place.copy_(values.places(numbers, scale));
    return values.at(place) * scale;
  });
  places = (seen.dim == 1 ? places.t() : places).reshape({-1});
  packed.codes = values.bytes(packed.numel() % 2 == 0 ? places : at::constant_pad_nd(places, {0, 1}));
}

/// The numbers by operators that any device has. A byte is looked up as a whole, which takes the least memory.
inline at::Tensor dequantized_blocks(const FourBitTensor& packed) {
  const auto* values = code_of(packed.type).values;
  auto pairs = at::empty({256, 2}, at::kFloat);
  for (int byte = 0; byte < 256; ++byte) {
    pairs.mutable_data_ptr<float>()[2 * byte] = values[byte >> 4];
    pairs.mutable_data_ptr<float>()[2 * byte + 1] = values[byte & 15];
  }
  const auto found = pairs.to(packed.codes.device()).index_select(0, packed.codes.to(at::kInt));
  const auto numbers = found.view({-1}).narrow(0, 0, packed.numel());
  const auto scaled = in_rows(numbers, packed.block_size) * scales_of(packed).unsqueeze(1);
  return scaled.view({-1}).narrow(0, 0, packed.numel()).contiguous().view(packed.sizes);
}

/// The scales of blocks as they are needed, some at a time: double quantized ones are worked out, others are there.
class ScaleWindow {
 public:
  static constexpr int64_t kBlocks = 256;

  /// `end` is behind the last block that is asked for.
  ScaleWindow(const CodecKernels& kernels, const BlockScales& blocks, int64_t end)
      : kernels_(kernels), blocks_(blocks), end_(end) {}

  /// Those of the blocks [first, last), which are kBlocks at most.
  const float* at(int64_t first, int64_t last) {
    if (blocks_.absmax != nullptr) return blocks_.absmax + first;
    if (first < from_ || last > to_) {
      from_ = first;
      to_ = std::min(end_, first + kBlocks);
      kernels_.scales(blocks_, from_, to_ - from_, scales_);
    }
    return scales_ + (first - from_);
  }

 private:
  const CodecKernels& kernels_;
  const BlockScales blocks_;
  const int64_t end_;
  int64_t from_ = 0, to_ = 0;
  float scales_[kBlocks];
};

/// A FourBitTensor on the CPU, to read.
class FourBitReader {
 public:
  explicit FourBitReader(const FourBitTensor& packed, const CodecKernels& kernels = codec_kernels())
      : kernels_(kernels), codes_(packed.codes.const_data_ptr<std::uint8_t>()), values_(code_of(packed.type).values) {
    while ((int64_t{1} << block_bits_) < packed.block_size) ++block_bits_;
    if (packed.double_quantized()) {
      scales_.codes = packed.absmax.const_data_ptr<std::uint8_t>();
      scales_.map = packed.nested_map.const_data_ptr<float>();
      scales_.nested_absmax = packed.nested_absmax.const_data_ptr<float>();
      scales_.offset = packed.offset;
    } else {
      scales_.absmax = packed.absmax.const_data_ptr<float>();
    }
  }

  /// The numbers [first, first + count).
  void unpack(int64_t first, int64_t count, float* numbers) const {
    const auto end = first + count;
    at::parallel_for(first, end, kNumbersPerThread, [&](int64_t from, int64_t to) {
      ScaleWindow scales(kernels_, scales_, blocks_until(to));
      for_parts(from, to, scales, [&](const float* scale, int64_t part_from, int64_t part_to) {
        kernels_.unpack4(codes_, values_, block_bits_, scale, part_from, part_to, numbers + (part_from - first));
      });
    });
  }

  /// The products of the rows [first, first + count), each of so many numbers, with x.
  void dot_rows(int64_t columns, int64_t first, int64_t count, const float* x, float* y) const {
    // The two halves of a byte meet neighbours in x, which lie far from each other here: no row has to part them.
    std::vector<float> parted(static_cast<size_t>(columns));
    float* const even = parted.data();
    float* const odd = even + (columns + 1) / 2;
    for (int64_t j = 0; j < columns; ++j) (j % 2 == 0 ? even : odd)[j / 2] = x[j];
    const auto grain = std::max<int64_t>(1, kNumbersPerThread / std::max<int64_t>(1, columns));
    at::parallel_for(first, first + count, grain, [&](int64_t from, int64_t to) {
      ScaleWindow scales(kernels_, scales_, blocks_until(to * columns));
      for (auto row = from; row < to; ++row) {
        float sum = 0;
        const auto begin = row * columns;
        for_parts(begin, begin + columns, scales, [&](const float* scale, int64_t part_from, int64_t part_to) {
          const auto place = part_from + part_from % 2 - begin;  // of the first whole byte, in x
          const auto factors = begin % 2 == 0 ? Factors4{even + place / 2, odd + place / 2}
                                              : Factors4{odd + place / 2, even + (place + 1) / 2};
          sum += kernels_.dot4(codes_, values_, block_bits_, scale, part_from, part_to, factors);
        });
        y[row - first] = sum;
      }
    });
  }

 private:
  int64_t blocks_until(int64_t number) const { return (number + (int64_t{1} << block_bits_) - 1) >> block_bits_; }

  /// Calls `work` with parts of [from, to) and the scales from the first block of a part on.
  template <class Work>
  void for_parts(int64_t from, int64_t to, ScaleWindow& scales, Work work) const {
    while (from < to) {
      const auto block = from >> block_bits_;
      const auto part_to = std::min(to, (block + ScaleWindow::kBlocks) << block_bits_);
      work(scales.at(block, blocks_until(part_to)), from, part_to);
      from = part_to;
    }
  }

  const CodecKernels& kernels_;
  const std::uint8_t* codes_;
  const float* values_;
  int block_bits_ = 0;
  BlockScales scales_;
};

}  // namespace detail

LORA_INLINE void FourBitTensor::validate(const char* who) const {
  NF4().block_size(block_size).validate(who);
  TORCH_CHECK(std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size > 0; }), who,
              ": the sizes of a packed weight are ", at::IntArrayRef(sizes), ", but each has to be at least 1");
  const auto blocks = (numel() + block_size - 1) / block_size;
  TORCH_CHECK(codes.defined(), who, ": codes of a packed weight is undefined");
  const auto device = codes.device();
  detail::check_part(who, "codes", codes, at::kByte, (numel() + 1) / 2, device);
  detail::check_part(who, "absmax", absmax, double_quantized() ? at::kByte : at::kFloat, blocks, device);
  if (!double_quantized()) return;
  const auto nested_blocks = (blocks + detail::kNestedBlockSize - 1) / detail::kNestedBlockSize;
  detail::check_part(who, "nested_absmax", nested_absmax, at::kFloat, nested_blocks, device);
  detail::check_part(who, "nested_map", nested_map, at::kFloat, 256, device);
}

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
