#pragma once

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <lora/version.hpp>

#include <filesystem>

namespace lora {
inline namespace LORA_ABI {

/// A file that cannot be read or written, or whose content is not what it has to be. The text starts with the path.
class CheckpointError : public c10::Error {
 public:
  /// `reason` is put together like the arguments of TORCH_CHECK.
  template <typename... Reason>
  explicit CheckpointError(const std::filesystem::path& path, const Reason&... reason)
      : c10::Error(c10::str(path.string(), ": ", reason...)) {}
};

}  // namespace LORA_ABI
}  // namespace lora
