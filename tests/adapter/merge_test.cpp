#include "support/models.hpp"

#include <lora/attach.hpp>

#include <limits>

using lora::LoRAConfig;

namespace {

/// A model with an adapter on six layers, alpha / rank = 3, all tensors filled.
struct Fixture {
  explicit Fixture(torch::ScalarType type = torch::kFloat) {
    torch::manual_seed(0);
    model->to(type);
    adapters = std::make_unique<lora::Adapters>(
        lora::attach(*model, LoRAConfig(2).alpha(6).target_modules({"q_proj", "v_proj"})));
    testing::randomize(adapters->parameters());
    for (const auto& parameter : model->parameters()) before.push_back(parameter.clone());
    x = torch::randn({2, 3, 8}, testing::on_device(type));
  }

  torch::Tensor adapted() {
    auto active = adapters->activate();
    return model->forward(x).detach();
  }

  bool is_pristine() {
    auto now = model->parameters();
    for (size_t i = 0; i < now.size(); ++i) {
      if (!torch::equal(now[i], before[i])) return false;
    }
    return true;
  }

  testing::Stack model;
  std::unique_ptr<lora::Adapters> adapters;
  std::vector<torch::Tensor> before;
  torch::Tensor x;
};

}  // namespace

TEST_CASE("A merged model gives the adapted outputs without a scope, and with one too") {
  Fixture f;
  auto adapted = f.adapted();
  f.adapters->merge();
  CHECK(testing::distance(f.model->forward(f.x), adapted) < 1e-5);
  CHECK(testing::distance(f.adapted(), adapted) < 1e-5);  // what is merged is not added again
  f.adapters->unmerge();
  CHECK(f.is_pristine());
  CHECK(torch::equal(f.adapted(), adapted));
}

TEST_CASE("A thousand merges leave no trace in bfloat16") {
  Fixture f(torch::kBFloat16);
  for (int cycle = 0; cycle < 1000; ++cycle) {
    lora::MergeGuard merged(*f.adapters);
    if (cycle == 0) CHECK_FALSE(f.is_pristine());
  }
  CHECK(f.is_pristine());
}

TEST_CASE("An update that is not finite is refused before any weight changes") {
  Fixture f;
  const auto [value, for_good] = GENERATE(table<double, bool>({
      {std::numeric_limits<double>::quiet_NaN(), false},
      {std::numeric_limits<double>::infinity(), false},
      {std::numeric_limits<double>::quiet_NaN(), true},
  }));
  f.adapters->named_parameters()["layers.2.v_proj.lora_B"].detach()[0][0] = value;  // the last layer
  auto error =
      testing::error_of([&, for_good = for_good] { for_good ? f.adapters->merge_and_unload() : f.adapters->merge(); });
  CHECK_THAT(error, testing::contains("layers.2.v_proj") && testing::contains("adapter \"default\" is not finite") &&
                        testing::contains("nothing was merged"));
  CHECK_FALSE(f.adapters->is_merged());
  CHECK(f.is_pristine());
  CHECK(f.adapters->parameters().size() == 12);
}

TEST_CASE("A merged weight that does not fit into half precision is refused") {
  Fixture f(torch::kHalf);
  f.adapters->named_parameters()["layers.0.q_proj.lora_B"].detach().fill_(1e6);
  CHECK_THAT(testing::error_of([&] { f.adapters->merge(); }),
             testing::contains("layers.0.q_proj") && testing::contains("does not fit into its type"));
  CHECK(f.is_pristine());
}

TEST_CASE("Merging for good leaves a plain model: its tensors, its flags, its file") {
  Fixture f;
  const bool merged_before = GENERATE(false, true);
  testing::TemporaryFolder folder;
  auto adapted = f.adapted();
  if (merged_before) f.adapters->merge();
  f.adapters->merge_and_unload();
  CHECK(f.adapters->names().empty());
  CHECK(testing::distance(f.model->forward(f.x), adapted) < 1e-5);
  for (const auto& parameter : f.model->parameters()) CHECK(parameter.requires_grad());
  torch::save(f.model, (folder / "merged.pt").string());
  testing::Stack plain;
  torch::load(plain, (folder / "merged.pt").string());
  CHECK(torch::equal(plain->forward(f.x), f.model->forward(f.x)));
}

TEST_CASE("What is merged cannot be merged again, and of two adapters the last is unmerged first") {
  Fixture f;
  f.adapters->merge();
  CHECK_THROWS_WITH(f.adapters->merge(), testing::contains("\"default\" is merged already"));
  CHECK_THROWS_WITH(lora::MergeGuard(*f.adapters), testing::contains("merged already"));
  lora::Adapters second(*f.model);
  second.add("second", LoRAConfig(2).target_modules({"q_proj"}));
  testing::randomize(second.parameters());
  second.merge();
  CHECK_THROWS_WITH(f.adapters->unmerge(),
                    testing::contains("layers.0.q_proj was replaced or written after it was merged"));
  second.unmerge();
  f.adapters->unmerge();
  CHECK(f.is_pristine());
}

TEST_CASE("A model moved while it is merged unmerges to its old values in the new type") {
  Fixture f;
  f.adapters->merge();
  f.model->to(torch::kDouble);
  f.adapters->unmerge();
  for (auto& value : f.before) value = value.to(torch::kDouble);
  CHECK(f.is_pristine());
}
