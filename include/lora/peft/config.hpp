#pragma once

#include <lora/config.hpp>
#include <lora/files/error.hpp>
#include <lora/linkage.hpp>
#include <lora/version.hpp>

#include <filesystem>

namespace lora {
inline namespace LORA_ABI {

/// Reads an adapter_config.json as PEFT 0.21 and its predecessors write it. Fields that are missing have PEFT's
/// default.
///
/// Errors: CheckpointError that names the file and the field if a value is of the wrong type or out of range, or asks
/// for something this library does not do and that would change the result. A field that PEFT 0.21 does not have is
/// ignored with a warning.
LORA_INLINE LoRAConfig read_adapter_config(const std::filesystem::path& path);

/// Writes `config` as an adapter_config.json with every field of PEFT 0.21, in one piece or not at all.
/// Errors: CheckpointError with the path and the reason of the operating system.
LORA_INLINE void write_adapter_config(const std::filesystem::path& path, const LoRAConfig& config);

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <lora/files/atomic_file.hpp>
#include <lora/peft/schema.hpp>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

namespace detail {

/// Turns an adapter_config.json into a LoRAConfig.
class PeftConfigReader {
 public:
  explicit PeftConfigReader(const std::filesystem::path& path) : path_(path), json_(read_json<PeftJson>(path)) {}

  LoRAConfig read() {
    if (!json_.is_object()) throw CheckpointError(path_, "has to hold one JSON object, but holds ", json_.type_name());
    const auto method = read_method();
    const auto& info = method.info();
    info_ = &info;
    check_fields(method);
    LoRAConfig config(info.rank_name.empty() ? 8 : read_rank(info));
    config.method(method);
    if (!info.alpha_name.empty()) config.alpha(number("lora_alpha", value("lora_alpha")));
    if (!info.dropout_name.empty()) config.dropout(read_dropout(info));
    if (info.peft_type == "LORA") config.rank_stabilized(flag("use_rslora")).init(read_init());
    config.fan_in_fan_out(flag("fan_in_fan_out"));
    config.target_modules(selector("target_modules")).exclude_modules(selector("exclude_modules"));
    config.layers_to_transform(layers()).layers_pattern(names("layers_pattern"));
    config.rank_pattern(ranks()).alpha_pattern(alphas());
    config.target_parameters(names("target_parameters")).modules_to_save(names("modules_to_save"));
    config.bias(read_bias(info)).lora_bias(flag("lora_bias"));
    config.base_model_name_or_path(text("base_model_name_or_path")).task_type(text("task_type"));
    check_ranges(config);
    return config;
  }

  /// The version of PEFT that wrote the file, "0.21.2"; empty where that is not said, as before 0.18.
  std::string version() const {
    const auto found = json_.find("peft_version");
    return found != json_.end() && found->is_string() ? found->get<std::string>() : "";
  }

 private:
  template <typename... Reason>
  [[noreturn]] void fail(const char* field, const Reason&... reason) const {
    throw CheckpointError(path_, "\"", field, "\" ", reason...);
  }

  /// Before nlohmann/json 3.11 objects that keep their order find std::string alone.
  PeftJson::const_iterator find(std::string_view field) const { return json_.find(std::string(field)); }

  /// The value of a field; PEFT's default where the file says nothing, or where PEFT has no such field for the method.
  PeftJson value(const char* field) const {
    const auto found = find(field);
    if (found != json_.end() && !found->is_null() && has_field(*info_, field)) return *found;
    const auto* known = peft_field(field);
    return known == nullptr ? PeftJson() : PeftJson::parse(known->standard);
  }

  /// The method whose flag is set, or the one of this type that has none.
  MethodKind read_method() const {
    const auto type = json_.find("peft_type");
    if (type == json_.end()) fail("peft_type", "is missing: this is no configuration of an adapter");
    const MethodKind *plain = nullptr, *flagged = nullptr;
    for (const auto& method : all_methods()) {
      const auto& info = method.info();
      if (*type != info.peft_type) continue;
      if (info.peft_flag.empty()) plain = &method;
      if (info.peft_flag.empty() || !is_set(info.peft_flag)) continue;
      if (flagged != nullptr) fail(flagged->info().peft_flag.data(), "and \"", info.peft_flag, "\" exclude each other");
      flagged = &method;
    }
    if (flagged == nullptr && plain == nullptr)
      fail("peft_type", "is ", type->dump(), ", but known here are ", types());
    return with_own_options(flagged != nullptr ? *flagged : *plain);
  }

  /// The method with the options of its own that the file has.
  MethodKind with_own_options(const MethodKind& method) const {
    const auto own = method.prototype().copy();
    for (const auto& known : own->own_options()) {
      const auto name = known.first;
      const auto found = find(name);
      if (found == json_.end() || found->is_null()) continue;
      const auto wanted = std::visit([&](const auto& like) { return option(name, *found, like); }, known.second);
      TORCH_INTERNAL_ASSERT(own->set_option(name, wanted), name);
    }
    return MethodKind(own);
  }

  OptionValue option(std::string_view name, const PeftJson& value, bool) const { return flag(name.data(), value); }
  OptionValue option(std::string_view name, const PeftJson& value, int64_t) const {
    return whole_number(name.data(), std::string(name), value);
  }
  OptionValue option(std::string_view name, const PeftJson& value, double) const { return number(name.data(), value); }
  OptionValue option(std::string_view name, const PeftJson& value, const std::vector<std::string>&) const {
    return names(name.data(), value);
  }

  int64_t read_rank(const MethodInfo& info) const {
    const auto found = find(info.rank_name);
    if (found == json_.end() || found->is_null()) return info.peft_rank;
    return whole_number(info.rank_name.data(), std::string(info.rank_name), *found);
  }

  double read_dropout(const MethodInfo& info) const {
    const auto found = find(info.dropout_name);
    return found == json_.end() || found->is_null() ? 0 : number(info.dropout_name.data(), *found);
  }

  bool is_set(std::string_view field) const {
    const auto found = find(field);
    return found != json_.end() && *found == true;
  }

  static std::string types() {
    std::string types;
    for (const auto& method : all_methods()) {
      const auto type = "\"" + std::string(method.info().peft_type) + "\"";
      if (types.find(type) == types.npos) types += (types.empty() ? "" : ", ") + type;
    }
    return types;
  }

  /// Refuses what asks for more than this library does, and warns of what it does not know.
  void check_fields(const MethodKind& method) const {
    std::string unknown;
    for (const auto& [name, value] : json_.items()) {
      const auto* field = has_field(method.info(), name) ? peft_field(name) : nullptr;
      if (field == nullptr && !is_of(method, name)) unknown += (unknown.empty() ? "\"" : ", \"") + name + "\"";
      if (field == nullptr || is_off(value) || value == PeftJson::parse(field->standard)) continue;
      if (field->effect == PeftEffect::kUnsupported) fail(field->name, "is ", value.dump(), ", which is not supported");
      if (field->effect == PeftEffect::kTraining)
        TORCH_WARN(path_.string(), ": \"", name,
                   "\" changes how PEFT trains this adapter; here it is trained without it");
    }
    if (!unknown.empty()) TORCH_WARN(path_.string(), ": unknown fields are ignored: ", unknown);
  }

  /// Whether a field is one of the method itself.
  static bool is_of(const MethodKind& method, std::string_view name) {
    const auto& info = method.info();
    if (name == info.rank_name || name == info.dropout_name || name == info.init_name) return true;
    if (info.peft_type == "LORA" && is_method_flag(name)) return true;
    const auto own = method.prototype().own_options();
    return std::any_of(own.begin(), own.end(), [&](const auto& option) { return option.first == name; });
  }

  Bias read_bias(const MethodInfo& info) const {
    const auto bias = text("bias");
    if (bias == "none" || bias.empty()) return Bias::kNone;
    if (bias == "all") return Bias::kAll;
    if (bias != only_name(info))
      fail("bias", "has to be \"none\", \"all\" or \"", only_name(info), "\", but is \"", bias, "\"");
    return Bias::kAdaptedOnly;
  }

  /// Every start that leaves the frozen weights alone is over once the adapter's tensors are loaded.
  Init read_init() const {
    const auto init = value("init_lora_weights");
    if (init == "gaussian") return flag("lora_bias") ? Init::kKaiming : Init::kGaussian;  // PEFT has no such pair
    const bool harmless = init.is_boolean() || init == "eva" || init == "orthogonal" || init == "mica";
    if (!harmless)
      fail("init_lora_weights", "is ", init.dump(),
           ", which means that training began by changing the frozen weights; ",
           init == "loftq" ? "it is only for the weights that were quantized then"
                           : "convert the adapter to a plain one first (lora::subtract_start)");
    return Init::kKaiming;
  }

  ModuleSelector selector(const char* field) const {
    const auto value = this->value(field);
    if (!value.is_string()) return names(field);
    auto text = value.get<std::string>();
    auto lower = text;
    std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
    if (lower == "all-linear") return all_linear;
    return regex(std::move(text));
  }

  /// A list of strings, or one string by itself.
  std::vector<std::string> names(const char* field) const { return names(field, value(field)); }
  std::vector<std::string> names(const char* field, const PeftJson& value) const {
    if (value.is_null()) return {};
    if (value.is_string()) return {value.get<std::string>()};
    const auto is_string = [](const auto& item) { return item.is_string(); };
    if (!value.is_array() || !std::all_of(value.begin(), value.end(), is_string))
      fail(field, "has to be a list of strings or a string, but is ", value.dump());
    return value.get<std::vector<std::string>>();
  }

  std::vector<int64_t> layers() const {
    const auto value = this->value("layers_to_transform");
    if (value.is_null()) return {};
    if (!value.is_array()) return {whole_number("layers_to_transform", "layers_to_transform", value)};
    std::vector<int64_t> layers;
    for (const auto& layer : value) layers.push_back(whole_number("layers_to_transform", "a layer", layer));
    return layers;
  }

  std::vector<std::pair<std::string, int64_t>> ranks() const {
    std::vector<std::pair<std::string, int64_t>> ranks;
    const auto json = patterns("rank_pattern");
    for (const auto& [pattern, rank] : json.items())
      ranks.emplace_back(pattern, whole_number("rank_pattern", pattern, rank));
    return ranks;
  }

  std::vector<std::pair<std::string, double>> alphas() const {
    std::vector<std::pair<std::string, double>> alphas;
    const auto json = patterns("alpha_pattern");
    for (const auto& [pattern, alpha] : json.items()) alphas.emplace_back(pattern, number("alpha_pattern", alpha));
    return alphas;
  }

  PeftJson patterns(const char* field) const {
    auto value = this->value(field);
    if (!value.is_object()) fail(field, "has to be an object, but is ", value.dump());
    return value;
  }

  /// PEFT's own conversions write ranks as 8.0 too.
  int64_t whole_number(const char* field, const std::string& what, const PeftJson& value) const {
    const auto number = this->number(field, value);
    if (number != std::floor(number) || std::abs(number) > 1e15)
      fail(field, "has to hold whole numbers, but ", what, " is ", value.dump());
    return static_cast<int64_t>(number);
  }

  double number(const char* field, const PeftJson& value) const {
    if (!value.is_number()) fail(field, "has to be given by numbers, but there is ", value.dump());
    return value.get<double>();
  }

  bool flag(const char* field) const { return flag(field, value(field)); }
  bool flag(const char* field, const PeftJson& value) const {
    if (!value.is_boolean()) fail(field, "has to be true or false, but is ", value.dump());
    return value.get<bool>();
  }

  std::string text(const char* field) const {
    const auto value = this->value(field);
    if (!value.is_null() && !value.is_string()) fail(field, "has to be a string, but is ", value.dump());
    return value.is_null() ? "" : value.get<std::string>();
  }

  void check_ranges(const LoRAConfig& config) const {
    try {
      config.validate("adapter_config.json");
      for (const auto& [pattern, rank] : config.rank_pattern())
        LoRAOptions(config).rank(rank).validate(pattern.c_str());
    } catch (const c10::ValueError& error) {
      throw CheckpointError(path_, error.what_without_backtrace());
    }
    if (config.target_modules().empty() && config.target_parameters().empty())
      fail("target_modules", "has to name the adapted modules, but is ", value("target_modules").dump());
  }

  const std::filesystem::path path_;
  const PeftJson json_;
  const MethodInfo* info_ = nullptr;  // once it is known
};

/// Turns a LoRAConfig into the text of an adapter_config.json.
class PeftConfigWriter {
 public:
  PeftConfigWriter(const std::filesystem::path& path, const LoRAConfig& config) : path_(path), config_(config) {}

  std::string text() const {
    const auto& info = config_.method().info();
    auto fields = standard_fields(info);
    fields["peft_type"] = info.peft_type;
    if (!info.peft_flag.empty()) fields[std::string(info.peft_flag)] = true;
    for (const auto& [name, value] : config_.method().prototype().own_options())
      fields[std::string(name)] = std::visit([](const auto& option) { return to_json(option); }, value);
    if (!info.rank_name.empty()) fields[std::string(info.rank_name)] = config_.rank();
    if (!info.alpha_name.empty()) fields[std::string(info.alpha_name)] = short_number(config_.alpha());
    if (!info.dropout_name.empty()) fields[std::string(info.dropout_name)] = config_.dropout();
    // PEFT refuses the combination with lora_bias, and how an adapter began does not matter any more.
    const bool says_start = info.peft_type == "LORA" && config_.init() == Init::kGaussian && !config_.lora_bias();
    fields[std::string(info.init_name)] = says_start ? PeftJson("gaussian") : PeftJson(true);
    set(fields, "use_rslora", config_.rank_stabilized(), config_.rank_stabilized() && !info.alpha_name.empty());
    set(fields, "lora_bias", config_.lora_bias(), config_.lora_bias());
    set(fields, "fan_in_fan_out", config_.fan_in_fan_out(), config_.fan_in_fan_out());
    fields["target_modules"] = selector(config_.target_modules());
    set(fields, "bias",
        config_.bias() == Bias::kNone  ? "none"
        : config_.bias() == Bias::kAll ? "all"
                                       : only_name(info),
        config_.bias() != Bias::kNone);
    set_unless_empty(fields, "modules_to_save", config_.modules_to_save());
    set_unless_empty(fields, "target_parameters", config_.target_parameters());
    if (!config_.target_parameters().empty() && config_.target_modules().empty())
      fields["target_modules"] = PeftJson::array();  // null asks PEFT to choose
    set(fields, "exclude_modules", selector(config_.exclude_modules()), !config_.exclude_modules().empty());
    set_unless_empty(fields, "layers_to_transform", config_.layers_to_transform());
    set_unless_empty(fields, "layers_pattern", config_.layers_pattern());
    auto ranks = PeftJson::object(), alphas = PeftJson::object();
    for (const auto& [pattern, rank] : config_.rank_pattern()) ranks.emplace(pattern, rank);
    for (const auto& [pattern, alpha] : config_.alpha_pattern()) alphas.emplace(pattern, short_number(alpha));
    set(fields, "rank_pattern", ranks, !ranks.empty() && !info.rank_name.empty());
    set(fields, "alpha_pattern", alphas, !alphas.empty() && !info.alpha_name.empty());
    set_unless_empty(fields, "base_model_name_or_path", config_.base_model_name_or_path());
    set_unless_empty(fields, "task_type", config_.task_type());
    return dump(fields);
  }

 private:
  using Fields = std::map<std::string, PeftJson>;

  static Fields standard_fields(const MethodInfo& info) {
    Fields fields;
    const bool is_lora = info.peft_fields.empty();
    for (const auto& field : kPeftFields) {
      if (has_field(info, field.name)) fields[field.name] = PeftJson::parse(field.standard);
    }
    for (const auto& method : all_methods()) {
      if (is_lora && !method.info().peft_flag.empty()) fields[std::string(method.info().peft_flag)] = false;
    }
    fields["inference_mode"] = true;
    fields["peft_version"] = kPeftVersion;
    fields.erase("runtime_config");  // PEFT writes it never, and warns where it finds it
    return fields;
  }

  /// Sets a field that PEFT has for this method; one that it has not cannot be written, unless it asks for nothing.
  void set(Fields& fields, const char* name, PeftJson value, bool asks) const {
    const auto& info = config_.method().info();
    if (has_field(info, name)) {
      fields[name] = std::move(value);
    } else if (asks) {
      throw CheckpointError(path_, "cannot be written: PEFT's ", info.peft_type, " has no \"", name, "\"");
    }
  }

  template <class Value>
  void set_unless_empty(Fields& fields, const char* name, const Value& value) const {
    if (!value.empty()) set(fields, name, value, true);
  }

  static PeftJson to_json(const std::vector<std::string>& names) { return PeftJson(names); }
  static PeftJson to_json(double value) { return value; }
  static PeftJson to_json(int64_t value) { return value; }
  static PeftJson to_json(bool value) { return value; }

  /// Python expects alpha to be an int and prints it; 16 is better there than 16.0.
  static PeftJson short_number(double number) {
    if (number == std::floor(number) && std::abs(number) < 1e15) return static_cast<int64_t>(number);
    return number;
  }

  static PeftJson selector(const ModuleSelector& selector) {
    if (selector.is_all_linear()) return "all-linear";
    if (const auto* regex = selector.pattern()) return regex->pattern;
    return selector.empty() ? PeftJson() : PeftJson(*selector.names());
  }

  /// As Python's json.dumps(..., indent=2, sort_keys=True) prints it, except that patterns keep their order: the first
  /// one that matches counts.
  std::string dump(Fields& fields) const {
    auto sorted = PeftJson::object();
    for (auto& [name, value] : fields) sorted[name] = std::move(value);
    try {
      return sorted.dump(2, ' ', /*ensure_ascii=*/true);
    } catch (const PeftJson::type_error&) {
      throw CheckpointError(path_, "cannot be written: a name in the configuration is not valid UTF-8");
    }
  }

  const std::filesystem::path& path_;
  const LoRAConfig& config_;
};

}  // namespace detail

LORA_INLINE LoRAConfig read_adapter_config(const std::filesystem::path& path) {
  return detail::PeftConfigReader(path).read();
}

LORA_INLINE void write_adapter_config(const std::filesystem::path& path, const LoRAConfig& config) {
  detail::AtomicFile file(path);
  file.write_at(0, detail::PeftConfigWriter(path, config).text());
  file.commit();
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
