#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <lora/intercept/scope.hpp>
#include <lora/method/contract.hpp>
#include <lora/site.hpp>
#include <lora/version.hpp>
#include <lora/weight/seen_inputs.hpp>

#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// What one weight was multiplied with so far.
class ObservedInputs {
 public:
  void add(const Product& product) {
    const bool multiplies = product.form == Product::Form::kRows || product.form == Product::Form::kColumns;
    std::lock_guard<std::mutex> lock(mutex_);
    if (!multiplies || product.operand.dim() != 2 || product.x.dim() == 0) {
      is_whole_ = false;
      return;
    }
    const auto x = product.x.detach().reshape({-1, product.x.size(-1)}).to(at::kFloat);
    if (!moments_.defined()) moments_ = at::zeros({x.size(1), x.size(1)}, x.options());
    moments_.addmm_(x.t(), x);
  }

  /// Notes a use that is no product with the whole weight.
  void add_other() {
    std::lock_guard<std::mutex> lock(mutex_);
    is_whole_ = false;
  }

  /// Nothing where there was none but zeros, or another use.
  std::optional<SeenInputs> of(const Site& site) const {
    const auto weight = site.weight();
    if (!is_whole_ || !moments_.defined() || weight.dim() != 2 || !moments_.any().item<bool>()) return std::nullopt;
    const auto matrix = site.view().matrix(weight);
    const auto is = [&](const at::Tensor& other) {
      return matrix.sizes() == other.sizes() && matrix.strides() == other.strides();
    };
    const int64_t dim = is(weight) ? 1 : 0;
    if (!is(dim == 1 ? weight : weight.t()) || weight.size(dim) != moments_.size(0)) return std::nullopt;
    return SeenInputs{moments_, dim};
  }

 private:
  std::mutex mutex_;
  at::Tensor moments_;
  bool is_whole_ = true;
};

/// A method that looks at what its weight is multiplied with, and changes nothing.
struct InputObserver : Method {
  static constexpr MethodInfo info{"InputObserver"};
  std::vector<MethodField<InputObserver>> fields() const { return {}; }
  void initialize(const Base& /*base*/) {}
  at::Tensor delta(const Base& base) const {
    observed->add_other();
    return at::zeros_like(base.dense());
  }
  at::Tensor forward(const Product& product) const {
    observed->add(product);
    return product.frozen();
  }

  std::shared_ptr<ObservedInputs> observed = std::make_shared<ObservedInputs>();
};

/// The inputs of each of the sites in what `run` computes; nothing for a weight that is not multiplied with as a whole.
template <class Run>
std::vector<std::optional<SeenInputs>> observe_inputs(const std::vector<std::shared_ptr<Site>>& sites, const Run& run) {
  std::vector<std::shared_ptr<ObservedInputs>> observed;
  std::vector<ActiveSite> active;
  for (const auto& site : sites) {
    InputObserver observer;
    observer.shape = site->view().shape();
    observed.push_back(observer.observed);
    mark(site->slot());  // so that other uses than products are seen, too
    active.emplace_back(site,
                        std::vector<ActiveSite::Acting>{{std::make_shared<MethodOf<InputObserver>>(observer), 1}});
  }
  {
    auto set = std::make_shared<const ActiveSet>(std::move(active), std::vector<Place>());
    const ScopeGuard guard(std::make_shared<const Scope>(std::move(set), std::make_shared<Usage>()));
    run();
  }
  std::vector<std::optional<SeenInputs>> all;
  for (size_t i = 0; i < sites.size(); ++i) all.push_back(observed[i]->of(*sites[i]));
  return all;
}

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
