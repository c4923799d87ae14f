// usage: read_safetensors PACKED SCRATCH
// Reads many safetensors files in one process. PACKED holds them one after the other, each behind its length in 8 bytes
// (little-endian); each becomes the file SCRATCH for a while. Prints a line of JSON for each: {"tensors": {name:
// [dtype, shape, CRC-32 of the bytes]}, "metadata": {...}}, or the error as a string.
#include <torch/torch.h>

#include <array>
#include <fstream>
#include <iostream>
#include <lora/files/safetensors.hpp>
#include <nlohmann/json.hpp>

using nlohmann::json;

/// The checksum of Python's zlib.crc32.
uint32_t crc32(std::string_view bytes) {
  static const auto table = [] {
    std::array<uint32_t, 256> table{};
    for (uint32_t i = 0; i < table.size(); ++i) {
      table[i] = i;
      for (int bit = 0; bit < 8; ++bit) table[i] = (table[i] >> 1) ^ (table[i] % 2 != 0 ? 0xEDB88320U : 0);
    }
    return table;
  }();
  uint32_t sum = ~0U;
  for (const unsigned char byte : bytes) sum = (sum >> 8) ^ table[(sum ^ byte) % table.size()];
  return ~sum;
}

json read(const std::filesystem::path& path) {
  try {
    const auto content = lora::open_safetensors(path);
    auto result = json{{"tensors", json::object()}, {"metadata", content.metadata}};
    for (const auto& [name, tensor] : content.tensors) {
      const auto bytes = std::string_view(static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes());
      result["tensors"][name] = {c10::toString(tensor.scalar_type()), tensor.sizes().vec(), crc32(bytes)};
    }
    return result;
  } catch (const lora::CheckpointError& error) {
    return error.what_without_backtrace();
  }
}

int main(int argc, char** argv) {
  if (argc != 3) return std::cerr << "usage: read_safetensors PACKED SCRATCH\n", 2;
  std::ifstream packed(argv[1], std::ios::binary);
  std::string bytes;
  uint64_t length = 0;
  while (packed.read(reinterpret_cast<char*>(&length), sizeof(length))) {
    bytes.resize(length);
    packed.read(bytes.data(), static_cast<std::streamsize>(length));
    std::ofstream(argv[2], std::ios::binary) << bytes;
    std::cout << read(argv[2]).dump(-1, ' ', true, json::error_handler_t::replace) << "\n";
  }
}
