#!/bin/sh
# build_and_run.sh CXX STANDARD LORA LIBTORCH OUT_DIR: the consumer with a compiler's options and nothing else, and one
# with the functions of lora in a source file of their own.
set -eu
cxx=$1 standard=$2 lora=$3 torch=$4 out=$5
mkdir -p "$out"
# LibTorch keeps the kernels of a device in a library of which no symbol is used: --no-as-needed
libraries="-ltorch -ltorch_cpu -lc10"
[ ! -e "$torch/lib/libtorch_cuda.so" ] || libraries="$libraries -ltorch_cuda -lc10_cuda"
build() {
  "$cxx" "$standard" -DFMT_HEADER_ONLY "-I$lora/include" -isystem "$torch/include" \
    -isystem "$torch/include/torch/csrc/api/include" "$@" \
    "-L$torch/lib" "-Wl,-rpath,$torch/lib" -Wl,--no-as-needed $libraries
}
consumer=$(dirname "$0")/../consumer.cpp
build "$consumer" -o "$out/consumer"
build -DLORA_COMPILED "$consumer" "$lora/cmake/lora_compiled.cpp" -o "$out/compiled_consumer"
[ "$("$out/compiled_consumer")" = "$("$out/consumer")" ]
"$out/consumer"
