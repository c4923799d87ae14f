#!/bin/sh
# The tests on a CUDA device, on a machine that has LibTorch but neither a network nor the packages that tests need:
#
#   sh tests/cuda.sh pack DIR           here: this checkout and what it needs beside LibTorch, at most 40 MB, in a new
#                                       folder
#   sh DIR/lora/tests/cuda.sh run DIR   there: builds in DIR/build, with the package torch of $LORA_PYTHON or python3,
#                                       and runs the tests on the device and a short benchmark
#
# That machine has Linux on the same kind of processor, a C++ compiler, cmake 3.24, ninja, and a Python with torch 2.6
# to 2.14. With LORA_TEST_DEVICE=cpu the same is run where no GPU is.
set -eu
usage() { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -eq 2 ] || usage
mode=$1
mkdir -p "$2"
place=$(cd "$2" && pwd)
cd "$(dirname "$0")/.."
. tests/setup.sh

deps=$place/deps
most_kilobytes=40000

# version_of HEADER MACRO_PREFIX: what the macros say
version_of() {
  printf '#include <%s>\n%s_MAJOR.%s_MINOR.%s_PATCH\n' "$1" "$2" "$2" "$2" | c++ -E -P -x c++ - | tail -n 1 | tr -d ' '
}

# add_package NAME VERSION TARGET: what find_package(NAME) reads there, for headers alone
add_package() {
  [ -n "$2" ] || fail "cuda.sh: the version of $1 is not known"
  mkdir -p "$deps/lib/cmake/$1"
  cat > "$deps/lib/cmake/$1/$1Config.cmake" << END
if(NOT TARGET $3)
  add_library($3 INTERFACE IMPORTED)
  set_target_properties($3 PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "\${CMAKE_CURRENT_LIST_DIR}/../../../include")
endif()
END
  cat > "$deps/lib/cmake/$1/$1ConfigVersion.cmake" << END
set(PACKAGE_VERSION "$2")
set(PACKAGE_VERSION_COMPATIBLE TRUE)
END
}

# add_headers FOLDER...: of the system's
add_headers() {
  for name in "$@"; do
    for system in /usr/include /usr/local/include; do
      [ ! -e "$system/$name" ] || cp -RL "$system/$name" "$deps/include/"
    done
    [ -e "$deps/include/$name" ] || fail "cuda.sh: the headers $name are not in the system's folders"
  done
}

pack() {
  [ -z "$(ls -A "$place")" ] || fail "cuda.sh: $place is not empty; name a new folder"
  install_packages only catch2
  have catch2/catch.hpp || fail "cuda.sh: Catch2 2 is needed, which is headers alone (Debian 12 has it)"
  mkdir -p "$place/lora" "$deps/include"
  git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$place/lora"
  add_headers catch2 nlohmann CLI fmt pcre2.h
  add_package Catch2 "$(version_of catch2/catch.hpp CATCH_VERSION | sed 's/CATCH_VERSION_PATCH$/0/')" Catch2::Catch2
  add_package nlohmann_json "$(version_of nlohmann/json.hpp NLOHMANN_JSON_VERSION)" nlohmann_json::nlohmann_json
  add_package CLI11 "$(version_of CLI/Version.hpp CLI11_VERSION)" CLI11::CLI11
  add_package fmt "$(echo 'FMT_VERSION' | c++ -E -P -include fmt/core.h -x c++ - | tail -n 1)" fmt::fmt-header-only
  library=$(c++ -print-file-name=libpcre2-8.a)
  [ -e "$library" ] || fail "cuda.sh: libpcre2-8.a is not there; it is in Debian's libpcre2-dev"
  cp "$library" "$deps/lib/"
  [ ! -e build/jinja ] || cp -R build/jinja "$deps/"
  kilobytes=$(du -sk "$place" | cut -f 1)
  [ "$kilobytes" -le $most_kilobytes ] || fail "cuda.sh: $place takes $kilobytes kB, more than $most_kilobytes"
  say "$place takes $kilobytes kB. On the other machine: sh DIR/lora/tests/cuda.sh run DIR"
}

run() {
  [ -d "$deps" ] || fail "cuda.sh: $place holds nothing that was packed"
  python=${LORA_PYTHON:-$(command -v python3)} || fail "cuda.sh: there is no python3; set LORA_PYTHON"
  device=${LORA_TEST_DEVICE:-cuda}
  if [ "$device" = cuda ]; then
    "$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' ||
      fail "cuda.sh: torch of $python sees no CUDA device; with LORA_TEST_DEVICE=cpu the CPU is tested"
  fi
  build=$place/build
  JOBS=${JOBS:-$(nproc)}
  with="-DLORA_BUILD_TESTS=ON -DLORA_BUILD_BENCHMARKS=ON -DLORA_TEST_BATCHES=$JOBS"
  CMAKE_ARGS="-DCMAKE_PREFIX_PATH=$deps -DLORA_JINJA=$deps/jinja $with ${CMAKE_ARGS:-}"
  configure
  build 3 lora_tests finetune_gpt 02_six_lines train_step layer > "$build.out" 2>&1 ||
    { grep -A 30 FAILED "$build.out" >&2; fail "cuda.sh: the build failed; the whole log is $build.out"; }
  say "configured and built in $(($(date +%s) - start)) s"
  failed=
  LORA_TEST_DEVICE=$device OMP_NUM_THREADS=1 ctest --test-dir "$build" --output-on-failure --parallel "$JOBS" \
    -R '_test$|examples/02' || failed=yes
  "$build/programs/train_step" "$device" || failed=yes
  "$build/programs/layer" 30 "$device" || failed=yes
  say "in all $(($(date +%s) - start)) s"
  [ -z "$failed" ] || exit 1
}

start=$(date +%s)
case $mode in
  pack) pack ;;
  run) run ;;
  *) usage ;;
esac
