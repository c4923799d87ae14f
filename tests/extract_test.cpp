// Adapters extracted from fine-tuned weights, and models written with an adapter merged in.
#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/extract.hpp>
#include <lora/peft/checkpoint.hpp>

namespace {

using lora::ExtractOptions;
using lora::LoRAConfig;
using testing::contains;

/// A layer of each kind that is seen as a matrix in a way of its own.
struct LayersImpl : torch::nn::Module {
  LayersImpl() {
    register_module("fc", torch::nn::Linear(6, 5));
    register_module("table", torch::nn::Embedding(7, 4));
    register_module("conv", torch::nn::Conv2d(torch::nn::Conv2dOptions(4, 6, 3).groups(2)));
    register_module("up", torch::nn::ConvTranspose1d(3, 4, 2));
    register_module("attention", torch::nn::MultiheadAttention(4, 2));
    register_module("lstm", torch::nn::LSTM(3, 4));
    register_module("qkv", torch::nn::Linear(4, 12));
    to(testing::device());
  }
};
TORCH_MODULE(Layers);

/// A linear layer with another one that differs from it by a matrix with the given singular values.
struct Pair {
  explicit Pair(const std::vector<double>& singular_values) {
    torch::NoGradGuard no_grad;
    torch::manual_seed(1);
    const auto basis = [](int64_t size) { return std::get<0>(torch::linalg_qr(torch::randn({size, size}))); };
    const auto rank = static_cast<int64_t>(singular_values.size());
    auto s = torch::tensor(singular_values, torch::kFloat);
    difference = basis(5).narrow(1, 0, rank).mul(s).mm(basis(6).narrow(0, 0, rank)).to(testing::device());
    base->push_back(torch::nn::Linear(6, 5));
    tuned->push_back(torch::nn::Linear(6, 5));
    base->to(testing::device());
    tuned->to(testing::device());
    for (auto name : {"0.weight", "0.bias"}) tuned->named_parameters()[name].copy_(base->named_parameters()[name]);
    tuned->named_parameters()["0.weight"].add_(difference);
  }
  LoRAConfig config(int64_t rank) const { return LoRAConfig(rank).alpha(6).target_modules({"0"}); }
  torch::nn::Sequential base, tuned;
  torch::Tensor difference;
};

double energy(const torch::Tensor& matrix) { return matrix.detach().cpu().square().sum().item<double>(); }

}  // namespace

TEST_CASE("A difference of the rank that is asked for is extracted whole, from every kind of layer") {
  struct Row {
    std::string layer, weight;
    int64_t rank;
    std::vector<lora::FusedProjection> fused;
    LoRAConfig config() const { return LoRAConfig(rank).alpha(7).target_modules({layer}).fused(fused); }
  };
  const std::vector<Row> rows{
      {"fc", "fc.weight", 3, {}},
      {"table", "table.weight", 2, {}},
      {"conv", "conv.weight", 4, {}},
      {"up", "up.weight", 2, {}},
      {"attention", "attention.in_proj_weight", 2, {}},
      {"lstm", "lstm.weight_hh_l0", 2, {}},
      {"qkv", "qkv.weight", 2, {{"qkv", {4, 4, 4}, {true, false, true}}}},
  };
  for (const auto& row : rows) {
    INFO(row.layer);
    torch::manual_seed(2);
    Layers tuned, base;
    {
      torch::NoGradGuard no_grad;
      for (auto& item : base->named_parameters()) item.value().copy_(tuned->named_parameters()[item.key()]);
    }
    auto first = lora::attach(*tuned, row.config());
    testing::randomize(first.parameters());
    first.merge_and_unload();
    const auto before = base->named_parameters()[row.weight].clone();

    lora::ExtractReport report;
    auto adapters = lora::extract(*base, *tuned, row.config(), {}, &report);
    CHECK(testing::distance(base->named_parameters()[row.weight], before) == 0);
    CHECK(report.left_out.empty());
    for (const auto& layer : report.layers) CHECK(layer.energy == testing::Approx(1));
    adapters.merge();
    for (const auto& item : tuned->named_parameters())
      CHECK(testing::distance(base->named_parameters()[item.key()], item.value()) < 1e-5);
  }
}

TEST_CASE("Less rank keeps the largest singular values, which is the best that rank can do") {
  for (int64_t rank : {1, 2, 3, 9}) {
    INFO(rank);
    Pair pair({3, 2, 1});
    lora::ExtractReport report;
    auto adapters = lora::extract(*pair.base, *pair.tuned, pair.config(rank), {}, &report);
    const double left = rank == 1 ? 5 : rank == 2 ? 1 : 0;
    CHECK(energy(adapters.delta("default", "0") - pair.difference) == testing::Approx(left).margin(1e-5));
    REQUIRE(report.layers.size() == 1);
    CHECK((report.layers[0].name == "0" && report.layers[0].rank == rank));
    CHECK(report.layers[0].energy == testing::Approx(1 - left / 14));
    CHECK(adapters.scaling("0") == testing::Approx(6.0 / static_cast<double>(rank)));
    CHECK(adapters.parameters().front().isfinite().all().item<bool>());
  }
}

TEST_CASE("A share of the energy chooses the rank of each layer, and files keep it") {
  struct Row {
    double share;
    int64_t rank;
  };
  for (const auto& row : std::vector<Row>{{0.6, 1}, {0.65, 2}, {0.92, 2}, {0.95, 3}, {1, 3}}) {
    INFO(row.share);
    Pair pair({3, 2, 1});  // shares 9/14, 13/14 and 1
    testing::TemporaryFolder folder;
    lora::ExtractReport report;
    const auto options = ExtractOptions().energy(row.share);
    auto adapters = lora::extract(*pair.base, *pair.tuned, pair.config(8).rank_stabilized(true), options, &report);
    CHECK(report.layers[0].rank >= row.rank);
    CHECK(report.layers[0].rank <= row.rank + (row.share == 1 ? 2 : 0));  // what is left of rounding counts, too
    CHECK(report.layers[0].energy >= row.share - 1e-6);
    CHECK(adapters.report().layers[0].rank == report.layers[0].rank);
    const auto delta = adapters.delta("default", "0");
    adapters.save(folder.path());
    adapters.detach();
    auto loaded = lora::load_adapter(*pair.base, folder.path());
    CHECK(testing::distance(loaded.delta("default", "0"), delta) == 0);
  }
  Pair same({});
  lora::ExtractReport report;
  auto adapters = lora::extract(*same.base, *same.tuned, same.config(8), ExtractOptions().energy(0.9), &report);
  CHECK((report.layers[0].rank == 1 && report.layers[0].energy == 1));
  CHECK(energy(adapters.delta("default", "0")) == 0);
}

TEST_CASE("Ranks that energy chooses come back from files, for parts of a module and for biases, too") {
  torch::manual_seed(3);
  for (const auto& config : {LoRAConfig(6).alpha(7).target_modules({"attention", "conv"}),
                             LoRAConfig(6).alpha(7).target_modules({"fc", "conv"}).lora_bias(true)}) {
    Layers tuned, base, other;
    {
      torch::NoGradGuard no_grad;
      for (const auto& item : base->named_parameters()) {
        for (auto& model : {tuned, other}) model->named_parameters()[item.key()].copy_(item.value());
      }
      for (auto& item : tuned->named_parameters()) item.value().add_(torch::randn_like(item.value()) * 0.2);
    }
    lora::ExtractReport report;
    auto adapters = lora::extract(*base, *tuned, config, ExtractOptions().energy(0.7), &report);
    testing::TemporaryFolder folder;
    adapters.save(folder.path());
    auto loaded = lora::load_adapter(*other, folder.path());
    for (const auto& layer : report.layers) {
      INFO(layer.name << " " << layer.rank);
      CHECK(layer.energy >= 0.7 - 1e-6);
      CHECK((layer.rank >= 2 && layer.rank < 6));  // not the one of the configuration
      CHECK(testing::distance(loaded.delta("default", layer.name), adapters.delta("default", layer.name)) == 0);
    }
    adapters.merge();
    loaded.merge();
    for (const auto& item : base->named_parameters())
      CHECK(testing::distance(other->named_parameters()[item.key()], item.value()) < 1e-6);
    if (config.lora_bias())
      CHECK(testing::distance(base->named_parameters()["fc.bias"], tuned->named_parameters()["fc.bias"]) < 1e-5);
  }
}

TEST_CASE("Of a fine-tuned model whose head is tied to its embedding the head is what it computes with") {
  testing::Tied base, tuned;
  lora::ExtractReport report;
  auto adapters = lora::extract(*base, *tuned, LoRAConfig(4).target_modules({"head"}), {}, &report);
  CHECK(testing::distance(adapters.delta("default", "head"), tuned->tokens->weight - base->tokens->weight) < 1e-5);
  CHECK(report.left_out == std::vector<std::string>{"tokens.weight"});
}

TEST_CASE("What an adapter cannot hold is named, or taken over in full") {
  Pair pair({2, 1});
  testing::randomize({pair.tuned->named_parameters()["0.bias"]});
  lora::ExtractReport report;
  auto adapters = lora::extract(*pair.base, *pair.tuned, pair.config(2), {}, &report);
  CHECK(report.left_out == std::vector<std::string>{"0.bias"});
  adapters.detach();
  for (const auto& config : {pair.config(2).bias(lora::Bias::kAll), pair.config(2).lora_bias(true)}) {
    adapters = lora::extract(*pair.base, *pair.tuned, config, {}, &report);
    CHECK(report.left_out.empty());
    auto x = torch::randn({2, 6}, testing::device());
    {
      auto active = adapters.activate();
      CHECK(testing::distance(pair.base->forward(x), pair.tuned->forward(x)) < 1e-5);
    }
    adapters.detach();
  }
}

TEST_CASE("A change of parts that are not adapted is missing in the energy, and named") {
  torch::manual_seed(4);
  torch::nn::Sequential base(torch::nn::Linear(4, 6)), tuned(torch::nn::Linear(4, 6));
  base->to(testing::device());
  tuned->to(testing::device());
  const auto config = LoRAConfig(2).target_modules({"0"}).fused({{"0", {2, 2, 2}, {true, false, true}}});
  lora::ExtractReport report;
  auto adapters = lora::extract(*base, *tuned, config, {}, &report);
  const auto difference = tuned->named_parameters()["0.weight"] - base->named_parameters()["0.weight"];
  const auto share = 1 - energy(difference.narrow(0, 2, 2)) / energy(difference);
  CHECK(report.layers[0].energy == testing::Approx(share).epsilon(1e-4));
  CHECK(report.left_out == std::vector<std::string>{"0.weight", "0.bias"});
}

TEST_CASE("What cannot be extracted is an error that says why, and leaves the model alone") {
  using Tensors = std::map<std::string, torch::Tensor>;
  struct Row {
    std::function<void(Tensors&)> damage;
    LoRAConfig config;
    ExtractOptions options;
    std::string error;
  };
  Pair pair({2, 1});
  const auto nothing = [](Tensors&) {};
  const std::vector<Row> rows{
      {[](Tensors& t) {
         t["0.wight"] = t["0.weight"];
         t.erase("0.weight");
       },
       pair.config(2),
       {},
       "the fine-tuned model has no \"0.weight\"; did you mean \"0.wight\"? It has 2 tensors"},
      {[](Tensors& t) {
         t["0.weight"] = torch::ones({5, 7});
       },
       pair.config(2),
       {},
       "\"0.weight\" is [5, 6] in the model, but [5, 7] in the fine-tuned one"},
      {[](Tensors& t) { t["0.weight"] = t["0.weight"] / 0; }, pair.config(2), {}, "\"0.weight\" is not finite"},
      {[](Tensors& t) { t["0.bias"] = t["0.bias"] / 0; },
       pair.config(2).bias(lora::Bias::kAll),
       {},
       "\"0.bias\" is not finite"},
      {nothing, pair.config(2).alpha(0), {}, "alpha is 0"},
      {nothing, pair.config(2).method(lora::DoRA()), {}, "extracted as LowRank, not as DoRA"},
      {nothing, pair.config(2), ExtractOptions().energy(0), "energy has to be in (0, 1], but got 0"},
      {nothing, pair.config(2), ExtractOptions().energy(1.5), "energy has to be in (0, 1], but got 1.5"},
      {nothing, LoRAConfig(2).target_modules({"one"}), {}, "\"one\""},
  };
  for (const auto& row : rows) {
    INFO(row.error);
    Tensors tensors;
    for (const auto& item : pair.tuned->named_parameters()) tensors[item.key()] = item.value().detach().clone();
    row.damage(tensors);
    CHECK_THAT(testing::error_of([&] { lora::extract(*pair.base, tensors, row.config, row.options); }),
               contains(row.error));
    for (const auto& parameter : pair.base->parameters()) CHECK(parameter.requires_grad());
  }
}

TEST_CASE("A model is written with an adapter merged in and stays as it was") {
  for (auto type : {torch::kFloat, torch::kBFloat16}) {
    INFO(type);
    testing::TemporaryFolder folder;
    testing::Stack model;
    model->to(type);
    auto adapters = lora::attach(*model, LoRAConfig(2).alpha(6).target_modules({"q_proj", "lm_head"}));
    adapters.add("other", LoRAConfig(3).target_modules({"v_proj"}));
    testing::randomize(adapters.parameters());
    std::map<std::string, torch::Tensor> before;
    for (const auto& item : model->named_parameters()) before[item.key()] = item.value().clone();
    CHECK_THROWS_WITH(adapters.save_merged(folder / "m"), contains("name the adapter that is meant"));
    CHECK_THROWS_AS(adapters.save_merged(folder / "missing" / "m", "other"), lora::CheckpointError);
    adapters.save_merged(folder / "default", "default");
    adapters.save_merged(folder / "other", "other");
    CHECK_FALSE(adapters.is_merged());
    for (const auto& item : model->named_parameters()) CHECK(item.value().equal(before[item.key()]));

    for (auto name : {"default", "other"}) {
      adapters.merge(name);
      adapters.save_merged(folder / "again", name);
      CHECK(adapters.is_merged());
      auto written = lora::read_safetensors(folder / name), again = lora::read_safetensors(folder / "again");
      CHECK(written.size() == model->named_parameters().size());
      for (const auto& item : model->named_parameters()) {
        CHECK(testing::distance(written.at(item.key()), item.value()) == 0);
        CHECK(testing::distance(again.at(item.key()), item.value()) == 0);
      }
      const auto adapted = std::string("layers.0.") + (name == std::string("other") ? "v_proj" : "q_proj") + ".weight";
      CHECK(testing::distance(written.at(adapted), before[adapted]) > 0.01);
      adapters.unmerge();
    }
  }
}
