// Checkpoints of a run: everything that decides how it goes on, in a folder that is either whole or not there.
#pragma once

#include <torch/torch.h>

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <lora/lora.hpp>
#include <lora/train/optimizer.hpp>

#include "config.hpp"

namespace gpt {

namespace detail {

namespace fs = std::filesystem;

/// Waits until a file, or the list of names of a folder, is on the disk.
inline void sync_to_disk(const fs::path& path) {
  const int file = open(path.c_str(), O_RDONLY);
  TORCH_CHECK(file >= 0, path.string(), ": cannot be opened to be written to disk");
  // Some file systems cannot sync a folder and say EINVAL; the files in it are safe there too.
  const bool is_synced = fsync(file) == 0 || (errno == EINVAL && fs::is_directory(path));
  close(file);
  TORCH_CHECK(is_synced, path.string(), ": cannot be written to disk");
}

/// Removes a folder so that it is never seen half removed under its name.
inline void remove_folder(const fs::path& folder) {
  const auto hidden = folder.parent_path() / ("." + folder.filename().string() + ".removed");
  fs::remove_all(hidden);
  fs::rename(folder, hidden);
  fs::remove_all(hidden);
}

}  // namespace detail

/// Calls `write` with an empty folder beside `target`, and gives it the name `target`, in place of what had it, only
/// when all of it is on the disk. When `write` throws, or the process dies in it, nothing under the name `target` has
/// changed.
inline void write_folder(const std::filesystem::path& target,
                         const std::function<void(const std::filesystem::path&)>& write) {
  namespace fs = std::filesystem;
  const auto temporary = target.parent_path() / ("." + target.filename().string() + ".tmp");
  fs::remove_all(temporary);  // of a process that died
  fs::create_directories(temporary);
  try {
    write(temporary);
    for (const auto& entry : fs::recursive_directory_iterator(temporary)) detail::sync_to_disk(entry.path());
    detail::sync_to_disk(temporary);
    if (fs::exists(target)) detail::remove_folder(target);
    fs::rename(temporary, target);
  } catch (...) {
    fs::remove_all(temporary);
    throw;
  }
  detail::sync_to_disk(fs::absolute(target).parent_path());
}

/// A checkpoint of a run: `folder` is OUT/checkpoint-`step`.
struct Checkpoint {
  int64_t step;
  std::filesystem::path folder;
};

/// The checkpoints in `out`, oldest first.
inline std::vector<Checkpoint> list_checkpoints(const std::filesystem::path& out) {
  namespace fs = std::filesystem;
  std::vector<Checkpoint> checkpoints;
  const std::string prefix = "checkpoint-";
  if (!fs::is_directory(out)) return checkpoints;
  for (const auto& entry : fs::directory_iterator(out)) {
    const auto name = entry.path().filename().string();
    const auto digits = name.substr(std::min(prefix.size(), name.size()));
    const bool is_number =
        !digits.empty() && digits.size() < 18 && digits.find_first_not_of("0123456789") == digits.npos;
    if (name.rfind(prefix, 0) == 0 && is_number) checkpoints.push_back({std::stoll(digits), entry.path()});
  }
  std::sort(checkpoints.begin(), checkpoints.end(), [](auto& a, auto& b) { return a.step < b.step; });
  return checkpoints;
}

/// Removes all but the newest `keep` checkpoints of `out`.
inline void remove_old_checkpoints(const std::filesystem::path& out, size_t keep) {
  auto checkpoints = list_checkpoints(out);
  for (size_t i = 0; i + keep < checkpoints.size(); ++i) detail::remove_folder(checkpoints[i].folder);
}

/// What changes while a run goes on, beside the number of the step (the data follow from step and seed).
struct RunState {
  torch::OrderedDict<std::string, torch::Tensor> parameters;  // of the adapters, by name
  lora::AdamW& optimizer;                                     // over exactly these parameters
  torch::Device device;                                       // its random numbers, and the CPU's, feed dropout
};

namespace detail {

/// The random number generators that a run on `device` draws from, by the name they have in a checkpoint.
inline std::map<std::string, at::Generator> generators(torch::Device device) {
  std::map<std::string, at::Generator> result{{"random.cpu", at::globalContext().defaultGenerator(torch::kCPU)}};
  if (!device.is_cpu())
    result.emplace("random." + c10::DeviceTypeName(device.type(), true), at::globalContext().defaultGenerator(device));
  return result;
}

/// The state of one optimizer for another one of the same parameters.
template <class From, class To>
void copy_state(From& from, To& to) {
  std::stringstream archive;
  torch::save(from, archive);
  torch::load(to, archive);
}

/// LibTorch's optimizer with the state of the run's, in which each parameter has tensors of its own.
inline torch::optim::AdamW in_parts(const RunState& state) {
  torch::optim::AdamW parts(state.parameters.values());
  copy_state(state.optimizer, parts);
  return parts;
}

inline torch::optim::AdamWParamState& moments(torch::optim::AdamW& optimizer, const torch::Tensor& parameter) {
  auto& slot = optimizer.state()[parameter.unsafeGetTensorImpl()];
  if (!slot) {  // as AdamW's first step makes it
    auto fresh = std::make_unique<torch::optim::AdamWParamState>();
    fresh->exp_avg(torch::zeros_like(parameter)).exp_avg_sq(torch::zeros_like(parameter));
    slot = std::move(fresh);
  }
  return static_cast<torch::optim::AdamWParamState&>(*slot);
}

}  // namespace detail

/// All tensors of a run: each adapter tensor, AdamW's two moments of it, and the states of the random generators.
inline std::map<std::string, torch::Tensor> state_tensors(const RunState& state) {
  std::map<std::string, torch::Tensor> tensors;
  auto optimizer = detail::in_parts(state);
  for (const auto& item : state.parameters) {
    auto& moments = detail::moments(optimizer, item.value());
    tensors["parameter." + item.key()] = item.value().detach();
    tensors["exp_avg." + item.key()] = moments.exp_avg();
    tensors["exp_avg_sq." + item.key()] = moments.exp_avg_sq();
  }
  for (const auto& [name, generator] : detail::generators(state.device)) tensors[name] = generator.get_state();
  for (auto& [name, tensor] : tensors) tensor = tensor.cpu().contiguous();
  return tensors;
}

/// Puts the tensors of `state_tensors`, read from `file`, back as they were after update `step`. All names and shapes
/// are compared first: when one does not fit, lora::CheckpointError names it and nothing has changed.
inline void restore_tensors(const RunState& state, const std::map<std::string, torch::Tensor>& tensors, int64_t step,
                            const std::filesystem::path& file) {
  for (const auto& [name, expected] : state_tensors(state)) {
    const auto found = tensors.find(name);
    if (found == tensors.end()) throw lora::CheckpointError(file, "the tensor \"", name, "\" is missing");
    const auto& tensor = found->second;
    if (tensor.sizes() == expected.sizes() && tensor.dtype() == expected.dtype()) continue;
    throw lora::CheckpointError(file, "the tensor \"", name, "\" must be ", expected.dtype(), " ", expected.sizes(),
                                ", found ", tensor.dtype(), " ", tensor.sizes());
  }
  torch::NoGradGuard no_grad;
  auto optimizer = detail::in_parts(state);
  for (const auto& item : state.parameters) {
    auto& moments = detail::moments(optimizer, item.value());
    torch::Tensor(item.value()).copy_(tensors.at("parameter." + item.key()));
    moments.exp_avg().copy_(tensors.at("exp_avg." + item.key()));
    moments.exp_avg_sq().copy_(tensors.at("exp_avg_sq." + item.key()));
    moments.step(step);
  }
  detail::copy_state(optimizer, state.optimizer);
  for (auto& [name, generator] : detail::generators(state.device)) generator.set_state(tensors.at(name).clone());
}

/// Writes OUT/checkpoint-STEP: the adapter as `save_adapter` writes it, the tensors of the state, and run.json with the
/// settings of the run. Keeps the last two checkpoints.
inline Checkpoint save_checkpoint(const std::filesystem::path& out, int64_t step, const RunState& state,
                                  const nlohmann::json& settings,
                                  const std::function<void(const std::filesystem::path&)>& save_adapter) {
  const auto target = out / fmt::format("checkpoint-{}", step);
  write_folder(target, [&](const std::filesystem::path& folder) {
    save_adapter(folder / "adapter");
    lora::write_safetensors(folder / "state.safetensors", state_tensors(state));
    write_json(folder / "run.json", nlohmann::json{{"step", step}, {"settings", settings}});
  });
  remove_old_checkpoints(out, 2);
  return {step, target};
}

/// Throws c10::ValueError that names the first setting whose value is not the one that the checkpoint was made with.
inline void check_same_settings(const nlohmann::json& saved, const nlohmann::json& now, const std::string& where) {
  for (const auto& [name, value] : now.items()) {
    const auto before = saved.contains(name) ? saved[name] : nlohmann::json();
    TORCH_CHECK_VALUE(before == value, "--resume: ", name, " was ", before.dump(), " in ", where, ", but is ",
                      value.dump(), " now; give the same options as before, or start a new run with another --out");
  }
}

/// Brings a run back to where `checkpoint` was made and returns the number of updates done. Throws c10::ValueError when
/// a setting is another one now, lora::CheckpointError when the checkpoint is damaged; the state is then as it was.
inline int64_t load_checkpoint(const Checkpoint& checkpoint, const RunState& state, const nlohmann::json& settings) {
  const auto run_file = checkpoint.folder / "run.json";
  std::ifstream stream(run_file);
  const auto run = nlohmann::json::parse(stream, nullptr, /*allow_exceptions=*/false);
  if (!run.is_object() || !run.contains("step") || !run["step"].is_number_integer() || !run.contains("settings")) {
    throw lora::CheckpointError(run_file, "is missing or damaged; remove ", checkpoint.folder.string(),
                                " to go on from the checkpoint before it");
  }
  check_same_settings(run["settings"], settings, checkpoint.folder.string());
  const auto step = run["step"].get<int64_t>();
  const auto state_file = checkpoint.folder / "state.safetensors";
  restore_tensors(state, lora::read_safetensors(state_file), step, state_file);
  return step;
}

}  // namespace gpt
