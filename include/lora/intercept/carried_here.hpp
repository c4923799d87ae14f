#pragma once

#include <lora/system/attributes.hpp>
#include <lora/version.hpp>

namespace lora {
inline namespace LORA_ABI {
namespace detail {

/// While it lives, what runs on this thread was wrapped by `carry`.
class CarriedHere {
 public:
  CarriedHere() { ++depth(); }
  ~CarriedHere() { --depth(); }
  CarriedHere(const CarriedHere&) = delete;
  CarriedHere& operator=(const CarriedHere&) = delete;

  static bool is() { return depth() > 0; }

 private:
  LORA_SHARED static int& depth() {
    thread_local int count = 0;
    return count;
  }
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
