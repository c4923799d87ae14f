// A second source file of the same program.
#include <lora/quantized_checkpoint.hpp>
#include <lora/weight/int8.hpp>

#include <filesystem>

void through_few_bits(torch::nn::Module& model, const std::filesystem::path& file) {
  lora::quantize(model, lora::Int8());
  lora::save_quantized(model, file);
  lora::load_quantized(model, file);
  lora::dequantize(model);
}
