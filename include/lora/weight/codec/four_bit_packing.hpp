#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/bucketize.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <c10/util/Exception.h>

#include <lora/system/parallel.hpp>
#include <lora/version.hpp>
#include <lora/weight/codec/input.hpp>
#include <lora/weight/codec/kernels.hpp>
#include <lora/weight/codec/round_in_turn.hpp>
#include <lora/weight/codec/statistics.hpp>
#include <lora/weight/finite.hpp>
#include <lora/weight/four_bit_tensor.hpp>
#include <lora/weight/seen_inputs.hpp>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

// How numbers become codes of 4 bits and scales.

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
  parallel_for(0, blocks, std::max<int64_t>(1, kNumbersPerThread / block_size), [&](int64_t from, int64_t to) {
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
  TORCH_CHECK_VALUE(is_finite(moments), who, ": the moments of the inputs of a weight ", weight.sizes(),
                    " are not finite");
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

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
