// Names, and what errors say of them.
#include "support/testing.hpp"

#include <lora/selection/text.hpp>

namespace {

using Names = std::vector<std::string>;

}  // namespace

TEST_CASE("An entry means the module of that name, and those whose name ends in a dot and the entry") {
  const auto [name, entry, is_meant] = GENERATE(table<std::string, std::string, bool>({
      {"q_proj", "q_proj", true},
      {"layers.0.q_proj", "q_proj", true},
      {"layers.0.q_proj", "0.q_proj", true},
      {"layers.0.q_proj", "layers.0.q_proj", true},
      {"layers.0.q_proj", "proj", false},
      {"layers.0.q_proj", "layers", false},
      {"layers.0.q_proj", "0", false},
      {"layers.0.q_proj", ".q_proj", false},
      {"layers.10.q_proj", "0.q_proj", false},
      {"q_proj", "layers.0.q_proj", false},
      {"q_proj", "Q_proj", false},
      {"layersxq_proj", "layers.q_proj", false},
      {"", "", true},
      {"a", "", false},
  }));
  INFO(name << " by " << entry);
  CHECK(lora::detail::is_or_ends_with(name, entry) == is_meant);
}

TEST_CASE("The owner of a tensor is what stands before the last dot") {
  CHECK(lora::detail::owner_of("layers.0.q_proj.weight") == "layers.0.q_proj");
  CHECK(lora::detail::owner_of("head.weight") == "head");
  CHECK(lora::detail::owner_of("weight").empty());
  CHECK(lora::detail::owner_of("").empty());
}

TEST_CASE("A list shows the first names and counts the others") {
  CHECK(lora::detail::list({}) == "none");
  CHECK(lora::detail::list({"a"}) == "a");
  CHECK(lora::detail::list({"a", "b", "c", "d", "e", "f"}) == "a, b, c, d, e, f");
  CHECK(lora::detail::list({"a", "b", "c", "d", "e", "f", "g", "h"}) == "a, b, c, d, e, f (+2 more)");
  CHECK(lora::detail::list({"a", "b", "c"}, 2) == "a, b (+1 more)");
  CHECK(lora::detail::list({"a", "b"}, 2) == "a, b");
  const std::string wide(60, 'w'), line(200, 'l');  // more than a line is written one below the other
  CHECK(lora::detail::list({wide, wide, wide}, 2) == "\n  " + wide + ",\n  " + wide + " (+1 more)");
  CHECK(lora::detail::list({line}) == line);
}

TEST_CASE("The distance of two words counts letters put in, left out, changed, and neighbours that changed places") {
  const auto [a, b, edits] = GENERATE(table<std::string, std::string, size_t>({
      {"", "", 0},
      {"head", "head", 0},
      {"", "abc", 3},
      {"head", "heads", 1},
      {"head", "ead", 1},
      {"head", "heat", 1},
      {"head", "haed", 1},
      {"head", "ehda", 2},
      {"ab", "ba", 1},
      {"ca", "abc", 3},  // a pair that changed places is not edited again
      {"kitten", "sitting", 3},
      {"q_proj", "v_proj", 1},
      {"abc", "xyz", 3},
  }));
  INFO(a << " and " << b);
  CHECK(lora::detail::edit_distance(a, b) == edits);
  CHECK(lora::detail::edit_distance(b, a) == edits);
}

TEST_CASE("The nearest candidates come first, each once, three at most, and none that is more than half different") {
  const auto [word, candidates, nearest] = GENERATE(table<std::string, Names, Names>({
      {"haed", {"body", "head"}, {"head"}},
      {"head", {"heat", "head"}, {"head", "heat"}},
      {"head", {"heat", "bead", "heat", "bead"}, {"bead", "heat"}},  // as near: by the alphabet
      {"a_proj", {"v_proj", "q_proj", "o_proj", "k_proj"}, {"k_proj", "o_proj", "q_proj"}},
      {"abcd", {"abxy"}, {"abxy"}},
      {"abcd", {"axyz"}, {}},
      {"q", {"v", "qv"}, {"qv"}},
      {"head", {}, {}},
      {"", {"a"}, {}},
  }));
  INFO(word);
  CHECK(lora::detail::nearest(word, candidates) == nearest);
}

TEST_CASE("A suggestion is a sentence, or nothing") {
  CHECK(lora::detail::did_you_mean("haed", {"body", "head"}) == " did you mean \"head\"?");
  CHECK(lora::detail::did_you_mean("a_proj", {"q_proj", "v_proj", "o_proj"}) ==
        " did you mean \"o_proj\" or \"q_proj\" or \"v_proj\"?");
  CHECK(lora::detail::did_you_mean("haed", {"body", "tail"}).empty());
  CHECK(lora::detail::did_you_mean("haed", {}).empty());
}

TEST_CASE("A mistyped entry may have meant a whole name or the last part of one") {
  CHECK(lora::detail::with_last_parts({"layers.0.q_proj", "head"}) ==
        Names{"layers.0.q_proj", "head", "q_proj", "head"});
  CHECK(lora::detail::with_last_parts({}).empty());
  CHECK(lora::detail::did_you_mean("q_porj", lora::detail::with_last_parts({"layers.0.q_proj", "layers.1.q_proj"})) ==
        " did you mean \"q_proj\"?");
}

TEST_CASE("Names that mean something in a regular expression are escaped, and others stay as they are") {
  CHECK(lora::detail::escaped("layers_0-q") == "layers_0-q");
  CHECK(lora::detail::escaped("layers.0") == R"(layers\.0)");
  CHECK(lora::detail::escaped(R"(.^$|()[]{}*+?\)") == R"(\.\^\$\|\(\)\[\]\{\}\*\+\?\\)");
  CHECK(lora::detail::escaped("").empty());
}
