// Packed weights under the names of bitsandbytes, and back; and what is said of tensors that do not fit each other.
// tests/peft/quantize_live.py has files of Python's bitsandbytes.
#include "support/testing.hpp"

#include <lora/files/bitsandbytes.hpp>
#include <lora/files/safetensors.hpp>

namespace {

using lora::bitsandbytes_tensors;
using lora::FP4;
using lora::Int8;
using lora::NF4;
using lora::read_bitsandbytes_weight;
using testing::device;
using testing::error_of;
using torch::Tensor;
using Tensors = std::map<std::string, Tensor>;

std::vector<std::string> names_of(const Tensors& tensors) {
  std::vector<std::string> names;
  for (const auto& [name, tensor] : tensors) names.push_back(name);
  return names;
}

std::string text_of(const Tensor& bytes) {
  const auto values = bytes.cpu().contiguous();
  return std::string(reinterpret_cast<const char*>(values.data_ptr<uint8_t>()), static_cast<size_t>(values.numel()));
}

Tensor bytes_of(const std::string& text) { return lora::detail::bytes_of(text); }

TEST_CASE("the tensors of a weight in 4 bits") {
  auto weight = torch::zeros({4, 32});
  weight.select(1, 0).copy_(torch::tensor({1.0, 2.0, 3.0, 6.0}));
  const auto packed = NF4().block_size(32).pack(weight.to(device()));
  const auto tensors = bitsandbytes_tensors("a.weight", *packed, torch::kBFloat16);
  CHECK(names_of(tensors) == std::vector<std::string>{"a.weight", "a.weight.absmax", "a.weight.nested_absmax",
                                                      "a.weight.nested_quant_map", "a.weight.quant_map",
                                                      "a.weight.quant_state.bitsandbytes__nf4"});
  CHECK(tensors.at("a.weight").sizes() == torch::IntArrayRef{64, 1});
  CHECK(tensors.at("a.weight").scalar_type() == torch::kByte);
  CHECK(tensors.at("a.weight.absmax").scalar_type() == torch::kByte);
  CHECK(tensors.at("a.weight.nested_absmax").item<float>() == 3);
  CHECK(tensors.at("a.weight.quant_map")[14].item<float>() == 0.7229568362236023F);
  CHECK(text_of(tensors.at("a.weight.quant_state.bitsandbytes__nf4")) ==
        R"({"quant_type":"nf4","blocksize":32,"dtype":"bfloat16","shape":[4,32],"nested_blocksize":256,)"
        R"("nested_dtype":"float32","nested_offset":3.0})");

  const auto single = FP4().double_quantization(false).pack(weight);
  const auto fewer = bitsandbytes_tensors("weight", *single, torch::kFloat);
  CHECK(names_of(fewer) == std::vector<std::string>{"weight", "weight.absmax", "weight.quant_map",
                                                    "weight.quant_state.bitsandbytes__fp4"});
  CHECK(text_of(fewer.at("weight.quant_state.bitsandbytes__fp4")) ==
        R"({"quant_type":"fp4","blocksize":64,"dtype":"float32","shape":[4,32]})");
}

TEST_CASE("the tensors of a weight in 8 bits lie beside each other") {
  const auto packed = Int8().pack(torch::ones({3, 2}).to(device()));
  struct Case {
    const char* weight;
    std::vector<std::string> names;
  };
  for (const auto& [weight, names] :
       std::vector<Case>{{"a.b.weight", {"a.b.SCB", "a.b.weight", "a.b.weight_format"}},
                         {"weight", {"SCB", "weight", "weight_format"}},
                         {"a.in_proj_weight", {"a.in_proj_weight", "a.in_proj_weight.SCB", "a.in_proj_weight_format"}},
                         {"experts.w1", {"experts.w1", "experts.w1.SCB", "experts.w1_format"}}}) {
    const auto tensors = bitsandbytes_tensors(weight, *packed, torch::kDouble);
    CHECK(names_of(tensors) == names);
    CHECK(tensors.at(weight).scalar_type() == torch::kChar);
    CHECK(lora::is_bitsandbytes_weight(weight, tensors));
    CHECK(torch::equal(read_bitsandbytes_weight(weight, tensors).weight->dense(), packed->dense()));
  }
}

TEST_CASE("what was written is read, also through a file") {
  torch::manual_seed(1);
  struct Case {
    lora::Quantization quantization;
    std::vector<int64_t> sizes;
  };
  const auto cases = std::vector<Case>{{NF4(), {40, 64}},
                                       {NF4().block_size(4096).double_quantization(false), {3, 5, 7}},
                                       {FP4(), {1}},
                                       {NF4(), {}},
                                       {FP4().block_size(32).double_quantization(false), {65}},
                                       {Int8(), {5, 33}},
                                       {NF4().block_size(32), {301, 33}}};
  const testing::TemporaryFolder folder;
  Tensors all = {{"other.weight", torch::ones({2})}};
  std::vector<std::shared_ptr<const lora::QuantizedWeight>> weights;
  for (const auto& [quantization, sizes] : cases) {
    weights.push_back(quantization.pack(torch::randn(sizes).to(device())));
    const auto name = std::to_string(weights.size()) + ".weight";
    for (const auto& part : bitsandbytes_tensors(name, *weights.back(), torch::kHalf)) all.insert(part);
  }
  lora::write_safetensors(folder / "model.safetensors", all);
  const auto read = lora::read_safetensors(folder / "model.safetensors");
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto name = std::to_string(i + 1) + ".weight";
    CAPTURE(name);
    CHECK(lora::is_bitsandbytes_weight(name, read));
    for (const auto& tensors : {all, read}) {
      const auto [weight, dtype] = read_bitsandbytes_weight(name, tensors);
      CHECK(weight->scheme() == weights[i]->scheme());
      CHECK(weight->sizes() == weights[i]->sizes());
      CHECK(weight->nbytes() == weights[i]->nbytes());
      CHECK(dtype == (weight->bits() == 4 ? std::optional(torch::kHalf) : std::nullopt));
      CHECK(torch::equal(weight->dense().cpu(), weights[i]->dense().cpu()));
    }
  }
  auto left = all;
  for (size_t i = 0; i < weights.size(); ++i)
    for (const auto& part : lora::bitsandbytes_names(std::to_string(i + 1) + ".weight")) left.erase(part);
  CHECK(names_of(left) == std::vector<std::string>{"other.weight"});
  CHECK_FALSE(lora::is_bitsandbytes_weight("other.weight", read));
  CHECK_FALSE(lora::is_bitsandbytes_weight("none", read));
}

TEST_CASE("codes may be stored as numbers of another type, and the map of the scales may be another one") {
  torch::manual_seed(2);
  const auto packed = NF4().pack(torch::randn({16, 64}).to(device()));
  auto tensors = bitsandbytes_tensors("weight", *packed, torch::kFloat);
  tensors["weight"] = tensors["weight"].contiguous().view({-1}).view(torch::kBFloat16).view({-1, 1});
  CHECK(torch::equal(read_bitsandbytes_weight("weight", tensors).weight->dense(), packed->dense()));
  tensors["weight.nested_quant_map"] = tensors["weight.nested_quant_map"] * 0;  // only the offset is left
  const auto text = text_of(tensors["weight.quant_state.bitsandbytes__nf4"]);
  const auto offset = nlohmann::json::parse(text)["nested_offset"].get<float>();
  const auto largest = read_bitsandbytes_weight("weight", tensors).weight->dense().abs().max().item<float>();
  CHECK(largest == offset);
}

TEST_CASE("tensors that are missing or do not fit are named") {
  torch::manual_seed(3);
  const auto weight = torch::randn({6, 64}).to(device());
  const auto four = bitsandbytes_tensors("m.weight", *NF4().pack(weight), torch::kFloat);
  const auto single = bitsandbytes_tensors("m.weight", *NF4().double_quantization(false).pack(weight), torch::kFloat);
  const auto eight = bitsandbytes_tensors("m.weight", *Int8().pack(weight), torch::kFloat);
  const std::string state = "m.weight.quant_state.bitsandbytes__nf4";
  struct Case {
    const char* name;  // of the tensor that is replaced, or taken away when undefined
    Tensor tensor;
    const char* text;
  };
  const auto bytes = [](int64_t count) { return torch::zeros({count, 1}, torch::kByte); };
  const auto check = [](const Tensors& whole, const std::vector<Case>& cases) {
    for (const auto& [name, tensor, text] : cases) {
      CAPTURE(name, text);
      auto tensors = whole;
      tensors.erase(name);
      if (tensor.defined()) tensors[name] = tensor;
      const auto error = error_of([&] { read_bitsandbytes_weight("m.weight", tensors); });
      CHECK_THAT(error, testing::contains(text));
      CHECK_THROWS_AS(read_bitsandbytes_weight("m.weight", tensors), lora::CheckpointError);
    }
  };
  check(four,
        {{"m.weight", {}, "m.weight: is missing"},
         {"m.weight", bytes(191), "m.weight: has 191 bytes, too few for [6,64] numbers of 4 bits"},
         {"m.weight", bytes(193), "m.weight: has 193 bytes, but [6,64] numbers of 4 bits need 192"},
         {"m.weight.absmax", {}, "m.weight.absmax: is missing, beside the other tensors of \"m.weight\""},
         {"m.weight.absmax", bytes(5), "m.weight.absmax: has to hold 6 numbers to fit \"m.weight\", but is [5, 1]"},
         {"m.weight.absmax", torch::ones({6}), "m.weight.absmax: has to be Byte beside nested_absmax, but is Float"},
         {"m.weight.quant_map", {}, "m.weight.quant_map: is missing"},
         {"m.weight.quant_map", torch::arange(16).to(torch::kFloat),
          "m.weight.quant_map: holds other numbers than NF4 has: [0, 1, 2"},
         {"m.weight.quant_map", torch::ones({15}), "m.weight.quant_map: has to hold 16 numbers"},
         {"m.weight.nested_absmax", torch::ones({2}), "m.weight.nested_absmax: has to hold 1 numbers"},
         {"m.weight.nested_absmax", torch::ones({1}, torch::kLong),
          "m.weight.nested_absmax: has to be Float, but is Long"},
         {"m.weight.nested_absmax", {}, "m.weight.absmax: has to be Float, but is Byte"},
         {"m.weight.nested_quant_map", {}, "m.weight.nested_quant_map: is missing"},
         {"m.weight.nested_quant_map", torch::ones({255}), "m.weight.nested_quant_map: has to hold 256 numbers"},
         {state.c_str(),
          {},
          "m.weight: is no weight in 4 or 8 bits: there is neither \"m.weight.quant_state.bitsandbytes__nf4\" nor"},
         {state.c_str(), torch::ones({3}), "has to be Byte, the text of an object of JSON, but is Float"},
         {state.c_str(), bytes_of("[1]"), "bitsandbytes__nf4: has to be an object of JSON, but is [1]"},
         {state.c_str(), bytes_of("{\"a\": NaN}"), "bitsandbytes__nf4: is not valid JSON"},
         {state.c_str(), bytes_of("{}"), "bitsandbytes__nf4: \"quant_type\" has to be a string, but is missing"}});
  struct Change {
    const char* key;
    nlohmann::json value;
    const char* text;
  };
  for (const auto& [key, value, text] : std::vector<Change>{
           {"quant_type", "fp4", "\"quant_type\" has to be \"nf4\", as in the name, but is \"fp4\""},
           {"blocksize", 48, "\"blocksize\" has to be a power of two from 32 to 4096, but is 48"},
           {"blocksize", 64.5, "\"blocksize\" has to be a number, but is 64.5"},
           {"blocksize", 32, "m.weight.absmax: has to hold 12 numbers"},
           {"dtype", "float64", "\"dtype\" has to be float32, float16 or bfloat16, but is \"float64\""},
           {"dtype", nullptr, "\"dtype\" has to be a string, but is null"},
           {"shape", nullptr, "\"shape\" has to be a list of sizes, but is null"},
           {"shape", {6, -64}, "\"shape\" has to be a list of sizes that fit 192 bytes, but is [6,-64]"},
           {"shape", {"6"}, "\"shape\" has to be a list of sizes that fit 192 bytes, but is [\"6\"]"},
           {"shape", {1e300}, "\"shape\" has to be a list of sizes that fit 192 bytes"},
           {"shape", {4000000000, 4000000000, 4000000000}, "\"shape\" has to be a list of sizes that fit 192 bytes"},
           {"shape", {300, 300}, "m.weight: has 192 bytes, too few for [300,300] numbers of 4 bits"},
           {"shape", {6, 63}, "m.weight: has 192 bytes, but [6,63] numbers of 4 bits need 189"},
           {"nested_blocksize", 128, "\"nested_blocksize\" has to be 256, but is 128"},
           {"nested_offset", "3", "\"nested_offset\" has to be a number, but is \"3\""}}) {
    auto changed = nlohmann::json::parse(text_of(four.at(state)));
    changed[key] = value;
    check(four, {{state.c_str(), bytes_of(changed.dump()), text}});
  }
  check(single, {{"m.weight.absmax", torch::ones({6}, torch::kByte), "m.weight.absmax: has to be Float, but is Byte"}});
  check(eight, {{"m.SCB", torch::ones({5}), "m.SCB: has to hold 6 numbers to fit \"m.weight\", but is [5]"},
                {"m.SCB", {}, "m.weight: is no weight in 4 or 8 bits"},
                {"m.weight", {}, "m.weight: is missing"},
                {"m.weight", torch::ones({6, 64}),
                 "m.weight: has to be Char with a size for each dimension beside \"m.SCB\", but is Float [6, 64]"},
                {"m.weight_format", torch::ones({}, torch::kByte),
                 "m.weight_format: has to be 0, for rows one after the other, but is [1]"}});
  auto tensors = eight;
  tensors.erase("m.weight_format");                                        // older files have none
  CHECK(lora::is_bitsandbytes_weight("m.weight", {{"m.SCB", Tensor()}}));  // so that somebody says what is missing
  CHECK(lora::is_bitsandbytes_weight("m.weight", {{state, Tensor()}}));
  CHECK_FALSE(lora::is_bitsandbytes_weight("m.weight", {{"m.SCB", Tensor()}, {"m.weight", weight}}));
  CHECK(torch::equal(read_bitsandbytes_weight("m.weight", tensors).weight->dense(), Int8().pack(weight)->dense()));
}

TEST_CASE("weights that bitsandbytes does not know are refused") {
  struct Other final : lora::QuantizedWeight {
    std::string_view scheme() const override { return "ternary"; }
    int64_t bits() const override { return 2; }
    at::IntArrayRef sizes() const override { return {}; }
    at::Device device() const override { return at::kCPU; }
    int64_t nbytes() const override { return 0; }
    at::Tensor dense() const override { return {}; }
    void unpack(int64_t, int64_t, float*) const override {}
    void dot_rows(int64_t, int64_t, const float*, float*) const override {}
    std::shared_ptr<const QuantizedWeight> to(at::Device) const override { return nullptr; }
  };
  CHECK_THAT(
      error_of([] { bitsandbytes_tensors("a.weight", Other(), torch::kFloat); }),
      testing::contains("files of bitsandbytes hold NF4, FP4 and int8, but the weight \"a.weight\" is in ternary"));
  const auto packed = NF4().pack(torch::ones({2}));
  CHECK_THAT(error_of([&] { bitsandbytes_tensors("a.weight", *packed, torch::kDouble); }),
             testing::contains(
                 "bitsandbytes computes in Float, Half or BFloat16, but dtype is Double for the weight \"a.weight\""));
}

}  // namespace
