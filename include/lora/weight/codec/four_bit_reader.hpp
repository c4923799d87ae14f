#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>

#include <lora/system/parallel.hpp>
#include <lora/version.hpp>
#include <lora/weight/codec/four_bit_packing.hpp>
#include <lora/weight/codec/kernels.hpp>
#include <lora/weight/codec/statistics.hpp>
#include <lora/weight/four_bit_tensor.hpp>

#include <algorithm>
#include <cstdint>
#include <vector>

// How codes of 4 bits become numbers again.

namespace lora {
inline namespace LORA_ABI {
namespace detail {

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
    parallel_for(first, end, kNumbersPerThread, [&](int64_t from, int64_t to) {
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
    parallel_for(first, first + count, grain, [&](int64_t from, int64_t to) {
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
}  // namespace LORA_ABI
}  // namespace lora
