#pragma once

#include <ATen/core/grad_mode.h>

#include <lora/files/bitsandbytes.hpp>
#include <lora/files/error.hpp>
#include <lora/files/safetensors.hpp>
#include <lora/quantize.hpp>
#include <lora/version.hpp>

#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

namespace detail {

/// Puts the tensors of a file into a model, weights of 4 and 8 bits as such. Everything is checked before anything is
/// changed.
class QuantizedLoading {
 public:
  QuantizedLoading(const Model& model, std::filesystem::path file, const std::map<std::string, at::Tensor>& tensors)
      : file_(std::move(file)), tensors_(tensors), places_(model.tensors()) {}

  void check() {
    std::set<std::string> taken;
    std::set<const void*> filled;
    std::vector<std::string> missing;
    for (const auto& tensor : places_) {
      const auto& name = tensor.place.name;
      const auto value = tensor.place.slot->read();
      if (!value.defined()) continue;
      if (is_bitsandbytes_weight(name, tensors_)) {
        auto read = read_bitsandbytes_weight(name, tensors_).weight;
        check_sizes(name, read->sizes(), value);
        for (const auto& item : bitsandbytes_tensors(name, *read, at::kFloat)) taken.insert(item.first);
        held_.emplace(name, std::move(read));
      } else if (const auto found = tensors_.find(name); found != tensors_.end()) {
        check_sizes(name, found->second.sizes(), value);
        if (found->second.is_floating_point() != value.is_floating_point())
          throw CheckpointError(file_, "\"", name, "\" is ", found->second.scalar_type(), ", but ", value.scalar_type(),
                                " in the model");
        taken.insert(name);
      } else {
        continue;
      }
      filled.insert(tensor.place.slot->place());
      filled.insert(value.unsafeGetTensorImpl());
    }
    for (const auto& tensor : places_) {  // of what is tied the file has one
      const auto value = tensor.place.slot->read();
      const bool is_filled = filled.count(value.unsafeGetTensorImpl()) + filled.count(tensor.place.slot->place()) > 0;
      if (value.defined() && !is_filled) missing.push_back(tensor.place.name);
    }
    if (!missing.empty()) throw CheckpointError(file_, "has no tensors for ", list(missing), " of the model");
    std::vector<std::string> unknown;
    for (const auto& item : tensors_) {
      if (taken.count(item.first) == 0) unknown.push_back(item.first);
    }
    if (!unknown.empty()) throw CheckpointError(file_, "has tensors that the model does not have: ", list(unknown));
  }

  QuantizeReport put() const {
    QuantizeReport report;
    for (const auto& tensor : places_) {
      const auto& place = tensor.place;
      const auto value = place.slot->read();
      if (const auto found = held_.find(place.name); found != held_.end()) {
        report.layers.push_back(owner_of(place.name));
        report.bytes_before += static_cast<int64_t>(value.nbytes());
        report.bytes_after += found->second->nbytes();
        auto weight = found->second;
        if (weight->device() != value.device()) weight = weight->to(value.device());
        hold(place.slot->handles(), std::move(weight), value.scalar_type(), owner_of(place.name));
      } else if (const auto numbers = tensors_.find(place.name); numbers != tensors_.end()) {
        if (is_quantized(value)) {
          release(place.slot->handles(), numbers->second.to(value.device(), value.scalar_type(), false, /*copy=*/true));
        } else {
          value.detach().copy_(numbers->second);
        }
      }
    }
    return report;
  }

 private:
  void check_sizes(const std::string& name, at::IntArrayRef sizes, const at::Tensor& value) const {
    if (sizes != value.sizes())
      throw CheckpointError(file_, "\"", name, "\" is ", sizes, ", but ", value.sizes(), " in the model");
  }

  std::filesystem::path file_;
  const std::map<std::string, at::Tensor>& tensors_;
  LayerWeights places_;
  std::map<std::string, std::shared_ptr<const QuantizedWeight>> held_;
};

}  // namespace detail

/// Writes every parameter and buffer of a model under its name as a safetensors file, those in 4 or 8 bits as they are,
/// under the names that bitsandbytes gives them (lora/files/bitsandbytes.hpp): Python's Transformers loads it, with a
/// config.json beside it that says so. What is tied is written once.
///
/// Errors: CheckpointError with the path and the reason of the operating system; c10::Error for weights in a way of
/// packing that bitsandbytes does not know, or that stand for ones of another type than Float, Half and BFloat16.
inline void save_quantized(const Model& model, const std::filesystem::path& file) {
  const detail::BelowInterception below;
  std::map<std::string, at::Tensor> tensors;
  std::set<const c10::TensorImpl*> written;
  for (const auto& tensor : model.tensors()) {
    const auto value = tensor.place.slot->read();
    if (!value.defined() || !written.insert(value.unsafeGetTensorImpl()).second) continue;
    const auto& name = tensor.place.name;
    if (const auto* held = detail::quantized(value)) {
      tensors.merge(bitsandbytes_tensors(name, *held, value.scalar_type()));
    } else {
      tensors.emplace(name, value);
    }
  }
  write_safetensors(file, tensors);
}
inline void save_quantized(torch::nn::Module& model, const std::filesystem::path& file) {
  save_quantized(ModuleModel(model), file);
}

/// Reads such a file, or one that bitsandbytes wrote, into a model: weights in 4 or 8 bits take the place of the
/// model's, whatever these are, and stand for weights of their type; everything else is copied. The file stays mapped
/// while a weight of it lives. It has to have each tensor of the model, and no other.
///
/// Errors, with nothing changed: CheckpointError that names what is missing, unknown or does not fit.
inline QuantizeReport load_quantized(const Model& model, const std::filesystem::path& file) {
  detail::register_kernels();
  const detail::BelowInterception below;
  at::NoGradGuard no_grad;
  const auto tensors = read_safetensors(file);
  detail::QuantizedLoading loading(model, file, tensors);
  loading.check();
  return loading.put();
}
inline QuantizeReport load_quantized(torch::nn::Module& model, const std::filesystem::path& file) {
  return load_quantized(ModuleModel(model), file);
}

}  // namespace LORA_ABI
}  // namespace lora
