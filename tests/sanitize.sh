#!/bin/sh
# sh tests/sanitize.sh [address | thread] [REGEX]: builds the tests whose file names match REGEX (default: all) with
# AddressSanitizer and UndefinedBehaviorSanitizer, or with ThreadSanitizer, and runs them, with the former on the second
# device, too; by clang where there is one, which takes half of g++'s time, unless CXX says otherwise. LibTorch itself is
# not instrumented: what is looked at is this library and what it does with LibTorch's memory.
#
# Another compiler, standard or Catch2:
#   CXX=clang++-14 CMAKE_ARGS="-DCMAKE_CXX_STANDARD=20 -DCatch2_DIR=DIR" sh tests/sanitize.sh
set -eu
cd "$(dirname "$0")/.."
. tests/setup.sh

kind=${1:-address}
files=${2:-.}
case $kind in
  address) flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined" ;;
  thread) flags="-fsanitize=thread" ;;
  *) fail "sanitize.sh knows \"address\" and \"thread\", not \"$kind\"" ;;
esac
install_packages
choose_python
if [ -z "${CXX:-}" ] && find_clang; then export CXX="$clang"; fi
build=build/sanitize-$kind-$(basename "${CXX:-c++}")  # CMake keeps the compiler of the first time
CMAKE_ARGS="${CMAKE_ARGS:-} -DLORA_BUILD_EXAMPLES=OFF -DLORA_TEST_FILES=$files -DLORA_TEST_BATCHES=2"
CXXFLAGS="$flags -fno-omit-frame-pointer" configure
build 15 lora_tests

# Leaks are looked for where this library allocates; LibTorch keeps its registries until the process ends.
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_leaks=1}" LSAN_OPTIONS="suppressions=$PWD/tests/support/leaks.txt:print_suppressions=0"
# LibTorch is not instrumented, so ThreadSanitizer does not see its locks; races inside of it are not this library's.
export TSAN_OPTIONS="suppressions=$PWD/tests/support/races.txt:ignore_noninstrumented_modules=1"
# For a device, autograd has threads of its own, to which a pass is handed over by such locks; so not under it.
if [ "$kind" = thread ]; then set -- --exclude-regex :second_device; else set --; fi
OMP_NUM_THREADS=1 exec ctest --test-dir "$build" --no-tests=error --output-on-failure --parallel 2 "$@"
