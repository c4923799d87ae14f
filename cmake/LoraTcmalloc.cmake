# The target lora::tcmalloc: malloc by tcmalloc where the machine has it, and else nothing, for programs that train or
# serve a whole model. Tensors of many sizes that come and go leave holes in the heap of glibc: a tenth of what a process
# takes.
if(NOT TARGET lora::tcmalloc)
  add_library(lora::tcmalloc INTERFACE IMPORTED GLOBAL)
  find_library(LORA_TCMALLOC NAMES tcmalloc_minimal libtcmalloc_minimal.so.4)
  if(LORA_TCMALLOC AND NOT CMAKE_CXX_FLAGS MATCHES "-fsanitize")  # a sanitizer has a malloc of its own
    set_target_properties(lora::tcmalloc PROPERTIES INTERFACE_LINK_LIBRARIES "${LORA_TCMALLOC}")
  else()
    message(STATUS "lora: the examples take the system's malloc, with which they need more memory than with tcmalloc \
(Debian, Ubuntu: libgoogle-perftools-dev)")
  endif()
endif()
