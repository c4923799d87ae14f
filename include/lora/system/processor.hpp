#pragma once

#include <lora/version.hpp>

// What the processor is that runs the program, where a compiler lets one ask, and functions for some of them only.

#if defined(__x86_64__) && defined(__GNUC__)

/// In front of a function whatever the processor is that the program is compiled for; it may run where there is AVX2.
#define LORA_AVX2 __attribute__((target("avx2,fma")))

/// The same where there is AVX-512, as `has_avx512` means it.
#define LORA_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))

#endif

namespace lora {
inline namespace LORA_ABI {
namespace detail {

#if defined(__x86_64__) && defined(__GNUC__)

inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

/// AVX-512 as all processors for servers have it, and AVX2.
inline bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

inline bool is_by_intel() { return __builtin_cpu_is("intel"); }

#else

inline bool has_avx2() { return false; }
inline bool has_avx512() { return false; }
inline bool is_by_intel() { return false; }

#endif

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
