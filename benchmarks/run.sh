#!/bin/sh
# sh benchmarks/run.sh [OPTION...]: sets up whatever is missing, builds the programs and compares with Python's PEFT: one
# Markdown table of ratios. The options are those of table.py: --short, --device cuda, --turns N. Half an hour on two
# cores; nothing else should run beside it.
set -eu
cd "$(dirname "$0")/.."
. tests/setup.sh

if [ -e build/text/kjv.txt ]; then install_packages only libbenchmark-dev; else install_packages only libbenchmark-dev bible-kjv; fi
choose_python
prepare_model
prepare_text
prepare_jinja
configure
build 5 layer rows finetune_gpt load_adapter
exec "$python" benchmarks/table.py --programs "$build/programs" --model "$model" --text "$text" "$@"
