// usage: save_forever DIRECTORY [SAVES]
// Saves an adapter into DIRECTORY again and again, each time another one: number n has rank 2 or 3, alpha n, and n in
// all of its tensors, so that a directory that holds parts of two can be told from one that holds one adapter.
//
// With SAVES it does that so many times, or until the first error, which is its exit status 1. Without, it answers
// lines on its standard input:
//   save FROM   starts a process that saves the adapters FROM, FROM + 1, ... without end, and prints its number
//   load        waits for the processes that were killed, loads DIRECTORY and prints what it holds: the number of the
//               adapter, "nothing", or an error
#include <torch/torch.h>

#include <iostream>
#include <lora/lora.hpp>

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

torch::nn::Sequential make_model() {
  torch::nn::Sequential model;
  model->push_back("fc1", torch::nn::Linear(8, 16));
  model->push_back("fc2", torch::nn::Linear(16, 8));
  return model;
}

void save(const std::filesystem::path& directory, int64_t number) {
  auto model = make_model();
  const auto config =
      lora::LoRAConfig(2 + number % 2).alpha(static_cast<double>(number)).target_modules({"fc1", "fc2"});
  auto adapters = lora::attach(*model, config);
  torch::NoGradGuard no_grad;
  for (auto& parameter : adapters.parameters()) parameter.fill_(number);
  adapters.save(directory);
}

std::string load(const std::filesystem::path& directory) {
  if (!std::filesystem::exists(directory / "adapter_config.json") &&
      !std::filesystem::exists(directory / "adapter_model.safetensors"))
    return "nothing";
  auto model = make_model();
  const auto adapters = lora::load_adapter(*model, directory);
  const auto alpha = adapters.config("default").alpha();
  for (const auto& parameter : adapters.parameters())
    TORCH_CHECK((parameter == alpha).all().item<bool>(), "alpha is ", alpha, ", but the tensors are ", parameter);
  return std::to_string(static_cast<int64_t>(alpha));
}

[[noreturn]] void save_without_end(const std::filesystem::path& directory, int64_t number, pid_t parent) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  while (::getppid() == parent) save(directory, number++);
  std::_Exit(1);
}

int main(int argc, char** argv) {
  if (argc != 2 && argc != 3) return std::cerr << "usage: save_forever DIRECTORY [SAVES]\n", 2;
  const std::filesystem::path directory = argv[1];
  try {
    if (argc == 3) {
      for (int64_t number = 1; number <= std::atoll(argv[2]); ++number) save(directory, number);
      return 0;
    }
    std::string command;
    int64_t from = 0;
    while (std::cin >> command) {
      if (command == "save") {
        std::cin >> from;
        const auto parent = ::getpid(), child = ::fork();
        if (child == 0) save_without_end(directory, from, parent);
        std::cout << child << std::endl;
      } else {
        while (::wait(nullptr) > 0) continue;
        std::cout << load(directory) << std::endl;
      }
    }
  } catch (const c10::Error& error) {
    std::cout << "error: " << error.what_without_backtrace() << std::endl;
    return 1;
  }
}
