#pragma once

#include "json_field.hpp"

#include <cstdint>
#include <string>
#include <vector>

namespace gpt {

/// The tokens that a whole text gets around its own, such as a beginning of text: "post_processor" in the file.
///
/// Read are null and ByteLevel (nothing), TemplateProcessing ("single" only: texts are never paired here),
/// RobertaProcessing and BertProcessing (cls, text, sep), and a Sequence of these, of which each one encloses what
/// those before it made. Anything else throws lora::CheckpointError with file, field and value.
class PostProcessor {
 public:
  explicit PostProcessor(const JsonField& field) {
    if (!field.is_null()) read(field);
  }

  const std::vector<int64_t>& before() const { return before_; }
  const std::vector<int64_t>& after() const { return after_; }

 private:
  void read(const JsonField& field) {
    const auto type = field["type"].text();
    if (type == "ByteLevel") return;  // about the places of words in the text, not about ids
    if (type == "Sequence") {
      for (const auto& step : field["processors"].elements()) read(step);
    } else if (type == "RobertaProcessing" || type == "BertProcessing") {
      const auto first = token(field["cls"]), last = token(field["sep"]);
      enclose({first}, {last});
    } else if (type == "TemplateProcessing") {
      read_template(field);
    } else {
      field["type"].refuse(
          "only TemplateProcessing, RobertaProcessing, BertProcessing, ByteLevel and Sequence can be read");
    }
  }

  /// ["</s>", 2]
  static int64_t token(const JsonField& pair) {
    const auto parts = pair.elements();
    if (parts.size() != 2) pair.refuse("a token and its id are needed");
    return parts[1].id();
  }

  /// "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}], with the ids under "special_tokens".
  void read_template(const JsonField& field) {
    const auto single = field["single"];
    std::vector<int64_t> around[2];
    size_t texts = 0;
    for (const auto& piece : single.elements()) {
      if (piece["SpecialToken"].is_null()) {
        if (piece["Sequence"]["id"].text() != "A") piece.refuse("a single text has the part A only");
        ++texts;
        continue;
      }
      auto& ids = around[texts == 0 ? 0 : 1];
      for (const auto& id : field["special_tokens"][piece["SpecialToken"]["id"].text()]["ids"].elements()) {
        ids.push_back(id.id());
      }
    }
    if (texts != 1) single.refuse("the text, A, has to be in it once");
    enclose(around[0], around[1]);
  }

  void enclose(const std::vector<int64_t>& front, const std::vector<int64_t>& back) {
    before_.insert(before_.begin(), front.begin(), front.end());
    after_.insert(after_.end(), back.begin(), back.end());
  }

  std::vector<int64_t> before_, after_;
};

}  // namespace gpt
