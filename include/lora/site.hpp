#pragma once

#include <lora/linkage.hpp>
#include <lora/method/contract.hpp>
#include <lora/version.hpp>
#include <lora/weight/merged_weights.hpp>
#include <lora/weight/placeholder.hpp>
#include <lora/weight/quantized.hpp>
#include <lora/weight/slot.hpp>
#include <lora/weight/stamp.hpp>
#include <lora/weight/use.hpp>

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// How PEFT's files name and shape the tensors of an adapter, where that differs from the tensors themselves. A
/// function that is empty changes nothing.
struct FileLayout {
  std::function<std::string(const NamedTensor& tensor)> name;  ///< without the layer's
  std::function<at::Tensor(const std::string& name, const at::Tensor& tensor)> to_file;
  /// Throws c10::Error when `stored` has no form as the tensor `name`.
  std::function<at::Tensor(const std::string& name, const at::Tensor& stored)> from_file;
};

/// Where a tensor of a model is, and what it is called there.
struct Place {
  std::string name;       ///< of the layer in the model: "encoder.self_attn"
  std::string file_name;  ///< of the layer in PEFT's files, where that differs from `name`
  std::string kind;       ///< for reports and errors: "Linear"
  std::shared_ptr<detail::WeightSlot> slot;
  Use use = Use::kProduct;                             ///< which uses of the tensor are this layer's
  std::shared_ptr<detail::WeightSlot> bias = nullptr;  ///< the layer's bias, for methods that change it, too
  /// The dimension of the layer's inputs that counts the rows of a batch; nothing where that cannot be known.
  std::optional<int64_t> row_axis = 0;
  std::vector<std::string> tied_to = {};  ///< layers with the same weight, whose uses of it are not adapted here
};

/// One method that is merged, for `Site::merge`, with the name of its adapter for errors.
struct MergedMethod {
  std::string adapter;
  std::shared_ptr<AnyMethod> method;
  double weight = 1;
};

/// One tensor of a model that can be adapted, and the only implementation of merging.
///
/// Merging computes W' = W + sum of the updates in float (double for double weights), rounds once to the type of W, and
/// writes the values into the tensor, which stays the same one for everyone who holds it; what was there is kept, and
/// unmerging writes it back, bit by bit. Only a weight that has to be told apart from what it is tied to is replaced by
/// another tensor.
class Site {
 public:
  Site(Place place, MatrixView view, FileLayout files = {})
      : place_(std::move(place)),
        view_(std::make_shared<const MatrixView>(std::move(view))),
        files_(std::move(files)) {}

  const std::string& name() const { return place_.name; }
  const std::string& kind() const { return place_.kind; }
  const Place& place() const { return place_; }
  const detail::WeightSlot& slot() const { return *place_.slot; }
  Use use() const { return place_.use; }
  const MatrixView& view() const { return *view_; }
  const FileLayout& files() const { return files_; }
  bool is_training() const { return place_.slot->is_training(); }
  /// The name that the layer has in a model; where it brings its site with it, that is not known before.
  void rename(const std::string& name);
  /// The site of the layer's bias, made when it is first asked for; null where there is none.
  const std::shared_ptr<Site>& bias_site();
  /// The adapter that the layer has of its own, which acts outside of scopes; null where it has none.
  const std::shared_ptr<AnyMethod>& own() const { return own_; }
  void set_own(std::shared_ptr<AnyMethod> method) { own_ = std::move(method); }

  /// The weight as it is now, merged or not.
  at::Tensor weight() const { return place_.slot->read(); }
  /// The weight as it is without any merged update, also of a model that was moved since it was merged.
  at::Tensor pristine() const;
  /// The same as methods see it.
  WeightBase base() const { return base(pristine()); }
  /// The same for `weight`, which is this one or like it.
  WeightBase base(at::Tensor weight) const { return WeightBase(std::move(weight), view_); }
  /// The weight as operators see it now, with the values that methods see.
  WeightBase present_base() const { return merged_ ? WeightBase(weight(), pristine(), view_) : base(weight()); }
  /// How often something was merged or unmerged.
  int64_t merges() const { return merges_; }

  /// By which is seen whether somebody wrote to the weight; what merging writes does not count.
  detail::Stamp stamp() const;

  /// What holds the weight in few bits. Throws for one that is merged, is no matrix to methods, or cannot be held so.
  /// `seen`: the inputs in view of which it is rounded, if any.
  std::shared_ptr<const QuantizedWeight> packed(const Quantization& scheme, const SeenInputs* seen = nullptr) const;

  /// Holds the weight in few bits from now on; its numbers are given up, and it is not trained.
  void hold(std::shared_ptr<const QuantizedWeight> packed);

  /// Whether it is held so, also if something is merged into it now.
  bool is_held() const { return detail::is_quantized(merged_ ? merged_->former.member : place_.slot->read()); }

  /// Gives the weight its numbers back, as far as the few bits held them.
  void dequantize();

  /// Throws for a weight that is merged, is no matrix to methods, or has no finite numbers of floating point.
  void check_quantizable() const;

  /// Whether merged values go into a tensor of their own.
  bool is_told_apart() const { return !place_.tied_to.empty() || place_.slot->is_apart(); }
  bool is_merged() const { return merged_.has_value(); }
  /// Whether the weight has the update of that method in it.
  bool is_in(const AnyMethod* method) const;

  /// How many methods are merged.
  size_t merged_count() const { return merged_ ? merged_->methods.size() : 0; }

  /// W' for `weight`, which is W or a tensor like it. Throws when an update or W' is not finite.
  at::Tensor merged(const at::Tensor& weight, const std::vector<MergedMethod>& methods) const;

  /// Throws when `merge` could not put anything here; changes nothing.
  void check_mergeable() const {
    if (is_told_apart()) place_.slot->check_replaceable(name());
  }

  /// What merging needs, computed before any weight is changed.
  struct Prepared {
    at::Tensor numbers;  ///< W'; or what W is, where the updates are added in its own memory
    bool adds_in_place;
  };

  /// Throws when an update or W' is not finite; changes nothing.
  void check_finite(const std::vector<MergedMethod>& methods) const;

  /// Throws then, too; changes nothing.
  Prepared prepared(const std::vector<MergedMethod>& methods) const;

  /// Merges what was prepared. Takes no memory to speak of, so that it cannot fail half way.
  void merge(Prepared prepared, std::vector<MergedMethod> methods);

  /// Whether the model still holds what `merge` put there.
  bool can_unmerge() const;

  /// Puts the kept weight back. When the module was moved to another device or type meanwhile, the weight follows.
  void unmerge();

  /// Forgets the kept weight: what is merged stays for good, trainable if the weight was.
  void keep_merged();

  /// Takes over from `other` that the weight, a copy of the other's, is a merged one; `methods` are copies of the
  /// other's.
  void copy_merged(const Site& other, std::vector<MergedMethod> methods);

  /// The same site, with what is merged, of a layer that has the same tensors in other places.
  std::shared_ptr<Site> at(std::shared_ptr<detail::WeightSlot> slot, std::shared_ptr<detail::WeightSlot> bias) const;

  /// How operators have used its adapters.
  struct Uses {
    std::atomic<int64_t> count{0};
    std::atomic<int64_t> without_gradient{0};  // where one was expected
    std::atomic<bool> with_gradient{false};

    void add(bool has_gradient, bool misses_gradient) {
      count.fetch_add(1, std::memory_order_relaxed);
      if (has_gradient && !with_gradient.load(std::memory_order_relaxed)) with_gradient = true;
      if (misses_gradient) without_gradient.fetch_add(1, std::memory_order_relaxed);
    }
  };
  mutable Uses uses;

 private:
  struct Merged {
    detail::WeightSlot::Handles former;
    at::Tensor weight;    // that has the merged values
    detail::Stamp stamp;  // of it, by which is seen whether someone wrote to it since
    bool is_apart;        // whether it was put in the place of the former one
    std::vector<MergedMethod> methods;
    std::shared_ptr<const detail::MergedWeight> entry;  // by which other sites of the weight know
  };

  static std::shared_ptr<const detail::MergedWeight> entry_of(const at::Tensor& weight, const at::Tensor& former);

  /// Whether the updates can be added in the weight's own memory, and are so small that W' is finite without a look at
  /// it.
  bool is_sure_to_fit(const at::Tensor& weight, const std::vector<MergedMethod>& methods) const;

  /// The updates as terms that only add products of a type to the weight, as it lies; none where one is more than that.
  std::vector<Term> added_terms(const at::Tensor& weight, at::ScalarType type,
                                const std::vector<MergedMethod>& methods) const;

  /// W + the sum of the updates, in float at least; what replaces W, as it is.
  at::Tensor sum(const at::Tensor& weight, const std::vector<MergedMethod>& methods) const;

  /// Throws and says why a merged weight is not finite.
  [[noreturn]] void refuse_not_finite(const at::Tensor& weight, const std::vector<MergedMethod>& methods) const;

  template <class Write>
  void count_own_writes(const at::Tensor& tensor, const Write& write) {
    const auto before = detail::Stamp::writes(tensor);
    write();
    own_writes_ += detail::Stamp::writes(tensor) - before;
  }

  static void write(const at::Tensor& tensor, const at::Tensor& values);

  /// Adds the products of terms to the values of a weight, bit by bit as `sum` does.
  static void add(const at::Tensor& weight, const std::vector<Term>& terms);

  /// Gives each of two tensors the values of the other, a piece at a time.
  static void exchange(const at::Tensor& a, const at::Tensor& b);

  Place place_;
  std::shared_ptr<const MatrixView> view_;
  FileLayout files_;
  int64_t own_writes_ = 0, merges_ = 0;
  std::optional<Merged> merged_;
  std::shared_ptr<Site> bias_site_;
  std::shared_ptr<AnyMethod> own_;
};

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <lora/weight/finite.hpp>
#include <lora/weight/key.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace lora {
inline namespace LORA_ABI {

LORA_INLINE void Site::rename(const std::string& name) {
  if (place_.name == name) return;
  if (place_.file_name == place_.name) place_.file_name = name;
  place_.name = name;
}

LORA_INLINE const std::shared_ptr<Site>& Site::bias_site() {
  if (!bias_site_ && place_.bias) {
    Place place{name() + ".bias", name() + ".bias", "", place_.bias, Use::kAny};
    place.row_axis = place_.row_axis;
    bias_site_ = std::make_shared<Site>(std::move(place), MatrixView::none(place_.bias->read().sizes()));
  }
  return bias_site_;
}

LORA_INLINE at::Tensor Site::pristine() const {
  const auto now = weight();
  return merged_ ? detail::moved(merged_->former.member, now.device(), now.scalar_type()) : now;
}

LORA_INLINE detail::Stamp Site::stamp() const {
  if (merged_ && merged_->is_apart) return detail::Stamp(merged_->former.member);
  const bool was_held = merged_ && detail::is_quantized(merged_->former.member);
  return detail::Stamp(was_held ? merged_->former.member : weight(), own_writes_);
}

LORA_INLINE std::shared_ptr<const QuantizedWeight> Site::packed(const Quantization& scheme,
                                                                const SeenInputs* seen) const {
  const detail::BelowInterception below;
  at::NoGradGuard no_grad;
  check_quantizable();
  const auto weight = place_.slot->read().detach();
  return seen == nullptr ? scheme.pack(weight, name()) : scheme.pack(weight, name(), *seen);
}

LORA_INLINE void Site::hold(std::shared_ptr<const QuantizedWeight> packed) {
  const detail::BelowInterception below;
  detail::hold(place_.slot->handles(), std::move(packed), weight().scalar_type(), name());
}

LORA_INLINE void Site::dequantize() {
  const detail::BelowInterception below;
  at::NoGradGuard no_grad;
  const auto handles = place_.slot->handles();
  if (!detail::is_quantized(handles.member)) return;
  detail::release(handles, detail::dequantized(handles.member));
}

LORA_INLINE void Site::check_quantizable() const {
  const detail::BelowInterception below;
  const auto weight = place_.slot->read();
  TORCH_CHECK(!detail::MergedWeight::is(weight), "lora::quantize: ", name(),
              " is merged; unmerge it, or unload the adapter, first");
  TORCH_CHECK(view_->shape().out > 0 && at::isFloatingType(weight.scalar_type()), "lora::quantize: ", name(),
              " has no matrix of floating point to hold in few bits: its type is ", weight.scalar_type(),
              ", its shape ", weight.sizes());
  TORCH_CHECK(detail::is_finite(weight), "lora::quantize: ", name(),
              " has numbers that are not finite (NaN or infinity), which no code stands for; nothing was changed");
}

LORA_INLINE bool Site::is_in(const AnyMethod* method) const {
  const auto is_it = [&](const MergedMethod& merged) { return merged.method.get() == method; };
  return merged_ && std::any_of(merged_->methods.begin(), merged_->methods.end(), is_it);
}

LORA_INLINE at::Tensor Site::merged(const at::Tensor& weight, const std::vector<MergedMethod>& methods) const {
  const detail::BelowInterception below;
  at::NoGradGuard no_grad;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto result = sum(weight, methods).to(weight.scalar_type());
  if (!detail::is_finite(result)) refuse_not_finite(weight, methods);
  return result;
}

LORA_INLINE bool Site::is_sure_to_fit(const at::Tensor& weight, const std::vector<MergedMethod>& methods) const {
  if (is_told_apart() || detail::is_quantized(weight)) return false;
  const auto terms = added_terms(weight, weight.scalar_type(), methods);
  if (terms.empty()) return false;
  auto largest = detail::largest_magnitude(weight);
  for (const auto& term : terms)
    largest += std::abs(term.scale) * static_cast<double>(term.A.size(0)) * detail::largest_magnitude(term.A) *
               detail::largest_magnitude(term.B);
  const bool is_double = weight.scalar_type() == at::kDouble;
  const double most = is_double ? std::numeric_limits<double>::max() : double{std::numeric_limits<float>::max()};
  return largest < most / 2;  // false for what is no number
}

LORA_INLINE void Site::check_finite(const std::vector<MergedMethod>& methods) const {
  const detail::BelowInterception below;
  at::NoGradGuard no_grad;
  if (const auto weight = this->weight().detach(); !is_sure_to_fit(weight, methods)) merged(weight, methods);
}

LORA_INLINE Site::Prepared Site::prepared(const std::vector<MergedMethod>& methods) const {
  const detail::BelowInterception below;
  at::NoGradGuard no_grad;
  const auto weight = this->weight().detach();
  if (is_sure_to_fit(weight, methods)) return {weight.clone(), /*adds_in_place=*/true};
  return {merged(weight, methods), /*adds_in_place=*/false};
}

LORA_INLINE void Site::merge(Prepared prepared, std::vector<MergedMethod> methods) {
  const detail::BelowInterception below;
  at::NoGradGuard no_grad;
  ++merges_;
  const auto weight = place_.slot->read();
  const auto& numbers = prepared.numbers;
  if (is_told_apart()) {
    auto former = place_.slot->handles();
    auto entry = entry_of(numbers, former.member);
    place_.slot->set({numbers, numbers});
    merged_ = Merged{std::move(former),  numbers,         detail::Stamp(numbers), /*is_apart=*/true,
                     std::move(methods), std::move(entry)};
    return;
  }
  if (detail::is_quantized(weight)) {
    const auto former = weight.detach();  // which counts the writes to the weight, too
    count_own_writes(weight, [&] { detail::exchange_data(weight, numbers); });
    merged_ = Merged{{former, former},        weight, detail::Stamp(weight), /*is_apart=*/false, std::move(methods),
                     entry_of(weight, former)};
    return;
  }
  count_own_writes(weight, [&] {
    const auto values = weight.detach();
    prepared.adds_in_place ? add(values, added_terms(values, values.scalar_type(), methods))
                           : exchange(values, numbers);
  });
  merged_ = Merged{{numbers, numbers},       weight, detail::Stamp(weight), /*is_apart=*/false, std::move(methods),
                   entry_of(weight, numbers)};
}

LORA_INLINE bool Site::can_unmerge() const {
  const detail::BelowInterception below;
  if (!merged_) return false;
  const auto now = weight();
  const auto& former = merged_->former.member;
  if (!now.is_same(merged_->weight)) return false;
  if (now.scalar_type() != former.scalar_type() || now.device() != former.device()) return true;  // moved since
  const detail::Stamp stamp(now);
  if (stamp == merged_->stamp) return true;
  if (place_.slot->is_apart()) return stamp.has_memory_of(merged_->stamp);  // the layer itself writes to it
  return now.equal(merged(former, merged_->methods));
}

LORA_INLINE void Site::unmerge() {
  const detail::BelowInterception below;
  at::NoGradGuard no_grad;
  ++merges_;
  auto former = std::move(merged_->former);
  if (merged_->is_apart) {
    const auto options = weight().options();
    for (auto* handle : {&former.member, &former.registered}) {
      if (handle->device() != options.device() || handle->dtype() != options.dtype())
        handle->set_data(detail::moved(handle->detach(), options.device(), weight().scalar_type()));
    }
    place_.slot->set(former);
  } else if (detail::is_quantized(former.member)) {
    const auto now = weight();
    const auto held = detail::moved(former.member, now.device(), now.scalar_type());
    count_own_writes(now, [&] { detail::exchange_data(now, held); });
  } else {
    count_own_writes(weight(), [&] { write(weight(), former.member); });
  }
  merged_.reset();
}

LORA_INLINE void Site::keep_merged() {
  if (merged_->is_apart) weight().requires_grad_(merged_->former.member.requires_grad());
  ++merges_;
  merged_.reset();
}

LORA_INLINE void Site::copy_merged(const Site& other, std::vector<MergedMethod> methods) {
  const detail::BelowInterception below;
  at::NoGradGuard no_grad;
  if (!other.merged_) return;
  const auto now = weight();
  auto former = detail::moved(other.merged_->former.member, now.device(), now.scalar_type(), /*copies=*/true);
  merged_ =
      Merged{{former, former}, now, detail::Stamp(now), /*is_apart=*/false, std::move(methods), entry_of(now, former)};
}

LORA_INLINE std::shared_ptr<Site> Site::at(std::shared_ptr<detail::WeightSlot> slot,
                                           std::shared_ptr<detail::WeightSlot> bias) const {
  auto place = place_;
  place.slot = std::move(slot);
  place.bias = bias;
  auto other = std::make_shared<Site>(std::move(place), *view_, files_);
  other->own_writes_ = own_writes_;
  other->merges_ = merges_;
  other->merged_ = merged_;
  other->own_ = own_;
  if (bias_site_) other->bias_site_ = bias_site_->at(std::move(bias), nullptr);
  return other;
}

LORA_INLINE at::Tensor Site::sum(const at::Tensor& weight, const std::vector<MergedMethod>& methods) const {
  if (methods.size() == 1 && methods.front().method->replaces() && methods.front().weight == 1) {
    auto value = methods.front().method->replacement(weight);
    return value.is_alias_of(methods.front().method->tensors().front().tensor->detach()) ? value.clone() : value;
  }
  auto sum = detail::dequantized(weight).to(adapter_dtype(weight.scalar_type()));
  const auto terms = added_terms(weight, sum.scalar_type(), methods);
  for (const auto& term : terms) sum = term.moved(sum);
  if (!terms.empty()) return sum;
  const auto base = this->base(weight);
  for (const auto& [adapter, method, factor] : methods) {
    const auto delta = method->delta(base);
    sum = sum + view_->weight(factor == 1 ? delta : delta * factor);
  }
  return sum.is_same(weight) ? sum.clone() : sum;
}

LORA_INLINE std::vector<Term> Site::added_terms(const at::Tensor& weight, at::ScalarType type,
                                                const std::vector<MergedMethod>& methods) const {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  std::vector<Term> terms;
  if (!view_->is_plain() || weight.dim() != 2) return terms;
  const auto base = this->base(weight);
  for (const auto& [adapter, method, factor] : methods) {
    if (method->replaces() || !method->has_term()) return {};
    auto term = method->term(base);
    if (term.scales_weight() || term.A.dim() != 2 || adapter_dtype(term.dtype()) != type) return {};
    term.scale *= factor;
    terms.push_back(std::move(term));
  }
  return terms;
}

LORA_INLINE void Site::refuse_not_finite(const at::Tensor& weight, const std::vector<MergedMethod>& methods) const {
  const auto base = this->base(weight);
  std::string what = "the merged weight does not fit into its type, or the weight itself is not finite";
  for (const auto& [adapter, method, unused_factor] : methods) {
    if (method->replaces()) {
      if (detail::is_finite(method->replacement(weight))) continue;
      what = "what was trained in its place is not finite (NaN or infinity)";
    } else if (!detail::is_finite(method->delta(base))) {
      what = "the update of adapter \"" + adapter + "\" is not finite (NaN or infinity)";
    }
  }
  TORCH_CHECK(false, "lora::merge: ", name(), ": ", what, "; nothing was merged");
}

LORA_INLINE std::shared_ptr<const detail::MergedWeight> Site::entry_of(const at::Tensor& weight,
                                                                       const at::Tensor& former) {
  return std::make_shared<const detail::MergedWeight>(weight, detail::is_quantized(former));
}

LORA_INLINE void Site::write(const at::Tensor& tensor, const at::Tensor& values) {
  c10::InferenceMode mode(tensor.is_inference());
  tensor.detach().copy_(values);
}

LORA_INLINE void Site::add(const at::Tensor& weight, const std::vector<Term>& terms) {
  c10::InferenceMode mode(weight.is_inference());
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto type = weight.scalar_type();
  for (const auto& term : terms) weight.addmm_(term.B.to(type), term.A.to(type), /*beta=*/1, term.scale);
}

LORA_INLINE void Site::exchange(const at::Tensor& a, const at::Tensor& b) {
  c10::InferenceMode mode(a.is_inference());
  if (a.dim() == 0 || a.numel() == 0) {
    const auto kept = a.clone();
    a.copy_(b);
    b.copy_(kept);
    return;
  }
  constexpr int64_t kPiece = 1 << 16;
  const auto rows = std::max<int64_t>(1, kPiece * a.size(0) / a.numel());
  for (int64_t row = 0; row < a.size(0); row += rows) {
    const auto count = std::min(rows, a.size(0) - row);
    const auto mine = a.narrow(0, row, count), theirs = b.narrow(0, row, count);
    const auto kept = mine.clone();
    mine.copy_(theirs);
    theirs.copy_(kept);
  }
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
