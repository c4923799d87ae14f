#!/bin/sh
# sh examples/finetune_gpt/run.sh [OPTION...]: sets up whatever is missing, builds the program and fine-tunes a model.
# The options are those of finetune_gpt; --help lists them. Without --model it is SmolLM2-135M-Instruct, without --text
# or --jsonl the text is the King James Bible, without --out the results go to build/finetune_gpt.
set -eu
here=$PWD
cd "$(dirname "$0")/../.."

needs_model=yes needs_text=yes needs_out=yes only_help=no
for option in "$@"; do
  case $option in
    --model | --model=*) needs_model=no ;;
    --text | --text=* | --jsonl | --jsonl=*) needs_text=no ;;
    --out | --out=*) needs_out=no ;;
    -h | --help) only_help=yes ;;
  esac
done

. tests/setup.sh
packages=
if [ "$needs_text" = yes ] && [ "$only_help" = no ] && [ ! -e build/text/kjv.txt ]; then packages=bible-kjv; fi
install_packages only $packages
choose_python
prepare_jinja
configure
build "2 to 5" finetune_gpt generate merge_checkpoint
program=$PWD/$build/programs/finetune_gpt
if [ "$only_help" = yes ]; then exec "$program" "$@"; fi

if [ "$needs_model" = yes ]; then
  prepare_model
  set -- "$@" --model "$model"
fi
if [ "$needs_text" = yes ]; then
  prepare_text
  set -- "$@" --text "$text"
fi
if [ "$needs_out" = yes ]; then
  set -- "$@" --out "$PWD/build/finetune_gpt"
fi
cd "$here"
exec "$program" "$@"
