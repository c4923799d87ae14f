#pragma once

#include <lora/config.hpp>
#include <lora/selection/text.hpp>
#include <lora/model/model.hpp>
#include <lora/selection/candidate.hpp>
#include <lora/version.hpp>

#include <algorithm>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// The entry of modules_to_save that means the module, or one it is inside of; empty when none does.
inline std::string saving_entry(const LoRAConfig& config, std::string name) {
  for (;; name = owner_of(name)) {
    for (const auto& entry : config.modules_to_save()) {
      if (is_or_ends_with(name, entry)) return entry;
    }
    if (name.find('.') == std::string::npos) return "";
  }
}

/// Finds what a configuration trains beside the adapters of weights: `modules_to_save`, `bias` and `lora_bias`. `run()`
/// names every entry that matches nothing.
class FullSelection {
 public:
  /// A parameter or buffer that is trained in full, or to which the adapter of a layer adds a bias of its own.
  struct Full {
    LayerWeight tensor;
    std::string file_name;
    std::string biased = "";  // the layer whose update has the bias
  };

  /// `targets` are the weights that are adapted, out of `parts`.
  FullSelection(const Model& model, const LoRAConfig& config, const std::vector<ModelPart>& parts,
                const std::vector<Candidate>& targets, Unmatched unmatched)
      : model_(model), config_(config), parts_(parts), targets_(targets), unmatched_(unmatched) {}

  std::vector<Full> run() const {
    std::vector<Full> found;
    if (config_.modules_to_save().empty() && config_.bias() == Bias::kNone && !config_.lora_bias()) return found;
    std::set<std::string> saved;
    const auto tensors = model_.tensors();
    for (const auto& tensor : tensors) {
      const auto& name = tensor.place.name;
      const auto owner = owner_of(name);
      const auto entry = saving_entry(config_, owner);
      if (!entry.empty()) {
        saved.insert(entry);
        check_layout(tensor, owner);
        take({tensor, name}, found);
      } else if (!tensor.is_buffer && is_trained_bias(name, owner)) {
        take({tensor, file_name_of_bias(name, owner)}, found);
      } else if (config_.lora_bias() && name == owner + ".bias" && target_named(owner) != nullptr) {
        take({tensor, target_named(owner)->file_name + ".lora_B.bias", owner}, found);
      }
    }
    check_biases(found);
    for (auto& full : found) note_ties(full.tensor.place, tensors);
    for (const auto& entry : config_.modules_to_save()) {
      if (saved.count(entry) > 0) continue;
      unmatched_.report("no module with parameters matches \"" + entry + "\" of modules_to_save",
                        did_you_mean(entry, with_last_parts(part_names())), "Modules here: " + list(part_names()));
    }
    return found;
  }

 private:
  /// A module that the model has under several names is trained once, under its first name. Of two modules with one
  /// tensor the uses could not be told apart.
  static void take(Full full, std::vector<Full>& found) {
    for (const auto& [other, file_name, biased] : found) {
      const auto &mine = full.tensor.place, &theirs = other.place;
      if (theirs.slot->place() == mine.slot->place()) return;
      TORCH_CHECK(!is_same_memory(mine, theirs) || !overlap(theirs.use, mine.use), "lora::attach: \"", theirs.name,
                  "\" and \"", mine.name, "\" are one tensor, which cannot be trained in full in two places; ",
                  "give one of the modules a copy of it first");
    }
    found.push_back(std::move(full));
  }

  static bool is_same_memory(const Place& a, const Place& b) {
    const auto mine = a.slot->read(), theirs = b.slot->read();
    return mine.numel() > 0 && mine.has_storage() && share_memory(mine, theirs) &&
           mine.storage_offset() == theirs.storage_offset();
  }

  /// Notes where else the model uses the tensor, in a way that is not meant.
  static void note_ties(Place& place, const LayerWeights& tensors) {
    if (place.use == Use::kAny) return;
    for (const auto& [other, form, groups, is_buffer] : tensors) {
      if (other.slot->place() != place.slot->place() && is_same_memory(place, other))
        place.tied_to.push_back(other.name);
    }
  }

  const Candidate* target_named(const std::string& name) const {
    const auto has_name = [&](const Candidate& target) { return target.name() == name; };
    const auto found = std::find_if(targets_.begin(), targets_.end(), has_name);
    return found == targets_.end() ? nullptr : &*found;
  }

  bool is_trained_bias(const std::string& name, const std::string& owner) const {
    if (config_.bias() == Bias::kNone || !is_or_ends_with(name, "bias")) return false;
    return config_.bias() == Bias::kAll || target_named(owner) != nullptr;
  }

  std::string file_name_of_bias(const std::string& name, const std::string& owner) const {
    const auto* target = target_named(owner);
    return target == nullptr ? name : target->file_name + ".base_layer.bias";
  }

  /// Of a square weight nobody would notice that Python keeps it as (in, out).
  void check_layout(const LayerWeight& tensor, const std::string& owner) const {
    const auto weight = tensor.place.slot->read();
    const auto is_it = [&](const ModelPart& part) { return part.name == owner && part.is_linear; };
    const bool is_square = weight.dim() == 2 && weight.size(0) == weight.size(1);
    TORCH_CHECK(!config_.fan_in_fan_out() || !is_square || std::none_of(parts_.begin(), parts_.end(), is_it),
                "lora::attach: \"", tensor.place.name,
                "\" of modules_to_save is square, and with fan_in_fan_out Python may ",
                "keep it as (in, out) or as (out, in), which its file does not say; make the module a target instead");
  }

  void check_biases(const std::vector<Full>& full) const {
    if (!config_.lora_bias()) return;
    TORCH_CHECK_VALUE(config_.bias() == Bias::kNone,
                      "lora::LoRAConfig: either `bias` trains the layers' own biases, or ",
                      "`lora_bias` gives the updates biases, not both");
    TORCH_CHECK_VALUE(config_.method().info().name == all_methods().front().info().name,
                      "lora::LoRAConfig: lora_bias is for ", all_methods().front().info().name, ", not for ",
                      config_.method().info().name);
    for (const auto& target : targets_) {
      const auto is_its = [&](const Full& item) { return item.biased == target.name(); };
      TORCH_CHECK(std::any_of(full.begin(), full.end(), is_its), "lora::attach: lora_bias adds to the biases of the ",
                  "adapted layers, but \"", target.name(), "\" (", target.place().kind, ") has none named \"bias\"");
    }
  }

  std::vector<std::string> part_names() const {
    std::vector<std::string> names;
    for (const auto& part : parts_) names.push_back(part.name);
    return names;
  }

  const Model& model_;
  const LoRAConfig& config_;
  const std::vector<ModelPart>& parts_;
  const std::vector<Candidate>& targets_;
  const Unmatched unmatched_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
