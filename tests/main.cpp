// Catch2 2 wants one translation unit with its main(); with version 3 this file is not compiled.
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
