// Names of adapters and of the folders they lie in: any name, none outside, each found again, none in a file.
#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/peft/checkpoint.hpp>

#include <fstream>
#include <iterator>
#include <random>

namespace {

using lora::LoRAConfig;
using lora::detail::adapter_name;
using lora::detail::folder_name;
using testing::contains;

std::string read_text(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// What lies below a folder, without its own name.
std::set<std::string> content(const std::filesystem::path& folder) {
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder))
    names.insert(std::filesystem::relative(entry.path(), folder).string());
  return names;
}

lora::Adapters with(testing::Stack& model, const std::vector<std::string>& names) {
  lora::Adapters adapters(*model);
  for (const auto& name : names) adapters.add(name, LoRAConfig(2).target_modules({"q_proj"}));
  testing::randomize(adapters.parameters());
  return adapters;
}

const std::vector<std::string> kNames{"french",
                                      "a/b",
                                      "a",
                                      "..",
                                      ".",
                                      "../../outside",
                                      "/tmp/absolute",
                                      "a/../../b",
                                      "v1.0",
                                      ".hidden",
                                      ".lora-1-2.tmp",
                                      "end.",
                                      "end ",
                                      "two words",
                                      "back\\slash",
                                      "C:\\x",
                                      "50%",
                                      "%2F",
                                      "a%2Fb",
                                      "line\nbreak",
                                      std::string("nul\0l", 5),
                                      "quote\"'",
                                      "\xc3\xa9\xe4\xb8\xad\xf0\x9f\xa6\x99",
                                      "not UTF-8 \xff\xc0\x80",
                                      "adapter_config.json",
                                      "adapter_model.safetensors",
                                      "adapter_model.bin",
                                      "lora_A",
                                      "weight",
                                      "layers.0.q_proj",
                                      "default.x",
                                      "base_model.model"};

}  // namespace

TEST_CASE("A folder has the adapter's name where that can be one") {
  const auto [name, folder] = GENERATE(table<std::string, std::string>({
      {"french", "french"},
      {"v1.0-b_2 x", "v1.0-b_2 x"},
      {"\xc3\xa9\xf0\x9f\xa6\x99", "\xc3\xa9\xf0\x9f\xa6\x99"},
      {"a/b", "a%2Fb"},
      {"..", "%2E%2E"},
      {".", "%2E"},
      {"../x", "%2E.%2Fx"},
      {".git", "%2Egit"},
      {"x.", "x%2E"},
      {"x ", "x%20"},
      {"50%", "50%25"},
      {"\xff", "%FF"},
      {"\xed\xa0\x80", "%ED%A0%80"},  // half of a pair of UTF-16
      {"\xc0\xaf", "%C0%AF"},         // "/", spelled too long
      {"adapter_config.json", "%61dapter_config.json"},
      {std::string(1, '\0'), "%00"},
  }));
  CHECK(folder_name(name) == folder);
  CHECK(adapter_name(folder) == name);
}

TEST_CASE("A folder that was not named here is an adapter of its own name") {
  for (const std::string folder : {"french", "50%", "%zz", "%2f", "%41", "%", "a%2", ".hidden", "x."}) {
    INFO(folder);
    CHECK(adapter_name(folder) == folder);
  }
}

TEST_CASE("Every name comes back from its folder, and no two have one folder") {
  std::mt19937 random(1);
  const std::string letters = "a%2F./\\ \xc3\xa9\xff:";
  std::map<std::string, std::string> names;
  for (int i = 0; i < 20000; ++i) {
    std::string name;
    for (auto size = 1 + random() % 6; size > 0; --size) name += letters[random() % letters.size()];
    const auto folder = folder_name(name);
    if (adapter_name(folder) != name || folder.find('/') != folder.npos || folder.front() == '.') FAIL(name);
    if (names.emplace(folder, name).first->second != name) FAIL(folder);
  }
}

TEST_CASE("Adapters of any name are saved inside of the directory, and found again") {
  testing::TemporaryFolder outer;
  const auto folder = outer / "in";
  testing::Stack model, other;
  const auto adapters = with(model, kNames);
  adapters.save_all(folder);
  CHECK(content(outer.path()).count("in") == 1);
  CHECK(std::distance(std::filesystem::directory_iterator(outer.path()), {}) == 1);
  CHECK(static_cast<size_t>(std::distance(std::filesystem::directory_iterator(folder), {})) == kNames.size());
  auto loaded = lora::load_adapters(*other, folder);
  const auto names = loaded.names();
  CHECK(std::set<std::string>(names.begin(), names.end()) == std::set<std::string>(kNames.begin(), kNames.end()));
  for (const auto& name : kNames) {
    INFO(name);
    CHECK(loaded.named_parameters(name)["layers.1.q_proj.lora_B"].equal(
        adapters.named_parameters(name)["layers.1.q_proj.lora_B"]));
  }
  CHECK(loaded.named_parameters().size() == adapters.named_parameters().size());
}

TEST_CASE("The name of an adapter is in no file") {
  testing::TemporaryFolder expected;
  testing::Stack model;
  lora::Adapters adapters(*model);
  auto plan = adapters.plan(LoRAConfig(2).target_modules({"q_proj"}));
  plan.initialize();
  adapters.add("default", plan);
  for (const auto& name : kNames) adapters.add(name, plan);
  adapters.save(expected.path(), "default");
  testing::TemporaryFolder folder;
  adapters.save_all(folder.path());
  for (const auto& name : kNames) {
    INFO(name);
    for (const auto* file : {"adapter_config.json", "adapter_model.safetensors"}) {
      const auto bytes = read_text(expected / file);
      CHECK((!bytes.empty() && bytes == read_text(folder.path() / folder_name(name) / file)));
    }
  }
}

TEST_CASE("An adapter that PEFT laid several folders deep is found under its name") {
  testing::TemporaryFolder folder;
  testing::Stack model, other, third;
  const auto adapters = with(model, {"one"});
  for (const auto* path : {"team/french", "team/a/b", "checkpoint-10", "checkpoint-10/inside", ".cache/x"})
    adapters.save(folder / path);
  std::filesystem::create_directory(folder / "empty");
  std::filesystem::create_directory_symlink("..", folder / "team" / "loop");
  CHECK(lora::load_adapters(*other, folder.path()).names() ==
        std::vector<std::string>{"checkpoint-10", "checkpoint-10/inside", "team/a/b", "team/french"});
  adapters.save(folder / "team%2Ffrench");  // as it is called when it is saved here
  CHECK_THROWS_WITH(lora::load_adapters(*third, folder.path()), contains("an adapter \"team/french\" already"));
}
