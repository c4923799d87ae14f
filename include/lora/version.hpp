#pragma once

/// The version of lora, written here and nowhere else: the build and the installed package read it from this file.
#define LORA_VERSION_MAJOR 0
#define LORA_VERSION_MINOR 1
#define LORA_VERSION_PATCH 0

#define LORA_JOIN_VERSION_(major, minor, patch) v##major##_##minor##_##patch
#define LORA_JOIN_VERSION(major, minor, patch) LORA_JOIN_VERSION_(major, minor, patch)

/// The inline namespace of every name of the library, e.g. lora::v0_1_0: two shared libraries of one process that were
/// built with different versions of these headers share no function, and so none over classes of another layout.
#ifndef LORA_ABI
#define LORA_ABI LORA_JOIN_VERSION(LORA_VERSION_MAJOR, LORA_VERSION_MINOR, LORA_VERSION_PATCH)
#endif
#define LORA_TEXT_OF_(name) #name
#define LORA_TEXT_OF(name) LORA_TEXT_OF_(name)
#define LORA_ABI_NAME LORA_TEXT_OF(LORA_ABI)
