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
  /// by, as in PEFT. Of each name in the file, without the prefix, the first expression that is found is replaced.
  /// Where that changes a name, the layers are those that the file has tensors for, and they are what the configuration
  /// names one by one from then on, in place of the file's own selection and patterns. Default: none.
  ///   LoadOptions().key_mapping({{"^model\\.layers\\.(\\d+)", "blocks.$1"}})
  TORCH_ARG(KeyMapping, key_mapping);
  /// What names in the file begin with. Exports that did not go through PEFT may have "". Default: PEFT's.
  TORCH_ARG(std::string, prefix) = "base_model.model.";
  /// Whether tensors that are missing, unexpected or of the wrong shape are an error. If not, those that fit are
  /// loaded, the others keep the values an adapter starts with, and `LoadReport` names them. Default: true.
  TORCH_ARG(bool, strict) = true;
  /// Whether the model takes over the tables that PEFT wrote along: the weights of embeddings, and of linear layers
  /// over them, of a model that got more tokens before it was trained. A table may have more rows than the model's, and
  /// as many columns; with a head, its bias. Layers with the same table stay so. Of one that was trained in full
  /// (modules_to_save) the model takes the rows it does not have, and keeps its own. The tables are the model's from
  /// then on, whatever becomes of the adapter; they have to be unadapted, and no other thread may use the model
  /// meanwhile. If not, a table that is not the model's is an error. Default: false.
  TORCH_ARG(bool, take_tables) = false;
  /// Whether the update of MultiheadAttention's out_proj counts twice: W + 2 s B A. From 0.15 to 0.21 PEFT adds it
  /// twice to what such a layer computes, in training, afterwards and when it merges, so an adapter that was trained
  /// there means that. B is doubled when it is loaded, and is written so. Default: false, with a warning where it
  /// matters.
  TORCH_ARG(bool, out_proj_twice) = false;
  /// The type of the adapter's tensors. Default: that of an attached adapter, which is float for half precision.
  TORCH_ARG(std::optional<c10::ScalarType>, dtype) = std::nullopt;
  /// Whether they take the type they have in the file instead. Default: false.
  TORCH_ARG(bool, keep_dtype) = false;
};

/// What did not fit when an adapter was loaded: quoted names with shapes.
struct LoadReport {
  std::vector<std::string> missing, unexpected, misshapen;
  /// Entries of the configuration that match nothing in this model, which is no fault by itself: one file may name the
  /// layers of several kinds of models. The adapter keeps them, and they are written again.
  std::vector<std::string> unmatched;

  /// Whether every tensor did fit.
  bool empty() const { return missing.empty() && unexpected.empty() && misshapen.empty(); }
};

}  // namespace LORA_ABI
}  // namespace lora
