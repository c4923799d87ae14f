# What lora's headers include beside LibTorch, as targets that are visible in every directory: nlohmann_json::nlohmann_json
# and lora::fmt. Read by the build and by the installed package, after LoraTorch.cmake.
# Result: the targets, or LORA_DEPENDENCIES_ERROR, a text that says what is missing.

set(LORA_DEPENDENCIES_ERROR)

if(NOT TARGET nlohmann_json::nlohmann_json)
  find_package(nlohmann_json 3.9.1 QUIET GLOBAL)  # the oldest that tests/libtorch_versions.sh runs
endif()
if(NOT TARGET nlohmann_json::nlohmann_json)
  set(LORA_DEPENDENCIES_ERROR "lora: nlohmann/json 3.9.1 or later, which reads and writes the JSON of adapter files, was not found. \
Install it (Debian, Ubuntu: nlohmann-json3-dev) or set nlohmann_json_DIR.")
  return()
endif()

# LibTorch's include folder carries fmt's headers and comes before the system's, so a compiled fmt library would be of
# another version than the headers: fmt is used header-only, whichever headers the compiler finds.
if(NOT TARGET lora::fmt)
  find_package(fmt CONFIG QUIET GLOBAL)
  if(NOT TARGET fmt::fmt-header-only AND NOT EXISTS "${LORA_TORCH_PREFIX}/include/fmt/format.h")
    set(LORA_DEPENDENCIES_ERROR "lora: fmt was found neither among LibTorch's headers nor as a package. Install it \
(Debian, Ubuntu: libfmt-dev) or set fmt_DIR.")
    return()
  endif()
  add_library(lora::fmt INTERFACE IMPORTED GLOBAL)
  set_target_properties(lora::fmt PROPERTIES INTERFACE_COMPILE_DEFINITIONS FMT_HEADER_ONLY=1)
  if(TARGET fmt::fmt-header-only)
    set_target_properties(lora::fmt PROPERTIES INTERFACE_LINK_LIBRARIES fmt::fmt-header-only)
  endif()
endif()
