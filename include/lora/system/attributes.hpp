#pragma once

/// Marks a function whose static variables the shared libraries of one process have in common, also libraries that hide
/// their symbols. On Windows every library has its own.
#if defined(_WIN32)
#define LORA_SHARED
#else
#define LORA_SHARED __attribute__((visibility("default")))
#endif
