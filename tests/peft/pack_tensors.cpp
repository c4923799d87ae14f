// usage: pack_tensors pack|unpack IN OUT
// pack: each tensor of the file IN, packed as the metadata says under its name ("nf4 64 double", "fp4 128 single",
// "int8"), becomes the tensors of bitsandbytes in the file OUT, as the weight NAME.weight, and NAME.dense, its numbers.
// Of "loftq 4 2", NF4 after two steps of LoftQ with a rank of 4, become NAME.dense, NAME.A and NAME.B, scaled. unpack:
// of each name in the metadata of IN the weight NAME.weight becomes NAME.dense.
#include <torch/torch.h>

#include <iostream>
#include <lora/lora.hpp>
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

/// What LoftQ makes of a matrix, by an adapter of which alpha is not the rank.
void add_loftq(const std::string& name, const torch::Tensor& matrix, int64_t rank, int64_t steps,
               std::map<std::string, torch::Tensor>& out) {
  torch::nn::Sequential model(torch::nn::Linear(torch::nn::LinearOptions(matrix.size(1), matrix.size(0)).bias(false)));
  model[0]->as<torch::nn::Linear>()->weight.set_data(matrix);
  auto config = lora::LoRAConfig(rank).alpha(3.0 * static_cast<double>(rank)).target_modules(lora::all_linear);
  auto adapters = lora::attach(*model, config.quantize(lora::NF4().double_quantization(false)).loftq(steps));
  const auto tensors = adapters.named_parameters();
  out[name + ".A"] = tensors["0.lora_A"].detach();
  out[name + ".B"] = tensors["0.lora_B"].detach() * adapters.scaling("0");
  lora::dequantize(*model);
  out[name + ".dense"] = model[0]->as<torch::nn::Linear>()->weight;
}

int main(int argc, char** argv) {
  if (argc != 4) return std::cerr << "usage: pack_tensors pack|unpack IN OUT\n", 2;
  const auto in = lora::open_safetensors(argv[2]);
  std::map<std::string, torch::Tensor> out;
  for (const auto& [name, how] : in.metadata) {
    if (std::string(argv[1]) == "pack") {
      const auto& tensor = in.tensors.at(name);
      std::istringstream words(how);
      std::string scheme;
      int64_t rank = 0, steps = 0;
      if (words >> scheme >> rank >> steps && scheme == "loftq") {
        add_loftq(name, tensor, rank, steps, out);
        continue;
      }
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
