// The figures of a run: metrics.csv, written as the run goes, and a picture of the loss.
#pragma once

#include <torch/torch.h>

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>

namespace gpt {

/// The figures after update `step`; step 0 is the model before training. What was not measured is empty.
struct MetricsRow {
  int64_t step = 0;
  std::optional<double> train_loss, validation_loss, learning_rate, tokens_per_second, gradient_norm;
};

namespace detail {

inline constexpr const char* kMetricsHeader = "step,train_loss,validation_loss,lr,tokens_per_second,grad_norm";

inline std::string format_row(const MetricsRow& row) {
  auto text = std::to_string(row.step);
  for (const auto& value :
       {row.train_loss, row.validation_loss, row.learning_rate, row.tokens_per_second, row.gradient_norm}) {
    text += value ? fmt::format(",{:.9g}", *value) : ",";
  }
  return text;
}

inline MetricsRow parse_row(const std::string& line) {
  MetricsRow row;
  std::istringstream cells(line);
  std::string cell;
  std::getline(cells, cell, ',');
  row.step = std::atoll(cell.c_str());
  for (auto* value :
       {&row.train_loss, &row.validation_loss, &row.learning_rate, &row.tokens_per_second, &row.gradient_norm}) {
    if (std::getline(cells, cell, ',') && !cell.empty()) *value = std::atof(cell.c_str());
  }
  return row;
}

/// Whether a program of this name is on the PATH.
inline bool has_program(const std::string& name) {
  const char* path = std::getenv("PATH");
  std::istringstream folders(path == nullptr ? "" : path);
  for (std::string folder; std::getline(folders, folder, ':');) {
    if (access((folder + "/" + name).c_str(), X_OK) == 0) return true;
  }
  return false;
}

/// Quotes a text for gnuplot.
inline std::string quoted(const std::string& text) {
  std::string result = "'";
  for (auto letter : text) result += letter == '\'' ? "''" : std::string(1, letter);
  return result + "'";
}

}  // namespace detail

/// metrics.csv of a run: one line for each step, on the disk as soon as it is known, with 9 significant digits.
class Metrics {
 public:
  /// Starts a new file, or goes on with the one of an interrupted run: then its rows after `last_step`, which the run
  /// is about to do again, are dropped.
  Metrics(std::filesystem::path path, std::optional<int64_t> last_step = std::nullopt) : path_(std::move(path)) {
    if (last_step) read(*last_step);
    const auto temporary = path_.string() + ".tmp";  // a crash must not cost the rows of the run so far
    std::ofstream file(temporary);
    file << detail::kMetricsHeader << "\n";
    for (const auto& row : rows_) file << detail::format_row(row) << "\n";
    file.close();
    TORCH_CHECK(file, path_.string(), ": cannot be written");
    std::filesystem::rename(temporary, path_);
  }

  void add(const MetricsRow& row) {
    rows_.push_back(row);
    std::ofstream file(path_, std::ios::app);
    file << detail::format_row(row) << "\n";
    TORCH_CHECK(file.flush(), path_.string(), ": cannot be written");
  }

  const std::vector<MetricsRow>& rows() const { return rows_; }

 private:
  void read(int64_t last_step) {
    std::ifstream file(path_);
    std::string line;
    std::getline(file, line);  // the header
    while (std::getline(file, line)) {
      const auto row = detail::parse_row(line);
      if (row.step <= last_step) rows_.push_back(row);
    }
  }

  std::filesystem::path path_;
  std::vector<MetricsRow> rows_;
};

/// The mean of the training losses of the last `window` rows that have one, at each of these: (step, mean). Fewer than
/// `window` are averaged at the start. Single batches differ by more than a run gains in ten steps.
inline std::vector<std::pair<int64_t, double>> running_mean(const std::vector<MetricsRow>& rows, size_t window) {
  std::vector<std::pair<int64_t, double>> losses, means;
  for (const auto& row : rows) {
    if (row.train_loss) losses.emplace_back(row.step, *row.train_loss);
  }
  for (size_t i = 0; i < losses.size(); ++i) {
    const auto first = i + 1 - std::min(i + 1, window);
    double sum = 0;
    for (auto j = first; j <= i; ++j) sum += losses[j].second;
    means.emplace_back(losses[i].first, sum / static_cast<double>(i + 1 - first));
  }
  return means;
}

/// Steps that the running mean in the picture of so many rows covers: a tenth, at least 5.
inline size_t mean_window(size_t rows) { return std::max<size_t>(5, rows / 10); }

/// Draws training and validation loss over the steps into a PNG file with gnuplot. Returns what kept it from doing so,
/// empty if nothing did: a picture is no reason for a run to fail.
inline std::string draw_losses(const std::vector<MetricsRow>& rows, const std::filesystem::path& png) {
  if (!detail::has_program("gnuplot")) return "gnuplot is not installed (Debian: gnuplot-nox)";
  const auto window = mean_window(rows.size());
  std::string train, mean, validation;
  for (const auto& row : rows) {
    if (row.train_loss) train += fmt::format("{} {:.9g}\n", row.step, *row.train_loss);
    if (row.validation_loss) validation += fmt::format("{} {:.9g}\n", row.step, *row.validation_loss);
  }
  for (const auto& [step, loss] : running_mean(rows, window)) mean += fmt::format("{} {:.9g}\n", step, loss);
  std::FILE* gnuplot = popen("gnuplot 2>/dev/null", "w");
  if (gnuplot == nullptr) return "gnuplot cannot be started";
  fmt::print(gnuplot, "$train << END\n{}END\n$mean << END\n{}END\n$validation << END\n{}END\n", train, mean,
             validation);
  fmt::print(gnuplot, "set terminal png size 960,600\nset output {}\n", detail::quoted(png.string()));
  fmt::print(gnuplot, "set xlabel 'step'\nset ylabel 'loss (nats per token)'\nset grid\n");
  fmt::print(gnuplot,
             "plot $train with points pt 7 ps 0.6 lc rgb '#9ecae1' title 'training, each step', "
             "$mean with lines lw 2 lc rgb '#2171b5' title 'training, mean of {} steps', "
             "$validation with linespoints lw 2 pt 7 lc rgb '#d94801' title 'validation'\n",
             window);
  return pclose(gnuplot) == 0 ? "" : "gnuplot could not draw the losses";
}

}  // namespace gpt
