// usage: pack_tensors pack|unpack IN OUT
// pack: each tensor of the file IN, packed as the metadata says under its name ("nf4 64 double", "fp4 128 single",
// "int8"), becomes the tensors of bitsandbytes in the file OUT, as the weight NAME.weight, and NAME.dense, its numbers.
// unpack: of each name in the metadata of IN the weight NAME.weight becomes NAME.dense.
#include <torch/torch.h>

#include <iostream>
#include <lora/files/bitsandbytes.hpp>
#include <lora/files/safetensors.hpp>
#include <sstream>

lora::Quantization quantization(const std::string& text) {
  std::istringstream words(text);
  std::string scheme, scales;
  int64_t block_size = 0;
  words >> scheme >> block_size >> scales;
  if (scheme == "nf4") return lora::NF4().block_size(block_size).double_quantization(scales == "double");
  if (scheme == "fp4") return lora::FP4().block_size(block_size).double_quantization(scales == "double");
  TORCH_CHECK(scheme == "int8", "pack_tensors: what is \"", text, "\"?");
  return lora::Int8();
}

int main(int argc, char** argv) {
  if (argc != 4) return std::cerr << "usage: pack_tensors pack|unpack IN OUT\n", 2;
  const auto in = lora::open_safetensors(argv[2]);
  std::map<std::string, torch::Tensor> out;
  for (const auto& [name, how] : in.metadata) {
    if (std::string(argv[1]) == "pack") {
      const auto& tensor = in.tensors.at(name);
      const auto weight = quantization(how).pack(tensor);
      for (const auto& part : lora::bitsandbytes_tensors(name + ".weight", *weight, tensor.scalar_type()))
        out.insert(part);
      out[name + ".dense"] = weight->dense();
    } else {
      out[name + ".dense"] = lora::read_bitsandbytes_weight(name + ".weight", in.tensors).weight->dense();
    }
  }
  lora::write_safetensors(argv[3], out);
}
