// Regular expressions: which are refused, and how. What a pattern matches is in patterns_test.cpp.
#include "support/testing.hpp"

#include <lora/selection/expression.hpp>

namespace {

std::string repeated(const std::string& text, size_t times) {
  std::string all;
  for (size_t i = 0; i < times; ++i) all += text;
  return all;
}

}  // namespace

TEST_CASE("The depth of a pattern is that of its brackets; escaped ones do not count") {
  const auto [pattern, depth] = GENERATE(table<std::string, size_t>({
      {"", 0},
      {"abc", 0},
      {"(a)", 1},
      {"(a)(b)(c)", 1},
      {"((a)b)", 2},
      {"(a(b(c)))(d)", 3},
      {"(((", 3},
      {")))(", 1},
      {R"(\(\(a\)\))", 0},
      {R"(\\(a))", 1},  // an escaped backslash, then a bracket
      {"(?:a(?=b))", 2},
      {R"(a\)", 0},
  }));
  INFO(pattern);
  CHECK(lora::detail::nesting(pattern) == depth);
}

TEST_CASE("The longest number of a pattern is one that repeats or refers") {
  const auto [pattern, digits] = GENERATE(table<std::string, size_t>({
      {"", 0},
      {"abc", 0},
      {"layers1234567", 0},
      {"a{1}", 1},
      {"a{12,345}", 3},
      {"a{1234,5}", 4},
      {"a{12,}", 2},
      {R"((a)\1)", 1},
      {R"(\123b{1})", 3},
      {R"(\d{2}\.)", 1},
      {"a{", 0},
      {"a{123", 3},
  }));
  INFO(pattern);
  CHECK(lora::detail::most_digits(pattern) == digits);
}

TEST_CASE("What is a regular expression within the limits compiles") {
  const auto pattern = GENERATE(as<std::string>(), "", "a", R"(layers\.[01]\.[qv]_proj)", "a|b", "(?:a)(?=b)b",
                                "a{1,20}", R"((a)\1)", "[^.]+", ".*?", R"(\d\w\s\b)",
                                repeated("(", 200) + repeated(")", 200), repeated("(a)", 300), repeated("a", 10000));
  INFO(pattern.substr(0, 60));
  CHECK_NOTHROW(lora::detail::compile(pattern, pattern));
}

TEST_CASE("What is no regular expression is shown as it was written") {
  const auto pattern =
      GENERATE(as<std::string>(), "(", "a)", "[", "[b-a]", "*", "a{2", "a{2,1}", "\\", R"((a)\2)", "(?<=a)b");
  INFO(pattern);
  CHECK_THROWS_AS(lora::detail::compile(pattern, "as written"), c10::ValueError);
  const auto error = testing::error_of([&] { lora::detail::compile(pattern, "as written"); });
  CHECK_THAT(error, testing::contains("lora::LoRAConfig: \"as written\" is not a regular expression"));
}

TEST_CASE("A pattern that would cost too much is refused with the limits and what it has") {
  const auto [pattern, has] = GENERATE(table<std::string, std::string>({
      {repeated("a", 10001), "has 10001, 0 and 0"},
      {repeated("(", 201) + repeated(")", 201), "has 402, 201 and 0"},
      {repeated("(", 100000), "has 100000, 100000 and 0"},
      {"a{1234567890}", "has 13, 0 and 10"},
      {"a{1,1234567890}", "has 15, 0 and 10"},
      {R"(\1234567890)", "has 11, 0 and 10"},
      {"a{" + repeated("9", 40) + "}", "has 43, 0 and 40"},
  }));
  CHECK_THROWS_AS(lora::detail::compile(pattern, pattern), c10::ValueError);
  const auto error = testing::error_of([&text = pattern] { lora::detail::compile(text, text); });
  CHECK_THAT(error, testing::contains("10000 characters, 200 brackets in each other and numbers of 9 digits") &&
                        testing::contains("\"" + pattern.substr(0, 60) + "...\" " + has));
  CHECK(error.size() < 300);  // not all of the pattern
}

TEST_CASE("A letter after a backslash that means nothing is named, and Python's beginning and end are understood") {
  const auto error = testing::error_of([] { lora::detail::compile("a\\yb", "a\\yb"); });
  CHECK_THAT(error, testing::contains("\"a\\yb\" has \\y, which is nothing in a regular expression"));
  CHECK(std::regex_search("q_proj", lora::detail::compile("\\Aq_proj\\Z", "as written")));
  CHECK_FALSE(std::regex_search("xq_proj", lora::detail::compile("\\Aq_proj\\Z", "as written")));
  CHECK_FALSE(std::regex_search("q_projZ", lora::detail::compile("\\Aq_proj\\Z", "as written")));
}
