#!/bin/sh
# sh tests/run.sh [CTEST OPTION...]: sets up whatever is missing, builds everything and runs all tests.
set -eu
cd "$(dirname "$0")/.."
. tests/setup.sh

install_packages
choose_python
prepare_model
configure
build all
exec ctest --test-dir "$build" --output-on-failure "$@"
