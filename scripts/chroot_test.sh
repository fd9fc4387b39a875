#!/usr/bin/env bash
# Runs a script of this checkout on a bare system: a minimal Debian made for the purpose, with nothing
# in it but what Debian calls required, and the committed files (git archive HEAD). Needs root and the
# package debootstrap. Packages come from the mirror that this machine's apt uses.
#
#   scripts/chroot_test.sh [--suite NAME] [--dir DIR] [--reuse] [--keep] SCRIPT [ARGUMENT...]
#
#   scripts/chroot_test.sh scripts/quickstart.sh
#   --suite NAME   Debian release (bookworm)
#   --dir DIR      where to make it (a new temporary folder)
#   --reuse        take the system that an earlier run with --keep left in DIR, with fresh sources
#   --keep         do not remove it afterwards
#
# The exit code is that of the script.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

suite=bookworm dir='' reuse=0 keep=0
while (($# > 0)); do
  case $1 in
    --suite) suite=${2:?--suite needs a name} && shift ;;
    --dir) dir=${2:?--dir needs a folder} && shift ;;
    --reuse) reuse=1 ;;
    --keep) keep=1 ;;
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    --*) die "unknown option '$1'; --help lists them" ;;
    *) break ;;
  esac
  shift
done
(($# > 0)) || die "which script? For example: scripts/chroot_test.sh scripts/quickstart.sh"
(($(id -u) == 0)) || die "a chroot needs root"
for program in debootstrap unshare git; do
  command -v $program >/dev/null || die "the program '$program' is missing"
done

# The folder inside: /src holds the sources, the rest is the system.
if [[ -z $dir ]]; then
  dir=$(mktemp -d "${TMPDIR:-/tmp}/deepseek-train-chroot.XXXXXX")
elif [[ -e $dir/etc/debian_version ]]; then
  ((reuse)) || die "$dir holds a system already; --reuse takes it, or remove it"
elif [[ -n $(ls -A "$dir" 2>/dev/null) ]]; then
  die "$dir is not empty and holds no system"
fi
mkdir -p "$dir"
remove() { if ((!keep)); then rm -rf --one-file-system "$dir"; fi; }
trap remove EXIT

# Lines "URI SUITE" of the Debian archives that apt on this machine knows, the main one first.
archives() {
  apt-get indextargets --format '$(CREATED_BY) $(REPO_URI) $(RELEASE) $(COMPONENT)' |
    awk -v suite="$suite" '$1 == "Packages" && $4 == "main" && ($3 == suite || index($3, suite "-") == 1) {
      if (!seen[$2 $3]++) print length($3), $2, $3
    }' | sort -n | cut -d' ' -f2-
}
if [[ ! -e $dir/etc/debian_version ]]; then
  mirror=$(archives | sed -n 's/ [^ ]*$//p;q')
  [[ -n $mirror ]] || die "apt on this machine knows no archive of Debian $suite"
  include=()
  if [[ $mirror == https:* ]]; then include=(--include=ca-certificates); fi
  step "a minimal Debian $suite in $dir"
  quietly "$dir.debootstrap.log" "debootstrap" \
    debootstrap --variant=minbase "${include[@]}" "$suite" "$dir" "$mirror"
  rm -f "$dir.debootstrap.log"
  archives | sed 's/^/deb /; s/$/ main/' >"$dir/etc/apt/sources.list"
  # How this machine reaches its archives (proxies, snapshots with old dates) holds inside as well.
  apt-config dump | grep -E '^Acquire::(https?|Check-Date|Check-Valid-Until|Retries)' |
    grep -v '""' >"$dir/etc/apt/apt.conf.d/90host" || true
fi
for file in /etc/resolv.conf /etc/hosts; do
  if [[ -e $file ]]; then cp --dereference "$file" "$dir$file"; fi
done

step "sources: $(git rev-parse --short HEAD)"
rm -rf "$dir/src"
mkdir "$dir/src"
git archive HEAD | tar -x -C "$dir/src"

step "$*"
# Mounts and processes live in namespaces of their own and end with the script.
status=0
unshare --mount --pid --fork --kill-child bash -c '
  dir=$1
  shift
  mount --make-rprivate /
  mount -t proc proc "$dir/proc"
  mount --rbind /dev "$dir/dev"
  mount --rbind /sys "$dir/sys"
  mount -t tmpfs tmpfs "$dir/run"
  exec env -i HOME=/root TERM="${TERM:-dumb}" PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    chroot "$dir" bash -c "cd /src && exec bash \"\$@\"" bash "$@"
' bash "$dir" "$@" </dev/null || status=$?
step "$1 ended with exit code $status"
exit $status
