// Every test case draws from the same seed: what passes once passes always, alone and among others.
#define CATCH_CONFIG_EXTERNAL_INTERFACES  // version 2 keeps listeners behind it
#include "testing.hpp"

namespace {

#if LORA_CATCH2 >= 3
using Listener = Catch::EventListenerBase;
#else
using Listener = Catch::TestEventListenerBase;
#endif

struct Seed : Listener {
  using Listener::Listener;
  void testCaseStarting(const Catch::TestCaseInfo&) override { torch::manual_seed(0); }
};
CATCH_REGISTER_LISTENER(Seed)

}  // namespace
