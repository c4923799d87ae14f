#pragma once

#include <torch/types.h>

#include <lora/files/atomic_file.hpp>
#include <lora/files/descriptor.hpp>
#include <lora/files/error.hpp>
#include <lora/files/safetensors/types.hpp>
#include <lora/linkage.hpp>
#include <lora/version.hpp>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace lora {
inline namespace LORA_ABI {

/// The content of a safetensors file.
struct Safetensors {
  std::map<std::string, torch::Tensor> tensors;
  std::map<std::string, std::string> metadata;
};

/// Maps a safetensors file and copies nothing: the values are read from the disk when they are used, and pages that are
/// not used cost no memory. The tensors may be changed in place; the file stays as it is. The mapping lives until the
/// last of the tensors is gone. Values that are not aligned for their type are copied.
///
/// Types: every one the format shares with LibTorch; F4 becomes Float4_e2m1fn_x2, with half the last dimension.
/// Errors: CheckpointError that names the file and the rule of the format that it breaks.
LORA_INLINE Safetensors open_safetensors(const std::filesystem::path& path);

/// The tensors of `open_safetensors`.
LORA_INLINE std::map<std::string, torch::Tensor> read_safetensors(const std::filesystem::path& path);

/// Maps a model that is split over several files, given the `model.safetensors.index.json` beside them. Exactly the
/// tensors that the index lists are returned.
///
/// Errors: CheckpointError if the index or a shard is damaged, or a tensor is not in its shard (names both).
LORA_INLINE std::map<std::string, torch::Tensor> read_safetensors_index(const std::filesystem::path& index_json);

/// Reads safetensors one tensor at a time, each into memory of its own, so that no more than one has to be in memory.
/// (What is used of the tensors of `read_safetensors` counts as memory of the process until the last of them is gone.)
///
/// Errors: CheckpointError that names the file, and the tensor or the reason of the operating system.
class SafetensorsReader {
 public:
  /// The tensors of one file.
  explicit SafetensorsReader(const std::filesystem::path& path);
  /// Those of a model that is split over several files, as `read_safetensors_index` finds them.
  static SafetensorsReader of_index(const std::filesystem::path& index_json);

  /// What there is, sorted by name.
  std::vector<TensorInfo> tensors() const;

  torch::Tensor read(const std::string& name) const;

 private:
  struct File {
    std::filesystem::path path;
    detail::Descriptor descriptor;
    int64_t data = 0;  // where the values start in it
  };
  struct Place {
    detail::StoredTensor stored;
    size_t file;
  };

  SafetensorsReader(std::filesystem::path index, std::nullptr_t);

  /// Adds the tensors of a file, or those of these names; returns the names.
  std::set<std::string> add(const std::filesystem::path& path, const std::set<std::string>* wanted);

  std::filesystem::path source_;
  std::vector<File> files_;
  std::map<std::string, Place> places_;
};

/// What a `SafetensorsWriter` has to know of tensors before it gets them.
LORA_INLINE std::vector<TensorInfo> tensor_infos(const std::map<std::string, torch::Tensor>& tensors);

/// Writes a safetensors file one tensor at a time, so that no more than one has to be in memory.
///
/// The bytes are those of the Python package's `safetensors.torch.save_file`, whatever the order of the calls. The file
/// appears under its name, complete, with `finish()`; without it the target stays as it was.
///
/// Errors: CheckpointError that names the target, and the tensor or the reason of the operating system.
class SafetensorsWriter {
 public:
  /// Empty `metadata` writes none.
  explicit SafetensorsWriter(const std::filesystem::path& path, std::vector<TensorInfo> tensors,
                             std::map<std::string, std::string> metadata = {{"format", "pt"}});

  /// Writes the values of one of the announced tensors; it may live on any device and have any strides.
  void write(const std::string& name, const torch::Tensor& tensor);

  /// Brings the file to the disk and renames it to its target. Every announced tensor has to be written by then.
  void finish();

  /// The same together with another file of the folder: both appear under their names at one moment.
  void finish_with(detail::AtomicFile& companion);

 private:
  void check_complete() const;

  template <typename... Reason>
  void check(bool holds, const Reason&... reason) const {
    if (!holds) throw CheckpointError(file_.target(), reason...);
  }

  detail::AtomicFile file_;
  int64_t data_ = 0;  // where the values start in the file
  std::map<std::string, detail::StoredTensor> missing_;
};

/// Writes `tensors` like `SafetensorsWriter`.
LORA_INLINE void write_safetensors(const std::filesystem::path& path,
                                   const std::map<std::string, torch::Tensor>& tensors,
                                   std::map<std::string, std::string> metadata = {{"format", "pt"}});

}  // namespace LORA_ABI
}  // namespace lora

#if LORA_BODIES

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <lora/files/atomic_pair.hpp>
#include <lora/files/safetensors/header.hpp>
#include <lora/files/mapped_file.hpp>

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

namespace lora {
inline namespace LORA_ABI {

#if defined(__BYTE_ORDER__)  // not by Microsoft's compiler, whose processors are all little-endian
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "safetensors files hold little-endian numbers");
#endif

namespace detail {

/// A tensor over its bytes in the file. It shares the ownership of the mapping.
inline torch::Tensor view_of(const std::shared_ptr<MappedFile>& file, int64_t data, const StoredTensor& stored) {
  const auto& [name, dtype, shape] = stored.info;
  if (stored.begin == stored.end) return at::empty(shape, dtype);
  char* address = file->data() + data + stored.begin;
  auto tensor = at::from_blob(
      address, shape, [file](void*) {}, dtype);
  // Other writers need not align; kernels may not read a float at an odd address.
  const bool aligned = reinterpret_cast<uintptr_t>(address) % c10::elementSize(dtype) == 0;
  if (aligned) return tensor;
  auto copy = at::empty(shape, dtype);
  std::memcpy(copy.data_ptr(), address, copy.nbytes());
  return copy;
}

}  // namespace detail

LORA_INLINE Safetensors open_safetensors(const std::filesystem::path& path) {
  const auto file = std::make_shared<detail::MappedFile>(path);
  int64_t data = 0;
  auto header = detail::SafetensorsHeaderReader(path).read(file->text(), data);
  Safetensors content{{}, std::move(header.metadata)};
  for (const auto& stored : header.tensors)
    content.tensors.emplace(stored.info.name, detail::view_of(file, data, stored));
  return content;
}

LORA_INLINE std::map<std::string, torch::Tensor> read_safetensors(const std::filesystem::path& path) {
  return open_safetensors(path).tensors;
}

namespace detail {

/// The names of tensors by the shard that holds them. A shard has to lie in the folder of the index or below it.
inline std::map<std::string, std::vector<std::string>> read_weight_map(const std::filesystem::path& index) {
  const auto json = read_json(index);
  if (!json.is_object() || !json.contains("weight_map") || !json["weight_map"].is_object())
    throw CheckpointError(index, "has to hold an object \"weight_map\" with a file name for each tensor");
  std::map<std::string, std::vector<std::string>> shards;
  for (const auto& [tensor, shard] : json["weight_map"].items()) {
    if (!shard.is_string())
      throw CheckpointError(index, "tensor \"", tensor, "\" has no file name, but ", shard.dump());
    const std::filesystem::path name = shard.get<std::string>();
    if (name.empty() || name.is_absolute() || std::find(name.begin(), name.end(), "..") != name.end())
      throw CheckpointError(index, "tensor \"", tensor, "\" lies outside of this folder, in \"", name.string(), "\"");
    shards[name.string()].push_back(tensor);
  }
  return shards;
}

/// Throws when a shard does not have what an index says.
template <class Found>
void check_shard(const Found& found, const std::vector<std::string>& names, const std::filesystem::path& shard,
                 const std::filesystem::path& index) {
  for (const auto& name : names) {
    if (found.count(name) == 0)
      throw CheckpointError(shard, "has no tensor \"", name, "\", which ", index.string(), " says it has");
  }
}

}  // namespace detail

LORA_INLINE std::map<std::string, torch::Tensor> read_safetensors_index(const std::filesystem::path& index_json) {
  std::map<std::string, torch::Tensor> tensors;
  for (const auto& [shard, names] : detail::read_weight_map(index_json)) {
    const auto path = index_json.parent_path() / shard;
    auto content = read_safetensors(path);
    detail::check_shard(content, names, path, index_json);
    for (const auto& name : names) tensors.insert(*content.find(name));
  }
  return tensors;
}

LORA_INLINE SafetensorsReader::SafetensorsReader(const std::filesystem::path& path) : source_(path) {
  add(path, nullptr);
}

LORA_INLINE SafetensorsReader SafetensorsReader::of_index(const std::filesystem::path& index_json) {
  SafetensorsReader reader(index_json, nullptr);
  for (const auto& [shard, names] : detail::read_weight_map(index_json)) {
    const auto path = index_json.parent_path() / shard;
    const std::set<std::string> wanted(names.begin(), names.end());
    detail::check_shard(reader.add(path, &wanted), names, path, index_json);
  }
  return reader;
}

LORA_INLINE std::vector<TensorInfo> SafetensorsReader::tensors() const {
  std::vector<TensorInfo> infos;
  for (const auto& item : places_) infos.push_back(item.second.stored.info);
  return infos;
}

LORA_INLINE torch::Tensor SafetensorsReader::read(const std::string& name) const {
  const auto found = places_.find(name);
  if (found == places_.end()) throw CheckpointError(source_, "has no tensor \"", name, "\"");
  const auto& [stored, number] = found->second;
  const auto& file = files_[number];
  auto tensor = at::empty(stored.info.shape, stored.info.dtype);
  auto* bytes = static_cast<char*>(tensor.mutable_data_ptr());
  if (!detail::read_file(file.descriptor.file(), file.data + stored.begin, bytes, tensor.nbytes()))
    throw CheckpointError(file.path, "tensor \"", name, "\" cannot be read: ", detail::last_error().message());
  return tensor;
}

LORA_INLINE SafetensorsReader::SafetensorsReader(std::filesystem::path index, std::nullptr_t)
    : source_(std::move(index)) {}

LORA_INLINE std::set<std::string> SafetensorsReader::add(const std::filesystem::path& path,
                                                         const std::set<std::string>* wanted) {
  files_.push_back({path, detail::open_existing(path, detail::Access::kRead)});
  auto& file = files_.back();
  const detail::MappedFile content(path, file.descriptor);  // of which no more than the header is touched
  std::set<std::string> names;
  for (auto& stored : detail::SafetensorsHeaderReader(path).read(content.text(), file.data).tensors) {
    const auto name = stored.info.name;
    if (wanted != nullptr && wanted->count(name) == 0) continue;
    names.insert(name);
    places_.emplace(name, Place{std::move(stored), files_.size() - 1});
  }
  return names;
}

LORA_INLINE std::vector<TensorInfo> tensor_infos(const std::map<std::string, torch::Tensor>& tensors) {
  std::vector<TensorInfo> infos;
  for (const auto& [name, tensor] : tensors) infos.push_back({name, tensor.scalar_type(), tensor.sizes().vec()});
  return infos;
}

LORA_INLINE SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& path, std::vector<TensorInfo> tensors,
                                                 std::map<std::string, std::string> metadata)
    : file_(path) {
  const detail::SafetensorsHeaderWriter writer(file_.target());
  auto header = writer.arrange(std::move(tensors), std::move(metadata));
  const auto text = writer.text(header);
  file_.write_at(0, text);
  data_ = static_cast<int64_t>(text.size());
  for (auto& tensor : header.tensors) {
    const auto name = tensor.info.name;
    if (name == "__metadata__" || !missing_.emplace(name, std::move(tensor)).second)
      throw CheckpointError(file_.target(), "the tensor name \"", name, "\" is taken already");
  }
}

LORA_INLINE void SafetensorsWriter::write(const std::string& name, const torch::Tensor& tensor) {
  const auto found = missing_.find(name);
  check(found != missing_.end(), "tensor \"", name, "\" was not announced, or is written twice");
  const auto& [info, begin, end] = found->second;
  check(tensor.defined(), "tensor \"", name, "\" is undefined");
  check(tensor.layout() == at::kStrided && tensor.scalar_type() == info.dtype && tensor.sizes() == info.shape,
        "tensor \"", name, "\" was announced as ", info.dtype, " ", c10::IntArrayRef(info.shape), ", but is ",
        tensor.layout(), " ", tensor.scalar_type(), " ", tensor.sizes());
  const auto values = tensor.detach().to(at::kCPU).resolve_conj().resolve_neg().contiguous();
  file_.write_at(data_ + begin, {static_cast<const char*>(values.const_data_ptr()), values.nbytes()});
  missing_.erase(found);
}

LORA_INLINE void SafetensorsWriter::finish() {
  check_complete();
  file_.commit();
}

LORA_INLINE void SafetensorsWriter::finish_with(detail::AtomicFile& companion) {
  check_complete();
  file_.sync();
  companion.sync();
  detail::AtomicPair(file_, companion).commit();
}

LORA_INLINE void SafetensorsWriter::check_complete() const {
  check(missing_.empty(), "cannot be finished: ", missing_.size(), " tensors were not written, \"",
        missing_.empty() ? "" : missing_.begin()->first, "\" among them");
}

namespace detail {

/// Writes all of `tensors`, but for the end. `finish` gets the writer.
template <typename Finish>
void write_tensors(const std::filesystem::path& path, const std::map<std::string, torch::Tensor>& tensors,
                   std::map<std::string, std::string> metadata, Finish finish) {
  for (const auto& [name, tensor] : tensors) {
    if (!tensor.defined()) throw CheckpointError(path, "tensor \"", name, "\" is undefined");
  }
  SafetensorsWriter writer(path, tensor_infos(tensors), std::move(metadata));
  for (const auto& [name, tensor] : tensors) writer.write(name, tensor);
  finish(writer);
}

}  // namespace detail

LORA_INLINE void write_safetensors(const std::filesystem::path& path,
                                   const std::map<std::string, torch::Tensor>& tensors,
                                   std::map<std::string, std::string> metadata) {
  detail::write_tensors(path, tensors, std::move(metadata), [](auto& writer) { writer.finish(); });
}

}  // namespace LORA_ABI
}  // namespace lora

#endif  // LORA_BODIES
