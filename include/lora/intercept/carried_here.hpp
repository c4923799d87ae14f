#pragma once

#include <lora/system/process_wide.hpp>
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
  static int& depth_here() {
    thread_local int count = 0;
    return count;
  }

  struct Depth {
    static constexpr const char* kName = "carried_here";
    int& (*of_thread)() = &depth_here;
  };

  static int& depth() { return process_wide<Depth>().of_thread(); }
};

}  // namespace detail
}  // namespace LORA_ABI
}  // namespace lora
