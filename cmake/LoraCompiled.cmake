# lora::compiled: lora::lora with the bodies of its functions in a static library, which is built along with the first
# program that links it, and with its compiler (include/lora/linkage.hpp).
if(NOT TARGET lora_compiled)
  add_library(lora_compiled STATIC EXCLUDE_FROM_ALL "${CMAKE_CURRENT_LIST_DIR}/lora_compiled.cpp")
  add_library(lora::compiled ALIAS lora_compiled)
  target_compile_definitions(lora_compiled PUBLIC LORA_COMPILED)
  target_link_libraries(lora_compiled PUBLIC lora::lora)
  set_target_properties(lora_compiled PROPERTIES POSITION_INDEPENDENT_CODE ON)
endif()
