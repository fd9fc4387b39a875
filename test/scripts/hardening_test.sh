#!/usr/bin/env bash
# The program is built with what makes memory faults harder to exploit: position independence,
# read-only relocations bound at start, no executable stack, stack protector, checked libc calls.
set -euo pipefail
program=$1
if ! command -v readelf >/dev/null; then
  echo "SKIPPED: build: the program is hardened: readelf (binutils) is not installed"
  exit 0
fi
headers=$(readelf --wide --file-header --program-headers --dynamic "$program")
symbols=$(readelf --wide --dyn-syms "$program")
if [[ $symbols == *__asan_init* || $symbols == *__tsan_init* ]]; then
  echo "SKIPPED: build: the program is hardened: sanitizers replace what it looks for"
  exit 0
fi
failures=0
expect() {  # expect WHAT TEXT REGULAR-EXPRESSION
  if ! grep -qE "$3" <<<"$2"; then
    echo "FAILED: $program: $1"
    failures=$((failures + 1))
  fi
}
expect 'is not position independent' "$headers" 'Type: +DYN'
expect 'has no read-only relocations' "$headers" 'GNU_RELRO'
expect 'binds symbols late' "$headers" 'BIND_NOW|FLAGS_1.*NOW'
expect 'has an executable stack' "$headers" 'GNU_STACK .* RW +0x'
expect 'has no stack protector' "$symbols" '__stack_chk_fail'
expect 'has no checked libc calls' "$symbols" ' __[a-z_]+_chk@GLIBC'
((failures == 0)) && echo "$program is hardened"
