# How the tests, examples and benchmarks of this project are compiled; users of lora have no part in it.

# lora_precompile(NAME LIBRARY OPTION...): all of LibTorch, which costs a compiler 15 seconds, compiled once and shared by
# programs with these options and this form of the library. They have to be the same for all of them: what was compiled
# with others is passed over by some compilers, and by others it puts its own in their place.
function(lora_precompile name library)
  file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/${name}.cpp" "")
  add_library(${name} OBJECT "${CMAKE_CURRENT_BINARY_DIR}/${name}.cpp")
  target_link_libraries(${name} PRIVATE ${library})
  target_compile_options(${name} PRIVATE -Wall -Wextra ${ARGN})
  target_precompile_headers(${name} PRIVATE <torch/torch.h>)
endfunction()

# What programs share; the tests have their own. With so many of them, the library is compiled once for all.
lora_precompile(lora_precompiled lora::compiled $<$<CONFIG:Release>:-O2>)
set(LORA_PRECOMPILED lora_precompiled)
set(LORA_PROGRAM_FOLDER "${CMAKE_CURRENT_BINARY_DIR}/programs")

# lora_add_program(NAME SOURCE... [LIBRARIES TARGET...])
function(lora_add_program name)
  cmake_parse_arguments(PARSE_ARGV 1 program "" "" LIBRARIES)
  add_executable(${name} ${program_UNPARSED_ARGUMENTS})
  get_target_property(library ${LORA_PRECOMPILED} LINK_LIBRARIES)
  target_link_libraries(${name} PRIVATE ${library} ${program_LIBRARIES})
  get_target_property(options ${LORA_PRECOMPILED} COMPILE_OPTIONS)
  target_compile_options(${name} PRIVATE ${options})
  target_precompile_headers(${name} REUSE_FROM ${LORA_PRECOMPILED})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${LORA_PROGRAM_FOLDER}")
endfunction()
