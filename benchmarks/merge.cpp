// How long does it take to merge adapters into a model, to take them out again, and to go over to others? A model with
// the 60 query and value projections of SmolLM2-135M (576 -> 576 and 192), rank 8; what the weights were is kept.
// Printed are the medians, and whether the weights are the same tensors all the time and have the same bits afterwards.
//
//   merge [ROUNDS]      100
#include <torch/torch.h>

#include <lora/lora.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <vector>

#include "timing.hpp"

namespace {

struct ProjectionsImpl : torch::nn::Module {
  ProjectionsImpl() {
    for (int i = 0; i < 30; ++i) {
      auto block = register_module(fmt::format("layers_{}", i), std::make_shared<torch::nn::Module>());
      block->register_module("q_proj", torch::nn::Linear(torch::nn::LinearOptions(576, 576).bias(false)));
      block->register_module("v_proj", torch::nn::Linear(torch::nn::LinearOptions(576, 192).bias(false)));
    }
  }
};
TORCH_MODULE(Projections);

std::vector<void*> addresses(const torch::nn::Module& model) {
  std::vector<void*> found;
  for (const auto& parameter : model.parameters()) found.push_back(parameter.data_ptr());
  return found;
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::stoi(arguments[1]) : 100;
  torch::manual_seed(0);
  Projections model;
  lora::Adapters adapters(*model);
  for (const auto* name : {"one", "other"}) {
    adapters.add(name, lora::LoRAConfig(8).alpha(16).target_modules({"q_proj", "v_proj"}));
    for (auto& tensor : adapters.parameters(name)) tensor.detach().normal_(0, 0.02);
  }
  std::vector<torch::Tensor> before;
  for (const auto& parameter : model->parameters()) before.push_back(parameter.detach().clone());
  const auto memory = addresses(*model);

  std::vector<double> merging, unmerging, switching;
  bool is_same = true, is_changed = true;
  for (int round = -3; round < rounds; ++round) {
    const auto merge = milliseconds([&] { adapters.merge("one"); });
    is_changed = is_changed && !torch::equal(model->parameters().front(), before.front());
    const auto to_other = milliseconds([&] {
      adapters.unmerge();
      adapters.merge("other");
    });
    is_same = is_same && addresses(*model) == memory;
    const auto unmerge = milliseconds([&] { adapters.unmerge(); });
    if (round < 0) continue;
    merging.push_back(merge);
    switching.push_back(to_other);
    unmerging.push_back(unmerge);
  }
  const auto after = model->parameters();
  const bool has_same_bits = std::equal(before.begin(), before.end(), after.begin(), torch::equal);
  fmt::print("merge 60 layers    {:.2f} ms\nunmerge            {:.2f} ms\nmerge another one  {:.2f} ms\n",
             median(merging), median(unmerging), median(switching));
  fmt::print("threads: {}; the same tensors: {}; changed while merged: {}; the same bits afterwards: {}\n",
             torch::get_num_threads(), is_same, is_changed, has_same_bits);
  return is_same && is_changed && has_same_bits ? 0 : 1;
}
