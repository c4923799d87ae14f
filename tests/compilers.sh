#!/bin/sh
# sh tests/compilers.sh: the headers as other compilers and systems see them, without a warning: clang with its own C++
# library, and for Windows mingw-w64's g++, with the headers that need no more of LibTorch than such a compiler can
# read. What files need of Windows is also run, in wine where that is there. Not part of tests/run.sh; needs clang 14 or
# later and the Debian packages libc++-dev, libc++abi-dev and g++-mingw-w64-x86-64-posix.
set -eu
cd "$(dirname "$0")/.."
. tests/setup.sh

for_windows="version fwd options system/files system/libtorch files/error files/descriptor
  files/mapped_file files/folder_lock files/atomic_file files/atomic_pair files/json files/safetensors/types
  files/safetensors/entries files/safetensors/header selection/text selection/patterns peft/load_options"
warnings="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Werror"

choose_python
torch=$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
libraries="-DFMT_HEADER_ONLY -Iinclude -isystem $torch/include -isystem $torch/include/torch/csrc/api/include"
standard=$(sed -n 's/.*C++\([0-9]*\) or later.*/-std=c++\1/p' "$torch/include/torch/csrc/api/include/torch/all.h")

# check COMPILER... < CODE
check() { nice "$@" $standard -fsyntax-only $warnings $libraries -x c++ -; }

json=build/compilers  # apart from the system's headers, which are not Windows's
rm -rf "$json"
mkdir -p "$json"
cp -RL /usr/include/nlohmann "$json/"
for header in $for_windows; do
  printf '#include <lora/%s.hpp>\n' "$header"
done | check x86_64-w64-mingw32-g++-posix -isystem "$json"
say "mingw-w64: $(echo $for_windows | wc -w) headers"
x86_64-w64-mingw32-g++-posix -std=c++17 $warnings -Iinclude tests/system/check_files.cpp -static \
  -o "$json/check_files.exe"
if have wine; then
  WINEPREFIX=$PWD/$json/wine WINEDEBUG=-all wine "$json/check_files.exe"
  say "wine: system/files.hpp"
else
  say "There is no wine, so system/files.hpp is only compiled for Windows"
fi
find_clang || fail "compilers.sh: there is no clang++"
for library in libstdc++ libc++; do
  printf '#include <lora/%s.hpp>\n' lora torchscript train/cross_entropy train/optimizer train/schedule |
    { cat; echo '#include "tests/packaging/templates.cpp"'; } | check "$clang" -stdlib=$library -I.
  say "$clang with $library: all headers"
done
