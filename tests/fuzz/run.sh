#!/bin/sh
# sh tests/fuzz/run.sh [SECONDS [SEED]]: builds the fuzzers of the readers with clang's sanitizers, in build/fuzz, and
# runs both side by side for so long (60). Each begins with the corpus that make_corpus.py writes and with what earlier
# runs found, and goes on with other inputs each time, or with those of a seed. An input on which one fails stays in
# build/fuzz, with the report in the log beside it; 0 seconds only try what is in the corpus.
set -eu
cd "$(dirname "$0")/../.."
seconds=${1:-60}
seed=${2:-0}
. tests/setup.sh

mkdir -p build
install_packages only clang
choose_python
find_clang || fail "There is no clang++ with libFuzzer and sanitizers (Debian: clang, libclang-rt-dev)"
torch=$("$python" -c 'import torch; print(torch.__path__[0])')
out=build/fuzz
mkdir -p "$out/found_safetensors" "$out/found_config"
"$python" tests/fuzz/make_corpus.py "$out/corpus"

# LibTorch itself is not compiled with sanitizers, and what of it is in headers trips none of them.
flags="-std=c++17 -g1 -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -DFMT_HEADER_ONLY"
compile() {
  program=$out/${1}_fuzzer
  if [ -e "$program" ] && [ -z "$(find include tests/fuzz -newer "$program" -name '*.[ch]pp')" ]; then return 0; fi
  say "Compiling $program"
  "$clang" $flags -Iinclude -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" \
    "tests/fuzz/${1}_fuzzer.cpp" -o "$program" "-L$torch/lib" "-Wl,-rpath,$torch/lib" -ltorch_cpu -lc10
}
compile safetensors &
compile config
wait $! || fail "The fuzzer of safetensors could not be compiled"

# run NAME: in the background, so that both have the same minute
run() {
  limit=-max_total_time=$seconds
  [ "$seconds" -gt 0 ] || limit=-runs=0
  "$out/$1_fuzzer" "$limit" -seed="$seed" -dict="$out/corpus/$1.dict" -artifact_prefix="$out/$1-" -print_final_stats=1 -timeout=10 \
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
  tail -n 40 "$out/$name.log" | cut -c 1-200 >&2
done
[ -z "$failed" ] || fail "Failed:$failed"
