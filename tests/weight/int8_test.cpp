// Weights in 8 bits: codes that can be worked out by hand, and the kernels of each processor beside the plain ones.
// tests/peft/quantize_live.py has many more tensors beside bitsandbytes.
#include "support/testing.hpp"

#include <lora/weight/int8.hpp>

namespace {

using testing::device;
using testing::error_of;
using torch::Tensor;

TEST_CASE("a row is rounded to 127ths of its largest number") {
  struct Case {
    std::vector<float> row;
    float absmax;
    std::vector<int> codes;
  };
  const auto cases = std::vector<Case>{
      {{127, -127, 63.5F, 0.5F}, 127, {127, -127, 64, 0}},
      {{127, 1.5F, 2.5F, -0.5F}, 127, {127, 2, 2, 0}},   // halves to the even neighbour
      {{1533, 416.4449F, 0, 0}, 1533, {127, 35, 0, 0}},  // times 1 / absmax, times 127: 127 / absmax would give 34
      {{0, 0, -0.0F, 0}, 0, {0, 0, 0, 0}},
      {{1, -0.25F, 0.3F, 0.1F}, 1, {127, -32, 38, 13}},
      {{1e-3F, -2e-3F, 0, 2e-3F}, 2e-3F, {64, -127, 0, 127}},
      {{2e36F, -2e36F, 1e36F, 1}, 2e36F, {127, -127, 64, 0}},
      {{1e-37F, 3e-37F, -3e-37F, 1e-45F}, 3e-37F, {0, 0, 0, 0}},  // 127 / absmax is more than a float holds
      {{1e-36F, 4e-37F, -6e-37F, 1e-45F}, 1e-36F, {127, 51, -76, 0}},
  };
  auto rows = std::vector<Tensor>();
  for (const auto& one : cases) rows.push_back(torch::tensor(one.row));
  const auto packed = lora::quantize_int8(torch::stack(rows).to(device()));
  CHECK(packed.codes.scalar_type() == torch::kChar);
  CHECK(packed.codes.device() == device());
  const auto back = lora::dequantize(packed);
  for (size_t i = 0; i < cases.size(); ++i) {
    const auto row = static_cast<int64_t>(i);
    CAPTURE(row);
    CHECK(torch::equal(packed.codes[row].cpu().to(torch::kInt), torch::tensor(cases[i].codes, torch::kInt)));
    CHECK(packed.absmax[row].item<float>() == cases[i].absmax);
    const auto numbers = torch::tensor(cases[i].codes).to(torch::kFloat) * (cases[i].absmax / 127);
    CHECK(torch::allclose(back[row].cpu(), numbers, 1e-6, 0));
  }
}

TEST_CASE("on a device and on the CPU the codes and the numbers are the same; rows are of the first dimension") {
  torch::manual_seed(1);
  for (const auto& sizes :
       std::vector<std::vector<int64_t>>{{}, {1}, {5}, {3, 7}, {4, 3, 2, 5}, {40, 64}, {17, 1000}}) {
    CAPTURE(sizes);
    const auto weight = torch::randn(sizes);
    const auto here = lora::quantize_int8(weight), there = lora::quantize_int8(weight.to(device()));
    CHECK(here.codes.sizes() == weight.sizes());
    CHECK(here.absmax.numel() == (sizes.empty() ? 1 : sizes[0]));
    CHECK(torch::equal(here.absmax, weight.reshape({here.absmax.numel(), -1}).abs().amax(1)));
    CHECK(torch::equal(there.codes.cpu(), here.codes));
    CHECK(torch::equal(there.absmax.cpu(), here.absmax));
    CHECK(torch::equal(lora::dequantize(there).cpu(), lora::dequantize(here)));
    const auto limit = (here.absmax / 254).view({-1, 1}) * 1.0001;
    CHECK(((lora::dequantize(here) - weight).view({here.absmax.numel(), -1}).abs() <= limit).all().item<bool>());
    const auto moved = lora::Int8Weight(here).to(device());
    CHECK(moved->device() == device());
    CHECK(torch::equal(moved->dense().cpu(), lora::dequantize(here)));
  }
  const auto weight = torch::randn({9, 20}).to(device());
  for (const auto type : {torch::kDouble, torch::kHalf, torch::kBFloat16}) {
    const auto other = lora::quantize_int8(weight.to(type)),
               same = lora::quantize_int8(weight.to(type).to(torch::kFloat));
    CHECK((torch::equal(other.codes, same.codes) && torch::equal(other.absmax, same.absmax)));
  }
}

TEST_CASE("what cannot be packed in 8 bits is refused") {
  struct Case {
    Tensor weight;
    const char* text;
  };
  auto with_nan = torch::ones({4, 5});
  with_nan[2][3] = std::numeric_limits<float>::quiet_NaN();
  const auto cases = std::vector<Case>{
      {with_nan,
       "lora::quantize_int8: 1 of the 20 numbers of the weight [4, 5] are not finite in float, the first of them nan "
       "at [2, 3]"},
      {torch::full({3, 2}, std::numeric_limits<float>::infinity()), "6 of the 6 numbers"},
      {torch::ones({2}, torch::kInt),
       "has to be a dense tensor of Float, Double, Half or BFloat16 to be packed, but got Strided Int [2]"},
      {torch::full({3, 2}, -2.7e36), "a number of the weight [3, 2] is 2.7e+36, but times 127 it has to be a float"},
      {torch::empty({3, 0}), "the weight [3, 0] has no numbers"},
  };
  for (const auto& [weight, text] : cases)
    CHECK_THAT(error_of([&, weight = weight] { lora::Int8().pack(weight.to(device())); }), testing::contains(text));
}

TEST_CASE("a weight in 8 bits knows what it is") {
  torch::manual_seed(2);
  const auto x = torch::randn({6, 50, 3}).to(device());
  const auto weight = lora::Quantization(lora::Int8()).pack(x);
  CHECK(weight->scheme() == "int8");
  CHECK(weight->bits() == 8);
  CHECK(weight->sizes() == x.sizes());
  CHECK(weight->device() == device());
  CHECK(weight->nbytes() == 900 + 6 * 4);
  CHECK(torch::equal(weight->dense(), lora::dequantize(lora::quantize_int8(x))));
}

TEST_CASE("tensors that do not fit each other are refused") {
  const auto good = lora::quantize_int8(torch::ones({3, 4}).to(device()));
  const auto refuses = [](const lora::Int8Tensor& bad, const char* text) {
    CHECK_THAT(error_of([&] { lora::Int8Weight weight(bad); }), testing::contains(text));
    CHECK_THAT(error_of([&] { lora::dequantize(bad); }), testing::contains(text));
  };
  refuses({good.codes, good.absmax.slice(0, 1)}, "absmax of this packed weight has to be Float of 3 numbers");
  refuses({good.codes, {}}, "absmax of a packed weight is undefined");
  refuses({{}, good.absmax}, "codes of a packed weight is undefined");
  refuses({good.codes.to(torch::kInt), good.absmax}, "codes of this packed weight has to be Char of 12 numbers");
  refuses({good.codes.t(), good.absmax}, "with strides [1, 4]");
  refuses({good.codes.slice(0, 0, 0), good.absmax}, "codes of a packed weight are [0, 4], no numbers");
  if (!device().is_cpu()) return;
  float number = 0;
  const lora::Int8Weight weight(good);
  CHECK_THAT(error_of([&] { weight.unpack(12, 1, &number); }),
             testing::contains("there are 12 numbers, but 1 from 12 on are asked for"));
  CHECK_THAT(error_of([&] { weight.dot_rows(4, 0, &number, &number); }), testing::contains("there are 3 rows"));
}

TEST_CASE("every kernel has the codes, numbers and products of the plain one") {
  torch::manual_seed(3);
  const auto columns = GENERATE(1, 2, 15, 16, 17, 33, 64, 95, 97, 768);
  const int64_t rows = 30;
  auto weight = torch::randn({rows, columns});
  weight[3].mul_(1e-37);
  weight[4] = (torch::arange(columns) % 255 - 127 + 0.5);  // ties
  const auto packed = lora::quantize_int8(weight);
  const auto matrix = packed.codes.to(torch::kFloat) * packed.absmax.unsqueeze(1) * 7.874015718698502e-3;
  const auto x = torch::randn({columns});
  const auto products = matrix.to(torch::kDouble).mv(x.to(torch::kDouble));
  const auto [by_operators, largest] = lora::detail::quantized_rows(weight);
  for (const auto& kernels : lora::detail::runnable_codec_kernels()) {
    CAPTURE(kernels.name, columns);
    auto codes = torch::full({rows * columns + 1}, 77, torch::kChar);
    auto absmax = torch::empty({rows});
    CHECK(lora::detail::quantize_rows(kernels, weight.data_ptr<float>(), rows, columns, codes.data_ptr<int8_t>(),
                                      absmax.data_ptr<float>()));
    CHECK(torch::equal(codes.slice(0, 0, -1).view({rows, -1}), by_operators));
    CHECK(torch::equal(absmax, largest));
    CHECK(codes[rows * columns].item<int>() == 77);
    const lora::detail::Int8Reader reader(packed, kernels);
    for (const int64_t first : {int64_t{0}, int64_t{1}, rows * columns / 2, rows * columns - 1}) {
      for (const int64_t count : {int64_t{0}, int64_t{1}, int64_t{19}, rows * columns - first}) {
        if (first + count > rows * columns) continue;
        auto part = torch::full({count + 1}, 77.0F);
        reader.unpack(first, count, part.data_ptr<float>());
        CHECK(torch::equal(part.slice(0, 0, count), matrix.view({-1}).slice(0, first, first + count)));
        CHECK(part[count].item<float>() == 77);
      }
    }
    auto y = torch::full({rows - 2}, 77.0F);
    reader.dot_rows(2, rows - 3, x.data_ptr<float>(), y.data_ptr<float>());
    CHECK(testing::distance(y.slice(0, 0, -1), products.slice(0, 2, rows - 1)) <
          1e-5 * std::max(1.0, products.abs().max().item<double>()));
    CHECK(y[rows - 3].item<float>() == 77);
  }
  auto y = torch::empty({2});
  lora::Int8Weight(packed).dot_rows(1, 2, x.data_ptr<float>(), y.data_ptr<float>());
  CHECK(testing::distance(y, products.slice(0, 1, 3)) < 1e-5 * std::max(1.0, products.abs().max().item<double>()));
}

}  // namespace
