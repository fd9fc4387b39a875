#!/usr/bin/env bash
# Configures and builds with Ninja. Does nothing, in about a second, when all is up to date.
#
#   scripts/build.sh [--build-dir DIR] [--debug] [--no-tests] [--failpoints] [--sanitize LIST] [--cuda auto|off]
#                    [--jobs N]
#
#   --build-dir DIR   where to build (build)
#   --debug           no optimisation, checks for inner loops
#   --no-tests        only the program
#   --failpoints      with the named failpoints that the fault tests use, and warnings as errors
#   --sanitize LIST   for example address,undefined or thread
#   --cuda auto|off   the CUDA back end where there is an nvcc (auto), or not at all
#   --jobs N          compile jobs (one per core, limited by free memory)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

build_dir=build type=Release tests=ON failpoints=OFF sanitize='' cuda=auto jobs=$(compile_jobs)
while (($# > 0)); do
  case $1 in
    --build-dir) build_dir=${2:?--build-dir needs a folder} && shift ;;
    --sanitize) sanitize=${2:?--sanitize needs a list such as address,undefined} && shift ;;
    --jobs) jobs=${2:?--jobs needs a number} && shift ;;
    --cuda) cuda=${2:?--cuda needs auto or off} && shift ;;
    --debug) type=Debug ;;
    --no-tests) tests=OFF ;;
    --failpoints) failpoints=ON ;;
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    *) die "unknown option '$1'; scripts/build.sh --help lists them" ;;
  esac
  shift
done

options=(-G Ninja -DCMAKE_BUILD_TYPE="$type" -DDSTRAIN_TESTS="$tests" -DDSTRAIN_SANITIZE="$sanitize"
  -DDSTRAIN_FAILPOINTS="$failpoints")
# Sanitizers make GCC warn of things that cannot happen.
if [[ $failpoints == ON && -z $sanitize ]]; then
  options+=(-DDSTRAIN_WERROR=ON)
else
  options+=(-DDSTRAIN_WERROR=OFF)
fi
if command -v ccache >/dev/null; then
  options+=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache)
fi

case $cuda in
  auto)
    options+=(-DDSTRAIN_CUDA=ON)
    if command -v nvcc >/dev/null || [[ -x /usr/local/cuda/bin/nvcc ]]; then scripts/cuda_headers.sh || true; fi
    ;;
  off) options+=(-DDSTRAIN_CUDA=OFF) ;;
  *) die "--cuda takes auto or off, not '$cuda'" ;;
esac

# A configuration for another place or with another generator cannot be built upon.
cache=$build_dir/CMakeCache.txt
if [[ -f $cache ]] && ! { grep -qx "CMAKE_HOME_DIRECTORY:INTERNAL=$root" "$cache" &&
  grep -qx "CMAKE_GENERATOR:INTERNAL=Ninja" "$cache"; }; then
  say "build: $build_dir was configured elsewhere; configuring it afresh"
  rm -rf "$cache" "$build_dir/CMakeFiles"
fi
quietly "$build_dir/configure.log" "configuring" cmake -S . -B "$build_dir" "${options[@]}"

# One line in ten says how far it is; whatever is not progress (warnings, errors) is shown in full.
show_progress() {
  local line shown=-1
  while IFS= read -r line; do
    if [[ $line =~ ^\[([0-9]+)/([0-9]+)\]\ (Building|Linking|Re-checking|Generating|Running)? ]]; then
      local tenth=$((10 * BASH_REMATCH[1] / BASH_REMATCH[2]))
      if [[ $line != *Re-checking* ]] && ((tenth > shown && BASH_REMATCH[2] > 2)); then
        shown=$tenth
        say "build: ${BASH_REMATCH[1]} of ${BASH_REMATCH[2]}"
      fi
    elif [[ $line == *"no work to do"* ]]; then
      say "build: $build_dir is up to date"
    elif [[ -n $line ]]; then
      say "$line"
    fi
  done
}
start=$(date +%s)
cmake --build "$build_dir" --parallel "$jobs" 2>&1 | show_progress || die "the build in $build_dir failed"
took=$(seconds_since "$start")
if ((took > 5)); then say "build: $build_dir took $took s with $jobs jobs"; fi
