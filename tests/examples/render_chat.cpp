// usage: render_chat CONVERSATIONS
// Renders conversations with the chat templates of models, for chat_template_live.py. Each line of the file is
// {"model": directory, "messages": [{"role", "content"}, ...], "open_reply": true or false}; each line of the output is
// {"text": ...} or {"error": ...}.
#include <torch/torch.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include "../../examples/finetune_gpt/chat_template.hpp"

namespace {

nlohmann::json render(const nlohmann::json& line) {
  try {
    std::vector<gpt::ChatMessage> messages;
    for (const auto& message : line["messages"]) messages.push_back({message["role"], message["content"]});
    const gpt::ChatTemplate chat(line["model"].get<std::string>());
    return {{"text", chat.render(messages, line["open_reply"])}};
  } catch (const c10::Error& error) {
    return {{"error", error.what_without_backtrace()}};
  }
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 2) {
    std::cerr << "usage: render_chat CONVERSATIONS\n";
    return 2;
  }
  std::ifstream lines(argv[1]);
  for (std::string line; std::getline(lines, line);) std::cout << render(nlohmann::json::parse(line)) << "\n";
} catch (const std::exception& error) {
  std::cerr << "render_chat: " << error.what() << "\n";
  return 1;
}
