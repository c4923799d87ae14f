// Many trainings over one frozen model, in one pass for each step: the batch is the rows of one training after those of
// the other, and each row has the adapter of its training.
#pragma once

#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <lora/lora.hpp>

namespace sweep {

/// When a training ends before the others: after `patience` evaluations in a row none of which was better than the best
/// one by the share `least_gain`, or at once when the loss is no finite number.
struct EarlyStop {
  int patience = 3;
  double least_gain = 0.01;
  double best = std::numeric_limits<double>::infinity();
  int without_gain = 0;

  /// Takes the next validation loss; whether the training is to end.
  bool operator()(double loss) {
    const bool is_gain = loss < best * (1 - least_gain);
    without_gain = is_gain ? 0 : without_gain + 1;
    if (is_gain) best = loss;
    return without_gain >= patience || !std::isfinite(loss);
  }
};

/// The losses of one training.
struct Course {
  std::vector<double> training;                        ///< of each step, before its update
  std::vector<std::pair<int64_t, double>> validation;  ///< (steps done, loss)
};

/// Trains adapters of one model side by side. Each has an optimizer, a learning rate, a loss and an end of its own, and
/// its losses are those of a training alone: a row only meets the adapter that it has.
///
///   sweep::Sweep sweep(adapters);
///   sweep.add("rank 4", 1e-3);  // the name of an adapter, and its learning rate
///   sweep.add("rank 8", 3e-3);
///   sweep.step(x.size(0), [&](int64_t copies) { return losses(model, x.repeat({copies, 1}), y.repeat(copies)); });
class Sweep {
 public:
  /// `adapters` has to outlive it. A pass is of at most `at_once` trainings: it needs memory for so many copies of the
  /// rows.
  explicit Sweep(const lora::Adapters& adapters, EarlyStop stop = {}, size_t at_once = 16)
      : adapters_(adapters), stop_(stop), at_once_(at_once) {}

  void add(const std::string& adapter, double learning_rate) {
    const auto options = torch::optim::AdamWOptions(learning_rate).weight_decay(0);
    runs_.push_back({adapter, torch::optim::AdamW(adapters_.parameters(adapter), options), stop_, false, {}});
  }

  /// One update of each training that has not ended, with the same `rows` rows of data for all. `losses_of_rows(n)`
  /// computes a loss for each row of n copies of the data, one copy after the other: shape (n * rows). The loss of a
  /// training is the mean over its own copy; their sum has, for each adapter, the gradient that its own loss has.
  template <class LossesOfRows>
  void step(int64_t rows, const LossesOfRows& losses_of_rows) {
    for (const auto& runs : passes()) {
      const auto losses = mean_losses(runs, rows, losses_of_rows);  // (runs)
      losses.sum().backward();
      const auto values = numbers(losses);
      for (size_t i = 0; i < runs.size(); ++i) {
        runs[i]->optimizer.step();
        runs[i]->optimizer.zero_grad();
        runs[i]->course.training.push_back(values[i]);
      }
    }
  }

  /// The loss of each training that has not ended, on the same held-out rows for all; ends those that are to end.
  template <class LossesOfRows>
  void evaluate(int64_t rows, const LossesOfRows& losses_of_rows) {
    torch::NoGradGuard no_grad;
    for (const auto& runs : passes()) {
      const auto values = numbers(mean_losses(runs, rows, losses_of_rows));
      for (size_t i = 0; i < runs.size(); ++i) {
        runs[i]->course.validation.emplace_back(runs[i]->course.training.size(), values[i]);
        runs[i]->has_ended = runs[i]->stop(values[i]);
      }
    }
  }

  /// What became of the trainings, in the order in which they were added.
  std::vector<Course> courses() const {
    std::vector<Course> courses;
    for (const auto& run : runs_) courses.push_back(run.course);
    return courses;
  }

 private:
  struct Run {
    std::string adapter;
    torch::optim::AdamW optimizer;
    EarlyStop stop;
    bool has_ended;
    Course course;
  };

  /// The trainings that have not ended, those of each pass.
  std::vector<std::vector<Run*>> passes() {
    std::vector<std::vector<Run*>> passes;
    for (auto& run : runs_) {
      if (run.has_ended) continue;
      if (passes.empty() || passes.back().size() == at_once_) passes.emplace_back();
      passes.back().push_back(&run);
    }
    return passes;
  }

  /// The mean loss of each run over its own rows.
  template <class LossesOfRows>
  torch::Tensor mean_losses(const std::vector<Run*>& runs, int64_t rows, const LossesOfRows& losses_of_rows) const {
    std::vector<std::string> names;
    for (const auto* run : runs) names.insert(names.end(), static_cast<size_t>(rows), run->adapter);
    const auto active = adapters_.activate(names);
    const auto count = static_cast<int64_t>(runs.size());
    return losses_of_rows(count).view({count, rows}).mean(1);
  }

  static std::vector<double> numbers(const torch::Tensor& losses) {
    const auto values = losses.detach().to(torch::kCPU, torch::kDouble).contiguous();
    return {values.const_data_ptr<double>(), values.const_data_ptr<double>() + values.numel()};
  }

  const lora::Adapters& adapters_;
  EarlyStop stop_;
  size_t at_once_;
  std::vector<Run> runs_;
};

}  // namespace sweep
