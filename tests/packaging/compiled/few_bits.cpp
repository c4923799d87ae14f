// A second source file of the same program.
#include <lora/files/bitsandbytes.hpp>
#include <lora/model/module_model.hpp>
#include <lora/quantized_checkpoint.hpp>
#include <lora/weight/four_bit.hpp>
#include <lora/weight/int8.hpp>

#include <filesystem>
#include <stdexcept>

void through_few_bits(torch::nn::Module& model, const std::filesystem::path& file) {
  lora::quantize(model, lora::Int8());
  lora::save_quantized(model, file);
  lora::load_quantized(model, file);
  lora::dequantize(lora::ModuleModel(model));
  const auto weight = torch::tensor({1.0F, -0.5F, 0.0F, 0.25F});
  const auto tensors = lora::bitsandbytes_tensors("a", *lora::NF4().pack(weight), torch::kFloat);
  const auto read = lora::read_bitsandbytes_weight("a", tensors).weight;
  if (!read->dense().equal(lora::dequantize(lora::quantize_nf4(weight)))) throw std::runtime_error("bitsandbytes");
}
