// The keys and values of the positions a model has already seen, so that each new token costs one position only.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace gpt {

/// Per layer the keys and values (B, K, length, D) of the texts so far. It starts empty and grows with each forward
/// pass; it is for generation, so a pass that records gradients is an error.
///
/// Texts of one cache have the same length, until those of another one join: then they end together, and in front of
/// the shorter ones there is padding, which nobody sees.
class KeyValueCache {
 public:
  /// Positions that finished forward passes have left here, of the longest text.
  int64_t length() const { return length_; }

  /// Positions in front of each text that are none of it, (B) int64; undefined while there are none.
  const torch::Tensor& padding() const { return padding_; }

  /// The positions of the next `count` tokens in their texts, int64: (count), or (B, count) where lengths differ.
  torch::Tensor next_positions(int64_t count, torch::Device device) const {
    const auto positions = torch::arange(length_, length_ + count, torch::TensorOptions(device).dtype(torch::kLong));
    return padding_.defined() ? positions - padding_.unsqueeze(1) : positions;
  }

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

  /// Adds the texts of another cache behind these.
  void append_texts(const KeyValueCache& other) {
    if (layers_.empty()) return void(*this = other);
    const auto length = std::max(length_, other.length_);
    const auto padding = torch::cat({padding_to(length), other.padding_to(length)});
    auto layers = layers_;
    for (size_t i = 0; i < layers.size(); ++i) {
      const auto& [keys, values] = other.layers_.at(i);
      layers[i] = {torch::cat({aligned(layers[i].first, length_, length), aligned(keys, other.length_, length)}),
                   torch::cat({aligned(layers[i].second, length_, length), aligned(values, other.length_, length)})};
    }
    layers_ = std::move(layers);
    set_padding(padding);
    length_ = length;
  }

  /// Leaves only these texts, and no more positions than the longest of them has.
  void keep_texts(const std::vector<int64_t>& texts) {
    if (texts.empty()) return void(*this = {});
    const auto kept = torch::tensor(texts, torch::TensorOptions(layers_.at(0).first.device()).dtype(torch::kLong));
    const auto padding = padding_to(length_).index_select(0, kept);
    const auto unused = padding.min().item<int64_t>();
    for (auto& [keys, values] : layers_) {
      keys = keys.narrow(2, unused, keys.size(2) - unused).index_select(0, kept);
      values = values.narrow(2, unused, values.size(2) - unused).index_select(0, kept);
    }
    set_padding(padding - unused);
    length_ -= unused;
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

  // Its `from` positions at the end of `to`. Zeros, since what is masked is still multiplied, by 0.
  static torch::Tensor aligned(const torch::Tensor& buffer, int64_t from, int64_t to) {
    return torch::constant_pad_nd(buffer.narrow(2, 0, from), {0, 0, to - from, 0});
  }

  torch::Tensor padding_to(int64_t length) const {
    const auto& keys = layers_.at(0).first;
    const auto none = torch::zeros({keys.size(0)}, keys.options().dtype(torch::kLong));
    return (padding_.defined() ? padding_ : none) + (length - length_);
  }

  void set_padding(const torch::Tensor& padding) { padding_ = padding.any().item<bool>() ? padding : torch::Tensor(); }

  std::vector<std::pair<torch::Tensor, torch::Tensor>> layers_;
  torch::Tensor padding_;
  int64_t length_ = 0;
};

}  // namespace gpt
