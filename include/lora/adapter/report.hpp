#pragma once

#include <lora/linkage.hpp>
#include <lora/version.hpp>

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// What an adapter trains, and how much that is. Prints as a table.
struct Report {
  struct Layer {
    std::string name, kind, method;
    std::vector<int64_t> weight;  ///< sizes
    int64_t rank;
    double scaling;
    int64_t parameters;
    std::vector<std::string> tied_to;  ///< layers with the same weight that are not adapted with it
  };

  std::vector<Layer> layers;
  int64_t trainable = 0;   ///< numbers in the adapters' tensors
  int64_t base = 0;        ///< numbers in the model's own parameters
  int64_t base_bytes = 0;  ///< memory of the model's own parameters

  /// trainable / (base + trainable), in [0, 1].
  double share() const {
    return trainable == 0 ? 0 : static_cast<double>(trainable) / static_cast<double>(base + trainable);
  }
};

LORA_INLINE std::ostream& operator<<(std::ostream& stream, const Report& report);

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <lora/adapter/adapter.hpp>

#include <algorithm>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// "512 B", "3.4 kB", "269.0 MB".
inline std::string byte_text(int64_t bytes) {
  auto value = static_cast<double>(bytes);
  if (value < 1e3) return fmt::format("{} B", bytes);
  if (value < 1e6) return fmt::format("{:.1f} kB", value / 1e3);
  return value < 1e9 ? fmt::format("{:.1f} MB", value / 1e6) : fmt::format("{:.2f} GB", value / 1e9);
}

/// What a report says of a layer.
inline Report::Layer report_row(const AdapterPart& part, double scale) {
  int64_t parameters = 0;
  for (const auto& item : part.method->tensors()) parameters += item.is_trained ? item.tensor->numel() : 0;
  const auto& info = part.method->info();
  const auto rank = info.rank_name.empty() ? 0 : part.method->options().rank();
  return {part.site->name(),
          part.site->kind(),
          std::string(info.name),
          part.site->weight().sizes().vec(),
          rank,
          scale * part.method->scaling(),
          parameters,
          part.site->place().tied_to};
}

}  // namespace detail

LORA_INLINE std::ostream& operator<<(std::ostream& stream, const Report& report) {
  size_t width = 5;
  for (const auto& layer : report.layers) width = std::max(width, layer.name.size());
  stream << fmt::format("{:<{}}  {:<18}  {:>13}  {:<8}  {:>4}  {:>7}  {:>10}\n", "layer", width, "kind", "weight",
                        "method", "rank", "scaling", "parameters");
  for (const auto& layer : report.layers) {
    stream << fmt::format("{:<{}}  {:<18}  {:>13}  {:<8}  {:>4}  {:>7.4g}  {:>10}\n", layer.name, width, layer.kind,
                          fmt::format("{}", fmt::join(layer.weight, " x ")), layer.method, layer.rank, layer.scaling,
                          layer.parameters);
  }
  for (const auto& layer : report.layers) {
    if (layer.tied_to.empty()) continue;
    stream << fmt::format("{} shares its weight with {}, whose own use of it stays as it is\n", layer.name,
                          fmt::join(layer.tied_to, ", "));
  }
  return stream << fmt::format("{} of {} parameters are trainable ({:.4f} %); the frozen ones take {}",
                               report.trainable, report.base + report.trainable, 100 * report.share(),
                               detail::byte_text(report.base_bytes));
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
