#pragma once

// The whole library. Each of these headers also stands alone.

#include <lora/adapter/activation.hpp>
#include <lora/extract.hpp>
#include <lora/adapter/merge.hpp>
#include <lora/adapter/report.hpp>
#include <lora/adapter/weighted.hpp>
#include <lora/adapters.hpp>
#include <lora/attach.hpp>
#include <lora/batch_rows.hpp>
#include <lora/combine.hpp>
#include <lora/config.hpp>
#include <lora/files/bitsandbytes.hpp>
#include <lora/files/safetensors.hpp>
#include <lora/functional.hpp>
#include <lora/hot_swap.hpp>
#include <lora/method/all.hpp>
#include <lora/model/module_model.hpp>
#include <lora/model/replace.hpp>
#include <lora/modules/attention.hpp>
#include <lora/modules/conv.hpp>
#include <lora/modules/embedding.hpp>
#include <lora/modules/linear.hpp>
#include <lora/options.hpp>
#include <lora/peft/checkpoint.hpp>
#include <lora/peft/config.hpp>
#include <lora/peft/convert.hpp>
#include <lora/pool.hpp>
#include <lora/quantize.hpp>
#include <lora/quantized_checkpoint.hpp>
#include <lora/site.hpp>
#include <lora/torchscript.hpp>
#include <lora/version.hpp>
#include <lora/weight/four_bit.hpp>
#include <lora/weight/int8.hpp>
#include <lora/weight/view.hpp>
