#pragma once

#include <lora/files/error.hpp>
#include <lora/linkage.hpp>
#include <lora/version.hpp>
#include <lora/weight/quantized.hpp>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

// Packed weights among the tensors of a checkpoint, under the names that bitsandbytes 0.50 gives them, so that Python
// loads what is written here and the other way round.
//
//   4 bits                                              8 bits
//   layer.weight                        Byte (n, 1)     layer.weight         Char, shaped as the weight
//   layer.weight.absmax                 Float or Byte   layer.SCB            Float (rows)
//   layer.weight.quant_map              Float (16)      layer.weight_format  Byte (), 0
//   layer.weight.nested_absmax          Float           (of a parameter that is not called "weight": its name
//   layer.weight.nested_quant_map       Float (256)      followed by ".SCB" and "_format")
//   layer.weight.quant_state.bitsandbytes__nf4  Byte, JSON
//
// The two nested ones are there when the scales are double quantized.

namespace lora {
inline namespace LORA_ABI {

/// A weight of a file in 4 or 8 bits.
struct BitsandbytesWeight {
  std::shared_ptr<const QuantizedWeight> weight;
  std::optional<at::ScalarType> dtype;  ///< In what it is computed; files of 8 bits do not say that.
};

/// What bitsandbytes would write for the weight of that name. `dtype` is what the weight is computed in: Float, Half or
/// BFloat16, which files of 8 bits do not say. The tensors are on the weight's device, and share its memory.
///
/// Throws c10::ValueError for another type of a weight in 4 bits, and c10::NotImplementedError for a weight that is in
/// neither NF4, FP4 nor int8.
LORA_INLINE std::map<std::string, at::Tensor> bitsandbytes_tensors(const std::string& name,
                                                                   const QuantizedWeight& weight, at::ScalarType dtype);

/// All names under which parts of a weight of that name may be in a checkpoint, its own first.
LORA_INLINE std::vector<std::string> bitsandbytes_names(const std::string& name);

/// Whether there is a weight of that name in 4 or 8 bits among the tensors of a checkpoint; also where some of its
/// parts are missing, which read_bitsandbytes_weight says.
LORA_INLINE bool is_bitsandbytes_weight(const std::string& name, const std::map<std::string, at::Tensor>& tensors);

/// The weight of that name, from the tensors of a checkpoint. It shares their memory.
///
/// Errors: CheckpointError that names the tensor which is missing, or does not fit the others, instead of a file.
LORA_INLINE BitsandbytesWeight read_bitsandbytes_weight(const std::string& name,
                                                        const std::map<std::string, at::Tensor>& tensors);

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/core/Tensor.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <nlohmann/json.hpp>

#include <lora/files/json.hpp>
#include <lora/weight/four_bit.hpp>
#include <lora/weight/int8.hpp>

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <utility>

namespace lora {
inline namespace LORA_ABI {

namespace detail {

constexpr auto kStatePrefix = ".quant_state.bitsandbytes__";
constexpr FourBitType kFourBitTypes[] = {FourBitType::kNF4, FourBitType::kFP4};

/// The types that bitsandbytes computes in, as it writes them.
inline const std::vector<std::pair<std::string, at::ScalarType>>& bitsandbytes_types() {
  static const std::vector<std::pair<std::string, at::ScalarType>> types = {
      {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}};
  return types;
}

inline std::string state_name(const std::string& name, FourBitType type) {
  return name + kStatePrefix + code_of(type).in_files;
}

/// "layer.SCB" for "layer.weight".
inline std::string scale_name(const std::string& name) {
  constexpr std::string_view last = "weight";
  const auto module = name.size() - std::min(name.size(), last.size());
  const bool is_weight = name.compare(module, name.npos, last) == 0 && (module == 0 || name[module - 1] == '.');
  return is_weight ? name.substr(0, module) + "SCB" : name + ".SCB";
}

inline std::string format_name(const std::string& name) { return name + "_format"; }

inline at::Tensor bytes_of(const std::string& text) {
  auto bytes = at::empty({static_cast<int64_t>(text.size())}, at::kByte);
  std::copy(text.begin(), text.end(), bytes.mutable_data_ptr<std::uint8_t>());
  return bytes;
}

inline at::Tensor values_of(FourBitType type) {
  auto values = at::empty({16}, at::kFloat);
  std::copy_n(code_of(type).values, 16, values.mutable_data_ptr<float>());
  return values;
}

/// Reads one weight; errors name the tensor that is wrong.
class BitsandbytesReader {
 public:
  BitsandbytesReader(const std::string& name, const std::map<std::string, at::Tensor>& tensors)
      : name_(name), tensors_(tensors) {}

  BitsandbytesWeight read() const {
    for (const auto type : kFourBitTypes)
      if (tensors_.count(state_name(name_, type)) != 0) return read_four_bit(type);
    if (tensors_.count(scale_name(name_)) != 0) return read_int8();
    throw CheckpointError(name_, "is no weight in 4 or 8 bits: there is neither \"",
                          state_name(name_, kFourBitTypes[0]), "\" nor \"", state_name(name_, kFourBitTypes[1]),
                          "\" nor \"", scale_name(name_), "\"");
  }

 private:
  BitsandbytesWeight read_four_bit(FourBitType type) const {
    const auto state_of = state_name(name_, type);
    const auto state = read_state(state_of);
    FourBitTensor packed;
    packed.type = type;
    const auto type_name = member(state_of, state, "quant_type", "a string", &nlohmann::json::is_string);
    check(type_name == code_of(type).in_files, state_of, "\"quant_type\" has to be \"", code_of(type).in_files,
          "\", as in the name, but is ", type_name.dump());
    packed.block_size = integer(state_of, state, "blocksize");
    check(NF4().block_size(packed.block_size).is_valid(), state_of,
          "\"blocksize\" has to be a power of two from 32 to ", "4096, but is ", packed.block_size);
    const auto shape = member(state_of, state, "shape", "a list of sizes", &nlohmann::json::is_array);
    packed.codes = codes();
    const int64_t most = 2 * packed.codes.numel();
    int64_t numbers = 1;
    for (const auto& size : shape) {
      check(size.is_number_integer() && size >= 1 && size <= most, state_of,
            "\"shape\" has to be a list of sizes that fit ", packed.codes.numel(), " bytes, but is ", shape.dump());
      packed.sizes.push_back(size.get<int64_t>());
      check(numbers <= most / packed.sizes.back(), name_, "has ", packed.codes.numel(), " bytes, too few for ",
            shape.dump(), " numbers of 4 bits");
      numbers *= packed.sizes.back();
    }
    check((numbers + 1) / 2 == packed.codes.numel(), name_, "has ", packed.codes.numel(), " bytes, but ", shape.dump(),
          " numbers of 4 bits need ", (numbers + 1) / 2);
    const auto map = floats(".quant_map", 16);
    check(at::allclose(map.to(at::kCPU), values_of(type), 0, 1e-6), name_ + ".quant_map", "holds other numbers than ",
          code_of(type).name, " has: ", list(map));
    const auto blocks = (numbers + packed.block_size - 1) / packed.block_size;
    if (tensors_.count(name_ + ".nested_absmax") != 0) {
      packed.absmax = tensor(name_ + ".absmax", blocks);
      check(packed.absmax.scalar_type() == at::kByte, name_ + ".absmax", "has to be Byte beside nested_absmax, but is ",
            packed.absmax.scalar_type());
      const auto nested_size = integer(state_of, state, "nested_blocksize");
      check(nested_size == kNestedBlockSize, state_of, "\"nested_blocksize\" has to be ", kNestedBlockSize, ", but is ",
            nested_size);
      packed.nested_absmax = floats(".nested_absmax", (blocks + kNestedBlockSize - 1) / kNestedBlockSize);
      packed.nested_map = floats(".nested_quant_map", 256);
      if (packed.nested_map.is_cpu() && at::equal(packed.nested_map, dynamic_map_tensor()))
        packed.nested_map = dynamic_map_tensor();  // that all have in common
      packed.offset = member(state_of, state, "nested_offset", "a number", &nlohmann::json::is_number).get<float>();
    } else {
      packed.absmax = floats(".absmax", blocks);
    }
    const auto dtype = member(state_of, state, "dtype", "a string", &nlohmann::json::is_string).get<std::string>();
    const auto& types = bitsandbytes_types();
    const auto found =
        std::find_if(types.begin(), types.end(), [&](const auto& known) { return known.first == dtype; });
    check(found != types.end(), state_of, "\"dtype\" has to be float32, float16 or bfloat16, but is \"", dtype, "\"");
    return {std::make_shared<FourBitWeight>(std::move(packed)), found->second};
  }

  BitsandbytesWeight read_int8() const {
    const auto codes = tensor(name_);
    check(codes.scalar_type() == at::kChar && codes.dim() > 0 && codes.numel() > 0, name_,
          "has to be Char with a size for each dimension beside \"", scale_name(name_), "\", but is ",
          codes.scalar_type(), " ", codes.sizes());
    const auto format = tensors_.find(format_name(name_));
    if (format != tensors_.end()) {
      const auto is_row = format->second.numel() == 1 && format->second.item<double>() == 0;
      check(is_row, format_name(name_), "has to be 0, for rows one after the other, but is ", list(format->second));
    }
    const auto absmax = tensor(scale_name(name_), codes.size(0)).to(at::kFloat).contiguous().view({-1});
    return {std::make_shared<Int8Weight>(Int8Tensor{codes.contiguous(), absmax}), std::nullopt};
  }

  template <class... Reason>
  static void check(bool holds, const std::string& name, const Reason&... reason) {
    if (!holds) throw CheckpointError(name, reason...);
  }

  static std::string list(const at::Tensor& tensor) {
    const auto values = tensor.to(at::kCPU, at::kDouble).contiguous();
    return c10::str(c10::ArrayRef<double>(values.const_data_ptr<double>(), static_cast<size_t>(values.numel())));
  }

  const at::Tensor& tensor(const std::string& name) const {
    const auto found = tensors_.find(name);
    check(found != tensors_.end() && found->second.defined(), name, "is missing, beside the other tensors of \"", name_,
          "\"");
    return found->second;
  }

  at::Tensor tensor(const std::string& name, int64_t numel) const {
    const auto& found = tensor(name);
    check(found.numel() == numel, name, "has to hold ", numel, " numbers to fit \"", name_, "\", but is ",
          found.sizes());
    return found.contiguous().view({-1});
  }

  at::Tensor floats(const char* suffix, int64_t numel) const {
    const auto found = tensor(name_ + suffix, numel);
    check(found.is_floating_point(), name_ + suffix, "has to be Float, but is ", found.scalar_type());
    return found.to(at::kFloat);
  }

  /// The bytes of the codes, which bitsandbytes may have written as numbers of some other type (quant_storage).
  at::Tensor codes() const {
    const auto found = tensor(name_).contiguous().view({-1});
    return found.scalar_type() == at::kByte ? found : found.view(at::kByte);
  }

  nlohmann::json read_state(const std::string& name) const {
    const auto bytes = tensor(name).to(at::kCPU).contiguous();
    check(bytes.scalar_type() == at::kByte, name, "has to be Byte, the text of an object of JSON, but is ",
          bytes.scalar_type());
    const std::string_view text(reinterpret_cast<const char*>(bytes.const_data_ptr<std::uint8_t>()),
                                static_cast<size_t>(bytes.numel()));
    const std::filesystem::path place = name;
    auto state = parse_json<nlohmann::json>(place, text, JsonRules<nlohmann::json>(place));
    check(state.is_object(), name, "has to be an object of JSON, but is ", state.dump());
    return state;
  }

  static nlohmann::json member(const std::string& name, const nlohmann::json& state, const char* key, const char* what,
                               bool (nlohmann::json::*fits)() const noexcept) {
    check(state.contains(key) && (state[key].*fits)(), name, "\"", key, "\" has to be ", what, ", but is ",
          state.contains(key) ? state[key].dump() : "missing");
    return state[key];
  }

  static int64_t integer(const std::string& name, const nlohmann::json& state, const char* key) {
    return member(name, state, key, "a number", &nlohmann::json::is_number_integer).get<int64_t>();
  }

  const std::string& name_;
  const std::map<std::string, at::Tensor>& tensors_;
};

}  // namespace detail

LORA_INLINE std::map<std::string, at::Tensor> bitsandbytes_tensors(const std::string& name,
                                                                   const QuantizedWeight& weight,
                                                                   at::ScalarType dtype) {
  if (const auto* int8 = dynamic_cast<const Int8Weight*>(&weight))
    return {{name, int8->packed().codes},
            {detail::scale_name(name), int8->packed().absmax},
            {detail::format_name(name), at::zeros({}, at::kByte)}};
  const auto* four_bit = dynamic_cast<const FourBitWeight*>(&weight);
  TORCH_CHECK_NOT_IMPLEMENTED(four_bit != nullptr,
                              "lora::bitsandbytes_tensors: files of bitsandbytes hold NF4, FP4 and ",
                              "int8, but the weight \"", name, "\" is in ", weight.scheme());
  const auto& types = detail::bitsandbytes_types();
  const auto type = std::find_if(types.begin(), types.end(), [&](const auto& known) { return known.second == dtype; });
  TORCH_CHECK_VALUE(type != types.end(),
                    "lora::bitsandbytes_tensors: bitsandbytes computes in Float, Half or BFloat16, ", "but dtype is ",
                    dtype, " for the weight \"", name, "\"");
  const auto& packed = four_bit->packed();
  nlohmann::ordered_json state = {{"quant_type", detail::code_of(packed.type).in_files},
                                  {"blocksize", packed.block_size},
                                  {"dtype", type->first},
                                  {"shape", packed.sizes}};
  std::map<std::string, at::Tensor> tensors = {{name, packed.codes.view({-1, 1})},
                                               {name + ".absmax", packed.absmax},
                                               {name + ".quant_map", detail::values_of(packed.type)}};
  if (packed.double_quantized()) {
    state["nested_blocksize"] = detail::kNestedBlockSize;
    state["nested_dtype"] = "float32";
    state["nested_offset"] = static_cast<double>(packed.offset);
    tensors[name + ".nested_absmax"] = packed.nested_absmax;
    tensors[name + ".nested_quant_map"] = packed.nested_map;
  }
  tensors[detail::state_name(name, packed.type)] = detail::bytes_of(state.dump());
  return tensors;
}

LORA_INLINE std::vector<std::string> bitsandbytes_names(const std::string& name) {
  std::vector<std::string> names = {name, detail::scale_name(name), detail::format_name(name)};
  for (const auto* part : {".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"})
    names.push_back(name + part);
  for (const auto type : detail::kFourBitTypes) names.push_back(detail::state_name(name, type));
  return names;
}

LORA_INLINE bool is_bitsandbytes_weight(const std::string& name, const std::map<std::string, at::Tensor>& tensors) {
  for (const auto type : detail::kFourBitTypes)
    if (tensors.count(detail::state_name(name, type)) != 0) return true;
  const auto codes = tensors.find(name);
  return tensors.count(detail::scale_name(name)) != 0 &&
         (codes == tensors.end() || codes->second.scalar_type() == at::kChar);
}

LORA_INLINE BitsandbytesWeight read_bitsandbytes_weight(const std::string& name,
                                                        const std::map<std::string, at::Tensor>& tensors) {
  return detail::BitsandbytesReader(name, tensors).read();
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
