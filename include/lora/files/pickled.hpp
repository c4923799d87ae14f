#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <lora/files/mapped_file.hpp>
#include <lora/files/error.hpp>
#include <lora/version.hpp>

#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// Reads what torch.save wrote of a dictionary of tensors, such as PEFT's older adapter_model.bin, into memory. Nothing
/// in the file is executed. Errors: CheckpointError when it is anything else: another object, one that holds other
/// objects, or the format of PyTorch before 1.6.
inline std::map<std::string, at::Tensor> read_pickled_tensors(const std::filesystem::path& path) {
  const detail::MappedFile file(path);
  const auto bytes = file.text();
  c10::IValue value;
  try {
    value = torch::jit::pickle_load(std::vector<char>(bytes.begin(), bytes.end()));
  } catch (const std::exception& error) {
    const std::string reason = error.what();
    throw CheckpointError(path,
                          "is no dictionary of tensors written by torch.save: ", reason.substr(0, reason.find('\n')));
  }
  if (!value.isGenericDict())
    throw CheckpointError(path, "has to hold a dictionary of tensors, but holds ", value.tagKind());
  std::map<std::string, at::Tensor> tensors;
  for (const auto& item : value.toGenericDict()) {
    if (!item.key().isString() || !item.value().isTensor())
      throw CheckpointError(path, "has to hold a dictionary of tensors, but holds also ", item.value().tagKind());
    tensors[item.key().toStringRef()] = item.value().toTensor();
  }
  return tensors;
}

}  // namespace LORA_ABI
}  // namespace lora
