#pragma once

#include <lora/system/processor.hpp>
#include <lora/version.hpp>
#include <lora/weight/thin_avx512.hpp>

#if defined(LORA_AVX512)

#include <immintrin.h>

#include <cstdint>

#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 finds that in its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wsign-conversion"  // without optimization some of its functions are macros
#endif

namespace lora {
inline namespace LORA_ABI {
namespace detail {
namespace avx512 {

/// SplitMix64 of eight states.
LORA_AVX512 inline __m512i mixed(__m512i bits) {
  const auto first = _mm512_set1_epi64(static_cast<std::int64_t>(0xBF58476D1CE4E5B9U));
  const auto second = _mm512_set1_epi64(static_cast<std::int64_t>(0x94D049BB133111EBU));
  bits = _mm512_mullo_epi64(_mm512_xor_si512(bits, _mm512_srli_epi64(bits, 30)), first);
  bits = _mm512_mullo_epi64(_mm512_xor_si512(bits, _mm512_srli_epi64(bits, 27)), second);
  return _mm512_xor_si512(bits, _mm512_srli_epi64(bits, 31));
}

/// The elements [first, last) of a DropoutMask's `of`, or, if kAdds, of its `add`, where `first` is a multiple of four:
/// hashes of eight places at a time are bits for 32 elements.
template <bool kAdds, class Number>
LORA_AVX512 void drop(std::uint64_t seed, std::uint32_t kept, const Number* from, Number* into, std::int64_t first,
                      std::int64_t last, float factor) {
  constexpr std::uint64_t kStep = 0x9E3779B97F4A7C15U;
  const auto step = _mm512_set1_epi64(static_cast<std::int64_t>(kStep));
  const auto places = _mm512_add_epi64(_mm512_set1_epi64(first / 4 + 1), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  auto states = _mm512_add_epi64(_mm512_set1_epi64(static_cast<std::int64_t>(seed)), _mm512_mullo_epi64(places, step));
  const auto next = _mm512_set1_epi64(static_cast<std::int64_t>(8 * kStep));
  const auto limit = _mm512_set1_epi16(static_cast<std::int16_t>(kept));
  const auto scale = _mm512_set1_ps(factor);
  for (auto i = first; i < last; i += 2 * kNumbers) {
    const auto is_kept = _mm512_cmplt_epu16_mask(mixed(states), limit);
    states = _mm512_add_epi64(states, next);
    for (int half = 0; half < 2; ++half) {
      const auto at = i + half * kNumbers;
      const auto mask = of_vector(last - at);
      const auto by = _mm512_maskz_mov_ps(static_cast<__mmask16>(is_kept >> (16 * half)), scale);
      const auto some = load(mask, from + at);
      const auto result = kAdds ? _mm512_fmadd_ps(some, by, load(mask, into + at)) : _mm512_mul_ps(some, by);
      store(mask, result, into + at);
    }
  }
}

}  // namespace avx512
}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora

#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#endif
