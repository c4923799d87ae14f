#!/bin/sh
# sh tests/run.sh [CTEST OPTION...]: sets up whatever is missing, builds everything and runs all tests.
set -eu
cd "$(dirname "$0")/.."
. tests/setup.sh

install_packages
choose_python
prepare_model
prepare_jinja
configure
build "10 to 25" all
# Two tests side by side, each with one thread: the tensors here are too small to gain from more.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" exec ctest --test-dir "$build" --output-on-failure --parallel 2 "$@"
