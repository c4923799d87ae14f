// The keys and values of the positions a model has already seen, so that each new token costs one position only.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace gpt {

/// Per layer the keys and values (B, K, length, D) of the texts so far. It starts empty and grows with each forward
/// pass; it is for generation, so a pass that records gradients is an error.
class KeyValueCache {
 public:
  /// Positions that a finished forward pass has left here.
  int64_t length() const { return length_; }

  /// Adds one layer's keys and values (B, K, T, D) of the pass under way; returns all of them, (B, K, length + T, D).
  std::pair<torch::Tensor, torch::Tensor> append(size_t layer, const torch::Tensor& keys, const torch::Tensor& values) {
    TORCH_CHECK(!keys.requires_grad() && !values.requires_grad(),
                "KeyValueCache: gradients cannot flow through a cache; use torch::NoGradGuard or pass no cache");
    if (layers_.size() <= layer) layers_.resize(layer + 1);
    auto& [all_keys, all_values] = layers_[layer];
    return {put(all_keys, keys), put(all_values, values)};
  }

  /// Ends a forward pass over T positions. A pass that failed half way leaves the length, and so the cache, as it was.
  void advance(int64_t positions) { length_ += positions; }

  /// Leaves only these texts, `rows` (N) int64 in that order.
  void keep_rows(const torch::Tensor& rows) {
    for (auto& [keys, values] : layers_) {
      keys = keys.index_select(0, rows.to(keys.device()));
      values = values.index_select(0, rows.to(values.device()));
    }
  }

  /// Adds the texts of another cache behind its own. Throws when they are not of the same length.
  void append_rows(const KeyValueCache& other) {
    TORCH_CHECK(length_ == other.length_, "KeyValueCache: texts of ", other.length_, " positions cannot join texts of ",
                length_);
    auto layers = layers_;
    for (size_t i = 0; i < layers.size(); ++i) {
      layers[i] = {joined(layers[i].first, other.layers_[i].first), joined(layers[i].second, other.layers_[i].second)};
    }
    layers_ = std::move(layers);
  }

 private:
  // The buffers double when they are full, so that a text of n tokens costs O(n) copies, not O(n^2).
  torch::Tensor put(torch::Tensor& buffer, const torch::Tensor& added) {
    const auto end = length_ + added.size(2);
    if (!buffer.defined() || buffer.size(2) < end) {
      auto shape = added.sizes().vec();
      shape[2] = std::max<int64_t>({64, end, 2 * length_});
      auto larger = torch::empty(shape, added.options());
      if (length_ > 0) larger.narrow(2, 0, length_).copy_(buffer.narrow(2, 0, length_));
      buffer = larger;
    }
    buffer.narrow(2, length_, added.size(2)).copy_(added);
    return buffer.narrow(2, 0, end);
  }

  // With the room that both have beyond their length.
  static torch::Tensor joined(const torch::Tensor& a, const torch::Tensor& b) {
    const auto room = std::min(a.size(2), b.size(2));
    return torch::cat({a.narrow(2, 0, room), b.narrow(2, 0, room)});
  }

  std::vector<std::pair<torch::Tensor, torch::Tensor>> layers_;
  int64_t length_ = 0;
};

}  // namespace gpt
