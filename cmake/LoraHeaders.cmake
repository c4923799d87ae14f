# Every header of the library, each under include/lora. The public ones are compiled alone by the test `headers`.
set(LORA_PUBLIC_HEADERS
  activation.hpp
  adapter_plan.hpp
  adapters.hpp
  attach.hpp
  config.hpp
  extract.hpp
  lora.hpp
  matrix_view.hpp
  merge.hpp
  model.hpp
  options.hpp
  replace.hpp
  report.hpp
  site.hpp
  torchscript.hpp
  version.hpp
  layers/adaptable.hpp
  layers/all.hpp
  layers/attention.hpp
  layers/convolution.hpp
  layers/embedding.hpp
  layers/linear.hpp
  layers/parameter.hpp
  layers/parts.hpp
  layers/recurrent.hpp
  layers/target.hpp
  method/all.hpp
  method/dora.hpp
  method/low_rank.hpp
  method/method.hpp
  modules/adapted.hpp
  modules/attention.hpp
  modules/attention_options.hpp
  modules/conv.hpp
  modules/embedding.hpp
  modules/linear.hpp
  peft/checkpoint.hpp
  peft/config.hpp
  peft/convert.hpp
  peft/error.hpp
  peft/load_options.hpp
  peft/pickled.hpp
  peft/safetensors.hpp
)
set(LORA_DETAIL_HEADERS
  detail/atomic_file.hpp
  detail/atomic_pair.hpp
  detail/attention_mask.hpp
  detail/descriptor.hpp
  detail/fused_attention.hpp
  detail/folder_lock.hpp
  detail/frozen_parameters.hpp
  detail/interception.hpp
  detail/json.hpp
  detail/mapped_file.hpp
  detail/patterns.hpp
  detail/peft_fields.hpp
  detail/peft_tensors.hpp
  detail/plain_execution.hpp
  detail/safetensors_entries.hpp
  detail/safetensors_header.hpp
  detail/safetensors_types.hpp
  detail/scopes.hpp
  detail/script_module.hpp
  detail/select.hpp
  detail/select_full.hpp
  detail/stacked.hpp
  detail/text.hpp
  detail/usage.hpp
  detail/weight_slot.hpp
  detail/weight_table.hpp
)

# A header in the folder that is not in the lists would be missing from the installed package, so that is an error.
if(PROJECT_IS_TOP_LEVEL)
  file(GLOB_RECURSE lora_found RELATIVE "${PROJECT_SOURCE_DIR}/include/lora" CONFIGURE_DEPENDS
       "${PROJECT_SOURCE_DIR}/include/lora/*.hpp")
  set(lora_listed ${LORA_PUBLIC_HEADERS} ${LORA_DETAIL_HEADERS})
  set(lora_not_listed ${lora_found})
  list(REMOVE_ITEM lora_not_listed ${lora_listed})
  set(lora_not_there ${lora_listed})
  list(REMOVE_ITEM lora_not_there ${lora_found})
  if(lora_not_listed OR lora_not_there)
    message(FATAL_ERROR "cmake/LoraHeaders.cmake does not list what is under include/lora.\n"
                        "  missing in the list: ${lora_not_listed}\n  listed, but no file: ${lora_not_there}")
  endif()
endif()

list(TRANSFORM LORA_PUBLIC_HEADERS PREPEND "${PROJECT_SOURCE_DIR}/include/lora/")
list(TRANSFORM LORA_DETAIL_HEADERS PREPEND "${PROJECT_SOURCE_DIR}/include/lora/")
