#include "support/testing.hpp"

#include <lora/options.hpp>

using lora::LoRAOptions;

TEST_CASE("The scaling is alpha / rank, or alpha / sqrt(rank) when rank-stabilized") {
  CHECK(LoRAOptions(2).alpha(8).scaling() == 4.0);
  CHECK(LoRAOptions(16).scaling() == 0.5);  // alpha is 8 by default
  CHECK(LoRAOptions(4).alpha(3).rank_stabilized(true).scaling() == 1.5);
}

TEST_CASE("Options out of range are refused with what was found") {
  auto error = [](LoRAOptions options) { return testing::error_of([&] { options.validate("here"); }); };
  CHECK(error(LoRAOptions(3).dropout(0.5).init_std(0.1)).empty());
  const auto [options, text] = GENERATE(table<LoRAOptions, std::string>({
      {LoRAOptions(0), "here: rank has to be at least 1, but got 0"},
      {LoRAOptions(-2), "but got -2"},
      {LoRAOptions(2).alpha(std::nan("")), "alpha has to be a finite number, but got nan"},
      {LoRAOptions(2).dropout(1.0), "dropout has to be in [0, 1), but got 1"},
      {LoRAOptions(2).dropout(-0.1), "dropout has to be in [0, 1), but got -0.1"},
      {LoRAOptions(2).init_std(0.0), "init_std has to be a positive number, but got 0"},
  }));
  CHECK_THAT(error(options), testing::contains(text));
}

TEST_CASE("Options of one layer take over every option of another class") {
  struct Other : lora::BasicOptions<Other> {
    Other() : BasicOptions(5) {}
  };
  auto other = Other();
  other.alpha(3).dropout(0.25).rank_stabilized(true).init(lora::Init::kKaiming).init_std(0.7);
  const LoRAOptions taken(other);
  CHECK(taken.rank() == 5);
  CHECK(taken.alpha() == 3);
  CHECK(taken.dropout() == 0.25);
  CHECK(taken.rank_stabilized());
  CHECK(taken.init() == lora::Init::kKaiming);
  CHECK(taken.init_std() == 0.7);
}
