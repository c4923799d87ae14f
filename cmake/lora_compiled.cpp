// lora::compiled: the bodies of the library's functions, for programs that only see their declarations.
#define LORA_COMPILING
#include <lora/lora.hpp>
