// Adapters that start from changed weights become plain ones. That PEFT and this library compute the same with them is
// in convert_live.py.
#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/peft/convert.hpp>

#include <fstream>

namespace {

using testing::contains;
using Json = nlohmann::ordered_json;

Json read(const std::filesystem::path& path) { return Json::parse(std::ifstream(path)); }
void write(const std::filesystem::path& path, const Json& json) { std::ofstream(path) << json; }

constexpr const char* kConfig = "adapter_config.json";
constexpr const char* kTensors = "adapter_model.safetensors";

/// Two adapters with random values, as if one came from the other by training, in the folders start and trained. Their
/// configurations say that training began with PiSSA.
class Folders {
 public:
  explicit Folders(bool rank_stabilized = false) {
    auto config = lora::LoRAConfig(2).alpha(6).rank_stabilized(rank_stabilized).target_modules({"0", "1"});
    config.rank_pattern({{"1", 3}}).alpha_pattern({{"1", 4.5}});
    for (auto name : {"start", "trained"}) {
      auto adapters = lora::attach(*model, config);
      testing::randomize(adapters.parameters(), 0.5);
      for (auto layer : {"0", "1"}) deltas[name].push_back(adapters.delta("default", layer).detach());
      adapters.save(folder / name);
      adapters.detach();
      change(name, [](Json& json) { json["init_lora_weights"] = "pissa"; });
    }
  }
  void change(const std::string& name, const std::function<void(Json&)>& edit) const {
    auto json = read(folder / name / kConfig);
    edit(json);
    write(folder / name / kConfig, json);
  }
  /// Changes the tensors of one of the two.
  void replace(const std::string& name, const std::string& key, const torch::Tensor& tensor) const {
    std::map<std::string, torch::Tensor> tensors;
    for (const auto& [name, stored] : lora::read_safetensors(folder / name / kTensors)) tensors[name] = stored.clone();
    if (tensor.defined()) {
      tensors[key] = tensor;
    } else {
      tensors.erase(key);
    }
    lora::write_safetensors(folder / name / kTensors, tensors);
  }

  testing::TemporaryFolder folder;
  torch::nn::Sequential model{torch::nn::Linear(4, 6), torch::nn::Linear(6, 5)};
  std::map<std::string, std::vector<torch::Tensor>> deltas;
};

}  // namespace

TEST_CASE("The start is taken away: twice the rank, the same scaling, for weights that nobody changed") {
  for (bool rank_stabilized : {false, true}) {
    for (std::string output : {"plain", "trained"}) {
      INFO(output << rank_stabilized);
      Folders folders(rank_stabilized);
      CHECK_THROWS_WITH(lora::load_adapter(*folders.model, folders.folder / "trained"), contains("subtract_start"));
      const auto scaling = [&](double alpha, double rank) {
        return alpha / (rank_stabilized ? std::sqrt(rank) : rank);
      };
      lora::subtract_start(folders.folder / "trained", folders.folder / "start", folders.folder / output);
      auto adapters = lora::load_adapter(*folders.model, folders.folder / output);
      CHECK(adapters.scaling("0") == testing::Approx(scaling(6, 2)));
      CHECK(adapters.scaling("1") == testing::Approx(scaling(4.5, 3)));
      CHECK(adapters.report().layers[0].rank == 4);
      CHECK(adapters.report().layers[1].rank == 6);
      for (size_t i : {0, 1}) {
        const auto expected = folders.deltas["trained"][i] - folders.deltas["start"][i];
        CHECK(testing::distance(adapters.delta("default", std::to_string(i)), expected) < 1e-5);
      }
    }
  }
}

TEST_CASE("A changed weight that lies beside the adapter is left out, and other tensors are kept") {
  const Folders folders;
  const std::string module = "base_model.model.";
  for (auto name : {"start", "trained"}) {
    folders.replace(name, module + "1.base_layer.weight", torch::ones({5, 6}));
    folders.replace(name, module + "head.bias", torch::ones({3}));
    folders.change(name, [](Json& json) { json["use_dora"] = nullptr; });
  }
  lora::subtract_start(folders.folder / "trained", folders.folder / "start", folders.folder / "plain");
  const auto tensors = lora::read_safetensors(folders.folder / "plain" / kTensors);
  CHECK(tensors.size() == 5);
  CHECK(tensors.count(module + "1.base_layer.weight") == 0);
  CHECK(tensors.at(module + "head.bias").equal(torch::ones({3})));
}

TEST_CASE("Two adapters that do not belong together are not converted, and nothing is written") {
  struct Row {
    std::function<void(const Folders&)> damage;
    std::string error;
  };
  const std::string layer = "base_model.model.0.";
  const std::vector<Row> rows{
      {[](auto& f) { f.change("start", [](Json& json) { json["r"] = 3; }); }, "r is 2, but 3 at the start"},
      {[](auto& f) { f.change("trained", [](Json& json) { json["lora_alpha"] = 8.5; }); },
       "lora_alpha is 8.5, but 6 at the start"},
      {[](auto& f) { f.change("trained", [](Json& json) { json.erase("rank_pattern"); }); }, "rank_pattern is {}, but"},
      {[](auto& f) { f.change("trained", [](Json& json) { json["use_dora"] = true; }); }, "use_dora is true"},
      {[](auto& f) {
         for (auto name : {"start", "trained"}) f.change(name, [](Json& json) { json["r"] = "two"; });
       },
       "has \"two\" where a number has to be"},
      {[](auto& f) {
         for (auto name : {"start", "trained"}) f.change(name, [](Json& json) { json["peft_type"] = "LOHA"; });
       },
       "peft_type is \"LOHA\", not \"LORA\""},
      {[](auto& f) { f.change("trained", [](Json& json) { json["init_lora_weights"] = "loftq"; }); },
       "init_lora_weights is \"loftq\""},
      {[](auto& f) { write(f.folder / "trained" / kConfig, Json::array()); }, "has to hold an object"},
      {[](auto& f) { std::filesystem::remove(f.folder / "start" / kTensors); }, kTensors},
      {[&](auto& f) { f.replace("start", layer + "lora_A.weight", {}); }, "lacks \"base_model.model.0.lora_A.weight\""},
      {[&](auto& f) { f.replace("trained", layer + "lora_B.weight", {}); },
       "lacks \"base_model.model.0.lora_B.weight\""},
      {[&](auto& f) {
         f.replace("trained", layer + "lora_A.weight", {});
         f.replace("trained", layer + "lora_B.weight", {});
       },
       "holds \"base_model.model.0.lora_A.weight\", which was not trained"},
      {[&](auto& f) {
         f.replace("trained", layer + "lora_B.weight", torch::ones({6, 1}));
       },
       "\"base_model.model.0.lora_A.weight\" is [2, 4] and \"base_model.model.0.lora_B.weight\" [6, 1], which are not"},
      {[](auto& f) { f.change("trained", [](Json& json) { json["target_parameters"] = {"0.weight"}; }); },
       "target_parameters is [\"0.weight\"]; only adapters of layers"},
      {[&](auto& f) {
         f.replace("start", layer + "lora_B.weight", torch::ones({6, 3}));
       },
       "is [6, 3] at the start and [6, 2] after training"},
      {[&](auto& f) { f.replace("trained", layer + "lora_magnitude_vector", torch::ones({6})); },
       "which no plain LoRA has"},
  };
  for (const auto& row : rows) {
    INFO(row.error);
    const Folders folders;
    row.damage(folders);
    const auto call = [&] {
      lora::subtract_start(folders.folder / "trained", folders.folder / "start", folders.folder / "plain");
    };
    CHECK_THROWS_AS(call(), lora::CheckpointError);
    CHECK_THAT(testing::error_of(call), contains(row.error));
    CHECK_FALSE(std::filesystem::exists(folders.folder / "plain"));
  }
}
