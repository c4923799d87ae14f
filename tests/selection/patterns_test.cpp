// rank_pattern and alpha_pattern: which value a name gets, as in PEFT.
#include "support/testing.hpp"

#include <lora/selection/patterns.hpp>
#include <lora/selection/text.hpp>

namespace {

using Names = std::vector<std::string>;
using Numbers = lora::detail::Patterns<int64_t>;

/// Whether a pattern matches a name.
bool matches(const std::string& pattern, const std::string& name) {
  return Numbers({{pattern, 1}}).value(name, 0) == 1;
}

}  // namespace

TEST_CASE("A pattern is tried on the whole name, and on what follows a dot") {
  const auto [pattern, name, is_match] = GENERATE(table<std::string, std::string, bool>({
      {"q_proj", "q_proj", true},
      {"q_proj", "layers.0.q_proj", true},
      {"0.q_proj", "layers.0.q_proj", true},
      {"layers.0.q_proj", "layers.0.q_proj", true},
      {"q_proj", "layers.0.xq_proj", false},
      {"q_proj", "layers.0.q_projx", false},
      {"q_proj", "layers.0.q_proj.inner", false},
      {"q_proj", "layers.0q_proj", false},
      {"proj", "q_proj", false},
      {"layers.0", "layers.0.q_proj", false},
      {"layers.0", "layersx0", true},  // the dot of a regular expression
      {R"(layers\.0)", "layersx0", false},
      {R"(layers\.[01]\.[qv]_proj)", "model.layers.1.v_proj", true},
      {R"(layers\.[01]\.[qv]_proj)", "model.layers.2.v_proj", false},
      {R"(\Aq_proj\Z)", "q_proj", true},  // Python's words for the beginning and the end
      {R"(\Aq_proj\Z)", "Aq_projZ", false},
      {R"(.*q_proj\Z)", "layers.0.q_proj", true},
      {".*", "anything.at.all", true},
      {"q|v", "layers.v", true},  // the alternatives are bracketed before the prefix is put in front
      {"q|v", "layers.q", true},
      {"q|v", "q.x", false},
      {"q|v", "layers.qv", false},
      {"^head", "head", true},
      {"^head", "model.head", false},
      {"head$", "model.head", true},
      {"", "head", false},
      {"", "", true},
      {R"(\d+)", "layers.12", true},
      {"Head", "head", false},
  }));
  INFO(pattern << " on " << name);
  CHECK(matches(pattern, name) == is_match);
}

#ifdef __GLIBCXX__
TEST_CASE("A pattern that can match in very many ways takes no longer for it") {
  const auto [pattern, is_match] = GENERATE(table<std::string, bool>({
      {"((x*)*)*y", false},
      {"(x|x|x)*y", false},
      {"(x?){60}x{30}", true},
      {"(x+x+)+y", false},
      {"(.*)*(.*)*(.*)*y", false},
      {"((x*)*)*", true},
  }));
  INFO(pattern);
  CHECK(matches(pattern, std::string(60, 'x')) == is_match);
}
#endif

TEST_CASE("A pattern may refer back to one of its brackets, the first of which is the prefix") {
  CHECK(matches(R"((\w)_\3)", "layers.0.q_q"));
  CHECK_FALSE(matches(R"((\w)_\3)", "layers.0.q_v"));
}

TEST_CASE("Of several patterns that match, the first one counts; a name that none matches gets the other value") {
  Numbers patterns({{"0.q_proj", 1}, {"q_proj", 2}, {".*_proj", 3}, {"q_proj", 4}});
  CHECK(patterns.value("layers.0.q_proj", 9) == 1);
  CHECK(patterns.value("layers.1.q_proj", 9) == 2);
  CHECK(patterns.value("layers.1.v_proj", 9) == 3);
  CHECK(patterns.value("head", 9) == 9);
  CHECK(patterns.value("head", 8) == 8);
  CHECK(Numbers({}).value("head", 7) == 7);
  CHECK(lora::detail::Patterns<double>({{"head", 0.5}}).value("model.head", 1) == 0.5);
}

TEST_CASE("Patterns that have matched no name are known, in their order and as they were written") {
  Numbers patterns({{"q|v", 1}, {"haed", 2}, {"v", 3}, {"k", 4}});
  CHECK(patterns.unused() == Names{"q|v", "haed", "v", "k"});
  patterns.value("head", 0);
  CHECK(patterns.unused() == Names{"q|v", "haed", "v", "k"});
  patterns.value("layers.q", 0);
  CHECK(patterns.unused() == Names{"haed", "v", "k"});
  patterns.value("layers.v", 0);  // the first pattern counts, but the third one is not mistyped
  CHECK(patterns.unused() == Names{"haed", "k"});
  CHECK(Numbers({}).unused().empty());
}

TEST_CASE("A pattern that is none is shown as it was written") {
  const auto error = testing::error_of([] { Numbers({{"head", 1}, {"layers.[", 2}}); });
  CHECK_THAT(error, testing::contains("\"layers.[\" is not a regular expression"));
  const auto deep = testing::error_of([] { Numbers({{std::string(300, '('), 1}}); });
  CHECK_THAT(deep, testing::contains("\"" + std::string(60, '(') + "...\" has"));
}

TEST_CASE("An escaped name matches itself and nothing near it") {
  std::string printable;
  for (char letter = ' '; letter <= '~'; ++letter) printable += letter;
  const auto name = GENERATE_COPY(as<std::string>(), "layers.0.q_proj", "a+b", "[0-9]", "(x)|y", R"(\d\\)", "a{2}^$?*",
                                  "\xC3\xA4.\xC3\xB6", printable);
  const auto pattern = lora::detail::escaped(name);
  INFO(name << " as " << pattern);
  CHECK(matches(pattern, name));
  CHECK(matches(pattern, "model." + name));
  for (size_t i = 0; i < name.size(); ++i) {
    INFO("at " << i);
    auto without = name, with = name, changed = name;
    without.erase(i, 1);
    with.insert(i, 1, name[i]);
    changed[i] = name[i] == 'x' ? 'y' : 'x';
    CHECK_FALSE(matches(pattern, without));
    CHECK_FALSE(matches(pattern, with));
    CHECK_FALSE(matches(pattern, changed));
  }
}
