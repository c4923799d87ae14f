#include "support/testing.hpp"

#include <lora/attach.hpp>
#include <lora/peft/checkpoint.hpp>

#include <csignal>
#include <fstream>
#include <iterator>
#include <thread>

#include <sys/fsuid.h>
#include <sys/resource.h>

namespace {

using lora::load_adapter;
using lora::LoRAConfig;
using lora::read_safetensors;
using lora::write_safetensors;
using testing::contains;

struct MlpImpl : torch::nn::Module {
  torch::nn::Linear fc1 = register_module("fc1", torch::nn::Linear(8, 16));
  torch::nn::Linear fc2 = register_module("fc2", torch::nn::Linear(16, 8));
  torch::nn::Linear head = register_module("head", torch::nn::Linear(8, 3));
  torch::Tensor forward(const torch::Tensor& x) { return head(fc2(torch::relu(fc1(x)))); }
};
TORCH_MODULE(Mlp);

Mlp make_model() {
  torch::manual_seed(0);
  Mlp model;
  model->to(testing::device());
  return model;
}

LoRAConfig mlp_config(lora::MethodKind method = lora::LowRank()) {
  return LoRAConfig(2)
      .alpha(8)
      .method(method)
      .target_modules({"fc1", "fc2"})
      .rank_pattern({{"fc2", 3}})
      .alpha_pattern({{"fc1", 6}});
}

/// An adapter with values that were not there at the start.
lora::Adapters trained(Mlp& model, const LoRAConfig& config) {
  auto adapters = lora::attach(*model, config);
  for (auto& parameter : adapters.parameters()) torch::nn::init::normal_(parameter, 0.5, 0.3);
  return adapters;
}

torch::Tensor adapted_output(Mlp& model, const lora::Adapters& adapters) {
  torch::NoGradGuard no_grad;
  auto active = adapters.activate();
  return model->forward(torch::linspace(-1, 1, 2 * 5 * 8).view({2, 5, 8}).to(testing::device()));
}

std::string read_text(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// Replaces the text `from` in a file.
void edit(const std::filesystem::path& path, const std::string& from, const std::string& to) {
  auto text = read_text(path);
  REQUIRE(text.find(from) != text.npos);
  text.replace(text.find(from), from.size(), to);
  std::ofstream(path, std::ios::binary) << text;
}

size_t files_in(const std::filesystem::path& folder) {
  return std::distance(std::filesystem::directory_iterator(folder), std::filesystem::directory_iterator());
}

/// Files no longer than this, in place of a full disk, and without the signal that would end the process.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) : signal_(std::signal(SIGXFSZ, SIG_IGN)) {
    ::getrlimit(RLIMIT_FSIZE, &former_);
    const struct rlimit limit { bytes, former_.rlim_max };
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &former_);
    std::signal(SIGXFSZ, signal_);
  }

 private:
  void (*const signal_)(int);
  struct rlimit former_ {};
};

/// Makes a folder read-only for this thread, also when it is root's.
class ReadOnly {
 public:
  explicit ReadOnly(std::filesystem::path folder) : folder_(std::move(folder)), user_(::setfsuid(65534)) {
    ::setfsuid(user_);
    std::filesystem::permissions(folder_, std::filesystem::perms(0555));
    if (user_ == 0) ::setfsuid(65534);
  }
  ~ReadOnly() {
    ::setfsuid(user_);
    std::filesystem::permissions(folder_, std::filesystem::perms(0755));
  }

 private:
  const std::filesystem::path folder_;
  const int user_;
};

}  // namespace

TEST_CASE("an adapter survives its directory", "[peft_checkpoint]") {
  testing::TemporaryFolder folder;
  auto model = make_model();
  const bool dora = GENERATE(false, true);
  const auto adapters = trained(model, dora ? mlp_config(lora::DoRA()) : mlp_config());
  const auto expected = adapted_output(model, adapters);
  adapters.save(folder / "new" / "adapter");
  CHECK(files_in(folder / "new" / "adapter") == 2);

  const auto tensors = read_safetensors(folder / "new" / "adapter" / "adapter_model.safetensors");
  CHECK(tensors.size() == (dora ? 6 : 4));
  CHECK(tensors.at("base_model.model.fc1.lora_A.weight").sizes() == torch::IntArrayRef({2, 8}));
  CHECK(tensors.at("base_model.model.fc1.lora_B.weight").sizes() == torch::IntArrayRef({16, 2}));
  CHECK(tensors.at("base_model.model.fc2.lora_A.weight").sizes() == torch::IntArrayRef({3, 16}));
  if (dora) CHECK(tensors.at("base_model.model.fc2.lora_magnitude_vector").sizes() == torch::IntArrayRef({8}));

  auto again = make_model();
  auto loaded = load_adapter(*again, folder / "new" / "adapter");
  CHECK(loaded.names() == std::vector<std::string>{"default"});
  CHECK(loaded.scaling("fc1") == 3);
  CHECK(loaded.scaling("fc2") == testing::Approx(8.0 / 3));
  CHECK(torch::equal(adapted_output(again, loaded), expected));
  CHECK(testing::distance(again->forward(torch::ones({1, 8}, testing::device())),
                          model->forward(torch::ones({1, 8}, testing::device()))) == 0);
  for (const auto& parameter : loaded.parameters()) CHECK((parameter.requires_grad() && parameter.is_leaf()));
  CHECK(!again->fc1->weight.requires_grad());

  // What is loaded belongs to the adapter: training it does not reach the file, and saving it writes the same bytes.
  loaded.save(folder / "copy");
  for (const auto* name : {"adapter_model.safetensors", "adapter_config.json"})
    CHECK(read_text(folder / "copy" / name) == read_text(folder / "new" / "adapter" / name));
}

TEST_CASE("all linear layers are written by name", "[peft_checkpoint]") {
  testing::TemporaryFolder folder;
  auto model = make_model();
  const auto adapters =
      trained(model, LoRAConfig(2).alpha(6).target_modules(lora::all_linear).exclude_modules({"fc2"}));
  adapters.save(folder.path());
  const auto config = lora::read_adapter_config(folder / "adapter_config.json");
  REQUIRE(config.target_modules().names() != nullptr);
  CHECK(*config.target_modules().names() == std::vector<std::string>{"fc1", "head"});
  CHECK(config.exclude_modules().empty());
  auto again = make_model();
  CHECK(torch::equal(adapted_output(again, load_adapter(*again, folder.path())), adapted_output(model, adapters)));
}

TEST_CASE("the projections of attention are written under PEFT's names", "[peft_checkpoint]") {
  testing::TemporaryFolder folder;
  torch::nn::TransformerEncoderLayer model(torch::nn::TransformerEncoderLayerOptions(8, 2).dropout(0));
  model->to(testing::device());
  auto adapters = lora::attach(*model, LoRAConfig(2).alpha(6).target_modules({"self_attn"}));
  for (auto& parameter : adapters.parameters()) torch::nn::init::normal_(parameter);
  adapters.save(folder.path());
  const auto tensors = read_safetensors(folder / "adapter_model.safetensors");
  CHECK(tensors.size() == 4);
  CHECK(tensors.at("base_model.model.self_attn.lora_B.weight").sizes() == torch::IntArrayRef({24, 2}));
  CHECK(tensors.at("base_model.model.self_attn.base_layer.out_proj.lora_B.weight").sizes() ==
        torch::IntArrayRef({8, 2}));
  torch::nn::TransformerEncoderLayer again(torch::nn::TransformerEncoderLayerOptions(8, 2).dropout(0));
  again->to(testing::device());
  const auto loaded = load_adapter(*again, folder.path());
  for (const auto& item : adapters.named_parameters()) {
    INFO(item.key());
    CHECK(torch::equal(loaded.named_parameters()[item.key()], item.value()));
  }
}

TEST_CASE("tensors of another type are taken over in the adapter's", "[peft_checkpoint]") {
  testing::TemporaryFolder folder;
  auto model = make_model();
  const auto adapters = trained(model, mlp_config());
  adapters.save(folder.path());
  auto tensors = read_safetensors(folder / "adapter_model.safetensors");
  for (auto& item : tensors) item.second = item.second.to(torch::kBFloat16);
  write_safetensors(folder / "adapter_model.safetensors", tensors);
  const auto loaded = load_adapter(*model, folder.path()).named_parameters();
  CHECK(loaded["fc1.lora_A"].scalar_type() == torch::kFloat);
  CHECK(torch::equal(loaded["fc1.lora_A"].cpu(), tensors.at("base_model.model.fc1.lora_A.weight").to(torch::kFloat)));
}

TEST_CASE("load_adapter changes nothing when something is wrong", "[peft_checkpoint]") {
  testing::TemporaryFolder folder;
  const auto config = folder / "adapter_config.json", file = folder / "adapter_model.safetensors";
  auto model = make_model();
  trained(model, mlp_config()).save(folder.path());
  auto tensors = read_safetensors(file);
  const std::string key = "base_model.model.fc2.lora_A.weight";
  const auto fails = [&](const std::string& expected) {
    auto untouched = make_model();
    const auto error = testing::error_of([&] { load_adapter(*untouched, folder.path()); });
    CHECK_THAT(error, contains(expected));
    CHECK_THAT(error, contains(folder.path().string()));
    for (const auto& parameter : untouched->parameters()) CHECK(parameter.requires_grad());
  };

  SECTION("a folder that is not there") {
    CHECK_THROWS_WITH(load_adapter(*model, folder / "none"),
                      contains("none/adapter_config.json: cannot be opened: No such"));
  }
  SECTION("no tensors") {
    std::filesystem::remove(file);
    fails("adapter_model.safetensors: cannot be opened");
  }
  SECTION("cut short") {
    std::filesystem::resize_file(file, std::filesystem::file_size(file) - 1);
    fails("adapter_model.safetensors: is cut short");
  }
  SECTION("a tensor is missing") {
    tensors.erase(key);
    write_safetensors(file, tensors);
    fails("adapter_model.safetensors: does not fit the model and adapter_config.json: missing: \"" + key +
          "\" [3, 16]");
  }
  SECTION("a tensor too many, and two missing") {
    tensors["fc2.lora_A.weight"] = tensors.at(key);
    tensors.erase(key);
    tensors.erase("base_model.model.fc1.lora_B.weight");
    write_safetensors(file, tensors);
    fails("missing: \"base_model.model.fc1.lora_B.weight\" [16, 2], \"" + key +
          "\" [3, 16];\nunexpected: \"fc2.lora_A.weight\" [3, 16]");
  }
  SECTION("a pattern that does not agree with the tensors") {
    edit(config, "\"fc2\": 3", "\"fc2\": 4");
    fails("not of the shape or type that rank and layer give: \n  \"" + key + "\" is [3, 16], not [4, 16]");
  }
  SECTION("a tensor of whole numbers") {
    tensors[key] = torch::ones({3, 16}, torch::kLong);
    write_safetensors(file, tensors);
    fails("\"" + key + "\" holds Long");
  }
  SECTION("another method") {
    edit(config, "\"use_dora\": false", "\"use_dora\": true");
    fails("missing: \"base_model.model.fc1.lora_magnitude_vector\" [16]");
  }
  SECTION("layers that the model does not have") {
    edit(config, "\"fc2\"\n", "\"fc7\"\n");
    fails("no module matches \"fc7\" of target_modules");
  }
  SECTION("what is not supported") {
    edit(config, "\"use_qalora\": false", "\"use_qalora\": true");
    fails("adapter_config.json: \"use_qalora\" is true, which is not supported");
  }
  SECTION("a model of another width") {
    torch::nn::Sequential other;
    other->push_back("fc1", torch::nn::Linear(8, 20));
    other->push_back("fc2", torch::nn::Linear(16, 8));
    CHECK_THROWS_WITH(load_adapter(*other, folder.path()),
                      contains("\"base_model.model.fc1.lora_B.weight\" is [16, 2], not [20, 2]"));
    for (const auto& parameter : other->parameters()) CHECK(parameter.requires_grad());
  }
}

TEST_CASE("save keeps the earlier directory when it fails", "[peft_checkpoint]") {
  testing::TemporaryFolder folder;
  auto model = make_model();
  const auto adapters = trained(model, mlp_config());
  adapters.save(folder.path());
  const auto config = read_text(folder / "adapter_config.json"),
             tensors = read_text(folder / "adapter_model.safetensors");

  auto other = make_model();
  CHECK_THROWS_WITH(trained(other, mlp_config().base_model_name_or_path("\xff")).save(folder.path()),
                    contains("adapter_config.json: cannot be written: "));
  CHECK(read_text(folder / "adapter_config.json") == config);
  CHECK(read_text(folder / "adapter_model.safetensors") == tensors);
  CHECK(files_in(folder.path()) == 2);

  CHECK_THROWS_WITH(adapters.save(folder.path(), "french"), contains("there is no adapter \"french\""));
}

TEST_CASE("what the operating system refuses is named, and the earlier adapter stays", "[peft_checkpoint]") {
  testing::TemporaryFolder folder;
  auto model = make_model(), other = make_model();
  trained(model, mlp_config()).save(folder.path());
  const auto adapters = trained(other, LoRAConfig(50).alpha(5).target_modules({"fc1"}));
  const auto config = folder / "adapter_config.json", file = folder / "adapter_model.safetensors";
  const auto old_config = read_text(config), old_tensors = read_text(file);
  size_t files = 2;
  const auto fails = [&](const std::filesystem::path& directory, const std::string& expected) {
    const auto error = testing::error_of([&] { adapters.save(directory); });
    CHECK_THAT(error, contains(expected));
    CHECK(error.rfind(directory.string(), 0) == 0);
  };

  SECTION("a file") { fails(config, "adapter_config.json: cannot be created: Not a directory"); }
  SECTION("below a file") { fails(config / "a", "adapter_config.json/a: cannot be created: Not a directory"); }
  SECTION("a name that is too long") { fails(folder / std::string(300, 'a'), "cannot be created: File name too long"); }
  SECTION("what nobody can write to") { fails("/proc/self", "adapter_config.json: cannot be created: "); }
  SECTION("a missing folder in a read-only one") {
    const ReadOnly read_only(folder.path());
    fails(folder / "new" / "adapter", "new/adapter: cannot be created: Permission denied");
  }
  SECTION("a read-only folder") {
    const ReadOnly read_only(folder.path());
    fails(folder.path(), "adapter_config.json: cannot be created: Permission denied");
  }
  SECTION("no room for the configuration") {
    const FileSizeLimit limit(100);
    fails(folder.path(), "adapter_config.json: cannot be written: File too large");
  }
  SECTION("no room for the tensors") {
    const FileSizeLimit limit(old_config.size() + 100);  // the tensors are longer
    fails(folder.path(), "adapter_model.safetensors: cannot be written: File too large");
  }
  SECTION("a folder in the place of a file") {
    const auto name = GENERATE("adapter_config.json", "adapter_model.safetensors");
    std::filesystem::create_directories(folder / "other" / name);
    fails(folder / "other", std::string(name) + ": cannot be replaced: ");
    CHECK(files_in(folder / "other") == 1);
    files = 3;
  }
  CHECK(read_text(config) == old_config);
  CHECK(read_text(file) == old_tensors);
  CHECK(files_in(folder.path()) == files);
}

TEST_CASE("directories may have any name", "[peft_checkpoint]") {
  testing::TemporaryFolder folder;
  auto model = make_model();
  const auto adapters = trained(model, mlp_config());
  const auto expected = adapted_output(model, adapters);
  const auto works = [&](const std::filesystem::path& directory) {
    INFO(directory);
    for (int i = 0; i < 2; ++i) adapters.save(directory);
    auto again = make_model();
    CHECK(torch::equal(adapted_output(again, load_adapter(*again, directory)), expected));
    CHECK(files_in(directory) == 2);
  };
  works(folder / "two words");
  works(folder / "\xc3\xa9\xe4\xb8\xad \xf0\x9f\xa6\x99");
  works(folder / "not UTF-8 \xff");
  works(folder / "quote\"back\\slash\nline");
  works(folder / "slash/");
  works(folder / "missing" / "parents" / "." / ".." / "adapter");
  std::filesystem::create_directory_symlink("two words", folder / "link");
  works(folder / "link");

  const auto former = std::filesystem::current_path();
  std::filesystem::current_path(folder.path());
  works("relative");
  std::filesystem::create_directory("inside");
  std::filesystem::current_path("inside");
  works(".");
  std::filesystem::current_path(former);
}

TEST_CASE("save leaves alone what is not its own and clears up after a killed process", "[peft_checkpoint]") {
  testing::TemporaryFolder folder;
  auto model = make_model(), other = make_model();
  const auto adapters = trained(model, mlp_config());
  adapters.save(folder.path());
  const auto expected = adapted_output(model, adapters);
  std::ofstream(folder / "README.md") << "stays";
  std::filesystem::create_directory(folder / "second adapter");
  std::filesystem::create_symlink("README.md", folder / "link");

  // As it is after SIGKILL between the two steps in which both names change.
  const auto place = folder / ".lora-1-7.tmp";
  std::filesystem::create_directories(place / "old");
  std::filesystem::create_directory_symlink("old", place / "now");
  for (const auto* name : {"adapter_config.json", "adapter_model.safetensors"}) {
    std::filesystem::rename(folder / name, place / "old" / name);
    std::filesystem::create_symlink(std::filesystem::path(".lora-1-7.tmp") / "now" / name, folder / name);
  }
  std::ofstream(folder / ".lora-1-8.tmp") << "the beginning of a file";
  std::filesystem::create_directories(folder / ".lora-1-9.tmp" / "new");
  auto again = make_model();
  CHECK(torch::equal(adapted_output(again, load_adapter(*again, folder.path())), expected));

  SECTION("a save that fails keeps what is there") {
    const FileSizeLimit limit(100);
    CHECK_THROWS_WITH(trained(other, mlp_config()).save(folder.path()), contains("File too large"));
    auto third = make_model();
    CHECK(torch::equal(adapted_output(third, load_adapter(*third, folder.path())), expected));
  }
  SECTION("a save that does not") {
    const auto second = trained(other, mlp_config().alpha(3));
    second.save(folder.path());
    CHECK(files_in(folder.path()) == 5);
    for (const auto* name : {"adapter_config.json", "adapter_model.safetensors"})
      CHECK(std::filesystem::is_regular_file(std::filesystem::symlink_status(folder / name)));
    CHECK(read_text(folder / "link") == "stays");
    auto third = make_model();
    CHECK(torch::equal(adapted_output(third, load_adapter(*third, folder.path())), adapted_output(other, second)));
  }
}

TEST_CASE("adapters that are saved and loaded at a time do not mix", "[peft_checkpoint]") {
  testing::TemporaryFolder folder;
  // Shapes agree, so parts of two would load.
  const auto save_number = [&](int number) {
    auto model = make_model();
    auto adapters = lora::attach(*model, LoRAConfig(2).alpha(number).target_modules({"fc1", "fc2"}));
    torch::NoGradGuard no_grad;
    for (auto& parameter : adapters.parameters()) parameter.fill_(number);
    adapters.save(folder.path());
  };
  save_number(1);
  std::atomic<int> writers{2};
  const auto save_many = [&](int first) {
    for (int number = first; number < first + 20; ++number) save_number(number);
    --writers;
  };
  std::thread one(save_many, 100), two(save_many, 200);
  int loaded = 0, different = 0;
  for (; writers > 0 || loaded == 0; ++loaded) {
    auto model = make_model();
    const auto adapters = load_adapter(*model, folder.path());
    const auto alpha = adapters.config("default").alpha();
    for (const auto& parameter : adapters.parameters()) different += !(parameter == alpha).all().item<bool>();
  }
  one.join();
  two.join();
  INFO(loaded);
  CHECK(different == 0);
  CHECK(files_in(folder.path()) == 2);
}

TEST_CASE("one of several adapters is written by name", "[peft_checkpoint]") {
  testing::TemporaryFolder folder;
  auto model = make_model();
  auto adapters = trained(model, mlp_config());
  adapters.add("second", LoRAConfig(1).alpha(5).target_modules({"head"}));
  CHECK_THROWS_WITH(adapters.save(folder.path()), contains("name the adapter that is meant"));
  adapters.save(folder.path(), "second");
  const auto tensors = read_safetensors(folder / "adapter_model.safetensors");
  CHECK(tensors.size() == 2);
  CHECK(tensors.at("base_model.model.head.lora_A.weight").sizes() == torch::IntArrayRef({1, 8}));
}

TEST_CASE("the output projection of attention has the rank and alpha of its module", "[peft_checkpoint]") {
  testing::TemporaryFolder folder;
  torch::nn::TransformerEncoderLayer model(torch::nn::TransformerEncoderLayerOptions(8, 2).dropout(0));
  const auto config = LoRAConfig(2).alpha(6).target_modules({"self_attn"});
  const auto adapters =
      lora::attach(*model, LoRAConfig(config).rank_pattern({{"self_attn", 4}}).alpha_pattern({{"self_attn", 10}}));
  CHECK(adapters.scaling("self_attn") == 2.5);
  CHECK(adapters.scaling("self_attn.out_proj") == 2.5);
  torch::nn::TransformerEncoderLayer other(torch::nn::TransformerEncoderLayerOptions(8, 2).dropout(0));
  CHECK_THROWS_WITH(lora::attach(*other, LoRAConfig(config).rank_pattern({{"self_attn.out_proj", 4}})),
                    contains("no target matches \"self_attn.out_proj\" of rank_pattern"));
}

TEST_CASE("stacked ranks of a fused projection outrank the patterns", "[peft_checkpoint]") {
  testing::TemporaryFolder folder;
  auto model = make_model();
  auto config = mlp_config().target_modules({"fc1"}).rank_pattern({{"fc1", 1}}).alpha_pattern({{"fc1", 3}});
  config.fused({{"fc1", {6, 6, 4}, {true, false, true}}});  // two parts of rank 1: in files rank 2, the others' rank
  const auto adapters = trained(model, config);
  adapters.save(folder.path());
  auto again = make_model();
  const auto loaded = load_adapter(*again, folder.path());
  CHECK(loaded.scaling("fc1") == 3);
  CHECK(testing::distance(adapted_output(again, loaded), adapted_output(model, adapters)) < 1e-5);
}

TEST_CASE("what PEFT writes without need is compared or left aside", "[peft_checkpoint]") {
  testing::TemporaryFolder folder;
  const auto file = folder / "adapter_model.safetensors";
  const std::string prefix = "base_model.model.";
  auto model = make_model();
  const auto adapters = trained(model, mlp_config().bias(lora::Bias::kAll).modules_to_save({"head"}));
  adapters.save(folder.path());
  auto tensors = read_safetensors(file);
  tensors[prefix + "head.original_module.bias"] = torch::ones({3});
  tensors[prefix + "head.modules_to_save.bias"] = tensors.at(prefix + "head.bias").clone();
  tensors[prefix + "fc1.base_layer.weight"] = model->fc1->weight.detach().cpu().to(torch::kBFloat16);
  auto again = make_model();
  SECTION("copies of biases, and a frozen weight that is the model's") {
    write_safetensors(file, tensors);
    CHECK(torch::equal(adapted_output(again, load_adapter(*again, folder.path())), adapted_output(model, adapters)));
  }
  SECTION("a frozen weight that is not") {
    tensors[prefix + "fc1.base_layer.weight"].mul_(1.5);
    write_safetensors(file, tensors);
    CHECK_THROWS_WITH(load_adapter(*again, folder.path()),
                      contains("unexpected: \"base_model.model.fc1.base_layer.weight\" [16, 8] (a frozen weight, and "
                               "not the model's own, which is [16, 8])"));
  }
  SECTION("a copy of something else") {
    tensors[prefix + "norm.original_module.bias"] = torch::ones({3});
    write_safetensors(file, tensors);
    CHECK_THROWS_WITH(load_adapter(*again, folder.path()),
                      contains("unexpected: \"base_model.model.norm.original_module.bias\" [3]"));
  }
}

TEST_CASE("counts of batches come in another type than in a converted model", "[peft_checkpoint]") {
  testing::TemporaryFolder folder;
  const auto make = [](torch::ScalarType type) {
    torch::nn::Sequential model;
    model->push_back("fc", torch::nn::Linear(4, 4));
    model->push_back("norm", torch::nn::BatchNorm1d(4));
    model->to(testing::device(), type);
    return model;
  };
  const auto config = LoRAConfig(2).alpha(6).target_modules({"fc"}).modules_to_save({"norm"});
  auto model = make(torch::kFloat), converted = make(torch::kDouble);
  lora::attach(*model, config).save(folder.path());
  auto tensors = read_safetensors(folder / "adapter_model.safetensors");
  tensors["base_model.model.norm.num_batches_tracked"] = torch::tensor(7, torch::kLong);
  write_safetensors(folder / "adapter_model.safetensors", tensors);
  auto loaded = load_adapter(*converted, folder.path());
  loaded.merge();
  CHECK(converted[1]->named_buffers()["num_batches_tracked"].item<double>() == 7);
}

TEST_CASE("PEFT saves every module whose name ends in the letters of an entry", "[peft_checkpoint]") {
  testing::TemporaryFolder folder;
  const auto make = [] {
    torch::manual_seed(0);
    torch::nn::Sequential model;
    model->push_back("fc", torch::nn::Linear(4, 4));
    model->push_back("pre_head", torch::nn::Linear(4, 4));
    model->push_back("head", torch::nn::Linear(4, 2));
    model->to(testing::device());
    return model;
  };
  auto model = make(), other = make();
  lora::attach(*model, LoRAConfig(2).target_modules({"fc"}).modules_to_save({"head"})).save(folder.path());
  const auto tensors = read_safetensors(folder / "adapter_model.safetensors");
  CHECK(tensors.size() == 6);
  CHECK(torch::equal(tensors.at("base_model.model.pre_head.weight"), model[1]->named_parameters()["weight"].cpu()));
  const auto loaded = load_adapter(*other, folder.path());
  CHECK(loaded.config("default").modules_to_save() == std::vector<std::string>{"head", "pre_head"});
  CHECK(loaded.named_parameters().contains("pre_head.bias"));
}

TEST_CASE("each adapter is written as if it were alone, whatever the others adapt", "[peft_checkpoint]") {
  struct NetImpl : torch::nn::Module {
    NetImpl() { to(testing::device()); }
    torch::nn::MultiheadAttention attention = register_module("attention", torch::nn::MultiheadAttention(4, 2));
  };
  torch::manual_seed(0);
  auto model = std::make_shared<NetImpl>();
  lora::Adapters adapters(*model);
  adapters.add("inside", LoRAConfig(2).target_modules({"out_proj"}));
  adapters.add("whole", LoRAConfig(3).target_modules({"attention"}));
  for (const auto& parameter : adapters.parameters()) torch::nn::init::normal_(parameter);
  for (const std::string name : {"inside", "whole"}) {
    testing::TemporaryFolder folder;
    adapters.save(folder.path(), name);
    adapters.load("again_" + name, folder.path());
    auto other = std::make_shared<NetImpl>();
    auto loaded = load_adapter(*other, folder.path()).named_parameters();
    CHECK(loaded.size() == (name == "inside" ? 2 : 4));
    for (const auto& item : loaded) CHECK(item.value().equal(adapters.named_parameters(name)[item.key()]));
  }
}

TEST_CASE("an adapted layer may end in the letters of a module that is saved", "[peft_checkpoint]") {
  struct NetImpl : torch::nn::Module {
    NetImpl() { to(testing::device()); }
    torch::nn::Linear pre_head = register_module("pre_head", torch::nn::Linear(4, 5));
    torch::nn::Linear head = register_module("head", torch::nn::Linear(5, 3));
  };
  auto model = std::make_shared<NetImpl>(), other = std::make_shared<NetImpl>();
  testing::TemporaryFolder folder;
  auto adapters = lora::attach(*model, LoRAConfig(2).target_modules({"pre_head"}).modules_to_save({"head"}));
  for (const auto& parameter : adapters.parameters()) torch::nn::init::normal_(parameter);
  adapters.save(folder.path());
  CHECK(read_safetensors(folder / "adapter_model.safetensors").size() == 4);
  auto loaded = load_adapter(*other, folder.path()).named_parameters();
  CHECK(loaded.keys() == adapters.named_parameters().keys());
  for (const auto& item : loaded) CHECK(item.value().equal(adapters.named_parameters()[item.key()]));
}
