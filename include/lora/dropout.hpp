#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/core/Generator.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/native_dropout_backward.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <lora/dropout_avx512.hpp>
#include <lora/system/parallel.hpp>
#include <lora/system/processor.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <type_traits>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// Which elements of a tensor dropout keeps, as a function of a seed and their place, so that nothing is stored for
/// backward, which computes the mask once more. On a CPU element i is kept when 16 bits of the hash of seed and i / 4
/// (SplitMix64: Steele, Lea and Flood 2014) are below (1 - p) 65536; other devices have their own generator, with that
/// seed. 1 - p is rounded to a multiple of 1 / 65536 that is not 0.
class DropoutMask {
 public:
  /// None.
  DropoutMask() = default;
  /// One for p in [0, 1), with a seed from the CPU's generator.
  explicit DropoutMask(double p) : kept_(static_cast<uint32_t>(std::max(1L, std::lround((1 - p) * kSteps)))) {
    auto generator = at::detail::getDefaultCPUGenerator();
    std::lock_guard<std::mutex> lock(generator.mutex());
    seed_ = at::check_generator<at::CPUGeneratorImpl>(generator)->random64();
  }

  bool acts() const { return kept_ < kSteps; }
  bool operator==(const DropoutMask& other) const { return kept_ == other.kept_ && seed_ == other.seed_; }

  /// Whether such tensors can have one; others have LibTorch's dropout.
  static bool is_for(const at::Tensor& x) {
    return (x.is_cpu() || x.is_cuda() || x.is_privateuseone()) && at::isFloatingType(x.scalar_type());
  }

  /// 1 / (1 - p) for the rounded p, by which is multiplied what is kept, so that its mean stays.
  double scale() const { return static_cast<double>(kSteps) / kept_; }

  /// True where an element of a tensor of these sizes is kept; on a CPU, where it is computed along, undefined.
  at::Tensor places(const at::Tensor& like) const {
    if (like.is_cpu()) return {};
    // The generator's numbers fall on the elements in an order that follows from how many there are.
    auto of_device = at::globalContext().defaultGenerator(like.device());
    auto generator = [&] {
      std::lock_guard<std::mutex> lock(of_device.mutex());
      return of_device.clone();
    }();
    generator.set_current_seed(seed_);
    return at::empty(like.sizes(), like.options().dtype(at::kBool)).bernoulli_(1 / scale(), generator);
  }

  /// `factor` x where x is kept, else 0; contiguous. `places` are those of x, if they are known.
  at::Tensor of(const at::Tensor& x, double factor = 1, const at::Tensor& places = {}) const {
    const auto from = x.contiguous();
    if (!from.is_cpu())
      return at::native_dropout_backward(from, places.defined() ? places : this->places(from), factor);
    auto into = at::empty_like(from);
    for_each</*kAdds=*/false>(from, into, factor);
    return into;
  }

  /// into += factor x where x is kept. Both are contiguous.
  void add(const at::Tensor& x, const at::Tensor& into, double factor = 1, const at::Tensor& places = {}) const {
    if (!x.is_cpu() || x.scalar_type() != into.scalar_type()) {
      into.add_(of(x, factor, places));
    } else {
      for_each</*kAdds=*/true>(x, into, factor);
    }
  }

 private:
  static constexpr uint32_t kSteps = 65536;
  static constexpr int64_t kLanes = 4;    // of one hash
  static constexpr int64_t kBlock = 256;  // elements whose hashes are computed together

  using Bits = std::array<uint16_t, kBlock>;

  /// into[i] = factor * from[i] or zero for every element, or, if kAdds, that more than it was.
  template <bool kAdds>
  void for_each(const at::Tensor& from, const at::Tensor& into, double factor) const {
    constexpr int64_t kBlocksOfThread = 128;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, from.scalar_type(), "lora::dropout", [&] {
      const auto* source = from.const_data_ptr<scalar_t>();
      auto* target = into.mutable_data_ptr<scalar_t>();
      const auto size = from.numel();
      parallel_for(0, (size + kBlock - 1) / kBlock, kBlocksOfThread, [&](int64_t first, int64_t last) {
        put_range<kAdds>(source, target, first * kBlock, std::min(last * kBlock, size), factor);
      });
    });
  }

  /// The elements [first, last), where `first` is a multiple of the block.
  template <bool kAdds, class T>
  void put_range(const T* source, T* target, int64_t first, int64_t last, double factor) const {
#if defined(LORA_AVX512)
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, c10::BFloat16>) {
      if (has_avx512() && acts())
        return avx512::drop<kAdds>(seed_, kept_, source, target, first, last, static_cast<float>(factor));
    }
#endif
    Bits bits;
    for (; first + kBlock <= last; first += kBlock) {
      fill(bits, first);
      constexpr std::integral_constant<int64_t, kBlock> count;  // that the compiler knows
      put_block<kAdds>(source + first, target + first, count, bits.data(), factor);
    }
    fill(bits, first);
    put_block<kAdds>(source + first, target + first, last - first, bits.data(), factor);
  }

  /// The same for a block. The compiler knows that these are apart only where they come as arguments; then -O2 makes
  /// vectors of it.
  template <bool kAdds, class T, class Count>
  void put_block(const T* __restrict values, T* __restrict results, Count count, const uint16_t* __restrict bits,
                 double factor) const {
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const auto one = static_cast<Wide>(factor);
    const auto kept = kept_;
    for (int64_t i = 0; i < count; ++i) {
      const auto by = uint32_t{bits[i]} < kept ? one : Wide(0);
      const auto value = static_cast<T>(static_cast<Wide>(values[i]) * by);
      if constexpr (kAdds) {
        results[i] += value;
      } else {
        results[i] = value;
      }
    }
  }

  /// 16 bits for each element from `first` on, which is a multiple of the block.
  void fill(Bits& bits, int64_t first) const {
    std::array<uint64_t, kBlock / kLanes> hashes;
    for (size_t i = 0; i < hashes.size(); ++i) hashes[i] = hash(static_cast<uint64_t>(first / kLanes) + i);
    std::memcpy(bits.data(), hashes.data(), sizeof bits);
  }

  uint64_t hash(uint64_t place) const {
    auto bits = seed_ + (place + 1) * 0x9E3779B97F4A7C15U;
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9U;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBU;
    return bits ^ (bits >> 31);
  }

  uint64_t seed_ = 0;
  uint32_t kept_ = kSteps;

  friend struct MaskedInput;
};

/// `mask.of(x, factor)` as a node of autograd, which keeps the seed.
struct MaskedInput : torch::autograd::Function<MaskedInput> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x, const DropoutMask& mask,
                            double factor) {
    context->saved_data["seed"] = static_cast<int64_t>(mask.seed_);
    context->saved_data["kept"] = static_cast<int64_t>(mask.kept_);
    context->saved_data["factor"] = factor;
    return mask.of(x, factor);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    DropoutMask mask;
    mask.seed_ = static_cast<uint64_t>(context->saved_data["seed"].toInt());
    mask.kept_ = static_cast<uint32_t>(context->saved_data["kept"].toInt());
    return {apply(gradients[0], mask, context->saved_data["factor"].toDouble()), at::Tensor(), at::Tensor()};
  }
};

/// x where a mask keeps it, else 0, not scaled.
inline at::Tensor kept_of(const at::Tensor& x, const DropoutMask& mask) { return MaskedInput::apply(x, mask, 1.0); }

/// Dropout in training mode, with a new mask; LibTorch's in a trace, in which it is recorded.
inline at::Tensor dropout(const at::Tensor& x, double p) {
  if (!DropoutMask::is_for(x) || torch::jit::tracer::isTracing()) return at::dropout(x, p, /*train=*/true);
  const DropoutMask mask(p);
  return MaskedInput::apply(x, mask, mask.scale());
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
