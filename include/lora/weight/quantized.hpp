#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <lora/version.hpp>
#include <lora/weight/seen_inputs.hpp>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

namespace lora {
inline namespace LORA_ABI {

/// The numbers of a frozen weight in few bits each. A value: it does not change, and models that are copied share it.
/// The weight has any number of dimensions; where rows are spoken of it is a matrix (size(0), everything else), and
/// numbers are counted in the order of that matrix.
class QuantizedWeight {
 public:
  virtual ~QuantizedWeight() = default;

  /// What it is called: "NF4".
  virtual std::string_view scheme() const = 0;
  /// How many bits a number takes, without what a block of them takes together.
  virtual int64_t bits() const = 0;
  virtual at::IntArrayRef sizes() const = 0;
  virtual at::Device device() const = 0;
  /// The memory that it takes.
  virtual int64_t nbytes() const = 0;

  /// All numbers in float, shaped as the weight; on its device.
  virtual at::Tensor dense() const = 0;
  /// The numbers [first, first + count). On the CPU only.
  virtual void unpack(int64_t first, int64_t count, float* numbers) const = 0;
  /// y[i] = sum over j of W[first + i, j] x[j] for i < count. On the CPU only.
  virtual void dot_rows(int64_t first, int64_t count, const float* x, float* y) const = 0;

  virtual std::shared_ptr<const QuantizedWeight> to(at::Device device) const = 0;
};

/// A way of packing, as a value of a configuration: NF4(), FP4(), Int8(), Lossless() with their options. Throws
/// c10::ValueError for options out of their range.
class Quantization {
  template <class Scheme, class = void>
  struct HasValidate : std::false_type {};
  template <class Scheme>
  struct HasValidate<Scheme, std::void_t<decltype(std::declval<const Scheme&>().validate(""))>> : std::true_type {};
  template <class Scheme, class = void>
  struct SeesInputs : std::false_type {};
  template <class Scheme>
  struct SeesInputs<Scheme,
                    std::void_t<decltype(std::declval<const Scheme&>().pack(at::Tensor(), std::declval<SeenInputs>()))>>
      : std::true_type {};

  using Packed = std::shared_ptr<const QuantizedWeight>;

 public:
  template <class Scheme, class = decltype(std::declval<const Scheme&>().pack(at::Tensor()))>
  /* implicit */ Quantization(const Scheme& scheme)
      : pack_([scheme](const at::Tensor& weight) { return scheme.pack(weight); }) {
    if constexpr (HasValidate<Scheme>::value) scheme.validate("lora::Quantization");
    if constexpr (SeesInputs<Scheme>::value)
      pack_for_ = [scheme](const at::Tensor& weight, const SeenInputs& seen) { return scheme.pack(weight, seen); };
  }

  /// Throws for numbers that are not finite, and where the scheme cannot hold such a weight; with a name, errors say
  /// it.
  Packed pack(const at::Tensor& weight) const { return pack_(weight); }
  Packed pack(const at::Tensor& weight, const std::string& name) const {
    return with_name(name, [&] { return pack_(weight); });
  }

  /// Whether the scheme rounds a weight in view of its inputs, too; and what does so.
  bool sees_inputs() const { return pack_for_ != nullptr; }
  Packed pack(const at::Tensor& weight, const std::string& name, const SeenInputs& seen) const {
    return with_name(name, [&] { return pack_for_(weight, seen); });
  }

 private:
  template <class Run>
  static Packed with_name(const std::string& name, const Run& run) {
    try {
      return run();
    } catch (c10::Error& error) {
      error.add_context("while \"" + name + "\" was to be held in few bits");
      throw;
    }
  }

  std::function<Packed(const at::Tensor&)> pack_;
  std::function<Packed(const at::Tensor&, const SeenInputs&)> pack_for_;
};

}  // namespace LORA_ABI
}  // namespace lora
