#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DispatchKeySet.h>
#include <torch/arg.h>
#include <torch/optim/adamw.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>

#include <lora/adapters.hpp>
#include <lora/version.hpp>
#include <lora/weight/key.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// Options of `AdamW`, for all parameters or for a group of them: `AdamWOptions(1e-4).weight_decay(0).b_rate(16)`.
class AdamWOptions : public torch::optim::OptimizerCloneableOptions<AdamWOptions> {
 public:
  using betas_t = std::tuple<double, double>;

  /* implicit */ AdamWOptions(double lr = 1e-3) : lr_(lr) {}

  /// Learning rate; may be changed between steps (`set_lr`, schedules). At least 0. Default: 1e-3.
  TORCH_ARG(double, lr);
  /// How much of the running averages of the gradient and of its square stays; each in [0, 1). Default: 0.9, 0.999.
  TORCH_ARG(betas_t, betas) = {0.9, 0.999};
  /// Is added to the root that divides. At least 0. Default: 1e-8.
  TORCH_ARG(double, eps) = 1e-8;
  /// What a parameter loses of itself, times the learning rate. At least 0. Default: 0.01.
  TORCH_ARG(double, weight_decay) = 1e-2;
  /// The learning rate of every lora_B, divided by that of the others (Hayou et al. 2024, "LoRA+"). For `Adapters`,
  /// whose tensors have names. Above 0. Default: 1.
  TORCH_ARG(double, b_rate) = 1;

 public:
  double get_lr() const override { return lr(); }
  void set_lr(const double value) override { lr(value); }

  /// Throws c10::ValueError when one of them is out of its range.
  void validate() const {
    constexpr const char* who = "lora::AdamW: ";
    const auto is_share = [](double value) { return value >= 0 && value < 1; };
    TORCH_CHECK_VALUE(lr() >= 0, who, "lr has to be at least 0, but got ", lr());
    TORCH_CHECK_VALUE(is_share(std::get<0>(betas())) && is_share(std::get<1>(betas())), who,
                      "betas have to be in [0, 1), but got ", std::get<0>(betas()), " and ", std::get<1>(betas()));
    TORCH_CHECK_VALUE(eps() >= 0, who, "eps has to be at least 0, but got ", eps());
    TORCH_CHECK_VALUE(weight_decay() >= 0, who, "weight_decay has to be at least 0, but got ", weight_decay());
    TORCH_CHECK_VALUE(b_rate() > 0, who, "b_rate has to be above 0, but got ", b_rate());
  }

  /// The same for LibTorch's optimizer.
  torch::optim::AdamWOptions plain() const {
    return torch::optim::AdamWOptions(lr()).betas(betas()).eps(eps()).weight_decay(weight_decay());
  }
};

namespace detail {

/// Whether a parameter fills its memory, in which nothing else lies; or has none.
inline bool can_move(const at::Tensor& parameter) {
  return parameter.numel() == 0 || (parameter.is_non_overlapping_and_dense() && parameter.storage_offset() == 0 &&
                                    parameter.storage().nbytes() == static_cast<size_t>(parameter.nbytes()));
}

/// One parameter, and what is its own of a flat buffer.
struct FlatSlot {
  FlatSlot(at::Tensor of, size_t of_group)
      : parameter(std::move(of)), group(of_group), strides(parameter.strides().vec()) {}

  at::Tensor parameter;
  size_t group;
  std::vector<int64_t> strides;
  int64_t first = 0, end = 0;  ///< its elements in the buffer; what is behind them up to `end` is nobody's
  at::Tensor value, gradient;
  int64_t steps = 0;
  int64_t writes = 0;  ///< to the gradient, when it was zero last

  int64_t size() const { return parameter.numel(); }
  bool got_gradient() const { return gradient._version() != writes; }
};

/// Parameters of one type on one device, in memory that follows one on another, and their gradients and averages
/// likewise. Each gradient counts the writes to it alone: that tells whether the parameter got one.
///
/// It is the storage of a parameter that is moved, so whoever else holds it (views, scopes, saved graphs) sees the same
/// numbers, and files hold no more than the parameter. One that has only a part of its storage stays where it is.
class FlatBuffer {
 public:
  explicit FlatBuffer(std::vector<FlatSlot> slots) : slots_(std::move(slots)) {
    if (can_move(slots_.front().parameter)) {
      gather();
    } else {
      stay(slots_.front());
    }
    gradients_ = at::zeros(values_.sizes(), values_.options());
    averages_ = at::zeros_like(gradients_);
    squares_ = at::zeros_like(gradients_);
    for (auto& slot : slots_) {
      // A view would count writes together with all others.
      slot.gradient = of(gradients_, slot).variable_data();
      slot.writes = slot.gradient._version();
      collect_gradient(slot);
    }
  }

  const std::vector<FlatSlot>& slots() const { return slots_; }
  std::vector<FlatSlot>& slots() { return slots_; }
  const at::Tensor& gradients() const { return gradients_; }

  /// What is a slot's own of the running averages, shaped as the parameter.
  at::Tensor average(const FlatSlot& slot) const { return of(averages_, slot); }
  at::Tensor square(const FlatSlot& slot) const { return of(squares_, slot); }

  /// Brings here what somebody has given other memory since.
  void collect() {
    for (auto& slot : slots_) {
      collect_value(slot);
      collect_gradient(slot);
    }
  }

  void zero_gradients() {
    gradients_.zero_();
    for (auto& slot : slots_) {
      slot.writes = slot.gradient._version();
      attach(slot);
    }
  }

  /// One step for the parameters of that group which got a gradient.
  void step(size_t group, const AdamWOptions& options) {
    std::vector<Range> ranges;
    for (auto& slot : slots_) {
      if (slot.group != group || !slot.got_gradient()) continue;
      ++slot.steps;
      slot.parameter.unsafeGetTensorImpl()->bump_version();
      const bool follows = !ranges.empty() && ranges.back().end == slot.first && ranges.back().steps == slot.steps;
      if (follows) {
        ranges.back().end = slot.end;
      } else {
        ranges.push_back({slot.first, slot.end, slot.steps});
      }
    }
    if (ranges.empty()) return;
    if (is_fused()) {
      step_fused(ranges, options);
    } else {
      for (const auto& range : ranges) step_plain(range, options);
    }
  }

 private:
  struct Range {
    int64_t first, end, steps;

    at::Tensor of(const at::Tensor& buffer) const {
      const bool is_all = first == 0 && buffer.numel() == end;
      return is_all ? buffer : buffer.narrow(0, first, end - first);
    }
  };

  static constexpr int64_t kAlignment = 16;  // elements, so that each parameter starts where vectors like to

  void gather() {
    int64_t size = 0;
    for (auto& slot : slots_) {
      slot.first = size;
      size += (slot.size() + kAlignment - 1) / kAlignment * kAlignment;
      slot.end = size;
    }
    values_ = at::zeros({size}, slots_.front().parameter.options().requires_grad(false));
    for (auto& slot : slots_) {
      slot.value = of(values_, slot);
      move_in(slot);
    }
  }

  void stay(FlatSlot& slot) {
    slot.value = slot.parameter.detach();
    slot.end = slot.size();
    is_flat_ = slot.value.is_non_overlapping_and_dense();
    values_ = is_flat_ ? slot.value.as_strided({slot.size()}, {1}) : slot.value;
  }

  void move_in(FlatSlot& slot) {
    if (slot.size() == 0) return;
    slot.value.copy_(slot.parameter.detach());
    if (can_move(slot.parameter) && slot.parameter.strides() == slot.value.strides()) {
      slot.parameter.storage().unsafeGetStorageImpl()->set_data_ptr_noswap(memory_of(slot));
    } else {  // somebody gave it a part of other memory
      slot.parameter.set_data(slot.value);
    }
  }

  /// A part of the buffer, which lives as long.
  static c10::DataPtr memory_of(const FlatSlot& slot) {
    auto owner = std::make_unique<c10::Storage>(slot.value.storage());
    const auto let_go = [](void* storage) { delete static_cast<c10::Storage*>(storage); };
    return {slot.value.mutable_data_ptr(), owner.release(), let_go, slot.value.device()};
  }

  at::Tensor of(const at::Tensor& buffer, const FlatSlot& slot) const {
    if (!is_flat_) return buffer;
    return buffer.as_strided(slot.parameter.sizes(), slot.strides, buffer.storage_offset() + slot.first);
  }

  void collect_value(FlatSlot& slot) {
    const auto &now = slot.parameter, &then = slot.value;
    TORCH_CHECK(now.sizes() == then.sizes() && now.scalar_type() == then.scalar_type() && now.device() == then.device(),
                "lora::AdamW: a parameter is ", now.scalar_type(), " ", now.sizes(), " on ", now.device(), " and was ",
                then.scalar_type(), " ", then.sizes(), " on ", then.device(), " when the optimizer was ",
                "made; move and cast a model before");
    const bool is_there = now.const_data_ptr() == then.const_data_ptr() && now.strides() == then.strides();
    if (now.numel() > 0 && !is_there) move_in(slot);
  }

  static void collect_gradient(FlatSlot& slot) {
    const auto gradient = slot.parameter.grad();
    if (gradient.is_same(slot.gradient)) return;
    if (gradient.defined()) {
      slot.gradient.copy_(gradient.layout() == at::kStrided ? gradient : gradient.to_dense());
    } else if (slot.got_gradient()) {
      slot.gradient.zero_();
      slot.writes = slot.gradient._version();
    }
    attach(slot);
  }

  static void attach(FlatSlot& slot) {
    if (!slot.parameter.grad().is_same(slot.gradient)) slot.parameter.mutable_grad() = slot.gradient;
  }

  /// Whether LibTorch has its one operator for such tensors.
  bool is_fused() const {
    static const auto op = c10::Dispatcher::singleton().findSchema({"aten::_fused_adamw_", ""});
    return op.has_value() && is_flat_ && op->hasKernelForDispatchKey(c10::legacyExtractDispatchKey(values_.key_set()));
  }

  void step_fused(const std::vector<Range>& ranges, const AdamWOptions& options) {
    std::vector<at::Tensor> values, gradients, averages, squares, steps;
    for (const auto& range : ranges) {
      values.push_back(range.of(values_));
      gradients.push_back(range.of(gradients_));
      averages.push_back(range.of(averages_));
      squares.push_back(range.of(squares_));
      steps.push_back(at::full({}, static_cast<double>(range.steps), values_.options().dtype(at::kFloat)));
    }
    const auto [beta1, beta2] = options.betas();
    at::_fused_adamw_(values, gradients, averages, squares, /*max_exp_avg_sqs=*/{}, steps, options.lr(), beta1, beta2,
                      options.weight_decay(), options.eps(), /*amsgrad=*/false, /*maximize=*/false);
  }

  void step_plain(const Range& range, const AdamWOptions& options) {
    auto value = range.of(values_), average = range.of(averages_), square = range.of(squares_);
    const auto gradient = range.of(gradients_);
    const auto [beta1, beta2] = options.betas();
    const auto steps = static_cast<double>(range.steps);
    value.mul_(1 - options.lr() * options.weight_decay());
    average.mul_(beta1).add_(gradient, 1 - beta1);
    square.mul_(beta2).addcmul_(gradient, gradient, 1 - beta2);
    const auto root = square.sqrt().div_(std::sqrt(1 - std::pow(beta2, steps))).add_(options.eps());
    value.addcdiv_(average, root, -options.lr() / (1 - std::pow(beta1, steps)));
  }

  std::vector<FlatSlot> slots_;
  bool is_flat_ = true;
  at::Tensor values_, gradients_, averages_, squares_;
};

/// Throws when two parameters have numbers in common, as one that is given twice.
inline void check_apart(std::vector<at::Tensor> parameters) {
  const auto begin = [](const at::Tensor& p) { return static_cast<const char*>(p.const_data_ptr()); };
  const auto is_before = [&](const at::Tensor& a, const at::Tensor& b) { return begin(a) < begin(b); };
  const auto is_empty = [](const at::Tensor& p) { return p.numel() == 0; };
  parameters.erase(std::remove_if(parameters.begin(), parameters.end(), is_empty), parameters.end());
  std::sort(parameters.begin(), parameters.end(), is_before);
  for (size_t i = 1; i < parameters.size(); ++i) {
    const auto& before = parameters[i - 1];
    const bool overlap = before.is_alias_of(parameters[i]) && before.is_contiguous() &&
                         begin(parameters[i]) < begin(before) + before.nbytes();
    TORCH_CHECK(!overlap && !before.is_same(parameters[i]), "lora::AdamW: a parameter ", parameters[i].sizes(),
                " is given twice, or has numbers in common with another one ", before.sizes(),
                "; give tensors that are tied once");
  }
}

}  // namespace detail

/// Adam with decoupled weight decay (Loshchilov and Hutter 2019), over flat memory: for the gradient g of a parameter
/// p,
///
///   p -= lr weight_decay p,   m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
///   p -= lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
///
/// It is an optimizer of LibTorch, with the values, groups and files of torch::optim::AdamW (either reads the other's),
/// but the parameters of one type and device lie in one buffer, and so do their gradients: a step is one operator for
/// each group, `zero_grad` one fill, `clip_grad_norm` two operators, and backward passes add to gradients in place.
///
///   lora::AdamW optimizer(adapters, lora::AdamWOptions(2e-4).weight_decay(0).b_rate(16));
///
/// The tensors stay the ones they are, for adapters, modules and whoever holds them or views of them; only their memory
/// is another. A parameter that is a part of other memory stays there and is stepped alone. One that got no gradient
/// since `zero_grad` is passed over in a step, as in LibTorch one whose gradient is undefined. Values may be read into
/// the parameters at any time; a parameter that was moved to other memory is taken back in the next step. An adapter
/// that was removed is no longer used, gets no gradients, and stays as it is.
///
/// Throws c10::ValueError for options out of range, c10::Error for tensors that are no leaves, given twice or not of a
/// floating type, and in a step when a parameter has another type, shape or device than before.
class AdamW : public torch::optim::Optimizer {
 public:
  /// The trained tensors of all adapters. With a b_rate, every lora_B is in a second group.
  explicit AdamW(const Adapters& adapters, const AdamWOptions& options = {})
      : AdamW(groups_of(adapters, options), options) {}

  explicit AdamW(std::vector<at::Tensor> parameters, const AdamWOptions& options = {})
      : AdamW(unnamed(std::move(parameters), options), options) {}

  /// Groups may have `AdamWOptions` of their own; those that have none take `defaults`.
  explicit AdamW(const std::vector<torch::optim::OptimizerParamGroup>& groups, const AdamWOptions& defaults = {})
      : Optimizer(checked(groups), std::make_unique<AdamWOptions>(defaults)) {
    defaults.validate();
    for (size_t i = 0; i < groups.size(); ++i) keep_options(param_groups_[i], groups[i]);
    take_new_groups();
  }

  /// Adds a group, of which a step takes notice.
  void add_param_group(const torch::optim::OptimizerParamGroup& group) {
    checked({group});
    Optimizer::add_param_group(group);
    keep_options(param_groups_.back(), group);
    take_new_groups();
  }

  /// A step with the gradients that are there. Returns what `closure` returns, which is called first.
  at::Tensor step(LossClosure closure = nullptr) override {
    at::Tensor loss;
    if (closure != nullptr) {
      at::AutoGradMode with_gradient(true);
      loss = closure();
    }
    const detail::BelowInterception below;
    at::NoGradGuard no_grad;
    collect();
    for (auto& buffer : buffers_) {
      for (size_t group = 0; group < param_groups_.size(); ++group) buffer.step(group, options_of(group));
    }
    return loss;
  }

  /// Sets all gradients to zero. They stay defined, so that backward adds to them in place; with `set_to_none` they do
  /// not, as with LibTorch's default, and the next backward pass makes new ones.
  void zero_grad(bool set_to_none = false) {
    if (set_to_none) return Optimizer::zero_grad(true);
    const detail::BelowInterception below;
    at::NoGradGuard no_grad;
    take_new_groups();
    for (auto& buffer : buffers_) buffer.zero_gradients();
  }

  /// The gradients of all parameters: one flat tensor for each type and device. What is written to them counts.
  std::vector<at::Tensor> flat_gradients() {
    const detail::BelowInterception below;
    at::NoGradGuard no_grad;
    collect();
    std::vector<at::Tensor> all;
    for (const auto& buffer : buffers_) all.push_back(buffer.gradients());
    return all;
  }

  /// As torch::optim::AdamW, which can read it: the state of each parameter, and the options of each group.
  void save(torch::serialize::OutputArchive& archive) const override {
    auto twin = plain_twin();
    for (const auto& buffer : buffers_) {
      for (const auto& slot : buffer.slots()) {
        if (slot.steps == 0) continue;
        auto state = std::make_unique<torch::optim::AdamWParamState>();
        state->step(slot.steps).exp_avg(buffer.average(slot).clone()).exp_avg_sq(buffer.square(slot).clone());
        twin.state()[slot.parameter.unsafeGetTensorImpl()] = std::move(state);
      }
    }
    twin.save(archive);
  }

  /// Throws when the groups, or the shapes of their parameters, are others than those that were saved.
  void load(torch::serialize::InputArchive& archive) override {
    const detail::BelowInterception below;
    at::NoGradGuard no_grad;
    take_new_groups();
    auto twin = plain_twin();
    twin.load(archive);
    for_each_loaded(twin, [](const auto&, const auto& slot, const auto* state) {
      TORCH_CHECK(state == nullptr || state->exp_avg().sizes() == slot.parameter.sizes(),
                  "lora::AdamW: the saved state of a parameter is ", state->exp_avg().sizes(),
                  ", but the parameter is ", slot.parameter.sizes(),
                  "; load what was saved for the same parameters in the same order");
    });
    for_each_loaded(twin, [](const auto& buffer, auto& slot, const auto* state) {
      slot.steps = state == nullptr ? 0 : state->step();
      auto average = buffer.average(slot), square = buffer.square(slot);
      if (state == nullptr) {
        average.zero_();
        square.zero_();
      } else {
        average.copy_(state->exp_avg());
        square.copy_(state->exp_avg_sq());
      }
    });
    for (size_t group = 0; group < param_groups_.size(); ++group) {
      const auto& saved = static_cast<const torch::optim::AdamWOptions&>(twin.param_groups()[group].options());
      options_of(group).lr(saved.lr()).betas(saved.betas()).eps(saved.eps()).weight_decay(saved.weight_decay());
    }
  }

 private:
  using Groups = std::vector<torch::optim::OptimizerParamGroup>;

  static const Groups& checked(const Groups& groups) {
    for (size_t i = 0; i < groups.size(); ++i) {
      const bool fits = !groups[i].has_options() || dynamic_cast<const AdamWOptions*>(&groups[i].options()) != nullptr;
      TORCH_CHECK_TYPE(fits, "lora::AdamW: the options of group ", i, " are no lora::AdamWOptions");
    }
    return groups;
  }

  /// LibTorch, since 2.13, keeps options of groups only for its own optimizers.
  static void keep_options(torch::optim::OptimizerParamGroup& group, const torch::optim::OptimizerParamGroup& given) {
    if (given.has_options()) group.set_options(given.options().clone());
  }

  static Groups unnamed(std::vector<at::Tensor> parameters, const AdamWOptions& options) {
    options.validate();
    TORCH_CHECK_VALUE(options.b_rate() == 1, "lora::AdamW: b_rate is ", options.b_rate(), ", but bare tensors have no ",
                      "names by which a lora_B could be told; give the lora::Adapters, or groups with rates of their ",
                      "own");
    Groups groups;
    groups.emplace_back(std::move(parameters));
    return groups;
  }

  static Groups groups_of(const Adapters& adapters, const AdamWOptions& options) {
    options.validate();
    std::vector<at::Tensor> others, Bs;
    for (const auto& item : adapters.named_parameters()) {
      const auto name = "." + item.key() + ".";  // "fc.lora_B", and with several adapters "fc.lora_B.french"
      const bool is_B = options.b_rate() != 1 && name.find(".lora_B.") != std::string::npos;
      (is_B ? Bs : others).push_back(item.value());
    }
    TORCH_CHECK_VALUE(options.b_rate() == 1 || !Bs.empty(), "lora::AdamW: b_rate is ", options.b_rate(),
                      ", but no tensor of the adapters is a lora_B");
    Groups groups;
    groups.emplace_back(std::move(others), std::make_unique<AdamWOptions>(options));
    if (Bs.empty()) return groups;
    auto faster = std::make_unique<AdamWOptions>(options);
    faster->lr(options.lr() * options.b_rate());
    groups.emplace_back(std::move(Bs), std::move(faster));
    return groups;
  }

  AdamWOptions& options_of(size_t group) {
    auto* options = dynamic_cast<AdamWOptions*>(&param_groups_[group].options());
    TORCH_CHECK_TYPE(options != nullptr, "lora::AdamW: the options of group ", group, " are no lora::AdamWOptions");
    return *options;
  }

  void collect() {
    take_new_groups();
    for (auto& buffer : buffers_) buffer.collect();
  }

  /// Groups are added by LibTorch, which says nothing of it.
  void take_new_groups() {
    if (groups_taken_ == param_groups_.size()) return;
    const detail::BelowInterception below;
    at::NoGradGuard no_grad;
    std::vector<at::Tensor> parameters;
    std::vector<size_t> groups;
    for (size_t group = groups_taken_; group < param_groups_.size(); ++group) {
      options_of(group).validate();
      for (const auto& parameter : param_groups_[group].params()) {
        check(parameter);
        parameters.push_back(parameter);
        groups.push_back(group);
      }
    }
    detail::check_apart(parameters);
    std::vector<std::vector<detail::FlatSlot>> together;
    for (size_t i = 0; i < parameters.size(); ++i) {
      detail::FlatSlot slot(parameters[i], groups[i]);
      if (detail::can_move(parameters[i])) {
        fitting(together, parameters[i]).push_back(std::move(slot));
      } else {
        buffers_.emplace_back(std::vector<detail::FlatSlot>{std::move(slot)});
      }
    }
    for (auto& slots : together) buffers_.emplace_back(std::move(slots));
    groups_taken_ = param_groups_.size();
  }

  static void check(const at::Tensor& parameter) {
    TORCH_CHECK(parameter.defined() && parameter.layout() == at::kStrided && parameter.has_storage() &&
                    at::isFloatingType(parameter.scalar_type()),
                "lora::AdamW: a parameter has to be a dense tensor of a floating type, but one is ",
                parameter.defined() ? parameter.toString() : "undefined");
  }

  /// The slots of the type and device of the parameter, at the end where there are none yet.
  static std::vector<detail::FlatSlot>& fitting(std::vector<std::vector<detail::FlatSlot>>& together,
                                                const at::Tensor& parameter) {
    const auto fits = [&](const std::vector<detail::FlatSlot>& slots) {
      const auto& other = slots.front().parameter;
      return other.scalar_type() == parameter.scalar_type() && other.device() == parameter.device();
    };
    const auto found = std::find_if(together.begin(), together.end(), fits);
    return found != together.end() ? *found : together.emplace_back();
  }

  /// LibTorch's optimizer of the same groups, for files.
  torch::optim::AdamW plain_twin() const {
    Groups groups;
    for (const auto& group : param_groups_) {
      const auto* options = dynamic_cast<const AdamWOptions*>(&group.options());
      TORCH_CHECK_TYPE(options != nullptr, "lora::AdamW: the options of a group are no lora::AdamWOptions");
      groups.emplace_back(group.params(), std::make_unique<torch::optim::AdamWOptions>(options->plain()));
    }
    return torch::optim::AdamW(groups);
  }

  template <class Visit>
  void for_each_loaded(torch::optim::AdamW& twin, const Visit& visit) {
    for (auto& buffer : buffers_) {
      for (auto& slot : buffer.slots()) {
        const auto found = twin.state().find(slot.parameter.unsafeGetTensorImpl());
        const auto* state = found == twin.state().end() ? nullptr : found->second.get();
        visit(buffer, slot, static_cast<const torch::optim::AdamWParamState*>(state));
      }
    }
  }

  std::vector<detail::FlatBuffer> buffers_;
  size_t groups_taken_ = 0;
};

/// Scales all gradients so that their norm, taken over all of them, is at most `max_norm`; returns the norm that they
/// had. As in LibTorch, gradients that are not finite stay so; with `error_if_nonfinite` that is an error, and nothing
/// is changed.
inline double clip_grad_norm(AdamW& optimizer, double max_norm, bool error_if_nonfinite = false) {
  TORCH_CHECK_VALUE(max_norm >= 0, "lora::clip_grad_norm: max_norm has to be at least 0, but got ", max_norm);
  at::NoGradGuard no_grad;
  auto gradients = optimizer.flat_gradients();
  double squares = 0;
  for (const auto& gradient : gradients) {
    const auto wide = at::promote_types(gradient.scalar_type(), at::kFloat);
    const auto norm = at::linalg_vector_norm(gradient, 2, std::nullopt, /*keepdim=*/false, wide).item<double>();
    squares += norm * norm;
  }
  const auto norm = std::sqrt(squares);
  TORCH_CHECK(!error_if_nonfinite || std::isfinite(norm), "lora::clip_grad_norm: the norm of the gradients is ", norm,
              "; leave out the step, or pass error_if_nonfinite = false");
  const auto factor = max_norm / (norm + 1e-6);
  if (factor >= 1) return norm;
  for (auto& gradient : gradients) gradient.mul_(factor);
  return norm;
}

}  // namespace LORA_ABI
}  // namespace lora
