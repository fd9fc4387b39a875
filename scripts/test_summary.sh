#!/usr/bin/env bash
# Reads the JUnit report of ctest; lists slow, skipped and failed tests; the last line is the count.
# A passed test that printed "SKIPPED: <name>: <reason>" counts as skipped; many tests with one reason
# are listed together. Exits 1 if a test failed, none ran, or ctest itself reported failure.
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
  # The test may name itself without the suffix that tells its entries apart: "x" in "x (4 ranks)".
  function note_skipped(line,   plain_name, begin, reason) {
    plain_name = name
    sub(/ \([^()]*\)$/, "", plain_name)
    begin = "SKIPPED: " plain_name ": "
    reason = index(line, begin) == 1 ? substr(line, length(begin) + 1) : ""
    skip_lines[skipped] = line
    skip_names[skipped] = name
    skip_reasons[skipped] = reason
    sharing[reason]++
  }
  function print_skipped(   i) {
    for (i = 1; i <= skipped; i++) {
      if (skip_reasons[i] == "" || sharing[skip_reasons[i]] < 4) print skip_lines[i]
      else if (!(skip_reasons[i] in printed)) print_sharing(skip_reasons[i], i)
    }
  }
  function print_sharing(reason, first,   i, row) {
    printed[reason] = 1
    printf "SKIPPED: %d tests: %s\n", sharing[reason], reason
    for (i = first; i <= skipped; i++) {
      if (skip_reasons[i] != reason) continue
      if (row != "" && length(row) + length(skip_names[i]) > 118) {
        print row ";"
        row = ""
      }
      row = (row == "" ? "  " : row "; ") skip_names[i]
    }
    print row
  }
  function count() {
    if (name == "") return
    if (time > 20) slow[++slow_count] = sprintf("%6.1f s  %s", time, name)
    if (status == "run" && skip == "") passed++
    else if (status == "run" || status == "disabled" || by_code) {
      skipped++
      note_skipped(skip != "" ? skip : "SKIPPED: " name)
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
    print_skipped()
    for (i = 1; i <= slow_count; i++) print "slow: " slow[i]
    for (i = 1; i <= failed; i++) print "FAILED: " failed_names[i]
    if (passed + failed + skipped == 0) print "error: no test ran"
    if (ctest_status != 0 && failed == 0) print "error: ctest ended with exit code " ctest_status
    printf "%d passed, %d failed, %d skipped\n", passed, failed, skipped
    exit failed > 0 || ctest_status != 0 || passed + skipped == 0
  }' "$1"
