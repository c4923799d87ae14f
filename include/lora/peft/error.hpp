#pragma once

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <filesystem>

namespace lora {

/// A file that cannot be read or written, or whose content is not what it has to be. The text starts with the path.
class CheckpointError : public c10::Error {
 public:
  /// `reason` is put together like the arguments of TORCH_CHECK.
  template <typename... Reason>
  explicit CheckpointError(const std::filesystem::path& path, const Reason&... reason)
      : c10::Error(c10::str(path.string(), ": ", reason...)) {}
};

}  // namespace lora
