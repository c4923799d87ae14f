# Read by every script here, from the project's root: whatever the project needs and this machine lacks. What is there
# already is used, so a second run has nothing to do.
#
#   install_packages [only PACKAGE...]
#                       Debian packages, when root; without root their names are printed and the script ends. Of
#                       catch2, libbenchmark-dev, bible-kjv and clang-format all are needed, or, with `only`, those
#                       that are named; clang (with its sanitizers) only when it is named
#   choose_python       sets $python: a Python with all of $requirements; makes build/venv when there is none
#   prepare_model       sets $model: the default model as a Hugging Face directory
#   prepare_text        sets $text: the default text
#   prepare_jinja       build/jinja: the engine that renders chat templates
#   configure           build/cmake, for LibTorch of that Python; with the tests where there is Catch2, and with the
#                       benchmarks where there is Google Benchmark
#   build MINUTES TARGET...
#                       with $JOBS jobs, two unless the environment says otherwise; the first time it says what is
#                       built, and that it takes so many minutes
#   CMAKE_ARGS          more options for CMake, from the environment

build=build/cmake
requirements="torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.23.0 safetensors==0.8.0 tokenizers==0.23.3
gguf==0.19.0 accelerate==1.15.0 bitsandbytes==0.50.2"

say() { printf '%s\n' "$*"; }
fail() { printf '%s\n' "$*" >&2; exit 1; }

# have EVIDENCE: a program on the PATH, or a header in one of the system's folders
have() {
  case $1 in
    *.h | *.hpp)
      for headers in /usr/include /usr/local/include; do [ ! -e "$headers/$1" ] || return 0; done
      return 1
      ;;
    *) command -v "$1" > /dev/null ;;
  esac
}

# find_clang: sets $clang to a clang++ that comes with its sanitizers and libFuzzer; fails when there is none
find_clang() {
  for clang in clang++ clang++-19 clang++-18 clang++-17 clang++-16 clang++-15 clang++-14; do
    if have "$clang" && echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, long) { return 0; }' |
      "$clang" -x c++ -fsanitize=fuzzer,address,undefined - -o build/clang_check 2> /dev/null; then
      return 0
    fi
  done
  return 1
}

have_catch2() { have catch2/catch.hpp || have catch2/catch_all.hpp; }

install_packages() {
  missing= optional=
  case ${1:-} in only) needed=" $* " ;; *) needed=" catch2 libbenchmark-dev bible-kjv clang-format " ;; esac
  needs() { case $needed in *" $1 "*) return 0 ;; *) return 1 ;; esac; }
  have c++ || missing="$missing g++"
  have cmake || missing="$missing cmake"
  have ninja || missing="$missing ninja-build"
  have pcre2.h || missing="$missing libpcre2-dev"
  have nlohmann/json.hpp || missing="$missing nlohmann-json3-dev"
  have fmt/format.h || missing="$missing libfmt-dev"
  have CLI/CLI.hpp || missing="$missing libcli11-dev"
  if ! have_catch2; then
    if needs catch2; then missing="$missing catch2"; else optional="$optional catch2"; fi
  fi
  have benchmark/benchmark.h || ! needs libbenchmark-dev || missing="$missing libbenchmark-dev"
  have bible || ! needs bible-kjv || missing="$missing bible-kjv"
  have clang-format || ! needs clang-format || missing="$missing clang-format"
  ! needs clang || find_clang || missing="$missing clang libclang-rt-dev"
  have gperftools/tcmalloc.h || optional="$optional libgoogle-perftools-dev"
  have gnuplot || optional="$optional gnuplot-nox"
  if ! find_python; then
    have python3 || missing="$missing python3"
    # A Debian Python makes virtual environments only with this package; other Pythons bring what it holds.
    python3 -c 'import venv, ensurepip' 2> /dev/null || missing="$missing python3-venv"
  fi
  if [ "$(id -u)" -eq 0 ] && have apt-get; then
    missing=$missing$optional
  elif [ -n "$optional" ]; then
    say "Not installed, and only needed for the tests (catch2), pictures (gnuplot-nox) or to take less memory" \
        "(libgoogle-perftools-dev):$optional"
  fi
  [ -n "$missing" ] || return 0
  [ "$(id -u)" -eq 0 ] || fail "These Debian packages are missing, and installing them takes root: apt-get install$missing"
  command -v apt-get > /dev/null || fail "These packages are missing, by their Debian names, and there is no apt-get:$missing"
  say "Installing Debian packages:$missing"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq > build/apt.log 2>&1 &&
    apt-get install -y -qq --no-install-recommends $missing >> build/apt.log 2>&1 ||
    { tail -n 20 build/apt.log >&2 || :; fail "apt-get could not install them; the whole log is build/apt.log"; }
}

# lacking PYTHON: those of $requirements that it has not, or has in an older version; fails when it does not run
lacking() {
  "$1" - $requirements << 'END'
import re, sys
from importlib.metadata import PackageNotFoundError, version

def numbers(text):
    return [int(part) for part in re.match(r"\d+(\.\d+)*", text).group().split(".")]

def satisfied(requirement):
    name, wanted = requirement.split("==")
    try:
        return numbers(version(name)) >= numbers(wanted)
    except PackageNotFoundError:
        return False

print(*[requirement for requirement in sys.argv[1:] if not satisfied(requirement)])
END
}

# find_python: sets $found to the first Python that has all of $requirements; fails when there is none
find_python() {
  for found in "${LORA_PYTHON:-}" "$PWD/build/venv/bin/python" "$(command -v python3)"; do
    if [ -n "$found" ] && lacks=$(lacking "$found" 2> /dev/null) && [ -z "$lacks" ]; then return 0; fi
  done
  return 1
}

choose_python() {
  if find_python; then python=$found; else python=$PWD/build/venv/bin/python; found=; fi
  if [ -n "${LORA_PYTHON:-}" ] && [ "$python" != "$LORA_PYTHON" ]; then
    lacks=$(lacking "$LORA_PYTHON" 2> /dev/null) || lacks="(it does not run)"
    say "LORA_PYTHON is not used, but $python, because it lacks:" $lacks
  fi
  [ -z "$found" ] || return 0
  "$python" -c 'import pip' 2> /dev/null || python3 -m venv --clear build/venv || fail "python3 could not make build/venv"
  missing=$(lacking "$python")
  say "Installing Python packages into build/venv:" $missing
  "$python" -m pip install --quiet --disable-pip-version-check $missing || fail "pip could not install them"
}

prepare_model() {
  model=$PWD/build/models/SmolLM2-135M-Instruct
  [ -e "$model/config.json" ] || "$python" examples/finetune_gpt/prepare_model.py "$model"
}

prepare_text() {
  text=$PWD/build/text/kjv.txt
  [ -e "$text" ] || sh examples/finetune_gpt/prepare_text.sh "$text"
}

prepare_jinja() { [ -e build/jinja/json.h ] || "$python" examples/finetune_gpt/prepare_jinja.py build/jinja; }

configure() {
  if have_catch2; then with_tests=ON; else with_tests=OFF; fi
  if have benchmark/benchmark.h; then with_benchmarks=ON; else with_benchmarks=OFF; fi
  cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release "-DLORA_PYTHON=$python" \
    -DLORA_BUILD_TESTS=$with_tests -DLORA_BUILD_BENCHMARKS=$with_benchmarks ${CMAKE_ARGS:-} \
    > "$build.log" 2>&1 || { cat "$build.log" >&2; fail "cmake could not configure $build"; }
  grep -e '-- lora:' "$build.log"
}

build() {
  minutes=$1
  shift
  [ -e "$build/.ninja_log" ] ||  # which the first build begins
    say "Building $* in $build for the first time: about $minutes minutes on two cores; each step is named when it is done"
  cmake --build "$build" --parallel "${JOBS:-2}" --target "$@"
}

mkdir -p build
