#!/bin/sh
# sh benchmarks/run.sh [OPTION...]: sets up whatever is missing, builds the programs and compares with Python's PEFT:
# one Markdown table of ratios. The options are those of table.py: --short, --device cuda, --turns N. Nothing else is to
# run beside it.
set -eu
cd "$(dirname "$0")/.."
. tests/setup.sh

packages=libbenchmark-dev
[ -e build/text/kjv.txt ] || packages="$packages bible-kjv"
install_packages only $packages
choose_python
prepare_model
prepare_text
prepare_jinja
configure
build 3 layer rows finetune_gpt print_logits load_adapter
exec "$python" benchmarks/table.py --programs "$build/programs" --model "$model" --text "$text" "$@"
