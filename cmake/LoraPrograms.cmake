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

# With so many programs, the library is compiled once for all.
lora_precompile(lora_precompiled lora::compiled $<$<CONFIG:Release>:-O2>)
set(LORA_PROGRAM_FOLDER "${CMAKE_CURRENT_BINARY_DIR}/programs")

# lora_add_program(NAME SOURCE... [LIKE TARGET] [LIBRARIES TARGET...]): LIKE a target of lora_precompile, which is
# lora_precompiled unless it is said.
function(lora_add_program name)
  cmake_parse_arguments(PARSE_ARGV 1 program "" "LIKE" LIBRARIES)
  if(NOT program_LIKE)
    set(program_LIKE lora_precompiled)
  endif()
  add_executable(${name} ${program_UNPARSED_ARGUMENTS})
  get_target_property(library ${program_LIKE} LINK_LIBRARIES)
  target_link_libraries(${name} PRIVATE ${library} ${program_LIBRARIES})
  get_target_property(options ${program_LIKE} COMPILE_OPTIONS)
  target_compile_options(${name} PRIVATE ${options})
  target_precompile_headers(${name} REUSE_FROM ${program_LIKE})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${LORA_PROGRAM_FOLDER}")
endfunction()
