// Weights of bfloat16 in 12 bits: every number of bfloat16 comes back bit by bit, by each processor's kernels, too.
#include "support/testing.hpp"

#include <lora/weight/lossless.hpp>

namespace {

using testing::contains;
using testing::device;
using testing::error_of;
using torch::Tensor;

/// The numbers of bfloat16 that are finite, as bits: 65,280 of them, both zeros among them.
Tensor all_finite() {
  const auto bits = torch::arange(0x10000, torch::kInt);
  return bits.masked_select(bits.bitwise_and(0x7F80).ne(0x7F80));
}

/// Floats of bits of bfloat16.
Tensor floats(const Tensor& bits) { return bits.to(torch::kInt).bitwise_left_shift(16).view(torch::kFloat); }

Tensor bits_of(const Tensor& numbers) { return numbers.contiguous().view(torch::kInt); }

/// Rows of normally distributed numbers of all sizes, with zeros of both signs and numbers far below the others.
Tensor some_rows(int64_t rows, int64_t columns) {
  auto weight = torch::randn({rows, columns}) * torch::pow(2, torch::randint(-100, 100, {rows, 1}));
  weight.mul_(torch::where(torch::rand({rows, columns}) < 0.05, 1e-7, 1.0));
  weight.mul_(torch::where(torch::rand({rows, columns}) < 0.05, -0.0, 1.0));
  return weight.to(torch::kBFloat16).to(torch::kFloat);
}

}  // namespace

TEST_CASE("Each number of bfloat16 is held in 12 bits") {
  struct Case {
    const char* name;
    Tensor bits;  // of rows
  };
  const auto all = all_finite();
  torch::manual_seed(1);
  const auto cases = std::vector<Case>{
      {"in order", all.view({-1, 255})},
      {"all exponents in each row", all.view({255, -1}).t().contiguous()},
      {"mixed", all.index({torch::randperm(all.numel())}).view({1, -1})},
      {"one number a row", all.view({-1, 1})},
  };
  for (const auto& [name, bits] : cases) {
    INFO(name);
    const auto weight = floats(bits);
    CHECK(torch::equal(bits_of(lora::dequantize(lora::pack_lossless(weight))), bits_of(weight)));
    CHECK(torch::equal(bits_of(lora::Lossless().pack(weight.to(device()))->dense().cpu()), bits_of(weight)));
  }
}

TEST_CASE("What the 12 bits are") {
  //                        2^0   1.5 2^-1  -2^-14   2^-15   0   -0  denormal
  const auto weight = floats(torch::tensor({{0x3F80, 0x3F40, 0xB880, 0x3800, 0, 0x8000, 0x0001}}));
  const auto packed = lora::pack_lossless(weight.to(device()));
  const auto ints = [](const Tensor& tensor) { return tensor.cpu().to(torch::kInt); };
  CHECK(packed.codes.device() == device());
  CHECK(torch::equal(ints(packed.codes), torch::tensor({{0, 0x40, 0x80, 0, 0, 0x80, 1}}, torch::kInt)));
  CHECK(torch::equal(ints(packed.below), torch::tensor({{0x10, 0xFE, 0xFF, 0x0F}}, torch::kInt)));
  CHECK(torch::equal(ints(packed.largest), torch::tensor({127}, torch::kInt)));
  CHECK(torch::equal(ints(packed.far_places), torch::tensor({3}, torch::kInt)));
  CHECK(packed.far_numbers[0].item<double>() == std::pow(2, -15));

  const auto weights = lora::Quantization(lora::Lossless()).pack(weight.view({7, 1}).to(device()));
  CHECK(weights->scheme() == "bfloat16 without a loss");
  CHECK(weights->bits() == 12);
  CHECK(weights->sizes() == at::IntArrayRef({7, 1}));
  CHECK(weights->device() == device());
  CHECK(weights->nbytes() == 3 * 7);  // of rows of one number none is far from the largest
  CHECK(lora::LosslessWeight(packed).nbytes() == 7 + 4 + 1 + 8 + 2);
}

TEST_CASE("Of a trained weight's numbers few are in the list, whatever its shape and type") {
  torch::manual_seed(2);
  for (const auto& sizes :
       std::vector<std::vector<int64_t>>{{}, {1}, {5}, {3, 7}, {4, 3, 2, 5}, {40, 64}, {300, 999}}) {
    CAPTURE(sizes);
    const auto weight = torch::randn(sizes).to(torch::kBFloat16);
    const auto packed = lora::pack_lossless(weight.to(device()));
    CHECK(packed.codes.sizes() == weight.sizes());
    CHECK(packed.far_places.numel() <= 10 + weight.numel() / 1000);
    for (const auto type : {torch::kFloat, torch::kDouble})
      CHECK(torch::equal(lora::pack_lossless(weight.to(type)).codes, packed.codes.cpu()));
    CHECK(torch::equal(lora::dequantize(packed).cpu(), weight.to(torch::kFloat)));
    const auto moved = lora::LosslessWeight(lora::pack_lossless(weight)).to(device());
    CHECK(moved->device() == device());
    CHECK(torch::equal(moved->dense().cpu(), weight.to(torch::kFloat)));
  }
  const auto halves = torch::randint(-128, 128, {9, 20}).to(torch::kHalf) / 64;
  CHECK(torch::equal(lora::dequantize(lora::pack_lossless(halves)), halves.to(torch::kFloat)));
}

TEST_CASE("Every kernel has the numbers of bfloat16, and their products") {
  torch::manual_seed(3);
  const auto columns = GENERATE(1, 2, 15, 16, 17, 33, 64, 95, 97, 768);
  const int64_t rows = 30;
  const auto weight = some_rows(rows, columns);
  const auto packed = lora::pack_lossless(weight);
  CHECK((columns < 64 || packed.far_places.numel() > 10));
  const auto x = torch::randn({columns});
  const auto products = weight.to(torch::kDouble).mv(x.to(torch::kDouble));
  const auto most = weight.to(torch::kDouble).abs().mv(x.to(torch::kDouble).abs());
  for (const auto& kernels : lora::detail::runnable_codec_kernels()) {
    CAPTURE(kernels.name, columns);
    const lora::detail::LosslessReader reader(packed, kernels);
    for (const int64_t first : {int64_t{0}, int64_t{1}, rows * columns / 2, rows * columns - 1}) {
      for (const int64_t count : {int64_t{0}, int64_t{1}, int64_t{19}, int64_t{40}, rows * columns - first}) {
        if (first + count > rows * columns) continue;
        auto part = torch::full({count + 1}, 77.0F);
        reader.unpack(first, count, part.data_ptr<float>());
        CHECK(
            torch::equal(bits_of(part.slice(0, 0, count)), bits_of(weight.view({-1}).slice(0, first, first + count))));
        CHECK(part[count].item<float>() == 77);
      }
    }
    auto y = torch::full({rows - 2}, 77.0F);
    reader.dot_rows(2, rows - 3, x.data_ptr<float>(), y.data_ptr<float>());
    const auto errors = (y.slice(0, 0, -1) - products.slice(0, 2, rows - 1)).abs() / most.slice(0, 2, rows - 1);
    CHECK(errors.nan_to_num().max().item<double>() < 1e-5);
    CHECK(y[rows - 3].item<float>() == 77);
  }
}

TEST_CASE("What is not bfloat16 is refused") {
  struct Case {
    Tensor weight;
    const char* text;
  };
  auto other = torch::ones({4, 5}), with_nan = torch::ones({4, 5});
  other[2][3] = 0.1;
  other[3][0] = 1 + std::pow(2, -8);
  with_nan[2][3] = std::numeric_limits<float>::quiet_NaN();
  const auto cases = std::vector<Case>{
      {other,
       "lora::pack_lossless: 2 of the 20 numbers of the weight [4, 5] are not numbers of bfloat16, the first of them "
       "0.1 at [2, 3]; round them (weight.to(torch::kBFloat16)), or hold the weight in another way"},
      {torch::full({2}, 1 + std::pow(2, -40), torch::kDouble), "2 of the 2 numbers of the weight [2] are not numbers"},
      {torch::full({2, 1}, 1 + std::pow(2, -10), torch::kHalf),
       "2 of the 2 numbers of the weight [2, 1] are not numbers"},
      {with_nan, "1 of the 20 numbers of the weight [4, 5] are not finite in float, the first of them nan at [2, 3]"},
      {with_nan.to(torch::kBFloat16), "1 of the 20 numbers of the weight [4, 5] are not finite"},
      {torch::full({2}, -std::numeric_limits<double>::infinity(), torch::kDouble),
       "2 of the 2 numbers of the weight [2] are not finite"},
      {torch::full({2, 2}, 1e300, torch::kDouble), "4 of the 4 numbers of the weight [2, 2] are not finite in float"},
      {torch::ones({2}, torch::kInt),
       "has to be a dense tensor of Float, Double, Half or BFloat16 to be packed, but got Strided Int [2]"},
      {torch::empty({3, 0}), "the weight [3, 0] has no numbers"},
  };
  for (const auto& [weight, text] : cases)
    CHECK_THAT(error_of([&, weight = weight] { lora::Lossless().pack(weight.to(device())); }), contains(text));
}

TEST_CASE("Tensors that are no weight in 12 bits are refused") {
  torch::manual_seed(4);
  auto weight = torch::ones({3, 5});
  weight[0][1] = weight[2][4] = std::pow(2, -20);
  const auto good = lora::pack_lossless(weight.to(device()));
  struct Case {
    std::function<void(lora::LosslessTensor&)> change;
    const char* text;
  };
  using Packed = lora::LosslessTensor;
  const auto cases = std::vector<Case>{
      {[](Packed& bad) { bad.codes = Tensor(); }, "codes of a packed weight is undefined"},
      {[](Packed& bad) { bad.codes = bad.codes.to(torch::kInt); }, "codes of this packed weight has to be Byte of 15"},
      {[](Packed& bad) { bad.codes = bad.codes.slice(0, 0, 0); }, "codes of a packed weight are [0, 5], no numbers"},
      {[](Packed& bad) { bad.below = bad.below.slice(1, 0, 2).contiguous(); }, "below of this packed weight has to be"},
      {[](Packed& bad) { bad.below = bad.below.view({9}); }, "a row for each of 3, but is [9]"},
      {[](Packed& bad) { bad.largest = Tensor(); }, "largest of a packed weight is undefined"},
      {[](Packed& bad) { bad.far_places = Tensor(); }, "far_places of a packed weight is undefined"},
      {[](Packed& bad) { bad.far_numbers = bad.far_numbers.slice(0, 1).contiguous(); },
       "far_numbers of this packed weight has to be BFloat16 of 2 numbers"},
      {[](Packed& bad) {
         bad.largest = bad.largest.view({3, 1});
       },
       "have to have one dimension, but are [3, 1], [2]"},
      {[](Packed& bad) { bad.codes = bad.codes + 1; }, "have to have zeros at far_places"},
      {[](Packed& bad) { bad.far_places = bad.far_places.flip(0); }, "have to ascend and to be of its 15 numbers"},
      {[](Packed& bad) { bad.far_places = bad.far_places + 1; }, "have to ascend and to be of its 15 numbers"},
      {[](Packed& bad) { bad.far_places = bad.far_places - 2; }, "have to ascend and to be of its 15 numbers"},
  };
  for (const auto& [change, text] : cases) {
    auto bad = good;
    change(bad);
    CHECK_THAT(error_of([&] { lora::LosslessWeight whole(bad); }), contains(text));
    CHECK_THAT(error_of([&] { lora::dequantize(bad); }), contains(text));
  }
  if (!device().is_cpu()) return;
  float number = 0;
  const lora::LosslessWeight whole(good);
  CHECK_THAT(error_of([&] { whole.unpack(15, 1, &number); }), contains("there are 15 numbers, but 1 from 15 on"));
  CHECK_THAT(error_of([&] { whole.dot_rows(4, 0, &number, &number); }), contains("there are 3 rows"));
}
