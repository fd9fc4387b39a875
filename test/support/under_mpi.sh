#!/usr/bin/env bash
# Runs a program of tests as several MPI ranks of this machine, or without MPI where it is only asked for its
# list of tests.
#
#   test/support/under_mpi.sh RANKS PROGRAM ARG...
set -euo pipefail
ranks=$1
shift
case " $* " in *" --list-"*) exec "$@" ;; esac
if ! command -v mpirun >/dev/null; then
  printf 'SKIPPED: %s: mpirun is not installed\n' "$2"
  exit 0
fi
# Containers often run as root and forbid a process to read another one's memory. Open MPI leaks a little at
# its end, by itself.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_btl_vader_single_copy_mechanism=none
export ASAN_OPTIONS=${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0
# mpirun gives the ranks a terminal, which they colour.
mpirun -np "$ranks" --oversubscribe --bind-to none "$@" 2>&1 | sed $'s/\e\\[[0-9;]*m//g'
