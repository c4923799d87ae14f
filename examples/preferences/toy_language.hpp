// A small language, letter by letter: "\nowl: the shy owl hears a cat.\n". What follows the colon, the reply, is either
// in small letters or "THE SHY OWL HEARS A CAT.".
#pragma once

#include <torch/torch.h>

#include <cctype>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace toy {

inline const std::string kLetters = "\n .:abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";

inline std::vector<int64_t> encode(const std::string& text) {
  std::vector<int64_t> tokens;
  for (const char letter : text) tokens.push_back(static_cast<int64_t>(kLetters.find(letter)));
  return tokens;
}

inline std::string decode(const std::vector<int64_t>& tokens) {
  std::string text;
  for (const auto token : tokens) text += kLetters[static_cast<size_t>(token)];
  return text;
}

inline std::string in_capitals(std::string text) {
  for (auto& letter : text) letter = static_cast<char>(std::toupper(static_cast<unsigned char>(letter)));
  return text;
}

/// What can be talked about.
inline const std::vector<std::string> kSubjects{"cat", "dog", "cow", "hen", "fox", "owl", "ant", "bee",
                                                "pig", "rat", "bat", "elk", "ram", "yak", "cod", "eel"};

/// Speaks at random, the same for the same seed.
class Speaker {
 public:
  explicit Speaker(uint64_t seed) : random_(seed) {}

  std::string prompt(const std::string& subject) { return "\n" + subject + ":"; }

  /// In small letters.
  std::string reply(const std::string& subject) {
    return " the " + any({"red", "old", "big", "shy", "sad", "wet"}) + " " + subject + " " +
           any({"sees", "likes", "hears", "meets"}) + " a " + any(kSubjects) + ".\n";
  }

  std::string any(const std::vector<std::string>& words) { return words[random_() % words.size()]; }
  bool coin() { return random_() % 2 == 0; }

 private:
  std::mt19937 random_;
};

/// Longer than any text.
inline constexpr int64_t kLength = 40;

}  // namespace toy
