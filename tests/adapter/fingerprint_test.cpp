// What tells caches of different adapters apart.
#include "support/models.hpp"

#include <lora/attach.hpp>
#include <lora/peft/checkpoint.hpp>

TEST_CASE("A fingerprint is that of what an adapter computes, whatever it is called and wherever it is") {
  const auto method = GENERATE(lora::MethodKind(lora::LowRank()), lora::MethodKind(lora::DoRA()),
                               lora::MethodKind(lora::VeRA()), lora::MethodKind(lora::IA3()));
  testing::Stack model;
  lora::Adapters adapters(*model);
  const auto config = lora::LoRAConfig(2).alpha(6).method(method).target_modules({"q_proj", "lm_head"});
  for (const auto* name : {"a", "b"}) {
    adapters.add(name, config);
    testing::randomize(adapters.parameters(name));
  }
  const auto print = adapters.fingerprint("a");
  CHECK(print.size() == 40);
  CHECK(print.find_first_not_of("0123456789abcdef") == std::string::npos);
  CHECK(adapters.fingerprint("a") == print);
  CHECK(adapters.fingerprint("b") != print);
  CHECK(adapters.fingerprint("").empty());

  const testing::TemporaryFolder folder;
  adapters.save(folder.path(), "a");
  adapters.load("again", folder.path());
  CHECK(adapters.fingerprint("again") == print);

  adapters.set_scale("a", 2);
  const auto scaled = adapters.fingerprint("a");
  CHECK(scaled != print);
  adapters.set_scale("a", 1);
  adapters.set_scale("a", "lm_head", 2);
  CHECK(adapters.fingerprint("a") != print);
  CHECK(adapters.fingerprint("a") != scaled);
  adapters.set_scale("a", "lm_head", 1);
  CHECK(adapters.fingerprint("a") == print);
  {
    torch::NoGradGuard no_grad;
    adapters.parameters("a").back().view(-1)[-1].add_(1e-3);
  }
  CHECK(adapters.fingerprint("a") != print);
  CHECK_THROWS_WITH(adapters.fingerprint("nobody"), testing::contains("there is no adapter \"nobody\""));
}
