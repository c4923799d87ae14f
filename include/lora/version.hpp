#pragma once

/// The version of lora, written here and nowhere else: the build and the installed package read it from this file.
#define LORA_VERSION_MAJOR 0
#define LORA_VERSION_MINOR 1
#define LORA_VERSION_PATCH 0
