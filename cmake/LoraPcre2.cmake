# The target lora::pcre2: the regular expressions of tokenizers, for the example and its tests.
if(NOT TARGET lora::pcre2)
  find_path(LORA_PCRE2_INCLUDE pcre2.h)
  find_library(LORA_PCRE2_LIBRARY pcre2-8)
  if(NOT LORA_PCRE2_INCLUDE OR NOT LORA_PCRE2_LIBRARY)
    message(FATAL_ERROR "lora: finetune_gpt and the tests need PCRE2. Install it (Debian, Ubuntu: libpcre2-dev) or set \
LORA_PCRE2_INCLUDE and LORA_PCRE2_LIBRARY.")
  endif()
  add_library(lora::pcre2 INTERFACE IMPORTED GLOBAL)
  set_target_properties(lora::pcre2 PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${LORA_PCRE2_INCLUDE}"
                        INTERFACE_LINK_LIBRARIES "${LORA_PCRE2_LIBRARY}")
endif()
