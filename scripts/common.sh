# shellcheck shell=bash
# Sourced by the other scripts: the root folder, messages, and the number of compile jobs.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
export LC_ALL=C  # sorting and number formats do not depend on the user's language

say() { printf '%s\n' "$*"; }
step() { printf '\n== %s\n' "$*"; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Runs a command with its output in a file; shows the end of the file only if the command fails.
# quietly LOG WHAT COMMAND...
quietly() {
  local log=$1 what=$2
  shift 2
  mkdir -p "$(dirname "$log")"
  if ! "$@" >"$log" 2>&1 </dev/null; then
    tail -n 40 "$log" >&2
    die "$what failed; the whole output is in $log"
  fi
}

# Compile jobs: one per usable core, and no more than one per GiB of free memory.
compile_jobs() {
  local cores memory
  cores=$(nproc)
  memory=$(awk '/^MemAvailable:/ {print int($2 / 1048576)}' /proc/meminfo 2>/dev/null || echo "$cores")
  if ((memory < 1)); then memory=1; fi
  echo $((cores < memory ? cores : memory))
}

seconds_since() { echo $(($(date +%s) - $1)); }

# The C++ and CUDA sources of the folders named, sorted; folders that do not exist are left out.
sources_in() {
  local folder folders=()
  for folder in "$@"; do
    if [[ -d $folder ]]; then folders+=("$folder"); fi
  done
  ((${#folders[@]} > 0)) || return 0
  find "${folders[@]}" -name '*.h' -o -name '*.h.in' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' |
    sort
}
