#include "support/testing.hpp"

#include "trainer.hpp"

using testing::Approx;

TEST_CASE("The learning rate warms up, falls along half a cosine, and ends low", "[examples][schedule]") {
  gpt::TrainingOptions options;
  options.steps = 14;
  options.warmup = 4;
  options.learning_rate = 0.8;
  options.min_lr_ratio = 0.25;
  auto rate = [&](int64_t step) { return gpt::learning_rate_at(step, options); };
  CHECK(rate(0) == Approx(0.2));
  CHECK(rate(1) == Approx(0.4));
  CHECK(rate(3) == Approx(0.8));
  CHECK(rate(4) == Approx(0.8));           // t = 0
  CHECK(rate(9) == Approx(0.5));           // t = 1/2: midway between 0.8 and 0.2
  CHECK(rate(12) == Approx(0.257294902));  // t = 4/5: 0.2 + 0.6 (1 + cos(0.8 pi)) / 2
  CHECK(rate(14) == Approx(0.2).margin(1e-12));
  for (int64_t step = 4; step < 14; ++step) CHECK(rate(step + 1) < rate(step));
}

TEST_CASE("The schedule has no special cases at its ends", "[examples][schedule]") {
  gpt::TrainingOptions options;
  options.learning_rate = 2;
  options.min_lr_ratio = 0;
  options.steps = 5;
  options.warmup = 0;
  CHECK(gpt::learning_rate_at(0, options) == Approx(2));
  options.warmup = 5;  // nothing but warm-up
  CHECK(gpt::learning_rate_at(0, options) == Approx(0.4));
  CHECK(gpt::learning_rate_at(4, options) == Approx(2));
}
