// A second device without hardware, for LORA_TEST_DEVICE=fake: tensors in memory of its own that no operator of the CPU
// accepts. Its operators run on the CPU, on copies, and refuse every tensor that was made on another device.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>

namespace {

using at::IntArrayRef;
using at::Scalar;
using at::ScalarType;
using at::Tensor;
using std::optional;

const c10::Device kDevice(c10::kPrivateUse1, 0);

// What LibTorch asks of a backend: memory, a current device with its stream, and a generator of random numbers. That is
// the CPU's, so that a seed gives the numbers it gives on the CPU.

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes == 0 ? nullptr : c10::alloc_cpu(bytes);
    return {data, data, &c10::free_cpu, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::kPrivateUse1> {
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
};

Memory memory;

/// LibTorch has one accelerator in a process, so this one is registered only where it is asked for.
const bool registered = [] {
  const char* name = std::getenv("LORA_TEST_DEVICE");
  if (name == nullptr || std::string(name) != "fake") return false;
  c10::register_privateuse1_backend("fake");
  c10::SetAllocator(c10::kPrivateUse1, &memory);
  c10::impl::registerDeviceGuard(c10::kPrivateUse1, new Guard);
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

/// The memory of a tensor of the device as a tensor of the CPU.
Tensor seen_by_cpu(const Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
}

Tensor moved(const Tensor& tensor, c10::Device device) { return tensor.defined() ? tensor.to(device) : tensor; }

/// Refuses what was made in the wrong place; the numbers of expressions such as `2 * x` are on the CPU everywhere.
void check_device(const std::string& op, const Tensor& tensor) {
  if (!tensor.defined() || tensor.device() == kDevice || tensor.unsafeGetTensorImpl()->is_wrapped_number()) return;
  TORCH_CHECK(false, "the second device: ", op, " got a tensor ", tensor.sizes(), " on ", tensor.device(),
              ", but all have to be on ", kDevice);
}

// Operators on the memory itself: to make, to copy and to view tensors.

Tensor empty(IntArrayRef sizes, optional<ScalarType> type, optional<at::Layout>, optional<at::Device>, optional<bool>,
             optional<at::MemoryFormat> format) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(sizes, &memory, keys, c10::dtype_or_default(type), format);
}

Tensor empty_strided(IntArrayRef sizes, IntArrayRef strides, optional<ScalarType> type, optional<at::Layout>,
                     optional<at::Device>, optional<bool>) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(sizes, strides, &memory, keys, c10::dtype_or_default(type));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  seen_by_cpu(to).copy_(seen_by_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

Tensor& set_to_nothing(Tensor& tensor) {
  return at::native::set_(tensor, c10::Storage(c10::Storage::use_byte_size_t(), 0, &memory, true));
}

Scalar item(const Tensor& tensor) { return at::_local_scalar_dense(seen_by_cpu(tensor)); }

bool may_replace_each_other(const Tensor&, const Tensor&) { return true; }

// Operators for which LibTorch asks a backend of this kind for kernels that the CPU does not have.

Tensor fetched(const Tensor& operand) {
  check_device("aten::convolution", operand);
  return moved(operand, at::kCPU);
}

Tensor convolution(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                   int64_t groups) {
  auto y = at::convolution(fetched(x), fetched(weight), fetched(bias.value_or(Tensor())), stride, padding, dilation,
                           transposed, output_padding, groups);
  return y.to(kDevice);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& gradient, const Tensor& x, const Tensor& weight,
                                                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                        bool transposed, IntArrayRef output_padding, int64_t groups,
                                                        std::array<bool, 3> needed) {
  auto [dx, dw, db] =
      at::convolution_backward(fetched(gradient), fetched(x), fetched(weight), IntArrayRef{gradient.size(1)}, stride,
                               padding, dilation, transposed, output_padding, groups, needed);
  return {moved(dx, kDevice), moved(dw, kDevice), moved(db, kDevice)};
}

Tensor plus_bias(const Tensor& gates, const optional<Tensor>& bias) {
  return bias.has_value() && bias->defined() ? gates + *bias : gates;
}

/// The schema does not say that the running statistics are written to, so the copies that others get would be lost.
std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const optional<Tensor>& weight,
                                              const optional<Tensor>& bias, const optional<Tensor>& mean,
                                              const optional<Tensor>& variance, bool training, double momentum,
                                              double epsilon) {
  const auto seen = [](const optional<Tensor>& operand) {
    return operand && operand->defined() ? optional<Tensor>(seen_by_cpu(*operand)) : std::nullopt;
  };
  const auto [y, batch_mean, batch_deviation] = at::native_batch_norm(
      seen_by_cpu(x), seen(weight), seen(bias), seen(mean), seen(variance), training, momentum, epsilon);
  return {moved(y, kDevice), moved(batch_mean, kDevice), moved(batch_deviation, kDevice)};
}

/// Hidden state, cell state, and for the backward pass the gates before their nonlinearities.
std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& from_input, const Tensor& from_hidden, const Tensor& cell,
                                             const optional<Tensor>& input_bias, const optional<Tensor>& hidden_bias) {
  auto gates = plus_bias(from_input, input_bias) + plus_bias(from_hidden, hidden_bias);
  auto parts = gates.chunk(4, 1);
  auto next = parts[1].sigmoid() * cell + parts[0].sigmoid() * parts[2].tanh();
  return {parts[3].sigmoid() * next.tanh(), next, gates};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(const optional<Tensor>& d_hidden, const optional<Tensor>& d_cell,
                                                      const Tensor& cell, const Tensor& next, const Tensor& gates,
                                                      bool has_bias) {
  auto [d_gates, same, d_before, d_bias, same_bias] =
      at::_thnn_differentiable_lstm_cell_backward(d_hidden, d_cell, gates, at::zeros_like(gates), {}, {}, cell, next);
  return {d_gates, d_before, has_bias ? d_gates.sum(0) : Tensor()};
}

/// Hidden state, and for the backward pass all that it came from.
std::tuple<Tensor, Tensor> gru_cell(const Tensor& from_input, const Tensor& from_hidden, const Tensor& hidden,
                                    const optional<Tensor>& input_bias, const optional<Tensor>& hidden_bias) {
  auto x = plus_bias(from_input, input_bias), h = plus_bias(from_hidden, hidden_bias);
  auto xs = x.chunk(3, 1), hs = h.chunk(3, 1);
  auto update = (xs[1] + hs[1]).sigmoid();
  auto candidate = (xs[2] + (xs[0] + hs[0]).sigmoid() * hs[2]).tanh();
  return {candidate + update * (hidden - candidate), at::cat({x, h, hidden}, 1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& d_hidden, const Tensor& saved,
                                                                     bool has_bias) {
  auto parts = saved.chunk(7, 1);
  auto x = saved.narrow(1, 0, 3 * parts[0].size(1)), h = saved.narrow(1, x.size(1), x.size(1));
  auto [dx, dh, d_before, db, same] = at::_thnn_differentiable_gru_cell_backward(d_hidden, x, h, parts[6], {}, {});
  return {dx, dh, d_before, has_bias ? dx.sum(0) : Tensor(), has_bias ? dh.sum(0) : Tensor()};
}

// Every other operator.

void check_devices(const std::string& op, const c10::IValue& argument) {
  if (argument.isTensor()) check_device(op, argument.toTensor());
  if (argument.isTensorList()) {
    for (const auto& tensor : argument.toTensorVector()) check_device(op, tensor);
  }
  if (argument.isOptionalTensorList()) {
    for (const optional<Tensor>& tensor : argument.toOptionalTensorList()) check_device(op, tensor.value_or(Tensor()));
  }
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto name = c10::toString(op.operator_name());
  for (const auto& argument : torch::jit::last(stack, op.schema().arguments().size())) check_devices(name, argument);
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
  // The results are where the first operand is; for 1 / x that is the number 1, on the CPU.
  const auto returns = op.schema().returns().size();
  for (auto value = stack->end() - static_cast<std::ptrdiff_t>(returns); value != stack->end(); ++value) {
    if (value->isTensor()) *value = moved(value->toTensor(), kDevice);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &item);
  m.impl("_has_compatible_shallow_copy_type", &may_replace_each_other);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", static_cast<Tensor (*)(const Tensor&, IntArrayRef)>(&at::native::view));
  m.impl("view.dtype", &at::native::view_dtype);
  m.impl("unfold", &at::native::unfold);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("resize_", &at::native::resize_);
  m.impl("set_", &set_to_nothing);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, at::Storage)>(&at::native::set_));
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("native_batch_norm", &batch_norm);
  m.impl("_thnn_fused_lstm_cell", &lstm_cell);
  m.impl("_thnn_fused_lstm_cell_backward_impl", &lstm_cell_backward);
  m.impl("_thnn_fused_gru_cell", &gru_cell);
  m.impl("_thnn_fused_gru_cell_backward", &gru_cell_backward);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

// Autocast is no part of LibTorch for such a backend; these are its lists.
#define LORA_LOWER_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define LORA_FLOAT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define LORA_FLOAT_RESULT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define LORA_PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  using namespace at;  // the lists of LibTorch before 2.13 name a type of it
  AT_FORALL_LOWER_PRECISION_FP(LORA_LOWER_PRECISION)
  AT_FORALL_FP32(LORA_FLOAT)
  AT_FORALL_FP32_SET_OPT_DTYPE(LORA_FLOAT_RESULT)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(LORA_PROMOTE)
}
