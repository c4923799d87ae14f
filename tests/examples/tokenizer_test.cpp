#include <support/testing.hpp>

#include <fstream>
#include <thread>

#include "../../examples/finetune_gpt/tokenizer.hpp"

namespace {

using Ids = std::vector<int64_t>;
using nlohmann::json;

json added(int64_t id, const std::string& content) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", true}};
}

/// A tokenizer whose ids can be found by hand: it knows a, b, c, 1, 2, space, line break, ', s and é.
json small() {
  return {{"version", "1.0"},
          {"added_tokens", {added(18, "<|end|>")}},
          {"normalizer", nullptr},
          {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}},
          {"decoder", {{"type", "ByteLevel"}}},
          {"model",
           {{"type", "BPE"},
            {"vocab",
             {{"a", 0},
              {"b", 1},
              {"c", 2},
              {"Ġ", 3},
              {"ab", 4},
              {"abc", 5},
              {"Ġa", 6},
              {"Ċ", 7},
              {"1", 8},
              {"2", 9},
              {"Ã", 10},
              {"©", 11},
              {"Ã©", 12},
              {"'", 13},
              {"s", 14},
              {"'s", 15},
              {"12", 16},
              {"ac", 17}}},
            {"merges", {"a b", "Ġ a", "ab c", "Ã ©", "' s", "1 2"}}}}};
}

gpt::Tokenizer tokenizer(const json& content) {
  testing::TemporaryFolder folder;
  std::ofstream(folder / "tokenizer.json") << content;
  return gpt::Tokenizer(folder / "tokenizer.json");
}

/// small() with the value at `pointer` replaced or added.
json with(const std::string& pointer, const json& value) {
  auto content = small();
  content[json::json_pointer(pointer)] = value;
  return content;
}

json split(const json& pattern, const std::string& behavior, bool invert = false) {
  return with("/pre_tokenizer",
              {{"type", "Sequence"},
               {"pretokenizers",
                {{{"type", "Split"}, {"pattern", pattern}, {"behavior", behavior}, {"invert", invert}},
                 {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}});
}

std::string error_of(const json& content) {
  return testing::error_of([&] { tokenizer(content); });
}

std::vector<std::string> parts(const std::string& oniguruma, const std::string& text) {
  std::vector<std::string> all;
  for (const auto& piece : gpt::SplitPattern(gpt::OnigurumaPattern::to_pcre2(oniguruma)).split(text)) {
    all.push_back(text.substr(piece.begin, piece.end - piece.begin));
  }
  return all;
}

std::string refused(const std::string& pattern) {
  return testing::error_of([&] { gpt::OnigurumaPattern::to_pcre2(pattern); });
}

}  // namespace

TEST_CASE("tokenizer: the pair learned first is merged first, of equal ones the leftmost") {
  const auto bpe = tokenizer(small());
  CHECK(bpe.encode("abc") == Ids{5});
  CHECK(bpe.encode("abab") == Ids{4, 4});
  CHECK(bpe.encode("abcc") == Ids{5, 2});
  CHECK(bpe.encode(" a") == Ids{6});
  CHECK(bpe.encode(" ab") == Ids{3, 4});  // a b comes before Ġ a
  CHECK(bpe.encode("ac") == Ids{0, 2});   // in the vocabulary, but no merge makes it
  CHECK(bpe.encode("").empty());
}

TEST_CASE("tokenizer: words are split before bytes are merged") {
  const auto bpe = tokenizer(small());
  CHECK(bpe.encode("a b") == Ids{0, 3, 1});
  CHECK(bpe.encode("a  b") == Ids{0, 3, 3, 1});  // one of the two spaces belongs to b
  CHECK(bpe.encode("b  a") == Ids{1, 3, 6});     // ... so it can join a
  CHECK(bpe.encode("a's") == Ids{0, 15});
  CHECK(bpe.encode("a'\n12") == Ids{0, 13, 7, 16});
}

TEST_CASE("tokenizer: added tokens in the text are recognized") {
  auto content = small();
  CHECK(tokenizer(content).encode("ab<|end|>c<|end|>") == Ids{4, 18, 2, 18});
  CHECK(tokenizer(content).encode("a <|end|> c") == Ids{0, 3, 18, 3, 2});
  CHECK(tokenizer(content).encode("<|end|") == Ids{});  // no token spells < | e n d, and there is no unk_token

  content["added_tokens"] = {added(18, "1"), added(19, "122"), added(20, "2b")};
  content["added_tokens"][0]["id"] = 8;  // in the vocabulary already
  content["added_tokens"][1]["id"] = 18;
  content["added_tokens"][2]["id"] = 19;
  CHECK(tokenizer(content).encode("1122b") == Ids{8, 18, 1});  // the first, of two that start together the longest

  for (auto [flag, text, ids] : {std::tuple{"lstrip", "a \n <|end|> b", Ids{0, 18, 3, 1}},
                                 std::tuple{"rstrip", "a <|end|>\u3000\u0085 b", Ids{0, 3, 18, 1}},
                                 std::tuple{"single_word", "a<|end|> <|end|>1 <|end|>'", Ids{0, 3, 8, 3, 18, 13}}}) {
    auto flagged = small();
    flagged["added_tokens"][0][flag] = true;
    CHECK(tokenizer(flagged).encode(text) == ids);
  }

  content = small();
  content["added_tokens"] = {added(18, "1a"), added(19, "a<")};
  content["added_tokens"][0]["normalized"] = true;  // looked for only in what the others leave
  CHECK(tokenizer(content).encode("1a<") == Ids{8, 19});
}

TEST_CASE("tokenizer: Digits, a space in front, ignore_merges, pairs as arrays") {
  const json byte_level = small()["pre_tokenizer"];
  auto digits = [&](bool individual) {
    const json step = {{"type", "Digits"}, {"individual_digits", individual}};
    return tokenizer(with("/pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", {step, byte_level}}}));
  };
  CHECK(digits(true).encode("12a") == Ids{8, 9, 0});
  CHECK(digits(false).encode("12a") == Ids{16, 0});
  CHECK(digits(false).encode("a 12") == Ids{0, 3, 16});  // with GPT-2's pattern alone " 12" is one word

  const auto spaced = tokenizer(with("/pre_tokenizer/add_prefix_space", true));
  CHECK(spaced.encode("a") == Ids{6});
  CHECK(spaced.encode(" a") == Ids{6});
  CHECK(spaced.encode("a<|end|>a") == Ids{6, 18, 6});

  CHECK(tokenizer(with("/model/ignore_merges", true)).encode("ac") == Ids{17});
  CHECK(error_of(with("/model/merges", json::array({json::array({"a", "b"}), json::array({"b", "c"})}))) != "");
  CHECK(tokenizer(with("/model/merges", json::array({json::array({"a", "b"})}))).encode("abc") == Ids{4, 2});
}

TEST_CASE("tokenizer: what becomes of a match") {
  const json b = {{"Regex", "b"}};
  auto ids = [&](const std::string& behavior, bool invert) {
    return tokenizer(split(b, behavior, invert)).encode("abcabca");
  };
  CHECK(ids("Isolated", false) == Ids{0, 1, 2, 0, 1, 2, 0});
  CHECK(ids("Removed", false) == Ids{0, 2, 0, 2, 0});
  CHECK(ids("Removed", true) == Ids{1, 1});
  CHECK(ids("MergedWithPrevious", false) == Ids{4, 2, 4, 2, 0});  // ab, cab, ca
  CHECK(ids("MergedWithNext", false) == Ids{0, 1, 2, 0, 1, 2, 0});
  CHECK(ids("MergedWithNext", true) == Ids{4, 2, 4, 2, 0});
  CHECK(tokenizer(split({{"Regex", "[12]"}}, "Contiguous")).encode("a12a") == Ids{0, 16, 0});
  CHECK(tokenizer(split({{"Regex", "[12]"}}, "Isolated")).encode("a12a") == Ids{0, 8, 9, 0});
  CHECK(tokenizer(split({{"String", "."}}, "Isolated")).encode("ab") == Ids{4});
}

TEST_CASE("tokenizer: a byte without a token is unk_token, or nothing") {
  CHECK(tokenizer(small()).encode("aéxb") == Ids{0, 12, 1});  // x is left out
  auto content = with("/model/unk_token", "2");
  CHECK(tokenizer(content).encode("axyb") == Ids{0, 9, 9, 1});
  content["model"]["fuse_unk"] = true;
  CHECK(tokenizer(content).encode("axyb") == Ids{0, 9, 1});
}

TEST_CASE("tokenizer: what a whole text gets around it") {
  const json special = {{"<s>", {{"id", "<s>"}, {"ids", {7, 8}}, {"tokens", {"<s>", "x"}}}},
                        {"</s>", {{"id", "</s>"}, {"ids", {9}}, {"tokens", {"</s>"}}}}};
  const json begin = {{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}}, end = {{"SpecialToken", {{"id", "</s>"}}}};
  const json text = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}, second = {{"Sequence", {{"id", "B"}}}};
  auto pattern = [&](const std::vector<json>& single) {
    return json{
        {"type", "TemplateProcessing"}, {"single", single}, {"pair", json::array({text})}, {"special_tokens", special}};
  };
  const json byte_level = {{"type", "ByteLevel"}, {"add_prefix_space", true}, {"trim_offsets", true}};
  auto classes = [](const std::string& type) {
    return json{{"type", type}, {"sep", {"</s>", 2}}, {"cls", {"<s>", 3}}, {"add_prefix_space", false}};
  };
  auto sequence = [](const std::vector<json>& steps) { return json{{"type", "Sequence"}, {"processors", steps}}; };
  for (const auto& [processor, ids] : std::vector<std::pair<json, Ids>>{
           {nullptr, {4}},
           {byte_level, {4}},
           {pattern({text}), {4}},
           {pattern({begin, text}), {7, 8, 4}},
           {pattern({begin, text, end, end}), {7, 8, 4, 9, 9}},
           {classes("RobertaProcessing"), {3, 4, 2}},
           {classes("BertProcessing"), {3, 4, 2}},
           {sequence({}), {4}},
           {sequence({byte_level, pattern({begin, text, end})}), {7, 8, 4, 9}},
           {sequence({classes("BertProcessing"), sequence({pattern({begin, text, end})})}), {7, 8, 3, 4, 2, 9}},
       }) {
    CAPTURE(processor);
    const auto bpe = tokenizer(with("/post_processor", processor));
    CHECK(bpe.encode("ab") == Ids{4});
    CHECK(bpe.encode_whole("ab") == ids);
  }
  for (const auto& [processor, error] : std::vector<std::pair<json, std::string>>{
           {{{"type", "Marking"}}, R"(post_processor.type is "Marking"; only TemplateProcessing, RobertaProcessing)"},
           {sequence({json{{"type", "Marking"}}}), R"(post_processor.processors[0].type is "Marking"; only)"},
           {pattern({begin}), "; the text, A, has to be in it once"},
           {pattern({text, begin, text}), "; the text, A, has to be in it once"},
           {pattern({text, second}), "; a single text has the part A only"},
           {pattern({text, json{{"SpecialToken", {{"id", "<x>"}}}}}), "post_processor.special_tokens.<x> is null"},
           {{{"type", "BertProcessing"}, {"cls", json::array({"<s>"})}},
            "post_processor.cls is [\"<s>\"]; a token and its id"},
       }) {
    CHECK_THAT(error_of(with("/post_processor", processor)), testing::contains(error));
  }
}

TEST_CASE("tokenizer: ids turn into the same text again") {
  const auto bpe = tokenizer(small());
  for (const std::string text : {"", "abc a\n 12's é<|end|> \n", "<|end|>", "éa é"}) {
    CHECK(bpe.decode(bpe.encode(text)) == text);
  }
  CHECK(bpe.decode({10}) + bpe.decode({11}) == "é");  // the two bytes of one character
  CHECK(bpe.decode({6, 99, -1, 18}) == " a<|end|>");  // no token has the numbers 99 and -1
  CHECK(bpe.token_id("Ġa") == 6);
  CHECK(bpe.token_id("<|end|>") == 18);
  CHECK(bpe.token_id(" a") == std::nullopt);
  CHECK(bpe.vocab_size() == 19);
}

TEST_CASE("tokenizer: several threads") {
  const auto bpe = tokenizer(small());
  std::vector<Ids> found(4);
  std::vector<std::thread> threads;
  for (auto& ids : found) {
    threads.emplace_back([&] {
      for (int n = 0; n < 200; ++n) ids = bpe.encode("abc a's 12" + std::string(n % 50, 'a'));
    });
  }
  for (auto& thread : threads) thread.join();
  for (const auto& ids : found) CHECK(ids == found[0]);
}

TEST_CASE("tokenizer: long words and long runs") {
  const auto bpe = tokenizer(small());
  std::string text;
  for (int n = 0; n < 100000; ++n) text += "ab";
  CHECK(bpe.encode(text) == Ids(100000, 4));
  CHECK(bpe.encode(std::string(1000000, ' ') + "a") == [] {
    Ids ids(999999, 3);
    ids.push_back(6);
    return ids;
  }());
}

TEST_CASE("tokenizer: text that is not UTF-8") {
  const auto bpe = tokenizer(small());
  CHECK_THROWS_WITH(bpe.encode("ab\xE9"), testing::contains("has to be UTF-8, but at byte 2 of 3 it is not"));
  CHECK_THROWS_WITH(bpe.encode("\xED\xA0\x80"), testing::contains("at byte 0"));  // a surrogate
  CHECK(bpe.encode(std::string("a\0b", 3)) == Ids{0, 1});                         // NUL is a byte like others
}

TEST_CASE("tokenizer: what cannot be read is named with its file, field and value") {
  CHECK_THROWS_AS(tokenizer(with("/normalizer", {{"type", "NFC"}})), lora::CheckpointError);
  const std::vector<std::tuple<std::string, json, std::string>> cases = {
      {"/normalizer", {{"type", "NFC"}}, R"(normalizer is {"type":"NFC"}; only tokenizers without)"},
      {"/decoder", nullptr, "decoder is null; only ByteLevel"},
      {"/version", "2.0", R"(version is "2.0"; only 1.0)"},
      {"/pre_tokenizer", nullptr, "pre_tokenizer is null; ByteLevel is needed"},
      {"/pre_tokenizer/type", "Metaspace", R"(pre_tokenizer.type is "Metaspace"; ByteLevel is needed)"},
      {"/pre_tokenizer/add_prefix_space", "no", R"(pre_tokenizer.add_prefix_space is "no"; true or false)"},
      {"/model/type", "WordPiece", R"(model.type is "WordPiece"; only BPE)"},
      {"/model/dropout", 0.1, "model.dropout is 0.1"},
      {"/model/byte_fallback", true, "model.byte_fallback is true"},
      {"/model/end_of_word_suffix", "</w>", R"(model.end_of_word_suffix is "</w>")"},
      {"/model/unk_token", "?", R"(model.unk_token is "?"; it is not in model.vocab)"},
      {"/model/vocab", 7, "model.vocab is 7; an object is needed"},
      {"/model/vocab/b", -1, "model.vocab.b is -1; an id is needed"},
      {"/model/merges", nullptr, "model.merges is null; an array is needed"},
      {"/model/merges/1", "a b c", R"(model.merges[1] is "a b c"; a pair is needed)"},
      {"/model/merges/1", "b c", R"(model.merges[1] is "b c"; "bc" is not in model.vocab)"},
      {"/added_tokens/0/id", 40, R"(added_tokens[0].id is 40; "<|end|>" is number 18 by the vocabulary)"},
      {"/added_tokens/0/lstrip", nullptr, "added_tokens[0].lstrip is null; true or false"},
      {"/added_tokens/1", added(19, "<|end|>"), R"(added_tokens[1].content is "<|end|>"; it is there twice)"},
  };
  for (const auto& [pointer, value, text] : cases) {
    CAPTURE(pointer);
    CHECK_THAT(error_of(with(pointer, value)), testing::contains("tokenizer.json: " + text));
  }
  CHECK_THAT(error_of(split({{"Regex", "a\\b"}}, "Isolated")),
             testing::contains(R"(pre_tokenizer.pretokenizers[0].pattern.Regex is "a\\b"; )"));
  CHECK_THAT(error_of(split({{"Regex", "a)"}}, "Isolated")), testing::contains("PCRE2 cannot compile"));
  CHECK_THAT(error_of(split({{"Regex", "a"}}, "Joined")), testing::contains(R"(behavior is "Joined")"));
}

TEST_CASE("tokenizer: files that are none") {
  testing::TemporaryFolder folder;
  auto error = [&] { return testing::error_of([&] { gpt::Tokenizer bpe(folder / "tokenizer.json"); }); };
  CHECK_THAT(error(), testing::contains("tokenizer.json: cannot be opened"));
  std::ofstream(folder / "tokenizer.json") << "{\"model\": ";
  CHECK_THAT(error(), testing::contains("tokenizer.json: is no JSON: "));
  std::ofstream(folder / "tokenizer.json") << "[]";
  CHECK_THAT(error(), testing::contains("tokenizer.json: the content is []; an object is needed"));
}

TEST_CASE("tokenizer: patterns of Oniguruma mean the same in PCRE2") {
  using Parts = std::vector<std::string>;
  CHECK(parts(R"(\p{L}+)", "aé\u1C89\U0001E5D0\u0301b") == Parts{"aé\u1C89\U0001E5D0", "\u0301", "b"});  // Unicode 16
  CHECK(parts(R"(\d)", "1\U00016130\u00BD") == Parts{"1", "\U00016130", "\u00BD"});
  CHECK(parts(R"(\s+)", "a \u0085\u3000\u180Eb") == Parts{"a", " \u0085\u3000", "\u180Eb"});  // not U+180E
  CHECK(parts(R"([a[bc]]+)", "abc[d") == Parts{"abc", "[d"});
  CHECK(parts(R"([^\s\-a]+)", "b-a c") == Parts{"b", "-a ", "c"});
  CHECK(parts(R"('(?i:s))", "'S's'\u017F") == Parts{"'S", "'s", "'\u017F"});
  CHECK(parts("x*", "axxb") == Parts{"", "a", "xx", "b", ""});
  CHECK(parts(R"(a$)", "a\na") == Parts{"a", "\n", "a"});
  CHECK(parts(R"(\s++$)", "a \n b ") == Parts{"a \n b", " "});

  for (const std::string part : {R"(\w)", R"(\h)", R"(\b)", R"(\x)", R"(\p{Han})", R"(\p{^L})", R"(\1)", "(?<name>",
                                 "(?i)", "(*", "{,3}", "{1,3}+", "{2}?"}) {
    CAPTURE(part);
    CHECK(refused("a" + part) != "");
  }
  for (const std::string set :
       {"[]", "[^]a]", "[a&&b]", "[[:alpha:]]", "[a[^b]]", R"([\S])", R"([\s-z])", R"([ab-\s])", "[a"}) {
    CAPTURE(set);
    CHECK(refused(set) != "");
  }
  CHECK_THAT(refused(R"((?i:\p{Lu}))"),
             testing::contains(R"(\p{Lu} in (?i: is not supported in the pattern (?i:\p{Lu}))"));
}
