// Any bytes as a safetensors file: either a CheckpointError, or tensors that lie in the file and survive being written.
#include <lora/files/safetensors.hpp>

#include <numeric>
#include <optional>

#include "memory_file.hpp"

namespace {

using lora::detail::SafetensorsHeader;
using lora::detail::SafetensorsHeaderReader;
using lora::detail::SafetensorsHeaderWriter;

const std::filesystem::path kName = "input";

/// The header of bytes that are not followed by others: the sanitizer sees a reader that goes on.
std::optional<SafetensorsHeader> read_header(std::string_view file, int64_t& data) {
  try {
    return SafetensorsHeaderReader(kName).read(file, data);
  } catch (const lora::CheckpointError&) {
    return std::nullopt;
  }
}

std::optional<lora::Safetensors> open(std::string_view bytes) {
  const fuzz::MemoryFile file(bytes.data(), bytes.size());
  try {
    return lora::open_safetensors(file.path());
  } catch (const lora::CheckpointError&) {
    return std::nullopt;
  }
}

uint64_t sum_of(const torch::Tensor& tensor) {
  const auto* bytes = static_cast<const uint8_t*>(tensor.const_data_ptr());
  return std::accumulate(bytes, bytes + tensor.nbytes(), uint64_t{0});
}

void check_content(const SafetensorsHeader& header, const lora::Safetensors& content, std::string_view values) {
  fuzz::require(content.tensors.size() == header.tensors.size() && content.metadata == header.metadata, "same names");
  int64_t end = 0;
  for (const auto& [info, begin, next] : header.tensors) {
    fuzz::require(begin == end && next >= begin, "one after the other");
    const auto& tensor = content.tensors.at(info.name);
    fuzz::require(tensor.sizes() == info.shape && tensor.scalar_type() == info.dtype, "same tensors");
    fuzz::require(static_cast<int64_t>(tensor.nbytes()) == next - begin, "all bytes");
    const auto part = values.substr(begin, next - begin);
    fuzz::require(sum_of(tensor) == std::accumulate(part.begin(), part.end(), uint64_t{0},
                                                    [](auto sum, char c) { return sum + static_cast<uint8_t>(c); }),
                  "same values");
    end = next;
  }
  fuzz::require(end == static_cast<int64_t>(values.size()), "nothing is left");
}

void check_writing(const SafetensorsHeader& header, size_t value_bytes) {
  std::vector<lora::TensorInfo> infos;
  for (const auto& stored : header.tensors) infos.push_back(stored.info);
  const SafetensorsHeaderWriter writer(kName);
  const auto arranged = writer.arrange(infos, header.metadata);
  int64_t data = 0;
  const auto again = read_header(writer.text(arranged) + std::string(value_bytes, '\0'), data);
  fuzz::require(again && again->metadata == header.metadata, "what is written can be read");
  fuzz::require(again->tensors.size() == header.tensors.size(), "all tensors are written");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  const std::string_view file(reinterpret_cast<const char*>(bytes), size);
  int64_t data = 0;
  const auto header = read_header(file, data);
  const auto content = open(file);
  fuzz::require(header.has_value() == content.has_value(), "header and file are both valid, or neither");
  if (!header) return 0;
  const auto values = file.substr(static_cast<size_t>(data));
  check_content(*header, *content, values);
  check_writing(*header, values.size());
  return 0;
}
