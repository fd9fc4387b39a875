#!/usr/bin/env bash
# Plants one fault at a time in a small tree and expects scripts/check_source.sh to name its line.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

# expect VERDICT NAME FILE LINE TEXT
expect() {
  local verdict=$1 name=$2 file=$3 line=$4 text=$5 output status=0
  rm -rf "$work/tree"
  mkdir -p "$work/tree/core/base" "$work/tree/apps" "$work/tree/test/core"
  printf '// One value.\n#pragma once\nint value();\n' >"$work/tree/core/base/value.h"
  printf '%b' "$text" >"$work/tree/$file"
  output=$(bash "$root/scripts/check_source.sh" "$work/tree" 2>&1) || status=$?
  if [[ $verdict == allowed && $status == 0 ]]; then return; fi
  if [[ $verdict == refused && $status == 1 && $output == *"$file:$line: "* ]]; then return; fi
  printf 'FAILED: %s should be %s; exit %s, output:\n%s\n' "$name" "$verdict" "$status" "$output"
  failures=$((failures + 1))
}
lines() { yes 'int x();\n' | head -n "$1" | tr -d '\n'; }

expect allowed 'a plain file' core/base/x.cpp 0 'int x() { return 1; }\n'
expect allowed 'a banned word in a comment or a string' core/base/x.cpp 0 \
  '// system() would start a shell\nconst char* text = "system(1)";\n'
expect allowed 'a member or a longer name' core/base/x.cpp 0 'int y = a.system(1) + file_system(2);\n'
expect allowed 'a shell in a test' test/core/x_test.cpp 0 'int y = std::system("true");\n'
expect allowed 'the environment in apps' apps/x.cpp 0 'auto y = std::getenv("NO_COLOR");\n'
expect allowed '600 lines' core/base/x.cpp 0 "$(lines 600)"
expect allowed 'a long table' core/base/x_table.cpp 0 "$(lines 601)"

expect refused 'a header without pragma once' core/base/y.h 1 '// Two values.\nint two();\n'
expect refused 'an include guard' core/base/y.h 1 '#ifndef Y_H\n#define Y_H\n#pragma once\n#endif\n'
expect refused '601 lines' core/base/x.cpp 601 "$(lines 601)"
expect refused 'something left to do' core/base/x.cpp 2 'int x();\n// TODO: more\n'
expect refused 'system' core/base/x.cpp 1 'int y = std::system("true");\n'
expect refused 'popen with a space' core/base/x.cpp 1 'auto* y = popen ("true", "r");\n'
expect refused 'a guessable name' core/base/x.cpp 1 'char* y = mktemp(name);\n'
expect refused 'atoi' core/base/x.cpp 1 'int y = atoi(text);\n'
expect refused 'the environment below apps' core/base/x.cpp 1 'auto y = std::getenv("HOME");\n'
expect refused 'a tab' core/base/x.cpp 1 '\tint x();\n'
expect refused 'a space at the end' core/base/x.cpp 1 'int x(); \n'
expect refused 'no newline at the end' core/base/x.cpp 1 'int x();\nint y();'

((failures == 0)) && echo 'check_source.sh finds every planted fault'
