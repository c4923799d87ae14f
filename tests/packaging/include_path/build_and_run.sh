#!/bin/sh
# build_and_run.sh CXX STANDARD LORA_INCLUDE LIBTORCH OUT_DIR: the consumer with a compiler's options and nothing else.
set -eu
cxx=$1 standard=$2 include=$3 torch=$4 out=$5
mkdir -p "$out"
# LibTorch keeps the kernels of a device in a library of which no symbol is used: --no-as-needed
libraries="-ltorch -ltorch_cpu -lc10"
[ ! -e "$torch/lib/libtorch_cuda.so" ] || libraries="$libraries -ltorch_cuda -lc10_cuda"
"$cxx" "$standard" -DFMT_HEADER_ONLY "-I$include" -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" \
  "$(dirname "$0")/../consumer.cpp" -o "$out/consumer" \
  "-L$torch/lib" "-Wl,-rpath,$torch/lib" -Wl,--no-as-needed $libraries
"$out/consumer"
