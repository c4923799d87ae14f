# How the tests, examples and benchmarks of this project are compiled; users of lora have no part in it.

# All of LibTorch costs a compiler 15 seconds, so it is compiled once and shared.
file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/lora_precompiled.cpp" "")
add_library(lora_precompiled OBJECT "${CMAKE_CURRENT_BINARY_DIR}/lora_precompiled.cpp")
target_link_libraries(lora_precompiled PRIVATE lora::lora)
target_compile_options(lora_precompiled PRIVATE -Wall -Wextra $<$<CONFIG:Release>:-O1>)
target_precompile_headers(lora_precompiled PRIVATE <torch/torch.h>)
set(LORA_PROGRAM_FOLDER "${CMAKE_CURRENT_BINARY_DIR}/programs")

# lora_add_program(NAME SOURCE... [LIBRARIES TARGET...]). A release is compiled with -O1, in two thirds of the time that
# -O3 takes: the work of these programs is done inside LibTorch.
function(lora_add_program name)
  cmake_parse_arguments(PARSE_ARGV 1 program "" "" LIBRARIES)
  add_executable(${name} ${program_UNPARSED_ARGUMENTS})
  target_link_libraries(${name} PRIVATE lora::lora ${program_LIBRARIES})
  target_compile_options(${name} PRIVATE -Wall -Wextra $<$<CONFIG:Release>:-O1>)
  target_precompile_headers(${name} REUSE_FROM lora_precompiled)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${LORA_PROGRAM_FOLDER}")
endfunction()
