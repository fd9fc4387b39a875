#!/usr/bin/env bash
# Reads the JUnit report of ctest; lists slow, skipped and failed tests; the last line is the count.
# A passed test that printed "SKIPPED: <name>: <reason>" counts as skipped. Exits 1 if a test failed,
# none ran, or ctest itself reported failure.
#
#   scripts/test_summary.sh REPORT.xml CTEST_EXIT_CODE
set -euo pipefail
awk -v ctest_status="${2:-0}" '
  function attribute(text, name,   value) {
    if (!match(text, " " name "=\"[^\"]*\"")) return ""
    value = substr(text, RSTART + length(name) + 3, RLENGTH - length(name) - 4)
    return plain(value)
  }
  function plain(text) {
    gsub(/&lt;/, "<", text); gsub(/&gt;/, ">", text)
    gsub(/&quot;/, "\"", text); gsub(/&apos;/, "\047", text)
    gsub(/&amp;/, "\\&", text)
    return text
  }
  function count() {
    if (name == "") return
    if (time > 20) slow[++slow_count] = sprintf("%6.1f s  %s", time, name)
    if (status == "run" && skip == "") passed++
    else if (status == "run" || status == "disabled" || by_code) {
      skipped++
      print (skip != "" ? skip : "SKIPPED: " name)
    } else failed_names[++failed] = name
    name = ""
  }
  /^\t<testcase / {
    count()
    name = attribute($0, "name"); status = attribute($0, "status"); time = attribute($0, "time") + 0
    skip = ""; by_code = 0
  }
  /<skipped message="SKIP_/ { by_code = 1 }
  /(^|<system-out>)SKIPPED: / && skip == "" {
    skip = $0
    sub(/.*<system-out>/, "", skip)
    sub(/<\/system-out>.*/, "", skip)
    skip = plain(skip)
  }
  END {
    count()
    for (i = 1; i <= slow_count; i++) print "slow: " slow[i]
    for (i = 1; i <= failed; i++) print "FAILED: " failed_names[i]
    if (passed + failed + skipped == 0) print "error: no test ran"
    if (ctest_status != 0 && failed == 0) print "error: ctest ended with exit code " ctest_status
    printf "%d passed, %d failed, %d skipped\n", passed, failed, skipped
    exit failed > 0 || ctest_status != 0 || passed + skipped == 0
  }' "$1"
