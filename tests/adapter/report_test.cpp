#include "support/models.hpp"

#include <lora/attach.hpp>

TEST_CASE("The report counts what is trained and prints a row for each layer") {
  testing::Stack model(2);
  auto adapters = lora::attach(
      *model, lora::LoRAConfig(2).alpha(3).target_modules({"q_proj", "lm_head"}).rank_pattern({{"lm_head", 4}}));
  auto report = adapters.report();
  CHECK(report.layers.size() == 3);
  CHECK(report.trainable == 2 * (2 * 8 + 8 * 2) + (4 * 8 + 6 * 4));
  CHECK(report.base == 2 * 4 * (64 + 8) + 48);
  CHECK(report.base_bytes == 4 * report.base);
  CHECK(report.share() == testing::Approx(120.0 / (120 + 624)));
  CHECK(c10::str(report) ==
        "layer            kind                       weight  method    rank  scaling  parameters\n"
        "layers.0.q_proj  Linear                      8 x 8  LowRank      2      1.5          32\n"
        "layers.1.q_proj  Linear                      8 x 8  LowRank      2      1.5          32\n"
        "lm_head          Linear                      6 x 8  LowRank      4     0.75          56\n"
        "120 of 744 parameters are trainable (16.1290 %); the frozen ones take 2.5 kB");
}

TEST_CASE("A report of nothing says so") {
  testing::Stack model;
  CHECK(lora::Adapters(*model).report().share() == 0);
}
