#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <torch/arg.h>
#include <torch/optim/adamw.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>

#include <lora/adapters.hpp>
#include <lora/train/flat_buffer.hpp>
#include <lora/version.hpp>
#include <lora/weight/key.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
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
      for (size_t group = 0; group < param_groups_.size(); ++group) buffer.step(group, options_of(group).plain());
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
