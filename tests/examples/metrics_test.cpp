#include "support/testing.hpp"

#include <fstream>
#include <sstream>

#include "metrics.hpp"

namespace {

std::string content(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

gpt::MetricsRow row(int64_t step, double train_loss, std::optional<double> validation_loss = std::nullopt) {
  return {step, train_loss, validation_loss, 1e-3, 512.25, 0.5};
}

}  // namespace

TEST_CASE("metrics.csv has a line for each step, with enough digits to compare runs", "[examples][metrics]") {
  testing::TemporaryFolder folder;
  gpt::Metrics metrics(folder / "metrics.csv");
  gpt::MetricsRow before;
  before.validation_loss = 3.25;
  metrics.add(before);
  metrics.add(row(1, 3.123456789012));
  CHECK(content(folder / "metrics.csv") ==
        "step,train_loss,validation_loss,lr,tokens_per_second,grad_norm\n0,,3.25,,,\n1,3.12345679,,0.001,512.25,0.5\n");
}

TEST_CASE("A resumed run goes on with the lines up to its checkpoint", "[examples][metrics]") {
  testing::TemporaryFolder folder;
  const auto path = folder / "metrics.csv";
  {
    gpt::Metrics metrics(path);
    for (int64_t step = 1; step <= 4; ++step) metrics.add(row(step, static_cast<double>(step), 2.5));
  }
  std::ofstream(path, std::ios::app) << "5,3.1";  // a line cut short by a crash
  gpt::Metrics metrics(path, 2);
  REQUIRE(metrics.rows().size() == 2);
  CHECK_FALSE(std::filesystem::exists(folder / "metrics.csv.tmp"));
  CHECK(metrics.rows()[1].train_loss == 2.0);
  CHECK(metrics.rows()[1].validation_loss == 2.5);
  metrics.add(row(3, 7));
  CHECK(content(path) ==
        "step,train_loss,validation_loss,lr,tokens_per_second,grad_norm\n1,1,2.5,0.001,512.25,0.5\n"
        "2,2,2.5,0.001,512.25,0.5\n3,7,,0.001,512.25,0.5\n");
}

TEST_CASE("The running mean is that of the last steps, of fewer at the start", "[examples][metrics]") {
  gpt::MetricsRow before;
  before.validation_loss = 9;  // no training loss: it is passed over
  const std::vector<gpt::MetricsRow> rows{before, row(1, 4), row(2, 2), row(3, 9), row(5, 1)};
  using Means = std::vector<std::pair<int64_t, double>>;
  CHECK(gpt::running_mean(rows, 3) == Means{{1, 4}, {2, 3}, {3, 5}, {5, 4}});
  CHECK(gpt::running_mean(rows, 1) == Means{{1, 4}, {2, 2}, {3, 9}, {5, 1}});
  CHECK(gpt::running_mean({before}, 3).empty());
  CHECK(gpt::mean_window(101) == 10);
  CHECK(gpt::mean_window(3) == 5);
}

TEST_CASE("The losses are drawn, or it is said why not", "[examples][metrics]") {
  testing::TemporaryFolder folder;
  const auto png = folder / "it's a loss.png";
  const auto problem = gpt::draw_losses({row(1, 3, 3.5), row(2, 2, 2.5)}, png);
  if (!gpt::detail::has_program("gnuplot")) {
    CHECK_THAT(problem, testing::contains("gnuplot-nox"));
  } else {
    CHECK(problem.empty());
    CHECK(content(png).substr(1, 3) == "PNG");
  }
  CHECK_FALSE(gpt::detail::has_program("no_such_program"));
}
