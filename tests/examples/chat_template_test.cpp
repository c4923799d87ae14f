#include <support/testing.hpp>

#include <fstream>

#include "chat_template.hpp"

namespace {

using nlohmann::json;
using testing::contains;
using testing::error_of;

void write(const std::filesystem::path& file, const std::string& text) { std::ofstream(file) << text; }

constexpr const char* kTemplate =
    "{{ bos_token }}{% for message in messages %}\n"
    "    {%- if message.role == 'tool' %}{{ raise_exception('no tools, please') }}{% endif %}\n"
    "<{{ message['role'] }}>{{ message['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

}  // namespace

TEST_CASE("a directory without a chat template is refused, and told what to do") {
  testing::TemporaryFolder folder;
  auto error = [&] { return error_of([&] { gpt::ChatTemplate chat(folder.path()); }); };
  CHECK_THAT(error(), contains("has no chat template, neither chat_template.jinja nor \"chat_template\" in"));
  const json unnamed = {{"chat_template", {{{"name", "tool_use"}, {"template", "x"}}}}};
  write(folder / "tokenizer_config.json", unnamed.dump());
  CHECK_THAT(error(), contains("has no chat template"));
}

#ifdef GPT_HAS_JINJA

TEST_CASE("a conversation is written as the chat template says, wherever that is") {
  const json named = {{{"name", "tool_use"}, {"template", "x"}}, {{"name", "default"}, {"template", kTemplate}}};
  for (const json& place : {json(nullptr), json(kTemplate), named}) {
    testing::TemporaryFolder folder;
    json config = {{"bos_token", "<s>"}, {"eos_token", {{"content", "</s>"}}}, {"chat_template", "not this one"}};
    if (!place.is_null()) config["chat_template"] = place;
    if (place.is_null()) write(folder / "chat_template.jinja", kTemplate);
    write(folder / "tokenizer_config.json", config.dump());
    const gpt::ChatTemplate chat(folder.path());
    CHECK(chat.render({{"system", " Be {{ brief }}.\n"}, {"user", "Hi!"}}, true) ==
          "<s><system>Be {{ brief }}.</s>\n<user>Hi!</s>\n<assistant>");
    CHECK(chat.render({{"user", "é \"q\""}}, false) == "<s><user>é \"q\"</s>\n");
    CHECK_THAT(error_of([&] {
                 chat.render({{"tool", "7"}}, true);
               }),
               contains("the chat template of " + folder.path().string() + " says: no tools, please"));
  }
}

TEST_CASE("a chat template that cannot be parsed is refused in one line") {
  testing::TemporaryFolder folder;
  write(folder / "chat_template.jinja", "a\n{% for m in %}");
  const auto error = error_of([&] { gpt::ChatTemplate chat(folder.path()); });
  CHECK_THAT(error, contains("the chat template is no Jinja: "));
  CHECK(error.find('\n') == std::string::npos);
}

#else

TEST_CASE("without an engine a chat template is refused, and it is said how to get one") {
  testing::TemporaryFolder folder;
  write(folder / "chat_template.jinja", kTemplate);
  CHECK_THAT(error_of([&] { gpt::ChatTemplate chat(folder.path()); }), contains("prepare_jinja.py build/jinja"));
}

#endif
