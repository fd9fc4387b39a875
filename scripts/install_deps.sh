#!/usr/bin/env bash
# Installs the Debian or Ubuntu packages of the groups named: build, test, corpus. Packages that are
# there are left alone, and with none missing apt is not started at all.
#
#   scripts/install_deps.sh build test
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

packages_of() {
  case $1 in
    build)
      echo g++ cmake ninja-build pkg-config libopenmpi-dev openmpi-bin libcli11-dev libyaml-cpp-dev \
        libspdlog-dev libfmt-dev nlohmann-json3-dev libdnnl-dev libpcre2-dev libxxhash-dev
      ;;
    test) echo catch2 bible-kjv bible-kjv-text ;;
    corpus) echo bible-kjv bible-kjv-text gzip ;;
    *) die "unknown package group '$1'; the groups are build, test and corpus" ;;
  esac
}

is_installed() {
  [[ $(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null) == installed ]]
}

install_groups() {
  local group package names wanted=() missing=()
  for group in "$@"; do
    names=$(packages_of "$group") || exit 1
    read -ra names <<<"$names"
    wanted+=("${names[@]}")
  done
  if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    say "packages: this system has no apt; please install what stands behind these Debian names:"
    say "  ${wanted[*]}"
    return
  fi
  for package in "${wanted[@]}"; do
    is_installed "$package" || [[ " ${missing[*]} " == *" $package "* ]] || missing+=("$package")
  done
  if ((${#missing[@]} == 0)); then
    say "packages: all there ($*)"
    return
  fi

  local as_root=(env DEBIAN_FRONTEND=noninteractive)
  if (($(id -u) != 0)); then
    command -v sudo >/dev/null || die "packages are missing and this user is neither root nor has sudo.
Please have an administrator run:
  apt-get update && apt-get install --no-install-recommends ${missing[*]}"
    as_root=(sudo "${as_root[@]}")
    # The password is asked for here, while the prompt can be seen.
    sudo -v || die "sudo refused; packages are missing: ${missing[*]}"
  fi

  local apt=(apt-get -y -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300) log start
  log=$(mktemp "${TMPDIR:-/tmp}/deepseek-train-apt.XXXXXX")
  start=$(date +%s)
  say "packages: installing ${missing[*]}"
  quietly "$log" "apt-get update" "${as_root[@]}" "${apt[@]}" update
  quietly "$log" "apt-get install" "${as_root[@]}" "${apt[@]}" install --no-install-recommends \
    "${missing[@]}"
  for package in "${missing[@]}"; do
    is_installed "$package" || die "apt-get reported success but '$package' is not installed; see $log"
  done
  rm -f "$log"
  say "packages: installed ${#missing[@]} in $(seconds_since "$start") s"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  set -euo pipefail
  (($# > 0)) || die "usage: scripts/install_deps.sh GROUP...   (build, test, corpus)"
  install_groups "$@"
fi
