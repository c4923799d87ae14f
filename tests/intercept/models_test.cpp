// Models that use a weight in more than one way, or in another one than their layer's: what is trained in the scope is
// what is merged.
#include "support/models.hpp"

#include <lora/attach.hpp>

#include <cmath>
#include <functional>
#include <utility>

namespace {

using torch::Tensor;
namespace nn = torch::nn;

/// Tokens and positions as GPT-2 has them, with every use of the tables that models have.
struct NetImpl : nn::Module {
  NetImpl() { to(testing::device(), torch::kDouble); }

  nn::Embedding wte = register_module("wte", nn::Embedding(11, 6)), wpe = register_module("wpe", nn::Embedding(8, 6));
  nn::Linear fc = register_module("fc", nn::Linear(6, 6)), gate = register_module("gate", nn::Linear(6, 6));
};
TORCH_MODULE(Net);

using Forward = std::function<Tensor(NetImpl&, const Tensor& ids)>;

struct Row {
  const char* name;
  Forward logits;  // (batch, positions, 11)
  lora::LoRAConfig config;
};

lora::LoRAConfig adapting(std::vector<std::string> targets, std::vector<std::string> saved = {}) {
  return lora::LoRAConfig(2).alpha(5).target_modules(std::move(targets)).modules_to_save(std::move(saved));
}

Tensor positions(const Tensor& ids) { return torch::arange(ids.size(1), ids.options()); }
Tensor head(NetImpl& net, const Tensor& hidden) { return hidden.matmul(net.wte->weight.t()); }

const std::vector<Row>& rows() {
  static const Forward tied = [](NetImpl& net, const Tensor& ids) { return head(net, net.fc(net.wte(ids))); };
  static const auto with_positions = [](Tensor (*look_up)(const Tensor& table, const Tensor& ids)) {
    return [look_up](NetImpl& net, const Tensor& ids) {
      return head(net, net.fc(net.wte(ids) + look_up(net.wpe->weight, ids)));
    };
  };
  static const std::vector<Row> all{
      {"a head tied by function", tied, adapting({"wte"})},
      {"a head tied by function, and a layer", tied, adapting({"wte", "fc"})},
      {"a head tied by function, trained in full", tied, adapting({"fc"}, {"wte"})},
      {"a table narrowed", with_positions([](const Tensor& t, const Tensor& i) { return t.narrow(0, 0, i.size(1)); }),
       adapting({"fc"}, {"wpe"})},
      {"a table narrowed, adapted",
       with_positions([](const Tensor& t, const Tensor& i) { return t.narrow(0, 0, i.size(1)); }), adapting({"wpe"})},
      {"a table selected from",
       with_positions([](const Tensor& t, const Tensor& i) { return t.index_select(0, positions(i)); }),
       adapting({"fc"}, {"wpe"})},
      {"a table indexed", with_positions([](const Tensor& t, const Tensor& i) { return t.index({positions(i)}); }),
       adapting({"fc"}, {"wpe"})},
      {"a table indexed, adapted",
       with_positions([](const Tensor& t, const Tensor& i) { return t.index({positions(i)}); }), adapting({"wpe"})},
      {"another path in evaluation",
       [](NetImpl& net, const Tensor& ids) {
         const auto x = net.wte(ids);
         if (net.is_training()) return head(net, net.fc(x) * net.gate(x));
         const auto fused = torch::cat({net.fc->weight, net.gate->weight});
         const auto both = torch::linear(x, fused, torch::cat({net.fc->bias, net.gate->bias})).chunk(2, -1);
         return head(net, both[0] * both[1]);
       },
       adapting({"fc", "gate"})},
  };
  return all;
}

}  // namespace

TEST_CASE("Whatever a model does with its weights, what is trained is what evaluates and what is merged") {
  const auto index = GENERATE(range(size_t{0}, rows().size()));
  const auto& row = rows()[index];
  CAPTURE(row.name);
  Net net;
  const auto ids = torch::randint(11, {4, 7}, testing::on_device(torch::kLong));
  const auto loss = [&](bool training) {
    net->train(training);
    return nn::functional::cross_entropy(row.logits(*net, ids).flatten(0, 1), ids.roll(1, 1).flatten());
  };
  const auto before = loss(false).item<double>();
  auto adapters = lora::attach(*net, row.config);
  torch::optim::AdamW optimizer(adapters.parameters(), 0.05);
  for (int step = 0; step < 30; ++step) {
    auto active = adapters.activate();
    optimizer.zero_grad();
    loss(true).backward();
    for (const auto& item : adapters.named_parameters()) CHECK(item.value().grad().defined());
    optimizer.step();
  }
  CHECK(loss(false).item<double>() == before);
  const auto trained = [&] {
    auto active = adapters.activate();
    return std::pair(loss(true).item<double>(), loss(false).item<double>());
  }();
  CHECK(trained.first < 0.9 * before);
  CHECK(std::abs(trained.first - trained.second) < 1e-12);
  CHECK(adapters.unreached().empty());
  adapters.merge();
  CHECK(std::abs(loss(false).item<double>() - trained.first) < 1e-12);
  adapters.unmerge();
  CHECK(loss(false).item<double>() == before);
}
