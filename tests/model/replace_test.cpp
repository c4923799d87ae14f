// Models that are written with layers of the library, or get them by replacing entries of containers.
#include "support/models.hpp"

#include <lora/lora.hpp>

namespace {

using lora::LoRAOptions;

/// One layer of every kind, with ranks of their own.
struct WrittenImpl : torch::nn::Module {
  WrittenImpl() {
    register_module("tokens", tokens);
    register_module("conv", conv);
    register_module("attention", attention);
    register_module("head", head);
    register_module("norm", norm);
    to(testing::device());
  }
  torch::Tensor forward(const torch::Tensor& ids) {  // (batch, length)
    auto x = conv(tokens(ids).transpose(1, 2)).transpose(1, 2);
    return head(norm(attention->forward(x)));
  }

  lora::LoRAEmbedding<> tokens{lora::LoRAEmbeddingOptions(torch::nn::EmbeddingOptions(9, 8), LoRAOptions(3).alpha(6))};
  lora::LoRAConv1d<> conv{torch::nn::Conv1dOptions(8, 8, 3).padding(1).groups(2), LoRAOptions(4).alpha(6)};
  lora::LoRAAttention<> attention{lora::LoRAAttentionOptions(8, 2, LoRAOptions(2).alpha(6))};
  lora::LoRALinear<> head{lora::LoRALinearOptions(8, 5, LoRAOptions(2).alpha(6))};
  torch::nn::LayerNorm norm{torch::nn::LayerNormOptions({8})};
};
TORCH_MODULE(Written);

Written make_written() {
  torch::manual_seed(0);
  Written model;
  testing::randomize(lora::trainable_parameters(*model->tokens));
  for (const auto& item : model->named_parameters()) {
    if (item.key().find("lora_B") != std::string::npos) testing::randomize({item.value()});
  }
  return model;
}

torch::Tensor ids() { return torch::tensor({0, 3, 8, 3, 1, 1}, testing::device()).view({2, 3}); }

}  // namespace

TEST_CASE("The layers of a model that is written with the library are one adapter") {
  auto model = make_written();
  auto expected = model->forward(ids());
  auto adapters = lora::adapters_of(*model);
  CHECK(adapters.names() == std::vector<std::string>{"default"});
  CHECK(adapters.targets() ==
        std::vector<std::string>{"attention.q_proj", "attention.v_proj", "conv", "head", "tokens"});
  CHECK(adapters.scaling("conv") == 1.5);
  CHECK(adapters.config("default").rank() == 3);
  CHECK(model->norm->weight.requires_grad());  // what is trained is the model's business
  CHECK(adapters.parameters().size() == 10);
  CHECK(adapters.parameters()[0].is_same(model->tokens->lora_A()));
  {
    auto active = adapters.activate();  // the adapter that acts anyway is not added twice
    CHECK(testing::distance(model->forward(ids()), expected) < 1e-6);
  }
  adapters.merge();
  CHECK(testing::distance(model->forward(ids()), expected) < 1e-5);
  CHECK(model->head->is_merged());
  CHECK_THROWS_WITH(model->head->merge(), testing::contains("merged already"));
  adapters.unmerge();
  CHECK(torch::equal(model->forward(ids()), expected));
}

TEST_CASE("Further adapters decide inside their scopes, and a layer's own one outside") {
  auto model = make_written();
  auto own = model->forward(ids());
  auto adapters = lora::adapters_of(*model);
  adapters.add("second", lora::LoRAConfig(2).alpha(6).target_modules({"head", "tokens"}));
  CHECK_FALSE(model->norm->weight.requires_grad());
  CHECK(model->head->lora_A().requires_grad());
  testing::randomize(adapters.parameters("second"));
  auto hidden = torch::randn({4, 8}, testing::device());
  const auto expected =
      torch::linear(hidden, model->head->weight + adapters.delta("second", "head"), model->head->bias);
  const auto entries = model->tokens->weight + adapters.delta("second", "tokens");
  torch::Tensor adapted;
  {
    auto active = adapters.activate("second");
    adapted = model->forward(ids());
    CHECK(testing::distance(model->head(hidden), expected) < 1e-5);
    CHECK(testing::distance(model->tokens(ids()), entries.index({ids()})) < 1e-5);
  }
  CHECK(testing::distance(adapted, own) > 1e-3);
  CHECK(torch::equal(model->forward(ids()), own));
  adapters.detach();
  CHECK(torch::equal(model->forward(ids()), own));
  CHECK(model->norm->weight.requires_grad());
}

TEST_CASE("Files of a written model are those of an attached one") {
  testing::TemporaryFolder folder;
  auto model = make_written();
  auto expected = model->forward(ids());
  lora::adapters_of(*model).save(folder.path());
  auto tensors = lora::read_safetensors(folder / "adapter_model.safetensors");
  CHECK(tensors.at("base_model.model.tokens.lora_embedding_A").sizes() == torch::IntArrayRef({3, 9}));
  CHECK(tensors.at("base_model.model.conv.lora_A.weight").sizes() == torch::IntArrayRef({4, 8, 3}));
  CHECK(tensors.at("base_model.model.conv.lora_B.weight").sizes() == torch::IntArrayRef({8, 2, 1}));
  CHECK(tensors.at("base_model.model.attention.q_proj.lora_A.weight").sizes() == torch::IntArrayRef({2, 8}));
  auto other = make_written();
  for (auto& parameter : lora::trainable_parameters(*other)) parameter.detach().mul_(0.5);
  auto adapters = lora::adapters_of(*other);
  adapters.load("trained", folder.path());
  for (const auto& [name, parameter] : model->named_parameters().pairs()) {
    if (name.find("lora_") == std::string::npos) other->named_parameters()[name].detach().copy_(parameter);
  }
  auto active = adapters.activate("trained");
  CHECK(testing::distance(other->forward(ids()), expected) < 1e-5);
}

TEST_CASE("Merged for good, a layer's own adapter acts no more") {
  auto model = make_written();
  auto expected = model->forward(ids());
  auto adapters = lora::adapters_of(*model);
  adapters.merge_and_unload();
  CHECK(testing::distance(model->forward(ids()), expected) < 1e-5);
  CHECK_FALSE(model->head->is_merged());
}

TEST_CASE("Entries of containers are replaced in place; members cannot be") {
  struct NetImpl : torch::nn::Module {
    NetImpl() {
      register_module("body", body);
      register_module("list", list);
      register_module("fc", fc);
      to(testing::device());
    }
    torch::nn::Sequential body{torch::nn::Linear(4, 4), torch::nn::Tanh()};
    torch::nn::ModuleList list{torch::nn::Linear(4, 4)};
    torch::nn::Linear fc{4, 4};
  };
  torch::manual_seed(0);
  auto model = std::make_shared<NetImpl>();
  auto x = torch::randn({2, 4}, testing::device());
  auto before = model->body->forward(x);
  auto* linear = model->body[0]->as<torch::nn::Linear>();
  lora::LoRALinear<> layer(
      torch::nn::Linear(std::dynamic_pointer_cast<torch::nn::LinearImpl>(linear->shared_from_this())),
      LoRAOptions(2).alpha(6));
  lora::replace(*model, "body.0", layer);
  CHECK(torch::equal(model->body->forward(x), before));
  layer->lora_B().detach().normal_();
  CHECK(testing::distance(model->body->forward(x), layer->forward(x).tanh()) < 1e-6);
  CHECK(testing::distance(model->body->forward(x), before) > 1e-3);
  CHECK(model->named_parameters().contains("body.0.lora_A"));
  lora::replace(*model, "list.0", layer);
  CHECK(model->list[0].get() == layer.get());
  CHECK_THROWS_WITH(lora::replace(*model, "fc", layer),
                    testing::contains("\"fc\" is a member of") && testing::contains("lora::attach"));
  CHECK_THROWS_WITH(lora::replace(*model, "body.7", layer), testing::contains("no module \"body.7\""));
}

TEST_CASE("Entries of containers are replaced by their names, whatever these are") {
  namespace nn = torch::nn;
  const auto linear = [] { return nn::Linear(4, 4); };
  nn::Sequential named;
  for (const char* name : {"first", "1", "0", "third"}) named->push_back(name, nn::AnyModule(linear()));
  nn::ModuleDict dict;
  dict->update({{"b", linear().ptr()}, {"a", linear().ptr()}});
  const auto model = std::make_shared<nn::Module>("Net");
  model->register_module("named", named);
  model->register_module("dict", dict);
  model->to(testing::device());
  const auto x = torch::randn({2, 4}, testing::device());
  for (const std::string name : {"named.first", "named.0", "named.third", "dict.a"}) {
    const auto before = named->forward(x);
    const auto stock = std::dynamic_pointer_cast<nn::LinearImpl>(model->named_modules()[name]);
    lora::LoRALinear<> layer(nn::Linear(stock), LoRAOptions(2).alpha(6));
    lora::replace(*model, name, layer);
    CHECK(torch::equal(named->forward(x), before));
    CHECK(model->named_modules()[name] == layer.ptr());
    layer->lora_B().detach().normal_();
    const bool is_used = name.front() == 'n';
    CHECK((testing::distance(named->forward(x), before) > 1e-3) == is_used);
    if (!is_used) CHECK(dict["a"] == layer.ptr());
  }
}

TEST_CASE("Names that would collide, and models without such layers, are refused") {
  auto model = make_written();
  CHECK_THROWS_WITH(lora::attach(*model, lora::LoRAConfig(2).target_modules({"head"})),
                    testing::contains("\"head\" has an adapter \"default\" of its own"));
  testing::Stack plain(1);
  CHECK_THROWS_WITH(lora::adapters_of(*plain), testing::contains("lora::attach"));
}

TEST_CASE("A written model with its adapters merged is a file of plain weights") {
  testing::TemporaryFolder folder;
  auto model = make_written();
  const auto expected = model->forward(ids());
  auto adapters = lora::adapters_of(*model);
  adapters.save_merged(folder / "merged.safetensors");
  CHECK(torch::equal(model->forward(ids()), expected));
  adapters.merge();
  const auto written = lora::read_safetensors(folder / "merged.safetensors");
  for (const auto& item : model->named_parameters()) {
    INFO(item.key());
    const bool is_adapter = item.key().find("lora_") != std::string::npos;
    REQUIRE(written.count(item.key()) == (is_adapter ? 0 : 1));
    if (!is_adapter) CHECK(testing::distance(written.at(item.key()), item.value()) == 0);
  }
}

TEST_CASE("Layers' own adapters stay what they are in a file with another one merged in") {
  struct MixedImpl : torch::nn::Module {
    MixedImpl() { to(testing::device()); }
    lora::LoRALinear<> own = register_module("own", lora::LoRALinear<>(lora::LoRALinearOptions(4, 5, LoRAOptions(2))));
    torch::nn::Linear stock = register_module("stock", torch::nn::Linear(5, 3));
  };
  torch::manual_seed(0);
  testing::TemporaryFolder folder;
  auto model = std::make_shared<MixedImpl>();
  auto adapters = lora::attach(*model, lora::LoRAConfig(2).target_modules({"stock"}));
  testing::randomize(adapters.parameters());
  const auto expected = model->stock->weight + adapters.delta("default", "stock");
  adapters.save_merged(folder / "merged.safetensors");
  const auto written = lora::read_safetensors(folder / "merged.safetensors");
  CHECK(written.size() == 6);
  CHECK(testing::distance(written.at("stock.weight"), expected) < 1e-6);
  for (const auto& item : model->own->named_parameters())
    CHECK(written.at("own." + item.key()).equal(item.value().cpu()));
}
