#!/usr/bin/env bash
# What a developer does before a commit.
#
#   scripts/dev.sh tidy [--clang]      house rules, arrows, files over 400 lines; with --clang also clang-tidy
#   scripts/dev.sh format [--check]    lays the sources out with clang-format 14
#   scripts/dev.sh sanitize [LIST]     the tests with label core under sanitizers (address,undefined)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

clang_format_version=14  # Debian 12's; another version breaks lines elsewhere

tidy() {
  local status=0
  scripts/check_arrows.sh || status=1
  scripts/check_source.sh --report || status=1
  if [[ ${1:-} == --clang ]]; then
    command -v clang-tidy >/dev/null || die "clang-tidy is not installed (Debian package clang-tidy)"
    [[ -f build-test/compile_commands.json ]] || die "build-test/ is not configured; run scripts/test.sh"
    sources_in apps core parallel | grep '\.cpp$' |
      xargs -P "$(nproc)" -n 1 clang-tidy --quiet -p build-test || status=1
  fi
  return $status
}

format() {
  local program found
  program=$(command -v clang-format-$clang_format_version || command -v clang-format) ||
    die "clang-format is not installed (Debian package clang-format)"
  found=$("$program" --version | sed 's/.*version \([0-9]*\).*/\1/')
  [[ $found == "$clang_format_version" ]] ||
    die "clang-format $clang_format_version is wanted and this is $found: it would lay out other lines"
  if [[ ${1:-} == --check ]]; then
    format_sources | xargs "$program" --dry-run --Werror
  else
    format_sources | xargs "$program" -i
  fi
}
format_sources() { sources_in apps core parallel cuda test | grep -vE '\.h\.in$|_table\.cpp$'; }

command=${1:-}
if (($# > 0)); then shift; fi
case $command in
  tidy) tidy "$@" ;;
  format) format "$@" ;;
  sanitize) scripts/test.sh --sanitize "${1:-address,undefined}" -L core ;;
  *) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" && exit 2 ;;
esac
