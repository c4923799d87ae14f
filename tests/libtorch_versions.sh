#!/bin/sh
# sh tests/libtorch_versions.sh [VERSION...]: compiles lora_tests, and with them all headers, with each of the versions
# of LibTorch that cmake/LoraTorch.cmake names, and runs them on the CPU and, from LibTorch 2.11 on, on the second
# device. The first version, which is the oldest, comes with the oldest nlohmann/json, which is Debian 11's. Not part of
# tests/run.sh, for each version takes a download of up to 1 GB, 3 GB of disk until it is done with, and minutes.
#
# What runs here is the CPU part of each: of NVIDIA's libraries only those are installed that it is linked with.
set -eu
cd "$(dirname "$0")/.."
. tests/setup.sh

versions=${*:-"2.6 2.7 2.8 2.9 2.10 2.11 2.12 2.13 2.14"}
oldest=${versions%% *}
place=$PWD/build/versions

# needs_of PYTHON: the packages, as torch names them, of the two CUDA libraries that LibTorch's CPU part is linked with
needs_of() {
  "$1" - << 'END'
import importlib.metadata, re
for requirement in importlib.metadata.requires("torch"):
    needed = re.match(r"(nvidia-cuda-(?:runtime|cupti)-cu12|cuda-toolkit)[^=;]*(==[\d.]+)", requirement)
    if needed:  # the toolkit stands for such packages since CUDA 13
        print(needed[1] + ("[cudart,cupti]" if needed[1] == "cuda-toolkit" else "") + needed[2])
END
}

# without_cuda LIB: empty libraries in place of those with CUDA kernels, which without NVIDIA's could not be loaded
without_cuda() {
  [ -e "$1/libtorch_cuda.so" ] || return 0
  rm "$1"/libtorch_cuda*.so "$1"/libc10_cuda.so
  echo | c++ -shared -x c++ - -o "$1/libtorch_cuda.so"
  echo | c++ -shared -x c++ - -o "$1/libtorch.so" "-L$1" -Wl,--no-as-needed -ltorch_cpu -lc10 '-Wl,-rpath,$ORIGIN'
}

# oldest_json: sets $json to a folder with the nlohmann/json of Debian 11
oldest_json() {
  state=$place/apt
  json=$place/json/usr/lib/cmake/nlohmann_json
  mkdir -p "$state/lists/partial" "$state/archives/partial"
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | head -n 1)
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bullseye main" > "$state/sources.list"
  apt="apt-get -qq -o Dir::Etc::sourcelist=$state/sources.list -o Dir::Etc::sourceparts=- -o Dir::Cache=$state
    -o Dir::State::lists=$state/lists -o APT::Sandbox::User=root"
  $apt update && (cd "$state" && $apt download nlohmann-json3-dev=3.9.1-1) &&
    dpkg -x "$state"/nlohmann-*.deb "$place/json"
}

# run_version VERSION: prints one line; fails when something is wrong with it
run_version() {
  python=$place/$1/venv/bin/python
  build=$place/$1/cmake
  rm -rf "$place/$1"
  mkdir -p "$place/$1"
  python3 -m venv "$place/$1/venv" || return 1
  pip="$python -m pip install --quiet --disable-pip-version-check --no-cache-dir"
  $pip --no-deps "torch==$1.*" || return 1
  needs=$(needs_of "$python")
  [ -z "$needs" ] || $pip $needs 2> "$build.log" || { cat "$build.log"; return 1; }  # it speaks of what torch lacks
  without_cuda "$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')/lib" ||
    return 1
  options="-DLORA_BUILD_EXAMPLES=OFF -DLORA_BUILD_BENCHMARKS=OFF"
  [ "$1" != "$oldest" ] || options="$options -Dnlohmann_json_DIR=$json"
  cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Debug "-DCMAKE_CXX_FLAGS_DEBUG=-O0 -g0" "-DLORA_PYTHON=$python" \
    $options ${CMAKE_ARGS:-} > "$build.log" 2>&1 || { cat "$build.log"; return 1; }
  grep -e '-- lora:' "$build.log"
  build 5 lora_tests > "$build.log" 2>&1 || { grep -A 20 -e FAILED -e 'error:' "$build.log" | head -n 60; return 1; }
  ctest --test-dir "$build" --output-on-failure -R '_test(:second_device)?$' > "$build.log" 2>&1 ||
    { grep -v ' Passed ' "$build.log"; return 1; }
  grep '% tests passed' "$build.log"
}

rm -rf "$place"
mkdir -p "$place"
have ninja && have cmake && have_catch2 || fail "Run tests/run.sh first: it installs what is missing"
oldest_json
results=
for version in $versions; do
  say "LibTorch $version"
  start=$(date +%s)
  if run_version "$version"; then result=passed; else result=FAILED; fi
  results="$results$version: $result, $((($(date +%s) - start) / 60)) min
"
  rm -rf "${place:?}/$version"
done
rm -rf "$place"
say "$results"
case $results in *FAILED*) exit 1 ;; esac
