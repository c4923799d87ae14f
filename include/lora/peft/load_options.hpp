#pragma once

#include <c10/core/ScalarType.h>
#include <torch/csrc/api/include/torch/arg.h>

#include <lora/version.hpp>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// How the adapter in a PEFT directory is loaded.
struct LoadOptions {
  using KeyMapping = std::vector<std::pair<std::string, std::string>>;

  /// For a model whose names differ from the Python one's: regular expressions (ECMAScript) and what they are replaced
  /// by, as in PEFT. Of each name in the file, without the prefix, the first expression that is found is replaced. The
  /// layers are then those that the file has tensors for. Default: none.
  ///   LoadOptions().key_mapping({{"^model\\.layers\\.(\\d+)", "blocks.$1"}})
  TORCH_ARG(KeyMapping, key_mapping);
  /// What names in the file begin with. Exports that did not go through PEFT may have "". Default: PEFT's.
  TORCH_ARG(std::string, prefix) = "base_model.model.";
  /// Whether tensors that are missing, unexpected or of the wrong shape are an error. If not, those that fit are
  /// loaded, the others keep the values an adapter starts with, and `LoadReport` names them. Default: true.
  TORCH_ARG(bool, strict) = true;
  /// The type of the adapter's tensors. Default: that of an attached adapter, which is float for half precision.
  TORCH_ARG(std::optional<c10::ScalarType>, dtype) = std::nullopt;
  /// Whether they take the type they have in the file instead. Default: false.
  TORCH_ARG(bool, keep_dtype) = false;
};

/// What did not fit when an adapter was loaded: quoted names with shapes.
struct LoadReport {
  std::vector<std::string> missing, unexpected, misshapen;

  bool empty() const { return missing.empty() && unexpected.empty() && misshapen.empty(); }
};

}  // namespace LORA_ABI
}  // namespace lora
