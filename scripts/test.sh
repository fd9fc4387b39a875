#!/usr/bin/env bash
# Installs what is missing, builds the tests in build-test/ and runs all of them. The last line is
# "N passed, N failed, N skipped"; the exit code is 0 only if nothing failed.
#
#   scripts/test.sh [--build-dir DIR] [--sanitize LIST] [--no-install] [CTEST OPTION...]
#
#   scripts/test.sh -L core              tests with that label (core, slow)
#   scripts/test.sh -R safetensors       tests whose name matches
#   scripts/test.sh --sanitize address,undefined     the same tests under sanitizers, in build-asan/
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/install_deps.sh

build_dir='' sanitize='' install=1 selection=()
while (($# > 0)); do
  case $1 in
    --build-dir) build_dir=${2:?--build-dir needs a folder} && shift ;;
    --sanitize) sanitize=${2:?--sanitize needs a list such as address,undefined} && shift ;;
    --no-install) install=0 ;;
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    *) selection+=("$1") ;;
  esac
  shift
done
build_options=(--failpoints)
if [[ -n $sanitize ]]; then
  build_options+=(--sanitize "$sanitize")
  build_dir=${build_dir:-build-${sanitize%%,*}}
  build_dir=${build_dir/#build-address/build-asan}
fi
build_dir=${build_dir:-build-test}

# Whatever stops this script early is a failure, and the last line says so.
summarised=0
finish() {
  local status=$?
  if ((summarised == 0)); then
    say "0 passed, 1 failed, 0 skipped"
    exit $((status == 0 ? 1 : status))
  fi
}
trap finish EXIT

step "packages"
if ((install)); then install_groups build test; fi
step "build"
scripts/build.sh --build-dir "$build_dir" "${build_options[@]}"

step "tests"
# Read by sanitized programs only. Frames that are kept after a return are aligned to 32 bytes by g++ 12 and 13, which
# AVX-512 code that relies on 64 does not survive (GCC bug 110027): so that check is off.
export ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=0
export UBSAN_OPTIONS=print_stacktrace=1
report=$(realpath "$build_dir")/test_report.xml
rm -f "$report"
ctest_status=0
ctest --test-dir "$build_dir" --parallel "$(nproc)" --timeout 300 --output-on-failure --no-tests=error \
  --test-output-size-passed 1000000 --output-junit "$report" "${selection[@]}" 2>&1 |
  { grep -vE '^ +Start +[0-9]+: |^ *[0-9]+/[0-9]+ Test +#[0-9]+: .* Passed ' || true; } || ctest_status=$?
[[ -f $report ]] || die "ctest wrote no report; its messages are above"
summarised=1
scripts/test_summary.sh "$report" "$ctest_status"
