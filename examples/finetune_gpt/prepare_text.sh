#!/bin/sh
# Prints the King James Bible of Debian's package bible-kjv into a text file: prepare_text.sh OUT_FILE
# Chapters under their headings, one verse a line. OUT_FILE appears only when it is complete.
set -eu

[ $# -eq 1 ] || { echo "usage: prepare_text.sh OUT_FILE" >&2; exit 2; }
target=$1
command -v bible > /dev/null || { echo "prepare_text.sh: 'bible' is missing: apt-get install bible-kjv" >&2; exit 1; }

mkdir -p "$(dirname "$target")"
partial=$target.partial.$$
trap 'rm -f "$partial"' EXIT

# -p: only the package's data, never a bible.data in the current folder. -l: a verse is at most 532 characters, so no
# line is broken. Verses come indented, headings do not; the first line is empty.
bible -p /usr/lib -l 100000 Gen1:1-Rev22:21 < /dev/null | sed -e 1d -e 's/^  *//' > "$partial"

chapters=$(grep -c ' [0-9][0-9]*$' "$partial" || true)
lines=$(grep -c . "$partial" || true)
if [ "$chapters" -ne 1189 ] || [ "$lines" -ne 32291 ]; then
  echo "prepare_text.sh: bible printed $lines lines, $chapters of them headings, not 31102 verses in 1189 chapters" >&2
  exit 1
fi
mv "$partial" "$target"
echo "$target: $(wc -c < "$target") bytes, 31102 verses in $chapters chapters"
