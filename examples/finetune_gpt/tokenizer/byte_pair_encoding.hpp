#pragma once

#include "json_field.hpp"

#include <array>
#include <cstdint>
#include <queue>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace gpt {

/// How byte-level vocabularies spell bytes: printable Latin-1 characters stand for themselves, the others for the
/// characters from U+0100 on, so that a space is "Ġ" and a line break "Ċ".
class ByteAlphabet {
 public:
  ByteAlphabet() {
    for (int byte = 0, moved = 0; byte < 256; ++byte) {
      const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
      const int character = printable ? byte : 0x100 + moved++;
      auto& spelling = spelling_[byte];
      if (character >= 0x80) spelling += static_cast<char>(0xC0 | character >> 6);
      spelling += static_cast<char>(character < 0x80 ? character : 0x80 | (character & 0x3F));
      byte_.emplace(spelling, static_cast<char>(byte));
    }
  }

  const std::string& spelling(unsigned char byte) const { return spelling_[byte]; }

  /// The bytes that `token` stands for. One with a character that spells no byte stands for itself.
  std::string bytes(const std::string& token) const {
    std::string all;
    for (size_t at = 0; at < token.size();) {
      const size_t length = static_cast<unsigned char>(token[at]) < 0x80 ? 1 : 2;
      const auto found = byte_.find(token.substr(at, length));
      if (found == byte_.end()) return token;
      all += found->second;
      at += length;
    }
    return all;
  }

 private:
  std::array<std::string, 256> spelling_;
  std::unordered_map<std::string, char> byte_;
};

/// The model of a byte-level tokenizer: joins the bytes of a word to tokens, the pair that was learned first at first.
class BytePairEncoding {
 public:
  /// Reads the field "model" of a tokenizer.json. Throws lora::CheckpointError for what is no byte-level BPE.
  explicit BytePairEncoding(const JsonField& model) {
    check_supported(model);
    ignore_merges_ = model["ignore_merges"].flag_or(false);
    fuse_unknown_ = model["fuse_unk"].flag_or(false);
    read_vocabulary(model["vocab"]);
    read_merges(model["merges"]);
    read_alphabet(model);
  }

  /// From the token as it is spelled in the file to its id.
  const std::unordered_map<std::string, int64_t>& vocabulary() const { return vocabulary_; }

  /// The ids of a word, which is given as its bytes.
  std::vector<int64_t> encode(std::string_view word) const {
    if (ignore_merges_) {
      const auto whole = vocabulary_.find(spell(word));
      if (whole != vocabulary_.end()) return {whole->second};
    }
    auto symbols = first_symbols(word);
    merge(symbols);
    std::vector<int64_t> ids;
    for (const auto& symbol : symbols) {
      if (symbol.id != kGone) ids.push_back(symbol.id);
    }
    return ids;
  }

 private:
  static constexpr int64_t kMissing = -1;  // a byte without a token
  static constexpr int64_t kGone = -2;     // a symbol that became part of the one before it

  struct Merge {
    int64_t rank;
    int64_t id;
  };
  struct Symbol {
    int64_t id;
    int64_t previous;
    int64_t next;
  };
  /// A pair that can be joined. The one learned first comes first, of equal ones the leftmost.
  struct Candidate {
    int64_t rank;
    int64_t position;
    int64_t id;
    bool operator<(const Candidate& other) const {  // std::priority_queue has the greatest on top
      return std::make_pair(rank, position) > std::make_pair(other.rank, other.position);
    }
  };

  static void check_supported(const JsonField& model) {
    const auto type = model["type"];
    if (!type.is_null() && type.text() != "BPE") type.refuse("only BPE can be read");
    if (type.is_null() && model["merges"].is_null()) type.refuse("only BPE can be read");
    const auto dropout = model["dropout"];
    if (!dropout.is_null() && dropout.value() != 0) dropout.refuse("only null can be read: ids must not be random");
    if (model["byte_fallback"].flag_or(false)) model["byte_fallback"].refuse("only byte-level BPE can be read");
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
      if (!model[key].is_null() && model[key].text() != "") model[key].refuse("only null can be read");
    }
  }

  void read_vocabulary(const JsonField& vocabulary) {
    if (!vocabulary.value().is_object()) vocabulary.refuse("an object is needed");
    for (const auto& [token, id] : vocabulary.value().items()) vocabulary_[token] = vocabulary[token].id();
  }

  /// Each merge is "a b" or ["a", "b"]. Where a pair stands twice, the later one holds.
  void read_merges(const JsonField& merges) {
    int64_t rank = 0;
    for (const auto& merge : merges.elements()) {
      const auto& value = merge.value();
      if (value.is_string() && value.get_ref<const std::string&>().substr(0, 8) == "#version") continue;
      const auto [first, second] = pair(merge);
      auto id = [&](const std::string& token) {
        const auto found = vocabulary_.find(token);
        if (found == vocabulary_.end()) merge.refuse("\"" + token + "\" is not in model.vocab");
        return found->second;
      };
      merges_[key(id(first), id(second))] = {rank++, id(first + second)};
    }
  }

  static std::pair<std::string, std::string> pair(const JsonField& merge) {
    const auto& value = merge.value();
    if (value.is_array() && value.size() == 2 && value[0].is_string() && value[1].is_string()) {
      return {value[0].get<std::string>(), value[1].get<std::string>()};
    }
    const auto text = value.is_string() ? value.get<std::string>() : std::string();
    const auto space = text.find(' ');
    if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) merge.refuse("a pair is needed");
    return {text.substr(0, space), text.substr(space + 1)};
  }

  /// Finds the token of each byte. For a byte without one there is unk_token; without that, the byte is left out.
  void read_alphabet(const JsonField& model) {
    int64_t unknown = kMissing;
    const auto token = model["unk_token"];
    const auto found = token.is_null() ? vocabulary_.end() : vocabulary_.find(token.text());
    if (found != vocabulary_.end()) unknown = found->second;
    for (int byte = 0; byte < 256; ++byte) {
      const auto own = vocabulary_.find(alphabet_.spelling(static_cast<unsigned char>(byte)));
      is_unknown_[byte] = own == vocabulary_.end();
      byte_id_[byte] = is_unknown_[byte] ? unknown : own->second;
      const bool in_utf8 = byte < 0xF5 && byte != 0xC0 && byte != 0xC1;
      if (in_utf8 && byte_id_[byte] == kMissing && !token.is_null()) token.refuse("it is not in model.vocab");
    }
  }

  std::vector<Symbol> first_symbols(std::string_view word) const {
    std::vector<Symbol> symbols;
    bool after_unknown = false;
    for (const char c : word) {
      const auto byte = static_cast<unsigned char>(c);
      const bool fused = is_unknown_[byte] && after_unknown && fuse_unknown_;
      after_unknown = is_unknown_[byte];
      if (fused || byte_id_[byte] == kMissing) continue;
      const auto position = static_cast<int64_t>(symbols.size());
      symbols.push_back({byte_id_[byte], position - 1, position + 1});
    }
    return symbols;
  }

  void merge(std::vector<Symbol>& symbols) const {
    std::priority_queue<Candidate> candidates;
    const auto count = static_cast<int64_t>(symbols.size());
    auto add = [&](int64_t position) {
      const auto next = symbols[position].next;
      if (next >= count) return;
      const auto found = merges_.find(key(symbols[position].id, symbols[next].id));
      if (found != merges_.end()) candidates.push({found->second.rank, position, found->second.id});
    };
    for (int64_t position = 0; position + 1 < count; ++position) add(position);
    while (!candidates.empty()) {
      const auto best = candidates.top();
      candidates.pop();
      auto& left = symbols[best.position];
      if (left.id == kGone || left.next >= count) continue;
      const auto found = merges_.find(key(left.id, symbols[left.next].id));
      if (found == merges_.end() || found->second.id != best.id) continue;  // one of the two was merged since
      auto& right = symbols[left.next];
      left.id = best.id;
      left.next = right.next;
      right.id = kGone;
      if (left.next < count) symbols[left.next].previous = best.position;
      if (left.previous >= 0) add(left.previous);
      add(best.position);
    }
  }

  std::string spell(std::string_view word) const {
    std::string spelled;
    for (const char c : word) spelled += alphabet_.spelling(static_cast<unsigned char>(c));
    return spelled;
  }

  static uint64_t key(int64_t first, int64_t second) {
    return static_cast<uint64_t>(first) << 32 | static_cast<uint64_t>(second);
  }

  ByteAlphabet alphabet_;
  bool ignore_merges_ = false;
  bool fuse_unknown_ = false;
  std::unordered_map<std::string, int64_t> vocabulary_;
  std::unordered_map<uint64_t, Merge> merges_;
  std::array<int64_t, 256> byte_id_;
  std::array<bool, 256> is_unknown_;
};

}  // namespace gpt
