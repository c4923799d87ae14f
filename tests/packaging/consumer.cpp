// A whole program that uses lora; the projects beside it build it, each in its own way.
#include <lora/modules/linear.hpp>
#include <lora/version.hpp>

#include <cstdio>

int main() {
  torch::nn::Linear base(2, 1);
  lora::LoRALinear layer(base, lora::LoRAOptions(/*rank=*/1).alpha(3));
  torch::NoGradGuard no_grad;
  layer->weight.copy_(torch::tensor({{1.0, 2.0}}));
  layer->bias.fill_(1);
  layer->lora_A().copy_(torch::tensor({{1.0, 0.5}}));
  layer->lora_B().fill_(2);
  // W x + b + alpha B A x = 11 + 1 + 3 * 2 * 5
  const auto y = layer->forward(torch::tensor({3.0, 4.0})).item<float>();
  std::printf("lora %d.%d.%d: y = %g\n", LORA_VERSION_MAJOR, LORA_VERSION_MINOR, LORA_VERSION_PATCH, y);
}
