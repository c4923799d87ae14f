#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/modules/conv.hpp>

using lora::LoRAOptions;

namespace {

template <size_t D>
struct Case {
  const char* name;
  torch::nn::ConvOptions<D> options;
};

/// Every option of the frozen layer against the stock layer with W + s B A in it, and everything that can be done.
template <size_t D>
void check(const Case<D>& c) {
  CAPTURE(D, c.name);
  torch::manual_seed(0);
  torch::nn::ModuleHolder<lora::detail::StockConv<D>> base(c.options);
  base->to(testing::device(), torch::kDouble);
  lora::LoRAConvImpl<D> layer(base, LoRAOptions(4).alpha(6));
  auto x =
      torch::randn(std::vector<int64_t>{2, 4, 5, 6, 5}, torch::TensorOptions(torch::kDouble).device(testing::device()));
  x = D == 1 ? x.select(4, 0).select(3, 0) : D == 2 ? x.select(4, 0) : x;
  CHECK(layer.weight.is_same(base->weight));
  CHECK(testing::distance(layer.forward(x), base->forward(x)) < 1e-12);

  testing::randomize({layer.lora_A(), layer.lora_B()}, 0.5);
  CHECK(testing::gradient_error([&] { return layer.forward(x).sin().sum(); }, {layer.lora_A(), layer.lora_B()}) < 1e-6);
  auto adapted = layer.forward(x);
  auto groups = c.options.groups(), out = c.options.out_channels();
  auto a = layer.lora_A().view({groups, 4 / groups, -1}), b = layer.lora_B().view({groups, out / groups, -1});
  auto delta = (1.5 * b.matmul(a)).reshape(layer.weight.sizes()).detach();
  auto pristine = base->weight.clone();
  base->weight.add_(delta);
  CHECK(testing::distance(base->forward(x), adapted) < 1e-12);
  base->weight.copy_(pristine);

  layer.merge();
  CHECK(testing::distance(layer.forward(x), adapted) < 1e-12);
  layer.unmerge();
  CHECK(torch::equal(layer.weight, pristine));
  auto copy = std::dynamic_pointer_cast<lora::LoRAConvImpl<D>>(layer.clone());
  CHECK(testing::distance(copy->forward(x), adapted) < 1e-12);
  CHECK(lora::trainable_parameters(*copy).size() == 2);
}

using Conv1d = torch::nn::Conv1dOptions;
using Conv2d = torch::nn::Conv2dOptions;
using Conv3d = torch::nn::Conv3dOptions;

}  // namespace

TEST_CASE("Convolutions of every dimension and option: W + s B A, gradients, merging, copies") {
  for (const auto& c :
       std::vector<Case<1>>{{"plain", Conv1d(4, 6, 3)},
                            {"stride, reflected", Conv1d(4, 6, 3).stride(2).padding(2).padding_mode(torch::kReflect)}})
    check<1>(c);
  for (const auto& c : std::vector<Case<2>>{
           {"uneven, dilated, grouped", Conv2d(4, 6, {2, 3}).stride({1, 2}).dilation({2, 1}).groups(2)},
           {"depthwise without bias", Conv2d(4, 8, 3).groups(4).bias(false)},
           {"same size", Conv2d(4, 6, 3).padding(torch::kSame)},
           {"no padding, said so", Conv2d(4, 6, 3).padding(torch::kValid)},
           {"circular", Conv2d(4, 6, 3).padding(1).padding_mode(torch::kCircular)},
           {"replicated, same size", Conv2d(4, 6, 3).padding(torch::kSame).padding_mode(torch::kReplicate)}})
    check<2>(c);
  check<3>({"grouped", Conv3d(4, 2, 2).padding(1).groups(2)});
}

TEST_CASE("Dropout of a convolution acts on the input of the update alone") {
  torch::manual_seed(0);
  lora::LoRAConv2d<> layer(Conv2d(2, 3, 3).padding(1), LoRAOptions(2).alpha(6).dropout(0.5));
  layer->to(testing::device());
  testing::randomize({layer->lora_B()});
  auto x = torch::randn({2, 2, 5, 5}, testing::device());
  torch::manual_seed(4);
  auto adapted = layer->forward(x);
  torch::manual_seed(4);
  auto dropped = lora::detail::dropout(x, 0.5);
  auto delta = (3 * layer->lora_B().mm(layer->lora_A())).view({3, 2, 3, 3});
  auto expected = torch::conv2d(x, layer->weight, layer->bias, 1, 1) + torch::conv2d(dropped, delta, {}, 1, 1);
  CHECK(testing::distance(adapted, expected) < 1e-5);
}

TEST_CASE("A convolution says what it is and what it needed") {
  lora::LoRAConv2d layer(Conv2d(4, 6, 3).groups(2), LoRAOptions(4).alpha(6));
  CHECK(c10::str(layer) ==
        "lora::LoRAConv2d<LowRank>(in_channels=4, out_channels=6, kernel_size=[3, 3], groups=2, rank=4, alpha=6)");
  CHECK(layer->lora_A().sizes() == torch::IntArrayRef({2, 2, 18}));
  CHECK_THROWS_WITH(lora::LoRAConv1d<>(Conv1d(4, 6, 3).groups(2), LoRAOptions(3)),
                    testing::contains("lora::LoRAConv1d: the rank is divided among the groups") &&
                        testing::contains("rank is 3 and groups 2"));
  CHECK_THROWS_WITH(lora::LoRAConv1d<>(Conv1d(4, 6, 3), LoRAOptions(0)),
                    testing::contains("rank has to be at least 1"));
  layer->merge();
  CHECK_THROWS_WITH(layer->merge(), testing::contains("this LoRAConv2d is merged already"));
}
