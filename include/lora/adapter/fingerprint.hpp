#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/StringUtil.h>
#include <c10/util/hash.h>

#include <lora/adapter/registry.hpp>
#include <lora/version.hpp>

#include <cstring>
#include <string>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The SHA-1, in hexadecimal digits, of all that decides what an adapter computes: the layers, their methods, scalings
/// and scales, and the numbers in the tensors.
inline std::string fingerprint(const AdapterEntry& entry) {
  std::string content;
  const auto add = [&](double number) {
    char bytes[sizeof number];
    std::memcpy(bytes, &number, sizeof number);
    content.append(bytes, sizeof number);
  };
  for (const auto& part : entry.adapter->parts) {
    content += c10::str(part.changed(), '\n', part.method->info().name, '\n');
    add(part.method->scaling());
    add(entry.scale_of(part));
  }
  entry.adapter->for_each_tensor([&](const AdapterPart& part, const NamedTensor& tensor) {
    const auto values = tensor.tensor->detach().cpu().contiguous();
    content += c10::str(part.name_of(tensor), '\n', values.scalar_type(), values.sizes(), '\n');
    content.append(static_cast<const char*>(values.const_data_ptr()), values.nbytes());
  });
  return c10::sha1(content).str();
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
