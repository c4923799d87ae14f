#include "examples/tiny_model.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <fstream>

#include <lora/lora.hpp>

#include "data.hpp"
#include "run_state.hpp"
#include "trainer.hpp"

namespace {

namespace fs = std::filesystem;
using testing::contains;
using testing::error_of;

const nlohmann::json kSettings{{"--rank", 2}, {"--lr", 0.02}, {"adapted layers", {"a", "b"}}};

// A whole small run with dropout, from scratch: what another process would set up.
struct Run {
  explicit Run(const lora::MethodKind& method = lora::LowRank()) : adapters(make_adapters(*model, method)) {}

  static lora::Adapters make_adapters(gpt::LanguageModelImpl& model, const lora::MethodKind& method) {
    torch::manual_seed(4);
    return lora::attach(model, lora::LoRAConfig(2).alpha(6).dropout(0.3).method(method).target_modules(
                                   {"q_proj", "v_proj", "down_proj"}));
  }
  static gpt::TrainingOptions options() {
    gpt::TrainingOptions options;
    options.steps = 9;
    options.warmup = 2;
    options.learning_rate = 0.02;
    return options;
  }
  static std::vector<gpt::Example> make_examples() {
    std::vector<int64_t> tokens;
    for (int64_t i = 0; i < 61; ++i) tokens.push_back(i * i * 7 % 23);
    return gpt::cut_into_blocks(tokens, 6);
  }

  std::vector<double> losses_until(int64_t step) {
    gpt::TrainingBatches batches(examples, 2, 11);
    std::vector<double> losses;
    while (trainer.steps_done < step) losses.push_back(trainer.step({batches.at(trainer.steps_done)}).loss);
    return losses;
  }
  gpt::Checkpoint save(const fs::path& out) {
    return gpt::save_checkpoint(out, trainer.steps_done, state, kSettings,
                                [&](const fs::path& folder) { adapters.save(folder); });
  }
  void load(const gpt::Checkpoint& checkpoint) {
    trainer.steps_done = gpt::load_checkpoint(checkpoint, state, kSettings);
  }

  std::vector<gpt::Example> examples = make_examples();
  gpt::LanguageModel model = testing::tiny_llama();
  lora::Adapters adapters;
  gpt::Trainer trainer{*model, adapters, options()};
  gpt::RunState state{adapters.named_parameters(), trainer.optimizer, testing::device()};
};

std::string content(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write(const fs::path& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

}  // namespace

TEST_CASE("A resumed run has the losses of a run that never stopped, to the last bit", "[examples][run_state]") {
  for (const auto& method : lora::all_methods()) {
    testing::TemporaryFolder folder;
    Run whole(method);
    const auto expected = whole.losses_until(9);

    Run first(method);
    first.losses_until(5);
    const auto checkpoint = first.save(folder.path());
    CHECK(checkpoint.step == 5);
    CHECK(checkpoint.folder.filename() == "checkpoint-5");

    Run second(method);
    torch::manual_seed(999);  // nothing may depend on what happened before
    second.load(checkpoint);
    CHECK(second.losses_until(9) == std::vector<double>(expected.begin() + 5, expected.end()));
    for (size_t i = 0; i < whole.trainer.parameters.size(); ++i) {
      CHECK(torch::equal(second.trainer.parameters[i], whole.trainer.parameters[i]));
    }

    Run other_mask(method);  // and the test would notice if the dropout went another way
    other_mask.load(checkpoint);
    torch::manual_seed(999);
    CHECK(other_mask.losses_until(6).front() != expected[5]);
  }
}

TEST_CASE("A checkpoint holds a usable adapter, and the last two are kept", "[examples][run_state]") {
  testing::TemporaryFolder folder;
  Run run;
  for (int64_t step : {1, 2, 9}) {
    run.losses_until(step);
    run.save(folder.path());
  }
  const auto checkpoints = gpt::list_checkpoints(folder.path());
  REQUIRE(checkpoints.size() == 2);
  CHECK(checkpoints[0].step == 2);
  CHECK(checkpoints[1].step == 9);
  size_t entries = 0;
  for (const auto& entry : fs::directory_iterator(folder.path())) entries += entry.exists();
  CHECK(entries == 2);  // no temporary folder stays

  auto model = testing::tiny_llama();
  auto adapters = lora::load_adapter(*model, checkpoints[1].folder / "adapter");
  const auto ids = torch::arange(8, testing::device()).view({2, 4});
  torch::NoGradGuard no_grad;
  run.model->eval();
  model->eval();
  auto active = adapters.activate();
  const auto loaded = model->forward(ids);
  auto running = run.adapters.activate();
  CHECK(testing::distance(loaded, run.model->forward(ids)) < 1e-6);
}

TEST_CASE("Checkpoints are ordered by their number, and other names are not checkpoints", "[examples][run_state]") {
  testing::TemporaryFolder folder;
  CHECK(gpt::list_checkpoints(folder / "nothing").empty());
  for (const char* name : {"checkpoint-100", "checkpoint-9", "checkpoint-20", ".checkpoint-30.tmp", "checkpoint-",
                           "xcheckpoint-4", "checkpoint-5x", "adapter"}) {
    fs::create_directories(folder / name);
  }
  std::vector<int64_t> steps;
  for (const auto& checkpoint : gpt::list_checkpoints(folder.path())) steps.push_back(checkpoint.step);
  CHECK(steps == std::vector<int64_t>{9, 20, 100});
}

TEST_CASE("A save that fails or dies leaves the former checkpoint as it was", "[examples][run_state]") {
  testing::TemporaryFolder folder;
  const auto target = folder / "checkpoint-3";
  gpt::write_folder(target, [](const fs::path& path) { write(path / "state", "whole"); });
  CHECK(content(target / "state") == "whole");

  CHECK_THROWS_WITH(gpt::write_folder(target,
                                      [](const fs::path& path) {
                                        write(path / "state", "half");
                                        throw std::runtime_error("disk full");
                                      }),
                    contains("disk full"));
  CHECK(content(target / "state") == "whole");
  CHECK_FALSE(fs::exists(folder / ".checkpoint-3.tmp"));

  const auto child = fork();
  if (child == 0) {
    gpt::write_folder(target, [](const fs::path& path) {
      write(path / "state", "half");
      _exit(7);
    });
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(WEXITSTATUS(status) == 7);
  CHECK(content(target / "state") == "whole");
  CHECK(gpt::list_checkpoints(folder.path()).size() == 1);

  gpt::write_folder(target, [](const fs::path& path) {
    CHECK(fs::is_empty(path));  // what the dead process left is gone
    write(path / "state", "new");
  });
  CHECK(content(target / "state") == "new");
  CHECK_FALSE(fs::exists(folder / ".checkpoint-3.tmp"));
}

TEST_CASE("Resuming with another setting names it, and the damage of a checkpoint is named", "[examples][run_state]") {
  testing::TemporaryFolder folder;
  Run run;
  run.losses_until(3);
  const auto checkpoint = run.save(folder.path());
  const auto good = lora::read_safetensors(checkpoint.folder / "state.safetensors");
  Run fresh;
  const auto before = fresh.trainer.parameters[1].detach().clone();
  auto error_with = [&](nlohmann::json settings) {
    return error_of([&] { gpt::load_checkpoint(checkpoint, fresh.state, settings); });
  };
  auto settings = kSettings;
  settings["--rank"] = 3;
  CHECK_THAT(error_with(settings), contains("--resume: --rank was 2 in "));
  CHECK_THAT(error_with(settings), contains("but is 3 now"));
  settings = kSettings;
  settings["adapted layers"] = {"a"};
  CHECK_THAT(error_with(settings), contains("adapted layers was [\"a\",\"b\"]"));

  auto error_of_state = [&](std::map<std::string, torch::Tensor> tensors) {
    for (auto& [name, tensor] : tensors) tensor = tensor.clone();
    lora::write_safetensors(checkpoint.folder / "state.safetensors", tensors);
    return error_with(kSettings);
  };
  const std::string name = "exp_avg.model.layers.1.self_attn.v_proj.lora_B";
  REQUIRE(good.count(name) == 1);
  auto tensors = good;
  tensors.erase(name);
  CHECK_THAT(error_of_state(tensors), contains("state.safetensors: the tensor \"" + name + "\" is missing"));
  tensors[name] = torch::zeros({3, 3});
  CHECK_THAT(error_of_state(tensors), contains("\"" + name + "\" must be float [8, 2], found float [3, 3]"));
  write(checkpoint.folder / "run.json", "{\"step\": 3");
  CHECK_THAT(error_with(kSettings), contains("run.json: is missing or damaged; remove "));
  CHECK(torch::equal(fresh.trainer.parameters[1], before));
  CHECK(fresh.trainer.steps_done == 0);
}
