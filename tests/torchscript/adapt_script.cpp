// Adapts the TorchScript modules of a folder, as torchscript_live.py exported them, and writes down what they compute.
//
// usage: adapt_script FOLDER     reads FOLDER/cases.json, ID.pt and ID.inputs; writes ID.results and ID.merged.pt
#include <torch/script.h>
#include <torch/torch.h>

#include <lora/lora.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>

namespace {

using torch::Tensor;

std::vector<char> bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot open ", path);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::vector<c10::IValue> read_inputs(const std::string& path) {
  const auto tensors = torch::pickle_load(bytes_of(path)).toGenericDict();
  std::vector<c10::IValue> inputs;
  for (size_t i = 0; i < tensors.size(); ++i) inputs.push_back(tensors.at(std::to_string(i)));
  return inputs;
}

Tensor loss_of(const Tensor& output) {
  return (output * torch::arange(output.numel(), output.options()).cos().view(output.sizes())).sum();
}

std::string one_line(const std::exception& error) {
  const auto* of_torch = dynamic_cast<const c10::Error*>(&error);
  std::string text = of_torch != nullptr ? of_torch->what_without_backtrace() : error.what();
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

/// One exported module and everything that is computed with it.
class Case {
 public:
  Case(const std::string& folder, const nlohmann::json& description)
      : prefix_(folder + "/" + std::to_string(description.at("id").get<int>())),
        model_(torch::jit::load(prefix_ + ".pt")),
        inputs_(read_inputs(prefix_ + ".inputs")),
        config_(lora::LoRAConfig(2)
                    .alpha(3)
                    .target_modules(description.at("target_modules").get<std::vector<std::string>>())
                    .target_parameters(description.at("target_parameters").get<std::vector<std::string>>())) {
    refusals_ = description.at("refusals");
    is_training_ = description.at("mode") == "train";
    model_.train(is_training_);
  }

  void run() {
    if (refusals_.contains("attach")) return unless_refused("attach", [&] { lora::attach(model_, config_); });
    train_base();
    const auto before = values();
    auto adapters = lora::attach(model_, config_);
    const auto base = write("base", without_gradient(model_));
    train_base();  // also what is forked
    fill(adapters);
    unless_refused("gradients", [&] { train(adapters); });
    {
      auto active = adapters.activate();
      write("adapted without gradient", without_gradient(model_));
    }
    expect(torch::equal(without_gradient(model_), base), "the module outside of a scope is not the base model");
    unless_refused("merge", [&] { merge(adapters); });
    expect(torch::equal(without_gradient(model_), base), "the module is not the base model any more");
    adapters.detach();
    for (size_t i = 0; i < before.size(); ++i) expect(torch::equal(before[i], values()[i]), "a parameter has changed");
    std::ofstream(prefix_ + ".results", std::ios::binary) << text_of(torch::pickle_save(results_));
  }

 private:
  static void expect(bool condition, const char* otherwise) { TORCH_CHECK(condition, otherwise); }
  static std::string text_of(const std::vector<char>& bytes) { return {bytes.begin(), bytes.end()}; }

  /// Runs `action`, or expects the error that the case says it has.
  void unless_refused(const char* name, const std::function<void()>& action) const {
    if (!refusals_.contains(name)) return action();
    std::string error = "none";
    try {
      action();
    } catch (const std::exception& thrown) {
      error = one_line(thrown);
    }
    TORCH_CHECK(error.find(refusals_.at(name).get<std::string>()) != std::string::npos,
                "expected another error than: ", error);
  }

  void merge(lora::Adapters& adapters) {
    adapters.merge();
    write("merged", without_gradient(model_));
    model_.save(prefix_ + ".merged.pt");
    write("loaded", without_gradient(torch::jit::load(prefix_ + ".merged.pt")));
    adapters.unmerge();
  }

  Tensor write(const std::string& name, const Tensor& value) {
    results_.insert(name, value.detach().clone());
    return value;
  }

  std::vector<Tensor> values() const {
    std::vector<Tensor> values;
    for (const auto& parameter : model_.parameters()) values.push_back(parameter.detach().clone());
    return values;
  }

  Tensor without_gradient(torch::jit::Module model) const {
    torch::NoGradGuard no_grad;
    return model.forward(inputs_).toTensor();
  }

  /// In training mode the input has gradients, too: TorchScript then derives gradients of its own.
  Tensor with_gradient() {
    std::vector<c10::IValue> inputs;
    for (const auto& input : inputs_) {
      const auto tensor = input.toTensor().detach();
      inputs.emplace_back(tensor.requires_grad_(is_training_ && tensor.is_floating_point()));
    }
    return model_.forward(inputs).toTensor();
  }

  /// So often that the executor has its optimized plan, with weights that have no gradients, as adapters need it.
  void train_base() {
    for (auto parameter : model_.parameters()) parameter.requires_grad_(false);
    for (int step = 0; step < 4; ++step) {
      const auto output = with_gradient();
      if (output.requires_grad()) loss_of(output).backward();
    }
  }

  void fill(const lora::Adapters& adapters) {
    torch::manual_seed(1);
    for (const auto& item : adapters.named_parameters()) {
      item.value().detach().normal_(0, 0.5);
      write(item.key(), item.value());
    }
  }

  /// Past the profiling runs; the values are not changed, so every step has the same gradients.
  void train(const lora::Adapters& adapters) {
    const auto tensors = adapters.named_parameters();
    std::vector<Tensor> first;
    auto active = adapters.activate();
    for (int step = 0; step < 6; ++step) {
      const auto output = with_gradient();
      const auto gradients = torch::autograd::grad({loss_of(output)}, tensors.values(), {}, {}, false, true);
      for (const auto& gradient : gradients) expect(gradient.defined(), "a gradient is missing");
      if (step == 0) {
        write("adapted", output);
        first = gradients;
      }
      for (size_t i = 0; i < first.size(); ++i)
        expect(torch::allclose(first[i], gradients[i], 1e-12, 1e-12), "the gradients change from step to step");
    }
    for (size_t i = 0; i < first.size(); ++i) write("gradient " + tensors.keys()[i], first[i]);
  }

  std::string prefix_;
  torch::jit::Module model_;
  bool is_training_ = false;
  nlohmann::json refusals_;
  std::vector<c10::IValue> inputs_;
  lora::LoRAConfig config_;
  c10::Dict<std::string, Tensor> results_;
};

}  // namespace

int main(int count, char** arguments) {
  TORCH_CHECK(count == 2, "usage: adapt_script FOLDER");
  const std::string folder = arguments[1];
  int failures = 0;
  for (const auto& description : nlohmann::json::parse(bytes_of(folder + "/cases.json"))) {
    std::cout << description.at("id") << ' ';
    try {
      Case(folder, description).run();
      std::cout << "done\n";
    } catch (const std::exception& error) {
      ++failures;
      std::cout << one_line(error) << '\n';
    }
  }
  return failures > 0;
}
