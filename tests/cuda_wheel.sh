#!/bin/sh
# sh tests/cuda_wheel.sh: proves that the CUDA wheel of torch serves on a machine without the CUDA toolkit, where
# find_package(Torch) would stop: finetune_gpt is configured, built and asked for a CUDA device. A toolkit that is here is
# hidden. On the CPU an example is run, too, since this LibTorch is another one than that of the tests. Not part of tests/run.sh, for the wheel and NVIDIA's libraries take 6 GB (build/cuda-venv).
set -eu
cd "$(dirname "$0")/.."
. tests/setup.sh

build=build/cuda
python=$PWD/build/cuda-venv/bin/python
requirements="torch==2.14.1 numpy==2.4.6"

# hide_toolkit: sets $hidden, the CMake options that keep every find_* command away from each nvcc in reach
hide_toolkit() {
  unset CUDA_HOME CUDA_PATH CUDA_BIN_PATH CUDACXX
  bins= prefixes=
  for nvcc in $(which -a nvcc || true) /usr/local/cuda*/bin/nvcc /opt/cuda*/bin/nvcc; do
    [ -e "$nvcc" ] || continue
    bins="$bins;$(dirname "$nvcc")"
    prefixes="$prefixes;$(dirname "$(dirname "$nvcc")")"
  done
  hidden="-DCMAKE_IGNORE_PATH=$bins -DCMAKE_IGNORE_PREFIX_PATH=$prefixes"
}

# expect WHAT COMMAND...: the command must succeed
expect() {
  what=$1
  shift
  "$@" || fail "cuda_wheel.sh: not so: $what"
  say "ok: $what"
}

install_packages
[ -e "$python" ] || python3 -m venv build/cuda-venv
missing=$(lacking "$python")
[ -z "$missing" ] || "$python" -m pip install --quiet --disable-pip-version-check $missing

hide_toolkit
CMAKE_ARGS="$hidden -DLORA_BUILD_TESTS=OFF -DLORA_BUILD_BENCHMARKS=OFF ${CMAKE_ARGS:-}"
configure
expect "find_package(Torch) stops here for want of the toolkit" \
  grep -q 'cannot find the CUDA' "$build/lora_try_torch/log"
expect "so the targets are lora's own" grep -q "(CUDA.*targets of lora's own" "$build.log"
build 3 finetune_gpt 02_six_lines 03_merge_and_deploy

expect "an example trains and merges with this LibTorch" "$build/programs/02_six_lines"
deploy=$PWD/$build/programs/03_merge_and_deploy
for what in "another saves" "and saves over it"; do
  expect "$what" sh -c "cd '$build' && exec '$deploy'"
done
expect "the C++ library comes before parts of it that are in this LibTorch" \
  sh -c "readelf -d '$deploy' | grep NEEDED | head -n 1 | grep -q 'libstdc++'"
program=$build/programs/finetune_gpt
expect "finetune_gpt needs the CUDA library, though it uses no symbol of it" \
  sh -c "ldd $program | grep -q libtorch_cuda.so"
status=0
"$program" --model . --text tests/cuda_wheel.sh --device cuda > "$build/said" 2>&1 || status=$?
say "finetune_gpt --device cuda:"
cat "$build/said"
expect "exit code 2" [ "$status" -eq 2 ]
expect "one line" [ "$(wc -l < "$build/said")" -eq 1 ]
expect "it speaks of the missing device" grep -q 'no CUDA device is there' "$build/said"
