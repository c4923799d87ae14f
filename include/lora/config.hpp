#pragma once

#include <lora/linkage.hpp>
#include <lora/method/all.hpp>
#include <lora/options.hpp>
#include <lora/version.hpp>
#include <lora/weight/quantized.hpp>

#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// A regular expression (ECMAScript) that has to match a whole module name: `regex("layers\\.[01]\\.[qv]_proj")`.
struct Regex {
  std::string pattern;
};

inline Regex regex(std::string pattern) { return {std::move(pattern)}; }

/// Every torch::nn::Linear of the model.
struct AllLinear {};

inline constexpr AllLinear all_linear{};

/// Which modules of a model are meant: by name, by a regular expression, or all linear layers.
///
/// A name in a list selects the module of exactly that name and every module whose name ends in "." and that name:
/// "q_proj" selects "layers.0.q_proj" but not "layers.0.xq_proj". Names are those of `model.named_modules()`.
class ModuleSelector {
 public:
  using Names = std::vector<std::string>;

  ModuleSelector() = default;
  /* implicit */ ModuleSelector(std::initializer_list<std::string> names) : value_(Names(names)) {}
  /* implicit */ ModuleSelector(Names names) : value_(std::move(names)) {}
  /* implicit */ ModuleSelector(Regex pattern) : value_(std::move(pattern)) {}
  /* implicit */ ModuleSelector(AllLinear) : value_(AllLinear{}) {}

  /// The list of names, or nullptr when the selection is of another kind.
  const Names* names() const { return std::get_if<Names>(&value_); }
  /// The regular expression, or nullptr.
  const Regex* pattern() const { return std::get_if<Regex>(&value_); }
  bool is_all_linear() const { return std::holds_alternative<AllLinear>(value_); }
  /// Whether nothing was asked for.
  bool empty() const { return names() != nullptr && names()->empty(); }

 private:
  std::variant<Names, Regex, AllLinear> value_;
};

/// Which biases are trained along with an adapter, each adapter having copies of its own.
enum class Bias {
  kNone,         ///< none
  kAll,          ///< every parameter named "bias"
  kAdaptedOnly,  ///< those of the adapted layers; PEFT's "lora_only"
};

/// The parts of a fused projection that are adapted: the weight of `module` is that of several projections, one below
/// the other, and each part that is adapted has an A and a B of its own.
///
///   FusedProjection{"c_attn", {768, 768, 768}, {true, false, true}}   // query and value of GPT-2
struct FusedProjection {
  std::string module;          ///< by the rule for lists of names
  std::vector<int64_t> sizes;  ///< rows of each part, all together those of the weight
  std::vector<bool> adapted;   ///< which parts; at least one
};

/// An adapter for a whole model: what is adapted, and how. The rules of the selection are those of PEFT's LoraConfig,
/// except that an entry which matches nothing is an error.
///
///   LoRAConfig(8).alpha(16).dropout(0.05).target_modules({"q_proj", "v_proj"}).rank_pattern({{"v_proj", 16}})
class LoRAConfig : public BasicOptions<LoRAConfig> {
  using Self = LoRAConfig;
  /// A value for the layers whose name matches `(.*\.)?(pattern)`; the first match in the list counts.
  template <class T>
  using Patterns = std::vector<std::pair<std::string, T>>;

  /// The modules to adapt. Required unless there are `target_parameters`; none are meant by PEFT's name for that,
  /// `regex("dummy-target-modules")`.
  LORA_ARG(ModuleSelector, target_modules);
  /// Modules that are left out although `target_modules` selects them. Default: none.
  LORA_ARG(ModuleSelector, exclude_modules);
  /// Parameters to adapt whatever they are used for, by the rule for lists of names: matrices (out, in), or experts
  /// (E, out, in), which have an adapter each. For modules that are not of a kind the library knows. Default: none.
  LORA_ARG(std::vector<std::string>, target_parameters);
  /// Layers among the targets of which only parts are adapted. In files their ranks are stacked, as PEFT would train
  /// them with B zero elsewhere. Default: none.
  LORA_ARG(std::vector<FusedProjection>, fused);
  /// Modules that are trained in full, by the rule for lists of names, e.g. a new head: each adapter has a copy of all
  /// their parameters and buffers. They are not targets then. Default: none.
  LORA_ARG(std::vector<std::string>, modules_to_save);
  /// Biases that are trained in full. Default: none.
  LORA_ARG(Bias, bias) = Bias::kNone;
  /// Gives the update a bias of its own, which starts at zero: y += s b, and when merged bias += s b. Each adapted
  /// layer has to have a bias; for LowRank, and not together with `bias`. Default: false.
  LORA_ARG(bool, lora_bias) = false;
  /// The blocks to adapt, by the first number in a module's name; for targets given as a list. Default: all.
  LORA_ARG(std::vector<int64_t>, layers_to_transform);
  /// Names of the lists whose numbers `layers_to_transform` means, e.g. {"layers"}. Default: any list.
  LORA_ARG(std::vector<std::string>, layers_pattern);
  /// Other ranks for some layers. Default: none.
  LORA_ARG(Patterns<int64_t>, rank_pattern);
  /// Other alphas for some layers. Default: none.
  LORA_ARG(Patterns<double>, alpha_pattern);
  /// The mathematics of the update. Default: LowRank.
  LORA_ARG(MethodKind, method) = all_methods().front();
  /// Holds the weights of the adapted layers in few bits from then on (QLoRA): NF4(), FP4(), Int8() or Lossless(), with
  /// their options. The model then computes inside of scopes only. Default: as they are. Not written to files.
  LORA_ARG(std::optional<Quantization>, quantize);
  /// Starts A and B with what the few bits lose of the weights, in so many alternating steps (LoftQ, Li et al. 2023);
  /// for LowRank, with `quantize`. 1 is PEFT's default; more are slower and often nearer. Default: 0, as `init` says.
  LORA_ARG(int64_t, loftq) = 0;
  /// Tells Python that its layers keep their weights as (in, out), as GPT-2's do. A torch::nn::Linear is (out, in) here
  /// in any case, and the adapter's tensors are the same either way. Default: false.
  LORA_ARG(bool, fan_in_fan_out) = false;
  /// What Python loads as the base model of this adapter; written to the file, not used here. Default: none.
  LORA_ARG(std::string, base_model_name_or_path);
  /// PEFT's name of the task, e.g. "CAUSAL_LM"; written to the file, not used here. Default: none.
  LORA_ARG(std::string, task_type);

 public:
  /* implicit */ LoRAConfig(int64_t rank);
  // As a compiler makes them, but declared, so that lora::compiled has their bodies, and not every file of a program.
  LoRAConfig(const LoRAConfig& other);
  LoRAConfig(LoRAConfig&& other) noexcept;
  LoRAConfig& operator=(const LoRAConfig& other);
  LoRAConfig& operator=(LoRAConfig&& other) noexcept;
  ~LoRAConfig();
};

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

namespace lora {
inline namespace LORA_ABI {

LORA_INLINE LoRAConfig::LoRAConfig(int64_t rank) : BasicOptions(rank) {}
LORA_INLINE LoRAConfig::LoRAConfig(const LoRAConfig& other) = default;
LORA_INLINE LoRAConfig::LoRAConfig(LoRAConfig&& other) noexcept = default;
LORA_INLINE LoRAConfig& LoRAConfig::operator=(const LoRAConfig& other) = default;
LORA_INLINE LoRAConfig& LoRAConfig::operator=(LoRAConfig&& other) noexcept = default;
LORA_INLINE LoRAConfig::~LoRAConfig() = default;

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
