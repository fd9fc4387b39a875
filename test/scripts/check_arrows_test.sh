#!/usr/bin/env bash
# Plants includes that break the arrow table in a copy of a small tree and expects each to be found.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

# expect VERDICT NAME FILE TEXT: the tree with TEXT in FILE passes, or fails naming FILE and line 1.
expect() {
  local verdict=$1 name=$2 file=$3 text=$4 output status=0
  rm -rf "$work/tree"
  mkdir -p "$work/tree/core/base" "$work/tree/core/tensor" "$work/tree/core/config" \
    "$work/tree/parallel" "$work/tree/cuda" "$work/tree/apps" "$work/tree/test/core"
  (
    cd "$work/tree"
    for header in core/base/error.h core/tensor/tensor.h core/config/config.h parallel/mesh.h \
      cuda/ops.h test/core/helper.h; do
      printf '#pragma once\n' >"$header"
    done
    printf '#include <CLI/CLI.hpp>\n' >apps/cli.cpp
    mkdir -p "$(dirname "$file")"
    printf '%b\n' "$text" >"$file"
  )
  output=$(bash "$root/scripts/check_arrows.sh" "$work/tree" 2>&1) || status=$?
  if [[ $verdict == allowed && $status == 0 ]]; then return; fi
  if [[ $verdict == refused && $status == 1 && $output == *"$file:1: "* ]]; then return; fi
  printf 'FAILED: %s should be %s; exit %s, output:\n%s\n' "$name" "$verdict" "$status" "$output"
  failures=$((failures + 1))
}

expect allowed 'tensor to base' core/tensor/x.cpp '#include "core/base/error.h"'
expect allowed 'apps to parallel' apps/x.cpp '#include "parallel/mesh.h"'
expect allowed 'standard and POSIX headers' core/base/x.cpp '#include <vector>\n#include <sys/mman.h>'
expect allowed 'yaml-cpp in core/config' core/config/x.cpp '#include <yaml-cpp/yaml.h>'
expect allowed 'tests to anything' test/core/x_test.cpp '#include "cuda/ops.h"\n#include "parallel/mesh.h"'
expect allowed 'nlohmann-json in a .cpp file' core/base/x.cpp '#include <nlohmann/json.hpp>'

expect refused 'base to tensor' core/base/x.cpp '#include "core/tensor/tensor.h"'
expect refused 'tensor to config' core/tensor/x.h '#include "core/config/config.h"'
expect refused 'core to apps' core/base/y.cpp '#include "apps/x.h"'
expect refused 'core to parallel' core/tensor/x.cpp '#include "parallel/mesh.h"'
expect refused 'cuda to parallel' cuda/x.cu '#include "parallel/mesh.h"'
expect refused 'parallel to cuda' parallel/x.cpp '#include "cuda/ops.h"'
expect refused 'the program to its tests' apps/x.cpp '#include "test/core/helper.h"'
expect refused 'yaml-cpp outside core/config' core/tensor/x.cpp '#include <yaml-cpp/yaml.h>'
expect refused 'CLI11 in a second file' apps/second.cpp '#include <CLI/CLI.hpp>'
expect refused 'oneDNN outside core/backend' core/tensor/x.cpp '#include <oneapi/dnnl/dnnl.h>'
expect refused 'MPI in core' core/base/x.cpp '#include <mpi.h>'
expect refused 'nlohmann-json in a header' core/base/x.h '#include <nlohmann/json.hpp>'
expect refused 'an unknown library' core/base/x.cpp '#include <boost/optional.hpp>'
expect refused 'a path relative to the file' core/tensor/x.cpp '#include "tensor.h"'
expect refused 'spaces in the directive' core/base/x.cpp '  #  include   "core/tensor/tensor.h"'
expect refused 'a macro for a path' core/base/x.cpp '#include HEADER'
expect refused 'a folder that is not in the table' core/extra/x.cpp '#include <vector>'

((failures == 0)) && echo 'check_arrows.sh finds every planted fault'
