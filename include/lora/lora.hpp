#pragma once

// The whole library. Each of these headers also stands alone.

#include <lora/activation.hpp>
#include <lora/adapters.hpp>
#include <lora/attach.hpp>
#include <lora/config.hpp>
#include <lora/extract.hpp>
#include <lora/matrix_view.hpp>
#include <lora/merge.hpp>
#include <lora/method/all.hpp>
#include <lora/model.hpp>
#include <lora/modules/attention.hpp>
#include <lora/modules/conv.hpp>
#include <lora/modules/embedding.hpp>
#include <lora/modules/linear.hpp>
#include <lora/options.hpp>
#include <lora/peft/checkpoint.hpp>
#include <lora/peft/config.hpp>
#include <lora/peft/convert.hpp>
#include <lora/peft/safetensors.hpp>
#include <lora/replace.hpp>
#include <lora/report.hpp>
#include <lora/site.hpp>
#include <lora/torchscript.hpp>
#include <lora/version.hpp>
