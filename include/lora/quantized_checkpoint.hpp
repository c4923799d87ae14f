#pragma once

#include <lora/files/error.hpp>
#include <lora/linkage.hpp>
#include <lora/quantize.hpp>
#include <lora/version.hpp>

#include <filesystem>
#include <string>

namespace lora {
inline namespace LORA_ABI {

/// Writes every parameter and buffer of a model, without the adapters that layers have of their own, under its name as
/// a safetensors file, those in 4 or 8 bits as they are, under the names that bitsandbytes gives them
/// (lora/files/bitsandbytes.hpp): each of which bitsandbytes reads. Those in 12 bits (`Lossless`) are written as the
/// numbers of bfloat16 that they are, all of which are in memory then, and are held so again by reading them with that
/// scheme. What is tied is written once.
///
/// Errors: CheckpointError with the path and the reason of the operating system; c10::Error for weights in a way of
/// packing that bitsandbytes does not know, or in 4 bits for ones of another type than Float, Half and BFloat16.
LORA_INLINE void save_quantized(const Model& model, const std::filesystem::path& file);
LORA_INLINE void save_quantized(torch::nn::Module& model, const std::filesystem::path& file);

/// Reads such a file, or one that bitsandbytes wrote, into a model: weights in 4 or 8 bits take the place of the
/// model's, whatever these are, and stand for weights of their type; everything else is copied. The file has to have
/// each tensor of the model, and no other. With a scheme, weights of which the file has the numbers are held in few
/// bits as by `quantize`: beside the model as it was and what is held in few bits, one tensor of the file is in memory
/// at a time. (Parameters that were made by torch::empty take no memory before they are written.) A file
/// "model.safetensors.index.json" is read with those that it names. In the report `error` is that of what was packed
/// here.
///
///   lora::load_quantized(*model, "model.safetensors", lora::NF4(), lora::QuantizeOptions().exclude_modules({"head"}));
///
/// Errors, with nothing changed: CheckpointError that names what is missing, unknown or does not fit; those of
/// `quantize`. What the operating system cannot read while the model is written ends with what was read before.
LORA_INLINE QuantizeReport load_quantized(const Model& model, const std::filesystem::path& file);
LORA_INLINE QuantizeReport load_quantized(torch::nn::Module& model, const std::filesystem::path& file);
LORA_INLINE QuantizeReport load_quantized(const Model& model, const std::filesystem::path& file,
                                          const Quantization& scheme, const QuantizeOptions& options = {});
LORA_INLINE QuantizeReport load_quantized(torch::nn::Module& model, const std::filesystem::path& file,
                                          const Quantization& scheme, const QuantizeOptions& options = {});

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/core/grad_mode.h>

#include <lora/files/bitsandbytes.hpp>
#include <lora/files/safetensors.hpp>
#include <lora/model/frozen_parameters.hpp>
#include <lora/weight/lossless.hpp>

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

namespace detail {

/// Puts the tensors of a file into a model, weights of 4 and 8 bits as such. Everything is read and packed that is held
/// in few bits, and everything else is checked, before anything is changed; what is not packed is read one at a time.
class QuantizedLoading {
 public:
  /// The layers of `sites` are held by `scheme`, where the file has their numbers.
  QuantizedLoading(const Model& model, const std::filesystem::path& file, const Quantization* scheme,
                   const std::vector<std::shared_ptr<Site>>& sites)
      : file_(file), reader_(opened(file)), places_(model.tensors()), scheme_(scheme) {
    for (const auto& info : reader_.tensors()) stored_.emplace(info.name, info);
    for (const auto& site : sites) to_pack_.insert(site->weight().unsafeGetTensorImpl());
    for (const auto* adapter : adapter_tensors(model)) not_read_.insert(adapter);
  }

  void prepare() {
    for (const auto& tensor : places_) {
      const auto value = tensor.place.slot->read();
      if (!is_read(value)) continue;
      check(!MergedWeight::is(value), "\"", tensor.place.name, "\" of the model has an adapter merged into it, which ",
            "would be lost; unmerge it first");
      check_memory_stays(value);
      prepare(tensor.place, value);
    }
    std::vector<std::string> missing, unknown;
    for (const auto& tensor : places_) {  // of what is tied the file has one
      const auto value = tensor.place.slot->read();
      if (is_read(value) && filled_.count(value.unsafeGetTensorImpl()) == 0) missing.push_back(tensor.place.name);
    }
    check(missing.empty(), "has no tensors for ", list(missing), " of the model");
    for (const auto& item : stored_) {
      if (taken_.count(item.first) == 0) unknown.push_back(item.first);
    }
    check(unknown.empty(), "has tensors that the model does not have: ", list(unknown));
  }

  QuantizeReport put() {
    QuantizeReport report;
    std::vector<FormerMemory> former;
    for (const auto& tensor : places_) {
      const auto& place = tensor.place;
      const auto value = place.slot->read();
      if (const auto found = held_.find(place.name); found != held_.end()) {
        note(owner_of(place.name), value, *found->second, former, report);
        hold(place.slot->handles(), std::move(found->second), value.scalar_type(), owner_of(place.name));
      } else if (is_read(value) && stored_.count(place.name) > 0) {
        const auto numbers = reader_.read(place.name);
        if (is_quantized(value)) {
          release(place.slot->handles(), numbers.to(value.device(), value.scalar_type()));
        } else {
          value.detach().copy_(numbers);
        }
      }
    }
    note_held_elsewhere(former, report);
    report.error = error_.relative();
    return report;
  }

 private:
  static SafetensorsReader opened(const std::filesystem::path& file) {
    return file.extension() == ".json" ? SafetensorsReader::of_index(file) : SafetensorsReader(file);
  }

  /// Adapters that layers have of their own are no part of the base.
  bool is_read(const at::Tensor& value) const {
    return value.defined() && not_read_.count(value.unsafeGetTensorImpl()) == 0;
  }

  /// What the file has of a weight in few bits; nothing where it has none.
  std::map<std::string, at::Tensor> parts_of(const std::string& name) const {
    const auto has = [&](const std::string& part) { return stored_.count(part) > 0; };
    std::map<std::string, at::Tensor> parts;
    const auto types = {FourBitType::kNF4, FourBitType::kFP4};
    const auto has_state = [&](FourBitType type) { return has(state_name(name, type)); };
    if (!has(scale_name(name)) && std::none_of(types.begin(), types.end(), has_state)) return parts;
    for (const auto& part : bitsandbytes_names(name)) {
      if (has(part)) parts.emplace(part, reader_.read(part));
    }
    return parts;
  }

  void prepare(const Place& place, const at::Tensor& value) {
    const auto& name = place.name;
    if (const auto parts = parts_of(name); is_bitsandbytes_weight(name, parts)) {
      auto read = read_bitsandbytes_weight(name, parts).weight;
      check_sizes(name, read->sizes(), value);
      for (const auto& item : parts) taken_.insert(item.first);
      keep(name, std::move(read), value);
    } else if (const auto found = stored_.find(name); found != stored_.end()) {
      check_sizes(name, found->second.shape, value);
      const bool is_float = at::isFloatingType(found->second.dtype);
      check(is_float == value.is_floating_point(), "\"", name, "\" is ", found->second.dtype, ", but ",
            value.scalar_type(), " in the model");
      taken_.insert(name);
      if (is_float && to_pack_.count(value.unsafeGetTensorImpl()) > 0) {
        const auto numbers = reader_.read(name).to(value.scalar_type());
        auto packed = scheme_->pack(numbers, name);
        error_.add(numbers, *packed);
        keep(name, std::move(packed), value);
      }
    } else {
      return;
    }
    filled_.insert(value.unsafeGetTensorImpl());
  }

  void keep(const std::string& name, std::shared_ptr<const QuantizedWeight> weight, const at::Tensor& value) {
    held_.emplace(name, weight->device() == value.device() ? std::move(weight) : weight->to(value.device()));
  }

  void check_sizes(const std::string& name, at::IntArrayRef sizes, const at::Tensor& value) const {
    check(sizes == value.sizes(), "\"", name, "\" is ", sizes, ", but ", value.sizes(), " in the model");
  }

  template <class... Reason>
  void check(bool holds, const Reason&... reason) const {
    if (!holds) throw CheckpointError(file_, reason...);
  }

  std::filesystem::path file_;
  SafetensorsReader reader_;
  std::map<std::string, TensorInfo> stored_;
  LayerWeights places_;
  const Quantization* scheme_;
  std::set<const void*> to_pack_, filled_, not_read_;
  std::set<std::string> taken_;
  std::map<std::string, std::shared_ptr<const QuantizedWeight>> held_;
  RoundingError error_;
};

inline QuantizeReport load_quantized(const Model& model, const std::filesystem::path& file, const Quantization* scheme,
                                     const QuantizeOptions& options) {
  register_kernels();
  const BelowInterception below;
  at::NoGradGuard no_grad;
  QuantizeReport chosen;
  const auto sites = scheme == nullptr ? std::vector<std::shared_ptr<Site>>() : quantizable(model, options, chosen);
  QuantizedLoading loading(model, file, scheme, sites);
  loading.prepare();
  auto report = loading.put();
  report.shared = std::move(chosen.shared);
  return report;
}

}  // namespace detail

LORA_INLINE void save_quantized(const Model& model, const std::filesystem::path& file) {
  const detail::BelowInterception below;
  std::map<std::string, at::Tensor> tensors;
  auto written = detail::adapter_tensors(model);  // which are no part of it
  for (const auto& tensor : model.tensors()) {
    const auto value = tensor.place.slot->read();
    TORCH_CHECK(!value.defined() || !detail::MergedWeight::is(value), "lora::save_quantized: ", tensor.place.name,
                " has an adapter merged into it; unmerge it first, or unload the adapter");
    if (!value.defined() || !written.insert(value.unsafeGetTensorImpl()).second) continue;
    const auto& name = tensor.place.name;
    const auto* held = detail::quantized(value);
    if (dynamic_cast<const LosslessWeight*>(held) != nullptr) {
      tensors.emplace(name, held->dense().to(at::kBFloat16));
    } else if (held != nullptr) {
      tensors.merge(bitsandbytes_tensors(name, *held, value.scalar_type()));
    } else {
      tensors.emplace(name, value);
    }
  }
  write_safetensors(file, tensors);
}

LORA_INLINE void save_quantized(torch::nn::Module& model, const std::filesystem::path& file) {
  save_quantized(ModuleModel(model), file);
}

LORA_INLINE QuantizeReport load_quantized(const Model& model, const std::filesystem::path& file) {
  return detail::load_quantized(model, file, nullptr, {});
}

LORA_INLINE QuantizeReport load_quantized(torch::nn::Module& model, const std::filesystem::path& file) {
  return load_quantized(ModuleModel(model), file);
}

LORA_INLINE QuantizeReport load_quantized(const Model& model, const std::filesystem::path& file,
                                          const Quantization& scheme, const QuantizeOptions& options) {
  return detail::load_quantized(model, file, &scheme, options);
}

LORA_INLINE QuantizeReport load_quantized(torch::nn::Module& model, const std::filesystem::path& file,
                                          const Quantization& scheme, const QuantizeOptions& options) {
  return load_quantized(ModuleModel(model), file, scheme, options);
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
