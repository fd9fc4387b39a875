#!/usr/bin/env bash
# scripts/corpus.sh writes what it says, leaves a complete folder alone and explains what is wrong.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() {
  echo "FAILED: $*"
  exit 1
}
if ! command -v bible >/dev/null; then
  echo "SKIPPED: scripts: the corpus is complete and repeatable: the package bible-kjv is not installed"
  exit 0
fi
corpus() { bash "$root/scripts/corpus.sh" "$@"; }

corpus kjv "$work/a" >/dev/null
corpus kjv "$work/b" >/dev/null
diff -r "$work/a" "$work/b" || fail "two runs differ"
[[ $(wc -l <"$work/a/train.jsonl") == 1130 ]] || fail "1130 training chapters were expected"
[[ $(wc -l <"$work/a/valid.jsonl") == 59 ]] || fail "59 validation chapters were expected"
[[ $(head -c 53 "$work/a/train.jsonl") == '{"text": "In the beginning God created the heaven and' ]] ||
  fail "the training text does not begin with Genesis"
grep -q 'In the beginning was the Word' "$work/a/valid.txt" || fail "John is not held out"
! grep -q 'In the beginning was the Word' "$work/a/train.jsonl" || fail "John is in the training text"
# The plain validation text and the JSON hold the same characters.
sed -e 's/^{"text": "//' -e 's/"}$//' -e 's/\\n/\n/g' "$work/a/valid.jsonl" | cmp - "$work/a/valid.txt" ||
  fail "valid.jsonl and valid.txt differ"

# A complete folder is left alone; one without its last file is made again.
touch -d '2001-01-01' "$work/a/train.jsonl"
corpus kjv "$work/a" >/dev/null
[[ -z $(find "$work/a/train.jsonl" -newermt '2001-01-02') ]] || fail "a complete folder was written again"
rm "$work/a/README"
corpus kjv "$work/a" >/dev/null
diff -r "$work/a" "$work/b" || fail "an incomplete folder was not made again"

# A program 'bible' that prints something else is refused, and nothing is left behind.
mkdir "$work/bin"
printf '#!/bin/sh\necho "Ge1:1 In the beginning"\n' >"$work/bin/bible"
chmod +x "$work/bin/bible"
if output=$(PATH=$work/bin:$PATH corpus kjv "$work/c" 2>&1); then fail "a wrong text was accepted"; fi
[[ $output == *"1 lines where 31102 were expected"* ]] || fail "the reason is missing: $output"
[[ -z $(ls "$work/c") ]] || fail "a refused text left files behind"
echo 'corpus.sh is complete and repeatable'
