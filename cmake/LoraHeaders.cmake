# Every header of the library, each under include/lora. The public ones are compiled alone by the test `headers`.
set(LORA_PUBLIC_HEADERS
  adapters.hpp
  attach.hpp
  batch_rows.hpp
  combine.hpp
  config.hpp
  functional.hpp
  fwd.hpp
  hot_swap.hpp
  lora.hpp
  options.hpp
  pool.hpp
  site.hpp
  torchscript.hpp
  version.hpp
  adapter/activation.hpp
  adapter/adapter.hpp
  adapter/combine_options.hpp
  extract.hpp
  quantize.hpp
  quantized_checkpoint.hpp
  adapter/merge.hpp
  adapter/report.hpp
  adapter/weighted.hpp
  files/bitsandbytes.hpp
  files/error.hpp
  files/pickled.hpp
  files/safetensors.hpp
  layers/adaptable.hpp
  layers/all.hpp
  layers/attention.hpp
  layers/convolution.hpp
  layers/embedding.hpp
  layers/layer_weight.hpp
  layers/linear.hpp
  layers/parameter.hpp
  layers/recurrent.hpp
  method/all.hpp
  method/contract.hpp
  method/dora.hpp
  method/full_delta.hpp
  method/ia3.hpp
  method/low_rank.hpp
  method/swappable.hpp
  method/term.hpp
  method/vera.hpp
  model/model.hpp
  model/module_model.hpp
  model/replace.hpp
  model/script/model.hpp
  modules/adapted.hpp
  modules/attention.hpp
  modules/attention/options.hpp
  modules/conv.hpp
  modules/embedding.hpp
  modules/linear.hpp
  peft/checkpoint.hpp
  peft/config.hpp
  peft/convert.hpp
  peft/load_options.hpp
  train/checkpointing.hpp
  train/cross_entropy.hpp
  train/optimizer.hpp
  train/schedule.hpp
  weight/base.hpp
  weight/four_bit.hpp
  weight/int8.hpp
  weight/quantized.hpp
  weight/shape.hpp
  weight/use.hpp
  weight/view.hpp
)
set(LORA_DETAIL_HEADERS
  method/bias_update.hpp
  adapter/combined_update.hpp
  adapter/factors.hpp
  adapter/held_weights.hpp
  adapter/loftq.hpp
  adapter/plan.hpp
  adapter/pruning.hpp
  adapter/registry.hpp
  adapter/start_values.hpp
  files/atomic_file.hpp
  files/atomic_pair.hpp
  files/descriptor.hpp
  files/folder_lock.hpp
  files/json.hpp
  files/mapped_file.hpp
  files/safetensors/entries.hpp
  files/safetensors/header.hpp
  files/safetensors/types.hpp
  intercept/fused_attention.hpp
  intercept/kernels.hpp
  intercept/observe.hpp
  intercept/operands.hpp
  intercept/scope.hpp
  intercept/weight_kernel.hpp
  intercept/weight_table.hpp
  layers/files.hpp
  layers/norm_limit.hpp
  adapter/fingerprint.hpp
  dropout.hpp
  low_rank_linear.hpp
  model/frozen_parameters.hpp
  model/index.hpp
  model/script/module.hpp
  model/script/plain_execution.hpp
  modules/attention/mask.hpp
  modules/attention/packed.hpp
  peft/folder_name.hpp
  peft/schema.hpp
  peft/tables.hpp
  peft/tensors.hpp
  selection/candidate.hpp
  selection/full.hpp
  selection/patterns.hpp
  selection/selection.hpp
  selection/text.hpp
  system/attributes.hpp
  system/files.hpp
  system/libtorch.hpp
  train/flat_buffer.hpp
  train/new_graph.hpp
  train/run_state.hpp
  weight/codec/avx2.hpp
  weight/codec/avx512.hpp
  weight/codec/input.hpp
  weight/codec/kernels.hpp
  weight/codec/plain.hpp
  weight/codec/statistics.hpp
  weight/key.hpp
  weight/merged_weights.hpp
  weight/part.hpp
  weight/placeholder.hpp
  weight/quantized_product.hpp
  weight/rounding_error.hpp
  weight/slot.hpp
  weight/stamp.hpp
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
