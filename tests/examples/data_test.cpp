#include "support/testing.hpp"

#include <algorithm>
#include <fstream>
#include <set>

#include "data.hpp"

namespace {

using testing::contains;
using testing::error_of;

// One token for each byte, and one for each of ChatML's marks, so that everything below can be counted by hand.
std::vector<int64_t> encode(std::string_view text) {
  std::vector<int64_t> ids;
  for (size_t i = 0; i < text.size();) {
    const auto rest = text.substr(i);
    const bool is_open = rest.rfind("<|im_start|>", 0) == 0, is_close = rest.rfind("<|im_end|>", 0) == 0;
    ids.push_back(is_open ? 300 : is_close ? 301 : static_cast<unsigned char>(text[i]));
    i += is_open ? 12 : is_close ? 10 : 1;
  }
  return ids;
}

// A conversation in ChatML.
std::string render(const std::vector<gpt::ChatMessage>& messages, bool open_reply) {
  std::string text;
  for (const auto& message : messages) text += "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>\n";
  return open_reply ? text + "<|im_start|>assistant\n" : text;
}

gpt::TextFormat format(std::optional<int64_t> end) {
  return {encode, {}, {}, end, render, [](int64_t id) { return id >= 300; }};
}

// A tokenizer that puts 400 in front of each text and `after` behind.
gpt::TextFormat enclosing(std::optional<int64_t> end, std::vector<int64_t> after = {}) {
  auto result = format(end);
  result.before = {400};
  result.after = std::move(after);
  return result;
}

using Ids = std::vector<int32_t>;

std::vector<gpt::Example> numbered_blocks(int64_t count) {
  std::vector<gpt::Example> examples;
  for (int32_t i = 0; i < count; ++i) examples.push_back({{i}, {i + 1000}});
  return examples;
}

std::filesystem::path write_file(const std::filesystem::path& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
  return path;
}

}  // namespace

TEST_CASE("A stream is cut into blocks that predict every token but the first once", "[examples][data]") {
  const auto blocks = gpt::cut_into_blocks({10, 11, 12, 13, 14, 15, 16, 17}, 3);
  REQUIRE(blocks.size() == 2);  // the last token is left over
  CHECK(blocks[0].inputs == Ids{10, 11, 12});
  CHECK(blocks[0].targets == Ids{11, 12, 13});
  CHECK(blocks[1].inputs == Ids{13, 14, 15});
  CHECK(blocks[1].targets == Ids{14, 15, 16});
  CHECK(gpt::cut_into_blocks({10, 11, 12}, 3).empty());
  CHECK(gpt::cut_into_blocks({10, 11, 12, 13}, 3).size() == 1);
}

TEST_CASE("Text files become one stream with the end of text between them", "[examples][data]") {
  testing::TemporaryFolder folder;
  const std::vector<std::filesystem::path> files{write_file(folder / "a.txt", "abc"),
                                                 write_file(folder / "b.txt", "de")};
  const auto blocks = gpt::read_text(files, format(999), 2);
  REQUIRE(blocks.size() == 2);
  CHECK(blocks[0].inputs == Ids{'a', 'b'});
  CHECK(blocks[1].inputs == Ids{'c', 999});
  CHECK(blocks[1].targets == Ids{999, 'd'});
  CHECK(gpt::read_text(files, enclosing(999), 2)[0].inputs == Ids{400, 'a'});
  CHECK(gpt::read_text(files, enclosing(999), 2)[2].inputs == Ids{999, 400});
  CHECK(gpt::read_text(files, enclosing(999, {999}), 3)[1].inputs == Ids{'c', 999, 400});  // not twice
  CHECK(gpt::read_text({files[0]}, format(std::nullopt), 1)[1].targets == Ids{'c'});
  CHECK_THAT(error_of([&] { gpt::read_text(files, format(std::nullopt), 2); }),
             contains("--text: the 2 files cannot be told apart, because this model names no token that ends a text"));
  CHECK_THAT(error_of([&] { gpt::read_text(files, format(999), 3); }), contains("has 6 tokens, at least 7"));
  CHECK_THAT(error_of([&] { gpt::read_text({folder / "none.txt"}, format(999), 3); }),
             contains("none.txt: cannot be read"));
  auto refuse = format(999);
  refuse.encode = [](std::string_view) -> std::vector<int64_t> { TORCH_CHECK(false, "has to be UTF-8"); };
  CHECK_THAT(error_of([&] { gpt::read_text(files, refuse, 3); }), contains("a.txt: has to be UTF-8"));
}

TEST_CASE("Validation is the end of the data, evenly thinned out", "[examples][data]") {
  const auto data = gpt::split(numbered_blocks(20), 0.2, 100);
  CHECK(data.train.size() == 16);
  REQUIRE(data.validation.size() == 4);
  CHECK(data.train.back().inputs == Ids{15});
  CHECK(data.validation.front().inputs == Ids{16});
  CHECK(data.validation.back().inputs == Ids{19});

  const auto thinned = gpt::split(numbered_blocks(20), 0.5, 3);
  CHECK(thinned.train.size() == 10);  // what is left out of the validation is not learned either
  REQUIRE(thinned.validation.size() == 3);
  CHECK(thinned.validation[0].inputs == Ids{10});
  CHECK(thinned.validation[1].inputs == Ids{13});
  CHECK(thinned.validation[2].inputs == Ids{16});

  CHECK(gpt::split(numbered_blocks(2), 0.01, 9).validation.size() == 1);
  CHECK(gpt::split(numbered_blocks(2), 0.99, 9).train.size() == 1);
  CHECK_THAT(error_of([] { gpt::split(numbered_blocks(1), 0.5, 9); }), contains("has 1 example(s), at least 2"));
  CHECK_THAT(error_of([] { gpt::split(numbered_blocks(9), 1.0, 9); }), contains("--validation-share"));
}

TEST_CASE("The fingerprint changes with every token and with the split", "[examples][data]") {
  const auto print = gpt::split(numbered_blocks(9), 0.3, 9).fingerprint();
  CHECK(gpt::split(numbered_blocks(9), 0.3, 9).fingerprint() == print);
  CHECK(gpt::split(numbered_blocks(9), 0.5, 9).fingerprint() != print);
  auto other = numbered_blocks(9);
  other[8].targets[0] += 1;
  CHECK(gpt::split(other, 0.3, 9).fingerprint() != print);
}

TEST_CASE("Shorter examples are filled up with what does not count", "[examples][data]") {
  const gpt::Example longer{{1, 2, 3}, {2, gpt::kIgnored, 4}}, shorter{{7}, {8}};
  const auto batch = gpt::collate({&longer, &shorter});
  CHECK(torch::equal(batch.inputs, torch::tensor({{1, 2, 3}, {7, 0, 0}}, torch::kLong)));
  CHECK(torch::equal(batch.targets, torch::tensor({{2, -100, 4}, {8, -100, -100}}, torch::kLong)));
  CHECK(batch.read == 4);
  CHECK(batch.learned == 3);
  CHECK(gpt::collate({&shorter}, 5).inputs.sizes() == torch::IntArrayRef({1, 5}));
}

TEST_CASE("Each epoch sees everything once, in an order that follows from the seed", "[examples][data]") {
  const auto examples = numbered_blocks(10);
  auto first_rows = [&](uint64_t seed, int64_t from, int64_t to) {
    gpt::TrainingBatches batches(examples, 3, seed);
    std::vector<int64_t> rows;
    for (auto i = from; i < to; ++i) {
      const auto inputs = batches.at(i).inputs.flatten();
      rows.insert(rows.end(), inputs.data_ptr<int64_t>(), inputs.data_ptr<int64_t>() + inputs.numel());
    }
    return rows;
  };
  const auto rows = first_rows(5, 0, 10);  // 30 rows: three epochs of ten, which batches of three do not divide
  for (int epoch = 0; epoch < 3; ++epoch) {
    CHECK(std::set<int64_t>(rows.begin() + 10 * epoch, rows.begin() + 10 * (epoch + 1)).size() == 10);
  }
  CHECK(std::vector<int64_t>(rows.begin(), rows.begin() + 10) !=
        std::vector<int64_t>(rows.begin() + 10, rows.begin() + 20));
  CHECK(first_rows(5, 0, 10) == rows);
  CHECK(first_rows(6, 0, 10) != rows);
  CHECK(first_rows(5, 4, 10) == std::vector<int64_t>(rows.begin() + 12, rows.end()));  // nothing has to be replayed
  CHECK_THAT(error_of([] { gpt::TrainingBatches({}, 3, 0); }), contains("no example"));
}

TEST_CASE("Of a pair only the completion and the end are learned", "[examples][data]") {
  testing::TemporaryFolder folder;
  const auto file = write_file(folder / "pairs.jsonl", "{\"prompt\": \"ab\", \"completion\": \"xyz\"}\n\n");
  const auto dialogues = gpt::read_jsonl(file, format(2), 100);
  REQUIRE(dialogues.examples.size() == 1);
  CHECK(dialogues.examples[0].inputs == Ids{'a', 'b', 'x', 'y', 'z'});
  CHECK(dialogues.examples[0].targets == Ids{-100, 'x', 'y', 'z', 2});
  CHECK_FALSE(dialogues.is_chat);
  CHECK(dialogues.ends == std::set<int64_t>{2});
  CHECK(gpt::read_jsonl(file, format(std::nullopt), 100).examples[0].targets == Ids{-100, 'x', 'y', 'z'});
}

TEST_CASE("A pair stands between what the tokenizer puts around a text", "[examples][data]") {
  testing::TemporaryFolder folder;
  const auto file = write_file(folder / "pairs.jsonl", "{\"prompt\": \"a\", \"completion\": \"x\"}\n");
  auto example = [&](const gpt::TextFormat& format) { return gpt::read_jsonl(file, format, 100).examples.at(0); };
  CHECK(example(enclosing(2)).inputs == Ids{400, 'a', 'x'});
  CHECK(example(enclosing(2)).targets == Ids{-100, 'x', 2});
  CHECK(example(enclosing(2, {2})).targets == Ids{-100, 'x', 2});  // the tokenizer closes it itself
  CHECK(example(enclosing(2, {7})).targets == Ids{-100, 'x', 2, -100});
}

TEST_CASE("Of a conversation only what the assistant says is learned", "[examples][data]") {
  testing::TemporaryFolder folder;
  const auto file = write_file(
      folder / "chat.jsonl", R"({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"},)"
                             R"({"role": "user", "content": "s"}, {"role": "assistant", "content": "t"}]})");
  const auto dialogues = gpt::read_jsonl(file, format(2), 1000);
  REQUIRE(dialogues.examples.size() == 1);
  CHECK(dialogues.is_chat);
  const auto& [inputs, targets] = dialogues.examples[0];
  // <|im_start|> u s e r \n q <|im_end|> \n  <|im_start|> a s s i s t a n t \n r <|im_end|> \n  and once more.
  REQUIRE(inputs.size() == 2 * (9 + 14) - 1);
  std::vector<std::pair<size_t, int32_t>> learned;
  for (size_t i = 0; i < targets.size(); ++i) {
    if (targets[i] != gpt::kIgnored) learned.emplace_back(i, targets[i]);
  }
  CHECK(learned == std::vector<std::pair<size_t, int32_t>>{{19, 'r'}, {20, 301}, {42, 't'}, {43, 301}});
  CHECK(dialogues.ends == std::set<int64_t>{301});
  CHECK(inputs[19] == '\n');  // what opens the reply is read, not learned
  CHECK(Ids(inputs.begin(), inputs.begin() + 9) == Ids{300, 'u', 's', 'e', 'r', '\n', 'q', 301, '\n'});
}

TEST_CASE("What a chat template writes behind a reply, and between replies, is not learned", "[examples][data]") {
  // One that begins with 300, closes a whole conversation with 302 "e", and writes a default system of its own.
  auto with_end = format(2);
  with_end.encode = [](std::string_view text) {
    auto ids = encode(text);
    std::replace(ids.begin(), ids.end(), int64_t{'e'}, int64_t{302});
    return ids;
  };
  with_end.render = [](const std::vector<gpt::ChatMessage>& messages, bool open_reply) {
    std::string text = messages.front().role == "system" ? "" : "S\n";
    for (const auto& message : messages) text += message.role.substr(0, 1) + ":" + message.content + "<|im_end|>\n";
    return text + (open_reply ? "a:" : "e");
  };
  std::set<int64_t> ends;
  auto learned = [&](const std::vector<gpt::ChatMessage>& messages) {
    const auto tokens = gpt::detail::encode_conversation(messages, with_end, ends);
    CHECK(tokens.ids == with_end.encode(with_end.render(messages, false)));
    std::vector<int64_t> ids;
    for (size_t i = 0; i < tokens.ids.size(); ++i) {
      if (tokens.learn[i]) ids.push_back(tokens.ids[i]);
    }
    return ids;
  };
  using Tokens = std::vector<int64_t>;
  CHECK(learned({{"user", "q"}, {"assistant", "r"}, {"user", "s"}, {"assistant", "t"}, {"user", "v"}}) ==
        Tokens{'r', 301, 't', 301});
  CHECK(ends == std::set<int64_t>{301});
  CHECK(learned({{"system", "q"}, {"assistant", "r"}}) == Tokens{'r', 301, '\n', 302});
  CHECK(ends == std::set<int64_t>{301, 302});

  with_end.is_added = [](int64_t) { return false; };  // nothing tells a closing from a reply: both are learned
  CHECK(learned({{"user", "q"}, {"assistant", "r"}, {"user", "s"}}) == Tokens{'r', 301, '\n'});

  with_end.render = [](const std::vector<gpt::ChatMessage>& messages, bool open_reply) {
    return std::to_string(messages.size()) + (open_reply ? "a:" : "");
  };
  CHECK_THAT(error_of([&] {
               learned({{"user", "q"}, {"assistant", "r"}});
             }),
             contains("messages[1]: the chat template writes the conversation up to this reply in another way"));
  CHECK_THAT(error_of([&] { learned({{"assistant", "r"}}); }), contains("messages[0] is the assistant's"));
}

TEST_CASE("Examples that are too long are cut, and left out when nothing to learn remains", "[examples][data]") {
  testing::TemporaryFolder folder;
  const auto file = write_file(folder / "long.jsonl",
                               "{\"prompt\": \"abcd\", \"completion\": \"xyz\"}\n"
                               "{\"prompt\": \"a\", \"completion\": \"xyz\"}\n"
                               "{\"prompt\": \"a\", \"completion\": \"x\"}\n");
  const auto dialogues = gpt::read_jsonl(file, format(2), 3);
  REQUIRE(dialogues.examples.size() == 2);
  CHECK(dialogues.examples[0].targets == Ids{'x', 'y', 'z'});
  CHECK(dialogues.examples[1].targets == Ids{'x', 2});
  CHECK(dialogues.shortened == 2);
  CHECK(dialogues.dropped == 1);
  const auto cut = write_file(folder / "cut.jsonl", "{\"prompt\": \"abcd\", \"completion\": \"xyz\"}\n");
  const auto error = error_of([&] { gpt::read_jsonl(cut, format(2), 3); });
  CHECK_THAT(error, contains("cut.jsonl: all 1 examples have nothing left to learn"));
  CHECK_THAT(error, contains("cut at 3 tokens; give a larger --block"));
}

TEST_CASE("A malformed line is named with its file, its number and what is wrong", "[examples][data]") {
  testing::TemporaryFolder folder;
  const std::string good = "{\"prompt\": \"a\", \"completion\": \"b\"}\n";
  const std::vector<std::pair<std::string, std::string>> cases{
      {"{\"prompt\": \"a\", ", "not valid JSON at column"},
      {"\"text\"", "must be a JSON object, found string"},
      {"{\"text\": \"a\"}", "must have \"prompt\" and \"completion\", or \"messages\""},
      {"{\"prompt\": \"a\"}", "\"completion\" is missing"},
      {"{\"prompt\": 7, \"completion\": \"b\"}", "\"prompt\" must be a string, found number"},
      {"{\"prompt\": \"a\", \"completion\": \"\"}", "\"completion\" is empty"},
      {"{\"messages\": {}}", "\"messages\" must be a list, found object"},
      {"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}", "no message of the assistant"},
      {"{\"messages\": [\"a\"]}", "messages[0]: must be an object"},
      {"{\"messages\": [{\"role\": \"robot\", \"content\": \"a\"}]}", "found \"robot\""},
      {"{\"messages\": [{\"role\": \"user\"}]}", "messages[0]: \"content\" is missing"},
      {"{\"prompt\": \"\xff\", \"completion\": \"b\"}", "not valid JSON at column"},
  };
  for (const auto& [line, reason] : cases) {
    const auto file = write_file(folder / "bad.jsonl", good + "\n" + line + "\n" + good);
    const auto error = error_of([&] { gpt::read_jsonl(file, format(2), 100); });
    CAPTURE(line);
    CHECK_THAT(error, contains("bad.jsonl:3: "));
    CHECK_THAT(error, contains(reason));
  }
}
