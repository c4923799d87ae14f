# lora_jinja: the engine that renders the chat templates of models in examples/finetune_gpt and its tests. Its sources
# are those of llama.cpp's common/jinja, which examples/finetune_gpt/prepare_jinja.py puts into build/jinja. Without them
# there is no such target, and the programs say so where they meet a chat template.
set(LORA_JINJA "${CMAKE_CURRENT_LIST_DIR}/../build/jinja" CACHE PATH "Where prepare_jinja.py put the Jinja engine")
if(TARGET lora_jinja)
  return()
endif()
if(NOT EXISTS "${LORA_JINJA}/json.h")
  message(STATUS "lora: no Jinja engine in ${LORA_JINJA}, so finetune_gpt and generate render no chat templates; \
examples/finetune_gpt/prepare_jinja.py fetches one")
  return()
endif()
file(GLOB jinja_sources CONFIGURE_DEPENDS "${LORA_JINJA}/*.cpp" "${LORA_JINJA}/jinja/*.cpp")
add_library(lora_jinja STATIC ${jinja_sources})
target_include_directories(lora_jinja SYSTEM PUBLIC "${LORA_JINJA}")
target_link_libraries(lora_jinja PRIVATE lora::lora)  # the same nlohmann/json, and LibTorch's ABI
target_compile_options(lora_jinja PRIVATE -w $<$<CONFIG:Release>:-O1>)
