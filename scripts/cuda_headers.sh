#!/usr/bin/env bash
# Brings the headers that the CUDA back end compiles with and that toolkits lack: cudnn-frontend, CUTLASS and, where
# the toolkit has none, NCCL, from their Python wheels (nothing of Python is used at run time). They land in
# .deps/cuda/. Does nothing where they are. The build does without what is missing: attention and experts are then
# slower, and a job has one GPU.
#
#   scripts/cuda_headers.sh [--pack FILE]
#
#   --pack FILE   also writes them into one archive, for a machine without a network: unpack it in the checkout there
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

pack=''
while (($# > 0)); do
  case $1 in
    --pack) pack=${2:?--pack needs a file} && shift ;;
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    *) die "unknown option '$1'; --help lists them" ;;
  esac
  shift
done

# fetch NAME VERSION FOLDER_IN_WHEEL FILE [WHEEL]: headers of a wheel, nvidia-NAME, into .deps/cuda/NAME.
fetch() {
  local name=$1 version=$2 inside=$3 file=$4 wheel=${5:-nvidia-$1} work
  local target=.deps/cuda/$name/include  # cudnn-frontend refers to itself by that name
  if [[ -f $target/$file ]]; then return 0; fi
  work=$(mktemp -d "${TMPDIR:-/tmp}/deepseek-train-headers.XXXXXX")
  if python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.11 \
    --platform manylinux_2_18_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_28_x86_64 --platform any -d "$work" \
    "$wheel==$version" >"$work/log" 2>&1 &&
    (cd "$work" && python3 -m zipfile -e ./*.whl wheel) >>"$work/log" 2>&1 && [[ -f $work/wheel/$inside/$file ]]; then
    mkdir -p ".deps/cuda/$name" && rm -rf "$target" && mv "$work/wheel/$inside" "$target"
    say "cuda: headers of $name $version"
  else
    say "cuda: the headers of $name $version could not be fetched with pip; the build goes on without them"
  fi
  rm -rf "$work"
}
command -v python3 >/dev/null && python3 -m pip --version >/dev/null 2>&1 ||
  { say "cuda: no pip here; put cudnn_frontend.h and its folder into .deps/cuda/cudnn-frontend/include, CUTLASS into .deps/cuda/cutlass/include"; exit 0; }
fetch cudnn-frontend 1.32.0 include cudnn_frontend.h
fetch cutlass 4.2.0.0 cutlass_library/source/include cutlass/cutlass.h
# The library itself is loaded from the toolkit's folder, the system's or LD_LIBRARY_PATH.
nvcc=$(readlink -f "$(command -v nvcc || printf %s /usr/local/cuda/bin/nvcc)")
if [[ ! -f $(dirname "$nvcc")/../include/nccl.h ]]; then fetch nccl 2.28.9 nvidia/nccl/include nccl.h nvidia-nccl-cu13; fi
if [[ -n $pack ]]; then tar -czf "$pack" .deps/cuda; fi
