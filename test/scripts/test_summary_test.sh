#!/usr/bin/env bash
# Runs ctest on tests with every kind of end and checks what scripts/test_summary.sh makes of it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

# expect STATUS NAME LINES: the summary of the tests in $work exits with STATUS and ends with LINES.
expect() {
  local wanted_status=$1 name=$2 wanted=$3 output status=0 ctest_status=0
  rm -f "$work/report.xml"
  (cd "$work" && ctest --test-output-size-passed 100000 --output-junit report.xml) \
    >"$work/log" 2>&1 || ctest_status=$?
  output=$(bash "$root/scripts/test_summary.sh" "$work/report.xml" "$ctest_status") || status=$?
  if [[ $status == "$wanted_status" && $output == *"$wanted" ]]; then return; fi
  printf 'FAILED: %s: exit %s, output:\n%s\n' "$name" "$status" "${output//SKIPPED/skipped}"
  failures=$((failures + 1))
}

cat >"$work/CTestTestfile.cmake" <<'END'
add_test(good "true")
add_test([=[odd: "quotes", <angles> & [brackets]]=] "echo" "hello <world> & SKIPPED: in mid-line")
add_test(skipped "sh" "-c" "echo 'SKIPPED: skipped: needs <root> & a loop device'")
END
expect 0 'nothing failed' 'SKIPPED: skipped: needs <root> & a loop device
2 passed, 0 failed, 1 skipped'

for name in 'op: one' 'op: a long name, that takes up much of the line that it stands in, and more' \
  'op: three' 'two rows'; do
  echo "add_test([=[$name (CUDA)]=] sh -c [=[echo 'SKIPPED: $name: no GPU: no driver']=])"
done >"$work/CTestTestfile.cmake"
echo "add_test(other sh -c [=[echo 'SKIPPED: other: no GPU']=])" >>"$work/CTestTestfile.cmake"
expect 0 'one reason for many' 'SKIPPED: 4 tests: no GPU: no driver
  op: one (CUDA); op: a long name, that takes up much of the line that it stands in, and more (CUDA); op: three (CUDA);
  two rows (CUDA)
SKIPPED: other: no GPU
0 passed, 0 failed, 5 skipped'

cat >"$work/CTestTestfile.cmake" <<'END'
add_test(good "true")
add_test(fine "true")
add_test(skipped "sh" "-c" "echo 'SKIPPED: skipped: needs <root> & a loop device'")
add_test(bad "false")
add_test([=[claims & fails]=] "sh" "-c" "echo 'SKIPPED: claims: but fails'; exit 1")
add_test(crash "sh" "-c" "kill -SEGV $$")
add_test(hang "sleep" "100")
set_tests_properties(hang PROPERTIES TIMEOUT 1)
add_test(missing "/nonexistent/program")
END
expect 1 'failures of every kind' 'FAILED: bad
FAILED: claims & fails
FAILED: crash
FAILED: hang
FAILED: missing
2 passed, 5 failed, 1 skipped'

: >"$work/CTestTestfile.cmake"
expect 1 'no test at all' 'error: no test ran
0 passed, 0 failed, 0 skipped'

((failures == 0)) && echo 'test_summary.sh counts every kind of end'
