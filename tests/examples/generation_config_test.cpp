#include <support/testing.hpp>

#include <fstream>

#include "special_tokens.hpp"

namespace {

using nlohmann::json;
using testing::contains;
using testing::error_of;
using Ids = std::vector<int64_t>;

void write(const std::filesystem::path& file, const json& content) { std::ofstream(file) << content; }

json read(const std::filesystem::path& file) {
  std::ifstream stream(file);
  return json::parse(stream);
}

/// A directory with these files, where null leaves one out.
struct Folder : testing::TemporaryFolder {
  Folder(const json& config, const json& generation) {
    write(*this / "config.json", config);
    if (!generation.is_null()) write(*this / "generation_config.json", generation);
  }
};

/// The tokens a, <end> and <stop>, numbers 0 to 2.
gpt::Tokenizer tokenizer() {
  testing::TemporaryFolder folder;
  auto added = [](int64_t id, const std::string& content) {
    return json{{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
                {"rstrip", false}, {"normalized", false}, {"special", true}};
  };
  write(folder / "tokenizer.json",
        {{"version", "1.0"},
         {"added_tokens", {added(1, "<end>"), added(2, "<stop>")}},
         {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}},
         {"decoder", {{"type", "ByteLevel"}}},
         {"model", {{"type", "BPE"}, {"vocab", {{"a", 0}}}, {"merges", json::array()}}}});
  return gpt::Tokenizer(folder / "tokenizer.json");
}

}  // namespace

TEST_CASE("generation_config.json counts, config.json only without it, an adapter's before both") {
  const json config = {{"eos_token_id", 5}, {"top_k", 7}};
  const auto defaults = gpt::read_generation_config(Folder(json::object(), json::object()).path());
  CHECK(defaults.eos_token_ids.empty());
  CHECK_FALSE(defaults.do_sample);
  CHECK(defaults.temperature == 1);
  CHECK(defaults.top_k == 50);
  CHECK(defaults.top_p == 1);
  CHECK(defaults.repetition_penalty == 1);
  CHECK_FALSE(defaults.max_new_tokens);

  Folder old(config, nullptr);
  CHECK(gpt::read_generation_config(old.path()).eos_token_ids == Ids{5});
  CHECK(gpt::read_generation_config(old.path()).top_k == 7);

  Folder folder(config, {{"eos_token_id", {3, 4}},
                         {"do_sample", true},
                         {"temperature", 0.6},
                         {"top_p", 0.9},
                         {"repetition_penalty", 1.05},
                         {"max_new_tokens", 12},
                         {"num_beams", 1},
                         {"min_p", nullptr},
                         {"typical_p", 1.0},
                         {"no_repeat_ngram_size", 3},
                         {"suppress_tokens", {8}}});
  const auto found = gpt::read_generation_config(folder.path());
  CHECK(found.eos_token_ids == Ids{3, 4});
  CHECK(found.do_sample);
  CHECK(found.temperature == 0.6);
  CHECK(found.top_k == 50);  // config.json's is not looked at
  CHECK(found.top_p == 0.9);
  CHECK(found.repetition_penalty == 1.05);
  CHECK(found.max_new_tokens == 12);
  CHECK(found.ignored == std::vector<std::string>{"\"no_repeat_ngram_size\": 3", "\"suppress_tokens\": [8]"});

  testing::TemporaryFolder adapter;
  CHECK(gpt::read_generation_config(folder.path(), adapter.path()).eos_token_ids == Ids{3, 4});
  write(adapter / "generation_config.json", {{"eos_token_id", 9}});
  CHECK(gpt::read_generation_config(folder.path(), adapter.path()).eos_token_ids == Ids{9});

  write(folder / "generation_config.json", {{"top_p", "high"}});
  CHECK_THAT(error_of([&] { gpt::read_generation_config(folder.path()); }),
             contains("generation_config.json: \"top_p\" has the wrong type: \"high\""));
}

TEST_CASE("an end that is no token of the model is refused with both sizes") {
  for (const int64_t id : {384, 50256, -1}) {
    Folder folder({{"eos_token_id", 2}}, {{"eos_token_id", {2, id}}});
    const auto config = gpt::read_generation_config(folder.path());
    const auto error = error_of([&] { gpt::check_ends(config, 384); });
    CHECK_THAT(error, contains("generation_config.json: \"eos_token_id\" " + std::to_string(id) + " is no token"));
    CHECK_THAT(error, contains("has 384 rows (0 to 383)"));
    if (id >= 0) CHECK(error_of([&] { gpt::check_ends(config, id + 1); }).empty());
  }
}

TEST_CASE("ends that were trained are added to those of the model") {
  Folder folder({{"eos_token_id", 5}, {"bos_token_id", 1}, {"vocab_size", 9}, {"top_p", 0.5}},
                {{"_from_model_config", true}, {"eos_token_id", 3}, {"top_k", 7}});
  testing::TemporaryFolder out;
  const auto written = out / "generation_config.json";
  gpt::write_ends(gpt::read_generation_config(folder.path()), {3}, out.path());
  CHECK_FALSE(std::filesystem::exists(written));
  gpt::write_ends(gpt::read_generation_config(folder.path()), {3, 6}, out.path());
  CHECK(read(written) == json{{"eos_token_id", {3, 6}}, {"top_k", 7}});

  std::filesystem::remove(folder / "generation_config.json");
  gpt::write_ends(gpt::read_generation_config(folder.path()), {6}, out.path());
  CHECK(read(written) == json{{"eos_token_id", {5, 6}}, {"bos_token_id", 1}, {"top_p", 0.5}});
}

TEST_CASE("the end of a text is the tokenizer's, however it is spelled, else the model's first") {
  const auto bpe = tokenizer();
  auto end = [&](const json& tokenizer_config, const json& eos, const json& map = nullptr) {
    Folder folder({{"eos_token_id", eos}}, nullptr);
    if (!tokenizer_config.is_null()) write(folder / "tokenizer_config.json", tokenizer_config);
    if (!map.is_null()) write(folder / "special_tokens_map.json", map);
    return gpt::end_token(folder.path(), bpe, gpt::read_generation_config(folder.path()));
  };
  CHECK(end({{"eos_token", "<stop>"}}, 1) == 2);
  CHECK(end({{"eos_token", {{"content", "<stop>"}, {"lstrip", false}}}}, 1) == 2);
  CHECK(end({{"bos_token", "a"}}, 1, {{"eos_token", {{"content", "<stop>"}}}}) == 2);
  CHECK(end({{"eos_token", "<stop>"}}, 1, {{"eos_token", "<end>"}}) == 2);
  CHECK(end({{"eos_token", nullptr}}, {1, 2}) == 1);
  CHECK(end({{"eos_token", "<unknown>"}}, 1) == 1);
  CHECK(end(nullptr, nullptr) == std::nullopt);
  CHECK_THAT(error_of([&] { end({{"eos_token", 7}}, 1); }), contains("\"eos_token\" must be a token, found 7"));
}

TEST_CASE("a token without a row in the embedding is refused by name, with both sizes") {
  const auto bpe = tokenizer();
  CHECK(error_of([&] { gpt::check_rows("the data", Ids{0, 1}, 2, bpe); }).empty());
  const auto error = error_of([&] { gpt::check_rows("the data", Ids{0, 2, 1}, 2, bpe); });
  CHECK_THAT(error,
             contains("the data has the token \"<stop>\", number 2, but the model's embedding has 2 rows (0 to"));
  CHECK_THAT(error, contains("for the 3 tokens of tokenizer.json"));
}
