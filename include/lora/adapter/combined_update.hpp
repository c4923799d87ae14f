#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <lora/adapter/adapter.hpp>
#include <lora/adapter/combine_options.hpp>
#include <lora/adapter/factors.hpp>
#include <lora/adapter/pruning.hpp>
#include <lora/version.hpp>
#include <lora/weight/finite.hpp>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// What adapters do to one tensor of a model together.
struct Combined {
  struct Share {
    std::string adapter;
    const AdapterPart* part;
    double scale;   // the adapter's own
    double weight;  // in the combination
  };

  std::shared_ptr<Site> site;
  std::vector<Share> shares = {};
  Factors update = {};  // of the weight of a layer
  int64_t rank = 0;     // that a configuration gives for it
};

/// Computes the updates of a combination, tensor by tensor.
class UpdateCombiner {
 public:
  explicit UpdateCombiner(const CombineOptions& options)
      : options_(options),
        generator_(options.seed() ? at::detail::createCPUGenerator(*options.seed())
                                  : at::detail::getDefaultCPUGenerator()) {}

  /// Works out the product and the rank of a layer's update; of a layer without inputs or outputs there is none.
  void combine(Combined& layer) const {
    const auto& shape = layer.site->view().shape();
    const bool has_rank = options_.rank() && !options_.energy();
    auto rank = has_rank ? divided(*options_.rank(), shape.rank_shares) : int64_t{1};
    if (shape.in > 0 && shape.out > 0) {
      layer.update = factors(layer);
      if (!has_rank) rank = layer.update.rank();
    }
    layer.rank = rank * shape.rank_shares;
  }

  /// sum_i w_i delta_i of a tensor as a whole, shaped like it.
  static at::Tensor sum(const Combined& tensor) {
    const auto type = sum_dtype(tensor.site->pristine().scalar_type());
    auto sum = at::zeros(tensor.site->pristine().sizes(), tensor.site->pristine().options().dtype(type));
    for (const auto& share : tensor.shares)
      sum = sum.add(tensor.site->view().weight(matrix(*tensor.site, share)), share.weight);
    return sum;
  }

  /// The type in which numbers of the type `type` are added.
  static at::ScalarType sum_dtype(at::ScalarType type) {
    return at::isFloatingType(type) ? adapter_dtype(type) : at::kDouble;
  }

 private:
  static int64_t divided(int64_t rank, int64_t shares) { return (rank + shares - 1) / shares; }

  Factors factors(const Combined& layer) const {
    if (options_.prunes()) return cut(layer, pruned(layer));
    const bool is_product = std::all_of(layer.shares.begin(), layer.shares.end(),
                                        [&](const auto& share) { return is_low_rank(*layer.site, share); });
    return is_product ? cut(layer, product(layer)) : cut(layer, layer.site->view().matrix(sum(layer)));
  }

  static bool is_low_rank(const Site& site, const Combined::Share& share) {
    if (share.part->role != AdapterPart::Role::kLayer || !share.part->method->has_term()) return false;
    const auto term = share.part->method->term(site.base());
    return term.A.defined() && !term.scales_weight();
  }

  static Factors product(const Combined& layer) {
    std::vector<Factors> all;
    for (const auto& share : layer.shares) all.push_back(product(*layer.site, share));
    return concatenated(all);
  }

  static Factors product(const Site& site, const Combined::Share& share) {
    const auto term = share.part->method->term(site.base());
    const auto type = adapter_dtype(site.weight().scalar_type());
    auto b = term.B.to(type) * (term.scale * share.scale * share.weight);
    if (!site.view().part_rows().empty()) b = b * is_used(site).narrow(-1, 0, 1);  // rows that no part has
    check_finite(site, share, term.A);
    check_finite(site, share, b);
    return {term.A.to(type), b};
  }

  /// The update of one adapter as a matrix, with the adapter's own scale.
  static at::Tensor matrix(const Site& site, const Combined::Share& share) {
    const auto weight = site.pristine();
    const auto base = site.base(dequantized(weight).to(sum_dtype(weight.scalar_type())));
    const auto update = share.part->method->delta(base).to(base.dtype()) * share.scale;
    check_finite(site, share, update);
    return update;
  }

  static void check_finite(const Site& site, const Combined::Share& share, const at::Tensor& tensor) {
    TORCH_CHECK(is_finite(tensor), "lora::combine: the update of adapter \"", share.adapter, "\" to ", site.name(),
                " is not finite (NaN or infinity)");
  }

  /// Which entries of a layer's matrix are ones of its weight, as 0 and 1: of fused projections some are not.
  static at::Tensor is_used(const Site& site) {
    const auto weight = site.weight();
    return site.view().matrix(
        at::ones(weight.sizes(), weight.options().dtype(adapter_dtype(weight.scalar_type())).requires_grad(false)));
  }

  /// The entries of an update in the order of the weight, those of projections that are not adapted left out.
  static at::Tensor entries(const Site& site, const at::Tensor& matrix) {
    const auto weight = site.view().weight(matrix);
    return site.view().part_rows().empty() ? weight.flatten() : weight.masked_select(is_adapted(site));
  }

  static at::Tensor from_entries(const Site& site, const at::Tensor& entries) {
    if (site.view().part_rows().empty()) return site.view().matrix(entries.reshape(site.weight().sizes()));
    const auto weight = at::zeros(site.weight().sizes(), entries.options());
    return site.view().matrix(weight.masked_scatter(is_adapted(site), entries));
  }

  static at::Tensor is_adapted(const Site& site) { return site.view().weight(is_used(site)).gt(0); }

  at::Tensor pruned(const Combined& layer) const {
    std::vector<at::Tensor> kept;
    std::vector<double> weights;
    for (const auto& share : layer.shares) {
      kept.push_back(pruned(entries(*layer.site, matrix(*layer.site, share))));
      weights.push_back(share.weight);
    }
    const bool elects = options_.kind() == CombineKind::kTies || options_.kind() == CombineKind::kDareTies;
    return from_entries(*layer.site,
                        elects ? disjoint_mean(kept, weights, options_.majority_sign()) : weighted_sum(kept, weights));
  }

  at::Tensor pruned(const at::Tensor& entries) const {
    const bool is_random = options_.kind() == CombineKind::kDareLinear || options_.kind() == CombineKind::kDareTies;
    return is_random ? random_entries(entries, *options_.density(), generator_)
                     : largest_entries(entries, *options_.density());
  }

  Factors cut(const Combined& layer, const Factors& product) const {
    return options_.kind() == CombineKind::kConcatenation ? product : cut(layer, spectrum(product));
  }
  Factors cut(const Combined& layer, const at::Tensor& matrix) const {
    const bool keeps_all = options_.kind() == CombineKind::kConcatenation || options_.prunes();
    return keeps_all && !options_.rank() && !options_.energy() ? whole(matrix) : cut(layer, spectrum(matrix));
  }
  Factors cut(const Combined& layer, const Spectrum& spectrum) const {
    const auto shares = layer.site->view().shape().rank_shares;
    auto rank = options_.rank() ? divided(*options_.rank(), shares) : spectrum.s.size(-1);
    if (options_.energy()) rank = std::min(rank, rank_for_energy(spectrum.s, *options_.energy()));
    if (!options_.energy() && !options_.rank()) rank = spectrum.numerical_rank();
    return spectrum.first(rank);
  }

  const CombineOptions options_;
  const at::Generator generator_;
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
