# lora::compiled: lora::lora with the bodies of its functions in a static library (include/lora/linkage.hpp), for programs
# and shared libraries that link it PRIVATE. It is built along with the first of these, with the compiler and the flags of
# the folder that asks for lora. What has to be alike in all source files (sanitizers, _GLIBCXX_DEBUG, LORA_ABI,
# LORA_DISPATCH_KEY) is set for that folder, or PUBLIC for the target lora_compiled.
if(NOT TARGET lora_compiled)
  add_library(lora_compiled STATIC EXCLUDE_FROM_ALL "${CMAKE_CURRENT_LIST_DIR}/lora_compiled.cpp")
  add_library(lora::compiled ALIAS lora_compiled)
  target_compile_definitions(lora_compiled PUBLIC LORA_COMPILED)
  target_link_libraries(lora_compiled PUBLIC lora::lora)
  set_target_properties(lora_compiled PROPERTIES POSITION_INDEPENDENT_CODE ON)
  # Whose functions call each other as directly as those of headers.
  target_compile_options(lora_compiled PRIVATE $<$<CXX_COMPILER_ID:GNU>:-fno-semantic-interposition>)
endif()
