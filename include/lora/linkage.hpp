#pragma once

// Where the bodies of functions are. By default in the headers, and each program compiles those that it calls. A
// program that links lora::compiled, or defines LORA_COMPILED and compiles cmake/lora_compiled.cpp along, has them from
// there: its headers only declare what is marked so, and a compiler needs less time for them. Such a header says what
// it offers first, and how it is done below.

#if defined(LORA_COMPILED)
#define LORA_INLINE
#else
#define LORA_INLINE inline
#endif

/// Whether the bodies of functions that are LORA_INLINE are to be seen: not in a program that has them from elsewhere.
#if defined(LORA_COMPILED) && !defined(LORA_COMPILING)
#define LORA_BODIES 0
#else
#define LORA_BODIES 1
#endif
