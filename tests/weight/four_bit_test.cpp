// NF4 and FP4: codes and scales that can be worked out by hand, what is refused, and the kernels of each processor
// beside the plain ones. tests/peft/quantize_live.py has many more tensors beside bitsandbytes.
#include "support/testing.hpp"

#include <lora/weight/four_bit.hpp>

namespace {

using lora::FourBitTensor;
using lora::FourBitType;
using lora::FP4;
using lora::NF4;
using testing::device;
using testing::error_of;
using torch::Tensor;
using Bytes = std::vector<int>;

Tensor numbers(const std::vector<float>& values) { return torch::tensor(values).to(device()); }

Bytes bytes_of(const Tensor& tensor) {
  const auto values = tensor.to(torch::kCPU, torch::kInt).contiguous();
  return {values.data_ptr<int>(), values.data_ptr<int>() + values.numel()};
}

std::vector<float> floats_of(const Tensor& tensor) {
  const auto values = tensor.to(torch::kCPU, torch::kFloat).contiguous();
  return {values.data_ptr<float>(), values.data_ptr<float>() + values.numel()};
}

FourBitTensor quantize(FourBitType type, const Tensor& weight, int64_t block_size, bool double_quantization) {
  return type == FourBitType::kNF4
             ? lora::quantize_nf4(weight, NF4().block_size(block_size).double_quantization(double_quantization))
             : lora::quantize_fp4(weight, FP4().block_size(block_size).double_quantization(double_quantization));
}

bool is_same(const Tensor& a, const Tensor& b) {
  if (!a.defined() || !b.defined()) return a.defined() == b.defined();
  return a.scalar_type() == b.scalar_type() && torch::equal(a.cpu(), b.cpu());
}

bool is_same(const FourBitTensor& a, const FourBitTensor& b) {
  return a.type == b.type && a.sizes == b.sizes && a.block_size == b.block_size && is_same(a.codes, b.codes) &&
         is_same(a.absmax, b.absmax) && is_same(a.nested_absmax, b.nested_absmax) &&
         is_same(a.nested_map, b.nested_map) && a.offset == b.offset;
}

TEST_CASE("each of the sixteen values has its code, high half first") {
  struct Case {
    FourBitType type;
    std::vector<float> weight;  // sixteen numbers and as many zeros: one block of 32
    float absmax;
    Bytes codes;
  };
  const auto zeros = Bytes(8, 0x77);
  auto [type, weight, absmax, codes] = GENERATE_COPY(
      Case{FourBitType::kNF4,
           {-2.0F, -1.3923856F, -1.0501461F, -0.78983498F, -0.56888276F, -0.36954686F, -0.18210007F, 0.0F, 0.1591606F,
            0.3218604F, 0.4922246F, 0.67583042F, 0.88141966F, 1.125234F, 1.4459137F, 2.0F},
           2,
           {0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF, 0x77, 0x77, 0x77, 0x77, 0x77, 0x77, 0x77, 0x77}},
      Case{FourBitType::kFP4,
           {0, 0.0625F, 8, 12, 4, 6, 2, 3, 0, -0.0625F, -8, -12, -4, -6, -2, -3},
           12,
           {0x01, 0x23, 0x45, 0x67, 0x09, 0xAB, 0xCD, 0xEF, 0, 0, 0, 0, 0, 0, 0, 0}});
  weight.resize(32, 0.0F);
  const auto packed = quantize(type, numbers(weight).view({4, 8}), 32, false);
  CHECK(packed.codes.scalar_type() == torch::kByte);
  CHECK(bytes_of(packed.codes) == codes);
  CHECK(floats_of(packed.absmax) == std::vector<float>{absmax});
  CHECK_FALSE(packed.double_quantized());
  CHECK(packed.sizes == std::vector<int64_t>{4, 8});
  const auto back = lora::dequantize(packed);
  CHECK(back.device() == device());
  CHECK(back.sizes() == torch::IntArrayRef{4, 8});
  CHECK(testing::distance(back.view({-1}), numbers(weight)) < 1e-6);
}

TEST_CASE("a number halfway between two values takes the lower one") {
  struct Case {
    FourBitType type;
    float x;  // beside a largest number of 1
    int nibble;
  };
  const auto [type, x, nibble] =
      GENERATE(Case{FourBitType::kNF4, 0.07958029955625534F / 2, 7},  // between 0 and the next
               Case{FourBitType::kNF4, std::nextafterf(0.07958029955625534F / 2, 1.0F), 8},
               Case{FourBitType::kNF4, -0.09105003625154495F / 2, 6}, Case{FourBitType::kNF4, -0.0F, 7},
               Case{FourBitType::kNF4, 1e-45F, 7}, Case{FourBitType::kNF4, -0.99F, 0},
               Case{FourBitType::kNF4, 0.87F, 15}, Case{FourBitType::kFP4, 0.0F, 0}, Case{FourBitType::kFP4, -0.0F, 0},
               Case{FourBitType::kFP4, 1e-45F, 8},  // the other zero
               Case{FourBitType::kFP4, -1e-45F, 0}, Case{FourBitType::kFP4, 0.0625F / 24, 8},
               Case{FourBitType::kFP4, std::nextafterf(0.0625F / 24, 1.0F), 1},
               Case{FourBitType::kFP4, -0.0625F / 24, 9}, Case{FourBitType::kFP4, 0.375F, 7 - 3},
               Case{FourBitType::kFP4, 5.0F / 12, 4}, Case{FourBitType::kFP4, -0.9F, 11});
  CAPTURE(x, nibble);
  auto weight = std::vector<float>(32, 0.0F);
  weight[0] = 1;
  weight[1] = x;
  CHECK(bytes_of(quantize(type, numbers(weight), 32, false).codes)[0] % 16 == nibble);
}

TEST_CASE("each block has its scale, also the last one with what is left") {
  const auto tiny = 1e-38F;  // what bitsandbytes keeps for less in a last, shorter block, and no less divides by
  struct Case {
    std::vector<std::pair<int, float>> filled;  // counts of equal numbers
    std::vector<float> absmax;
    Bytes last;  // codes of the last two bytes
  };
  const auto& [filled, absmax, last] = GENERATE_REF(values<Case>({
      {{{1, -3}}, {3}, {0x07}},  // an odd count: the half that is left is zero
      {{{2, 0.0F}}, {tiny}, {0x77}},
      {{{32, 0.0F}}, {0}, {0x77, 0x77}},
      {{{32, -0.0F}}, {0}, {0x77, 0x77}},
      {{{32, 4}, {32, -0.5F}, {3, 2}}, {4, 0.5F, 2}, {0xFF, 0xF7}},
      {{{32, 1e-44F}}, {1e-44F}, {0x77, 0x77}},  // times 1e38, not divided by 1e-44
      {{{32, 5e-39F}}, {5e-39F}, {0xCC, 0xCC}},  // 0.5
      {{{32, 1e-38F}, {1, -5e-39F}}, {1e-38F, tiny}, {0xFF, 0x27}},
      {{{31, 1701}, {1, 346.18967F}, {1, 1701}, {1, 346.18967F}}, {1701, 1701}, {0xF9, 0xFA}},
      {{{32, 3e38F}, {32, -3e38F}}, {3e38F, 3e38F}, {0, 0}},
  }));
  // A last, shorter block is divided by its largest number, the others are multiplied by its inverse: 1701 and
  // 346.18967 lie on either side of a bound then.
  std::vector<float> weight;
  for (const auto& [count, value] : filled) weight.insert(weight.end(), static_cast<size_t>(count), value);
  const auto packed = lora::quantize_nf4(numbers(weight), NF4().block_size(32).double_quantization(false));
  CHECK(floats_of(packed.absmax) == absmax);
  const auto codes = bytes_of(packed.codes);
  CHECK(codes.size() == (weight.size() + 1) / 2);
  CHECK(Bytes(codes.end() - static_cast<std::ptrdiff_t>(last.size()), codes.end()) == last);
}

TEST_CASE("scales are quantized themselves, around their mean") {
  // Of blocks with 1, 2, 3 and 6: the mean is 3, and -2, -1, 0 and 3 are quantized in thirds. Zero becomes 2.125e-5.
  auto weight = torch::zeros({4, 32});
  weight.select(1, 0).copy_(torch::tensor({1.0, 2.0, 3.0, 6.0}));
  const auto packed = lora::quantize_nf4(weight.to(device()), NF4().block_size(32));
  REQUIRE(packed.double_quantized());
  CHECK(packed.offset == 3);
  CHECK(packed.absmax.scalar_type() == torch::kByte);
  CHECK(bytes_of(packed.absmax) == Bytes{23, 47, 131, 255});
  CHECK(floats_of(packed.nested_absmax) == std::vector<float>{3});
  const auto map = floats_of(packed.nested_map);
  CHECK(std::is_sorted(map.begin(), map.end()));
  CHECK(map[127] == 0);
  CHECK(map[255] == 1);
  CHECK(map[0] == -0.99296874F);
  CHECK(map[128] == 5.5000004e-7F);
  CHECK(map[131] == 2.1249998e-5F);
  CHECK(floats_of(lora::dequantize(packed).select(1, 0)) ==
        std::vector<float>{0.99140644F, 2.00390625F, 3.00006366F, 6});
}

TEST_CASE("a nested block has 256 scales") {
  auto weight = torch::zeros({300, 32});
  weight.select(1, 5).copy_(torch::arange(300));
  const auto packed = lora::quantize_fp4(weight.to(device()), FP4().block_size(32));
  CHECK(packed.offset == 149.5F);
  CHECK(packed.absmax.numel() == 300);
  CHECK(floats_of(packed.nested_absmax) == std::vector<float>{149.5F, 149.5F});
  auto same = lora::quantize_fp4(torch::full({300, 64}, 0.25F).to(device()));  // nothing is left of them but the mean
  CHECK(same.offset == 0.25F);
  CHECK(bytes_of(same.absmax) == Bytes(300, 0));
  CHECK(floats_of(same.nested_absmax) == std::vector<float>{0, 0});
  CHECK(torch::equal(lora::dequantize(same).cpu(), torch::full({300, 64}, 0.25F)));
}

TEST_CASE("on a device and on the CPU the codes and the numbers are the same") {
  torch::manual_seed(1);
  const auto type = GENERATE(FourBitType::kNF4, FourBitType::kFP4);
  const auto block_size = GENERATE(32, 64, 4096);
  const auto double_quantization = GENERATE(false, true);
  for (const auto& sizes : std::vector<std::vector<int64_t>>{{1}, {7}, {}, {65, 3}, {3, 5, 7}, {40, 64}, {301, 100}}) {
    CAPTURE(block_size, double_quantization, sizes);
    auto weight = torch::randn(sizes) * torch::randn(sizes).mul(3).exp();
    if (weight.dim() == 2) weight[1].zero_();
    const auto here = quantize(type, weight, block_size, double_quantization);
    const auto there = quantize(type, weight.to(device()), block_size, double_quantization);
    CHECK(there.codes.device() == device());
    CHECK(is_same(there, here));
    CHECK(is_same(lora::dequantize(there), lora::dequantize(here)));
    const auto moved = lora::FourBitWeight(here).to(device());
    CHECK(moved->device() == device());
    CHECK(is_same(dynamic_cast<const lora::FourBitWeight&>(*moved).packed(), here));
    CHECK(is_same(moved->dense(), lora::dequantize(here)));
  }
}

TEST_CASE("numbers of other types become float first; strides do not count") {
  torch::manual_seed(2);
  const auto weight = torch::randn({33, 20}).to(device());
  for (const auto type : {torch::kDouble, torch::kHalf, torch::kBFloat16}) {
    const auto other = weight.to(type);
    CHECK(is_same(lora::quantize_nf4(other), lora::quantize_nf4(other.to(torch::kFloat))));
  }
  CHECK(is_same(lora::quantize_nf4(weight.t()), lora::quantize_nf4(weight.t().contiguous())));
  CHECK(is_same(lora::quantize_nf4(weight.clone().requires_grad_()), lora::quantize_nf4(weight)));
}

TEST_CASE("numbers that were quantized once stay as they are") {
  torch::manual_seed(3);
  const auto type = GENERATE(FourBitType::kNF4, FourBitType::kFP4);
  const auto once = lora::dequantize(quantize(type, torch::randn({64, 64}).to(device()), 64, false));
  CHECK(torch::equal(lora::dequantize(quantize(type, once, 64, false)), once));
}

TEST_CASE("what cannot be packed is refused, with what is wrong") {
  const auto nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  auto with = [](float value, std::vector<torch::indexing::TensorIndex> place) {
    auto weight = torch::ones({40, 3});
    weight.index_put_(place, value);
    return weight.to(device());
  };
  struct Case {
    Tensor weight;
    const char* text;
  };
  const auto cases = std::vector<Case>{
      {with(nan, {7, 2}),
       "1 of the 120 numbers of the weight [40, 3] are not finite in float, the first of them nan at [7, 2]"},
      {with(inf, {39, 0}), "the first of them inf at [39, 0]; only finite numbers can be packed"},
      {with(-inf, {torch::indexing::Slice(), 1}),
       "40 of the 120 numbers of the weight [40, 3] are not finite in float, the first of them -inf at [0, 1]"},
      {torch::full({2}, 1e300, torch::kDouble).to(device()),
       "2 of the 2 numbers of the weight [2] are not finite in float, the first of them 1e+300 at [0]"},
      {torch::ones({2, 2}, torch::kLong).to(device()),
       "has to be a dense tensor of Float, Double, Half or BFloat16 to be packed, but got Strided Long [2, 2]"},
      {torch::empty({0, 4}).to(device()), "the weight [0, 4] has no numbers that could be packed"},
      {Tensor(), "the weight is undefined"},
      {torch::full({128}, 3e38F).to(device()), "it can be packed with double_quantization(false)"},
  };
  for (const auto& [weight, text] : cases) {
    CHECK_THAT(error_of([&, weight = weight] { NF4().block_size(32).pack(weight); }), testing::contains(text));
    CHECK_THAT(error_of([&, weight = weight] { FP4().block_size(32).pack(weight); }),
               testing::contains("lora::quantize_fp4: "));
  }
  for (const int64_t size : {0, -64, 1, 16, 33, 96, 8192}) {
    const auto text = error_of([&] { lora::quantize_nf4(torch::ones({2}), NF4().block_size(size)); });
    CHECK_THAT(text,
               testing::contains(
                   "lora::quantize_nf4: block_size has to be 32, 64, 128, 256, 512, 1024, 2048 or 4096, but got " +
                   std::to_string(size)));
  }
}

TEST_CASE("a weight knows what it is") {
  torch::manual_seed(4);
  const auto x = torch::randn({6, 50, 3}).to(device());
  struct Case {
    lora::Quantization quantization;
    FourBitType type;
    int64_t block_size;
    bool double_quantized;
    std::string scheme;
    int64_t bytes;  // 900 numbers
  };
  const auto cases = std::vector<Case>{
      {NF4(), FourBitType::kNF4, 64, true, "NF4", 450 + 15 + 4 + 4},
      {FP4(), FourBitType::kFP4, 64, true, "FP4", 450 + 15 + 4 + 4},
      {NF4().block_size(128).double_quantization(false), FourBitType::kNF4, 128, false, "NF4", 450 + 8 * 4},
  };
  for (const auto& [quantization, type, block_size, double_quantized, scheme, bytes] : cases) {
    const auto weight = quantization.pack(x);
    CHECK(weight->scheme() == scheme);
    CHECK(weight->bits() == 4);
    CHECK(weight->sizes() == x.sizes());
    CHECK(weight->device() == device());
    CHECK(weight->nbytes() == bytes);
    const auto expected = quantize(type, x, block_size, double_quantized);
    CHECK(is_same(weight->dense(), lora::dequantize(expected)));
  }
}

TEST_CASE("tensors that do not fit each other, and numbers that are not there, are refused") {
  const auto good = lora::quantize_nf4(torch::ones({3, 50}).to(device()), NF4().block_size(32));
  struct Case {
    std::function<void(FourBitTensor&)> change;
    const char* text;
  };
  for (const auto& [change, text] : std::vector<Case>{
           {[](auto& it) { it.codes = it.codes.slice(0, 1); },
            "codes of this packed weight has to be Byte of 75 numbers"},
           {[](auto& it) { it.codes = Tensor(); }, "codes of a packed weight is undefined"},
           {[](auto& it) { it.absmax = it.absmax.to(torch::kFloat); },
            "absmax of this packed weight has to be Byte of 5 numbers, contiguous, on "},
           {[](auto& it) { it.absmax = Tensor(); }, "absmax of a packed weight is undefined"},
           {[](auto& it) { it.nested_absmax = it.nested_absmax.expand(2); },
            "nested_absmax of this packed weight has to be Float of 1 numbers"},
           {[](auto& it) { it.nested_absmax = Tensor(); }, "absmax of this packed weight has to be Float of 5 numbers"},
           {[](auto& it) { it.nested_map = Tensor(); }, "nested_map of a packed weight is undefined"},
           {[](auto& it) { it.nested_map = torch::zeros({512}).to(device()).slice(0, 0, 512, 2); }, "with strides [2]"},
           {[](auto& it) { it.block_size = 100; }, "block_size has to be 32"},
           {[](auto& it) {
              it.sizes = {3, 0};
            },
            "the sizes of a packed weight are [3, 0], but each has to be at least 1"},
           {[](auto& it) {
              it.sizes = {3, 60};
            },
            "codes of this packed weight has to be Byte of 90 numbers"}}) {
    auto bad = good;
    change(bad);
    CHECK_THAT(error_of([&] { lora::FourBitWeight weight(bad); }), testing::contains(text));
    CHECK_THAT(error_of([&] { lora::dequantize(bad); }), testing::contains(text));
  }
  const lora::FourBitWeight weight(good);
  float number = 0;
  if (!device().is_cpu()) {
    CHECK_THAT(error_of([&] { weight.unpack(0, 1, &number); }),
               testing::contains("reads weights on the CPU, but this one is on "));
    return;
  }
  for (const auto& [first, count] :
       std::vector<std::pair<int64_t, int64_t>>{{-1, 1}, {0, -1}, {150, 1}, {149, 2}, {151, 0}}) {
    CHECK_THAT(error_of([&, from = first, size = count] { weight.unpack(from, size, &number); }),
               testing::contains("there are 150 numbers, but "));
  }
  CHECK_THAT(error_of([&] { weight.dot_rows(2, 2, &number, &number); }),
             testing::contains("there are 3 rows, but 2 from 2 on are asked for"));
}

TEST_CASE("a part of the numbers, and rows times a vector") {
  torch::manual_seed(5);
  const auto type = GENERATE(FourBitType::kNF4, FourBitType::kFP4);
  const auto block_size = GENERATE(32, 64, 256, 4096);
  const auto double_quantization = GENERATE(false, true);
  const auto columns = GENERATE(1, 2, 7, 64, 95, 97, 300, 768);
  const int64_t rows = 40;
  const auto packed = quantize(type, torch::randn({rows, columns}), block_size, double_quantization);
  const auto dense = lora::detail::dequantized_blocks(packed);  // by ATen's operators
  const auto x = torch::randn({columns});
  const auto products = dense.to(torch::kDouble).mv(x.to(torch::kDouble));
  const auto scale = dense.abs().to(torch::kDouble).mv(x.abs().to(torch::kDouble)).max().item<double>();
  for (const auto& kernels : lora::detail::runnable_codec_kernels()) {
    CAPTURE(kernels.name, block_size, double_quantization, columns);
    const lora::detail::FourBitReader reader(packed, kernels);
    const auto all = packed.numel();
    for (const int64_t first : {int64_t{0}, int64_t{1}, int64_t{31}, int64_t{32}, all / 3, all / 2 + 1, all - 1}) {
      for (const int64_t count :
           {int64_t{0}, int64_t{1}, int64_t{2}, int64_t{15}, int64_t{33}, int64_t{97}, all - first}) {
        if (first >= all || first + count > all) continue;
        auto part = torch::full({count + 2}, 77.0F);
        reader.unpack(first, count, part.data_ptr<float>() + 1);
        CHECK(torch::equal(part.slice(0, 1, count + 1), dense.view({-1}).slice(0, first, first + count)));
        CHECK((part[0].item<float>() == 77 && part[count + 1].item<float>() == 77));  // nothing beside it
      }
    }
    for (const int64_t first : {0, 1, 17}) {
      auto y = torch::full({rows - first + 1}, 77.0F);
      reader.dot_rows(columns, first, rows - first, x.data_ptr<float>(), y.data_ptr<float>());
      CHECK(testing::distance(y.slice(0, 0, rows - first), products.slice(0, first)) < 1e-6 * scale + 1e-30);
      CHECK(y[rows - first].item<float>() == 77);
    }
  }
  const lora::FourBitWeight weight(packed);
  auto y = torch::empty({3});
  weight.dot_rows(5, 3, x.data_ptr<float>(), y.data_ptr<float>());
  CHECK(testing::distance(y, products.slice(0, 5, 8)) < 1e-6 * scale);
  auto part = torch::empty({columns});
  weight.unpack(columns, columns, part.data_ptr<float>());
  CHECK(torch::equal(part, dense[1]));
}

TEST_CASE("every kernel gives the codes of the plain one") {
  torch::manual_seed(6);
  const auto& code = GENERATE(lora::detail::kNF4, lora::detail::kFP4);
  const auto block_size = GENERATE(32, 64, 4096);
  const std::vector<float> bounds(code.bounds, code.bounds + 15);
  for (const int64_t count : {1, 2, 15, 16, 17, 31, 33, 64, 65, 4099, 70000}) {
    auto x = torch::randn({count});
    if (count > 60) {  // ties, and the numbers beside them
      const auto halfway = torch::tensor(bounds);
      x.slice(0, 0, 15).copy_(halfway);
      x.slice(0, 15, 30).copy_(torch::nextafter(halfway, torch::full({}, 2.0F)));
      x.slice(0, 30, 45).copy_(torch::nextafter(halfway, torch::full({}, -2.0F)));
      x.slice(0, 45, 64).clamp_(-1, 1)[0] = 1;
      x.slice(0, 0, 32)[31] = -1;
    }
    const auto blocks = (count + block_size - 1) / block_size;
    std::vector<FourBitTensor> found;
    for (const auto& kernels : lora::detail::runnable_codec_kernels()) {
      CAPTURE(kernels.name, count);
      auto codes = torch::full({(count + 1) / 2 + 1}, 77, torch::kByte);
      auto absmax = torch::full({blocks}, 77.0F);
      CHECK(lora::detail::quantize_blocks(kernels, code, x.data_ptr<float>(), count, block_size,
                                          codes.data_ptr<uint8_t>(), absmax.data_ptr<float>()));
      CHECK(codes[(count + 1) / 2].item<int>() == 77);
      found.push_back({FourBitType::kNF4, {count}, block_size, codes, absmax, {}, {}, 0});
    }
    for (const auto& one : found) CHECK(is_same(one, found.back()));
    const auto [codes, absmax] = lora::detail::quantized_blocks(code, x, block_size);  // by ATen's operators
    CHECK(torch::equal(codes, found.back().codes.slice(0, 0, -1)));
    CHECK(torch::equal(absmax, found.back().absmax));
  }
}

TEST_CASE("every kernel finds the largest number, and those that are not finite") {
  for (const auto& kernels : lora::detail::runnable_codec_kernels()) {
    CAPTURE(kernels.name);
    for (const int64_t count : {0, 1, 7, 8, 15, 16, 17, 40}) {
      for (int64_t place = 0; place < count; ++place) {
        auto x = torch::linspace(-1, 1, count + 1).slice(0, 0, count).contiguous();
        x[place] = -3;
        CHECK(kernels.largest(x.data_ptr<float>(), count) == 0x40400000);
        for (const float value : {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                                  std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::quiet_NaN()}) {
          x[place] = value;
          CHECK(kernels.largest(x.data_ptr<float>(), count) >= 0x7F800000);
        }
      }
    }
    CHECK(kernels.largest(nullptr, 0) == 0);
  }
}

TEST_CASE("every kernel works out the same scales") {
  torch::manual_seed(7);
  const int64_t blocks = 700;
  const auto packed = lora::quantize_nf4(torch::randn({blocks, 32}).exp(), NF4().block_size(32));
  const auto expected = lora::detail::scales_of(packed);
  const lora::detail::BlockScales scales{nullptr, packed.absmax.data_ptr<uint8_t>(),
                                         packed.nested_map.data_ptr<float>(), packed.nested_absmax.data_ptr<float>(),
                                         packed.offset};
  for (const auto& kernels : lora::detail::runnable_codec_kernels()) {
    CAPTURE(kernels.name);
    for (const int64_t first : {0, 1, 240, 249, 255, 256, 505, 690}) {
      for (const int64_t count : {1, 7, 8, 16, 17, 40, 200}) {
        if (first + count > blocks) continue;
        auto found = torch::full({count + 1}, 77.0F);
        kernels.scales(scales, first, count, found.data_ptr<float>());
        CHECK(torch::equal(found.slice(0, 0, count), expected.slice(0, first, first + count)));
        CHECK(found[count].item<float>() == 77);
      }
    }
  }
}

}  // namespace
