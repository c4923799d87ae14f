#!/bin/sh
# sh tests/fuzz/run.sh [SECONDS]: builds the fuzzers of the readers with clang's sanitizers, in build/fuzz, and runs both
# side by side for so long (60). Each begins with the corpus that make_corpus.py writes and with what earlier runs found.
# An input on which one fails stays in build/fuzz as crash-*, with the report in the log beside it; 0 seconds only try
# what is in the corpus.
set -eu
cd "$(dirname "$0")/../.."
seconds=${1:-60}
. tests/setup.sh

mkdir -p build
install_packages only clang
choose_python
find_clang || fail "There is no clang++ with libFuzzer and sanitizers (Debian: clang, libclang-rt-dev)"
torch=$("$python" -c 'import torch; print(torch.__path__[0])')
out=build/fuzz
mkdir -p "$out/found_safetensors" "$out/found_config"
"$python" tests/fuzz/make_corpus.py "$out/corpus"

# LibTorch itself is not compiled with sanitizers, so memory that it hands over is known by its allocations only. Two
# checks are left out for its headers: calls of its virtual functions cannot be checked, because its type information is
# hidden (vptr), and containers that are filled on one side and read on the other look too short (container overflow).
flags="-std=c++17 -g1 -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -DFMT_HEADER_ONLY"
export ASAN_OPTIONS=detect_container_overflow=0:allocator_may_return_null=1
for name in safetensors config; do
  program=$out/${name}_fuzzer
  if [ ! -e "$program" ] || [ -n "$(find include tests/fuzz -newer "$program" -name '*.?pp')" ]; then
    say "Compiling $program"
    "$clang" $flags -Iinclude -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" \
      "tests/fuzz/${name}_fuzzer.cpp" -o "$program" "-L$torch/lib" "-Wl,-rpath,$torch/lib" -ltorch_cpu -lc10
  fi
done

# run NAME: in the background, so that both have the same minute
run() {
  limit=-max_total_time=$seconds
  [ "$seconds" -gt 0 ] || limit=-runs=0
  "$out/$1_fuzzer" "$limit" -dict="$out/corpus/$1.dict" -artifact_prefix="$out/$1-" -print_final_stats=1 -timeout=10 \
    -max_len=4096 "$out/found_$1" "$out/corpus/$1" > "$out/$1.log" 2>&1 &
}
run safetensors
safetensors=$!
run config
config=$!

failed=
wait $safetensors || failed="$failed safetensors"
wait $config || failed="$failed config"
for name in safetensors config; do
  say "$name: $(grep -E 'DONE|number_of_executed_units' "$out/$name.log" | tail -n 2 | tr -s '\n \t' ' ')"
done
for name in $failed; do
  tail -n 60 "$out/$name.log" >&2
done
[ -z "$failed" ] || fail "Failed:$failed"
