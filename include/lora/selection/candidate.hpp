#pragma once

#include <lora/layers/files.hpp>
#include <lora/model/model.hpp>
#include <lora/version.hpp>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// A weight that a configuration may mean.
struct Candidate {
  explicit Candidate(LayerWeight found) : weight(std::move(found)), file_name(place().file_name) {}
  explicit Candidate(std::shared_ptr<Site> brought) : own(std::move(brought)), file_name(place().file_name) {}

  const Place& place() const { return own ? own->place() : weight.place; }
  const std::string& name() const { return place().name; }
  at::Tensor tensor() const { return place().slot->read(); }
  Use use() const { return place().use; }

  /// Its site: the one that its module brings, or a new one.
  std::shared_ptr<Site> site() const {
    if (own) return own;
    auto place = weight.place;
    place.tied_to = tied_to;
    if (!part_rows.empty()) {
      auto view = MatrixView::parts(tensor().sizes(), part_rows, chosen_parts);
      auto files = layers::PartFiles(view).layout();
      return std::make_shared<Site>(std::move(place), std::move(view), std::move(files));
    }
    auto view = weight.view();
    auto files = place.kind == "Parameter" ? layers::parameter_files(tensor()) : weight.files(view);
    return std::make_shared<Site>(std::move(place), std::move(view), std::move(files));
  }

  LayerWeight weight;
  std::shared_ptr<Site> own;
  std::string file_name;
  std::vector<std::string> tied_to = {};
  std::vector<int64_t> part_rows = {};  // of a fused projection
  std::vector<bool> chosen_parts = {};
};

/// All weights of a module.
inline std::vector<Candidate> candidates(const ModelPart& part) {
  std::vector<Candidate> all;
  for (const auto& weight : part.weights) all.emplace_back(weight);
  for (const auto& own : part.own) all.emplace_back(own);
  return all;
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
