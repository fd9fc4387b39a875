#!/usr/bin/env bash
# House rules that a compiler does not check. Prints file:line and the reason, exits 1 on any.
#   - a header begins with #pragma once
#   - no file is longer than 600 lines (tables of data, *_table.cpp, may be)
#   - nothing is left to be done: no TODO, FIXME or XXX
#   - the program starts no shell (system, popen, wordexp), guesses no temporary names (tmpnam,
#     tempnam, mktemp), and uses no C function that cannot report an error or overruns its buffer
#   - only apps reads the environment
#   - no tabs, no spaces at the end of a line, and a newline at the end of the file
#   - every shell script parses
#
#   scripts/check_source.sh [--report] [FOLDER]     --report also lists files over 400 lines
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
report=0
if [[ ${1:-} == --report ]]; then report=1 && shift; fi
cd "${1:-$root}"

status=0
sources_in apps core parallel cuda test | awk -v report="$report" '
  function complain(why) { printf "%s:%d: %s\n", file, line, why; faults++ }
  function check_calls(text,   name) {
    gsub(/"([^"\\]|\\.)*"/, "\"\"", text)
    sub(/\/\/.*/, "", text)
    if (match(text, /(^|[^A-Za-z0-9_.>])(system|popen|wordexp|tmpnam|tempnam|mktemp|gets|strcpy|strcat|sprintf|vsprintf|strtok|atoi|atol|atoll|atof|rand|srand)[ \t]*\(/)) {
      name = substr(text, RSTART, RLENGTH)
      gsub(/[^a-z]/, "", name)
      complain("calls " name "(); " reason[name])
    }
    if (file !~ /^apps\// && text ~ /(^|[^A-Za-z0-9_])(secure_)?getenv[ \t]*\(/ && file !~ /failpoint/)
      complain("reads the environment; only apps does, so that a job file says everything")
  }
  BEGIN {
    reason["system"] = reason["popen"] = reason["wordexp"] = "a shell would read hostile names as commands"
    reason["tmpnam"] = reason["tempnam"] = reason["mktemp"] = "the name can be guessed; use mkdtemp or mkstemp"
    reason["gets"] = reason["strcpy"] = reason["strcat"] = reason["sprintf"] = reason["vsprintf"] = \
      "it can write past its buffer"
    reason["strtok"] = "it keeps hidden state between calls"
    reason["atoi"] = reason["atol"] = reason["atoll"] = reason["atof"] = "it cannot report bad input; use from_chars"
    reason["rand"] = reason["srand"] = "random numbers come from core/base/rng.h"
  }
  {
    file = $0
    directive = last = ""
    files++
    for (line = 1; (getline text < file) > 0; line++) {
      if (text ~ /\t/) complain("holds a tab")
      if (text ~ /[ \r]$/) complain("ends in a space or a carriage return")
      if (text ~ /(^|[^A-Za-z])(TODO|FIXME|XXX)([^A-Za-z]|$)/) complain("leaves something to be done")
      if (directive == "" && text ~ /^[ \t]*#/) directive = text
      if (file !~ /^test\//) check_calls(text)
    }
    close(file)
    line--
    if (line > 600 && file !~ /_table\.cpp$/) complain("has " line " lines; split it (600 at most)")
    if (report && line > 400 && line <= 600) printf "%s: %d lines (over 400)\n", file, line
    total += line
    if (file ~ /\.(h|cuh|h\.in)$/ && directive != "#pragma once") {
      line = 1
      complain("a header begins with #pragma once")
    }
  }
  END {
    if (!files) { print "no sources found"; exit 1 }
    if (faults) { printf "source: %d faults\n", faults; exit 1 }
    printf "source: %d files, %d lines keep the house rules\n", files, total
  }' || status=1

while IFS= read -r file; do
  if [[ -s $file && -n $(tail -c 1 "$file") ]]; then
    say "$file:$(wc -l <"$file"): does not end in a newline"
    status=1
  fi
done < <(sources_in apps core parallel cuda test)

for script in scripts/*.sh test/scripts/*.sh .ci/run; do
  if [[ -f $script ]] && ! bash -n "$script"; then status=1; fi
done
exit $status
