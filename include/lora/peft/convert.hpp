#pragma once

#include <lora/files/error.hpp>
#include <lora/linkage.hpp>
#include <lora/version.hpp>

#include <filesystem>

namespace lora {
inline namespace LORA_ABI {

/// Turns an adapter whose training began by changing the frozen weights (PiSSA, OLoRA, CorDA, LoRA-GA) into a plain one
/// for weights that nobody changed. With the adapter as it was at the start, A0 and B0, the trained model has the
/// weights
///
///   (W - s B0 A0) + s B A = W + s [B, -B0] [A; A0]
///
/// so the rank doubles, and with it alpha, or sqrt(2) alpha when rank-stabilized; s stays. Layers without a change of
/// their base are converted rightly, too, as their start is s B0 A0 = 0.
///
/// Arguments: directories that PEFT's save_pretrained wrote, `start` before the first step of training; `output` may be
/// one of them. Errors: CheckpointError that names the file and the field or tensor in which the two do not belong
/// together, or that is not of a LoRA of whole layers (`use_dora`, `target_parameters`, convolutions of several
/// groups); nothing is written then.
LORA_INLINE void subtract_start(const std::filesystem::path& trained_directory,
                                const std::filesystem::path& start_directory, const std::filesystem::path& output);

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/ops/cat.h>

#include <lora/peft/checkpoint.hpp>

#include <cmath>
#include <iterator>
#include <map>
#include <string>
#include <string_view>
#include <utility>

namespace lora {
inline namespace LORA_ABI {

namespace detail {

/// One of the two adapters of `subtract_start`.
struct StoredAdapter {
  explicit StoredAdapter(std::filesystem::path directory) : path(std::move(directory)) {
    const FolderLock lock(path, Lock::kShared);
    config = read_json<PeftJson>(path / kAdapterConfig);
    if (!config.is_object()) throw CheckpointError(path / kAdapterConfig, "has to hold an object");
    tensors = read_safetensors(path / kAdapterTensors);
  }

  /// The value of a field, or PEFT's default.
  PeftJson field(std::string_view name) const {
    const auto found = config.find(std::string(name));
    if (found != config.end() && !found->is_null()) return *found;
    const auto* known = peft_field(name);
    return known == nullptr ? PeftJson() : PeftJson::parse(known->standard);
  }

  std::filesystem::path path;
  PeftJson config;
  std::map<std::string, at::Tensor> tensors;
};

/// The dimension along which a tensor of an adapter has one entry for each rank; -1 for other tensors.
inline int64_t rank_dimension(const std::string& key) {
  if (ends_with(key, "lora_A.weight") || ends_with(key, "lora_embedding_A")) return 0;
  if (ends_with(key, "lora_B.weight") || ends_with(key, "lora_embedding_B")) return 1;
  return -1;
}

/// Throws unless A and B have the same rank. Those of a convolution of several groups have not: there the ranks are
/// divided among the groups, and further ones cannot just be appended.
inline void check_ranks(const std::filesystem::path& file, const std::map<std::string, at::Tensor>& tensors,
                        const std::string& key) {
  if (rank_dimension(key) != 0) return;
  auto partner = key;
  partner[partner.rfind("_A") + 1] = 'B';
  const auto b = tensors.find(partner);
  if (b == tensors.end()) throw CheckpointError(file, "lacks \"", partner, "\"");
  const auto& a = tensors.at(key);
  if (a.dim() < 2 || b->second.dim() < 2 || a.size(0) != b->second.size(1))
    throw CheckpointError(file, "\"", key, "\" is ", a.sizes(), " and \"", partner, "\" ", b->second.sizes(),
                          ", which are not of one rank");
}

/// The tensors of `trained` with those of `start` taken away.
inline std::map<std::string, at::Tensor> subtracted(const StoredAdapter& trained, const StoredAdapter& start) {
  const auto start_file = start.path / kAdapterTensors;
  const auto file = trained.path / kAdapterTensors;
  auto tensors = trained.tensors;
  for (auto item = tensors.begin(); item != tensors.end();) {  // the changed weights of embeddings and heads
    item = ends_with(item->first, ".base_layer.weight") ? tensors.erase(item) : std::next(item);
  }
  for (auto& [key, tensor] : tensors) {
    const auto dimension = rank_dimension(key);
    if (dimension < 0 && key.find(".lora_") != key.npos)
      throw CheckpointError(file, "holds \"", key, "\", which no plain LoRA has");
    if (dimension < 0) continue;
    check_ranks(file, trained.tensors, key);
    const auto found = start.tensors.find(key);
    if (found == start.tensors.end()) throw CheckpointError(start_file, "lacks \"", key, "\"");
    const auto& first = found->second;
    if (first.sizes() != tensor.sizes() || tensor.dim() < 2)
      throw CheckpointError(start_file, "\"", key, "\" is ", first.sizes(), " at the start and ", tensor.sizes(),
                            " after training");
    tensor = at::cat({tensor, (dimension == 0 ? first : -first).to(tensor.scalar_type())}, dimension);
  }
  for (const auto& item : start.tensors) {
    if (rank_dimension(item.first) >= 0 && tensors.count(item.first) == 0)
      throw CheckpointError(start_file, "holds \"", item.first, "\", which was not trained");
  }
  return tensors;
}

}  // namespace detail

LORA_INLINE void subtract_start(const std::filesystem::path& trained_directory,
                                const std::filesystem::path& start_directory, const std::filesystem::path& output) {
  at::NoGradGuard no_grad;
  const detail::StoredAdapter trained(trained_directory), start(start_directory);
  const auto config_path = trained.path / detail::kAdapterConfig;
  for (const auto* name : {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}) {
    if (trained.field(name) != start.field(name))
      throw CheckpointError(config_path, name, " is ", trained.field(name).dump(), ", but ", start.field(name).dump(),
                            " at the start");
  }
  if (trained.field("peft_type") != "LORA")
    throw CheckpointError(config_path, "peft_type is ", trained.field("peft_type").dump(), ", not \"LORA\"");
  if (trained.field("init_lora_weights") == "loftq")
    throw CheckpointError(config_path, "init_lora_weights is \"loftq\": the frozen weights were quantized, too");
  for (const auto& method : all_methods()) {
    const std::string flag(method.info().peft_flag);
    if (!flag.empty() && trained.field(flag) == true)
      throw CheckpointError(config_path, flag, " is true; only a LoRA without it can be converted");
  }
  if (const auto parameters = trained.field("target_parameters"); !parameters.empty())
    throw CheckpointError(config_path, "target_parameters is ", parameters.dump(),
                          "; only adapters of layers can be converted");
  const auto tensors = detail::subtracted(trained, start);

  auto config = trained.config;
  const auto scaled = [&](const detail::PeftJson& number, double factor) {
    if (!number.is_number()) throw CheckpointError(config_path, "has ", number.dump(), " where a number has to be");
    const bool stays_integer = number.is_number_integer() && factor == 2;
    return stays_integer ? detail::PeftJson(number.get<int64_t>() * 2)
                         : detail::PeftJson(number.get<double>() * factor);
  };
  const bool is_stabilized = trained.field("use_rslora") == true;
  const std::pair<const char*, double> factors[] = {{"r", 2.0}, {"lora_alpha", is_stabilized ? std::sqrt(2.0) : 2.0}};
  const char* const patterns[] = {"rank_pattern", "alpha_pattern"};
  for (size_t i = 0; i < 2; ++i) {
    const auto [name, factor] = factors[i];
    config[name] = scaled(trained.field(name), factor);
    auto by_layer = trained.field(patterns[i]);
    for (auto& value : by_layer) value = scaled(value, factor);
    config[patterns[i]] = by_layer;
  }
  config["init_lora_weights"] = true;
  for (const auto* details : {"corda_config", "lora_ga_config"}) config[details] = nullptr;  // of the former start
  detail::write_files(output, config.dump(2, ' ', /*ensure_ascii=*/true), tensors);
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
