#!/usr/bin/env bash
# Two "hosts" on this machine, for trying what runs between hosts: the network namespaces dt1 and dt2,
# joined by a link of a rate of one's choice, each with a host name of its own. Needs root, iproute2 and
# util-linux, and a kernel with network namespaces, veth and tbf.
#
#   scripts/netns_link.sh up [RATE]          make them; RATE as tc writes it (1gbit)
#   scripts/netns_link.sh run COMMAND...      run a command on dt1, with Open MPI set up to reach dt2
#   scripts/netns_link.sh on HOST COMMAND...  run a command on dt1 or dt2
#   scripts/netns_link.sh cut | mend          break the link, repair it
#   scripts/netns_link.sh down                remove them
#
#   scripts/netns_link.sh up 1gbit
#   scripts/netns_link.sh run deepseek-train --config job.yaml --set launch.hosts='[dt1:1, dt2:1]'
#   scripts/netns_link.sh run mpirun -np 2 --host dt1:1,dt2:1 --bind-to none hostname
#
# Open MPI starts its daemon on the other host through `netns_link.sh agent`, in place of ssh.
set -euo pipefail
self=$(readlink -f "${BASH_SOURCE[0]}")

declare -A address=([dt1]=10.213.0.1 [dt2]=10.213.0.2)
link=dtlink  # its end in each namespace

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

is_up() { ip netns list 2>/dev/null | grep -q '^dt1\b'; }
need_up() { is_up || die "there are no hosts dt1 and dt2; make them with: $0 up"; }

up() {
  local rate=${1:-1gbit} host other
  if is_up; then die "dt1 and dt2 are there already; remove them with: $0 down"; fi
  trap down_quietly ERR
  for host in dt1 dt2; do
    ip netns add $host
    # Names for both, seen by what runs there in place of /etc/hosts.
    mkdir -p "/etc/netns/$host"
    printf '127.0.0.1 localhost\n%s dt1\n%s dt2\n' "${address[dt1]}" "${address[dt2]}" \
      >"/etc/netns/$host/hosts"
  done
  ip -n dt1 link add $link type veth peer name $link netns dt2
  for host in dt1 dt2; do
    ip -n $host addr add "${address[$host]}/24" dev $link
    ip -n $host link set lo up
    ip -n $host link set $link up
    # Each direction is shaped where it leaves; the queue holds 20 ms of traffic.
    tc -n $host qdisc add dev $link root tbf rate "$rate" burst 256kb latency 20ms
  done
  trap - ERR
  for host in dt1 dt2; do
    other=$([[ $host == dt1 ]] && echo dt2 || echo dt1)
    printf '%s: %s, %s to %s\n' $host "${address[$host]}" "$rate" "$other"
  done
}

down() {
  local host
  for host in dt1 dt2; do
    if ip netns list | grep -q "^$host\b"; then
      ip netns pids $host | xargs -r kill -9
      ip netns del $host
    fi
    rm -rf "/etc/netns/$host"
  done
}
down_quietly() { down >/dev/null 2>&1 || true; }

# on HOST COMMAND...: with the host's network and name. Open MPI tells hosts apart by name.
on() {
  local host=$1
  shift
  [[ -n ${address[$host]:-} ]] || die "there is no host '$host'; dt1 and dt2 are the two"
  # shellcheck disable=SC2016  # the inner shell expands
  exec ip netns exec "$host" unshare --uts sh -c 'hostname "$1" && shift && exec "$@"' sh "$host" "$@"
}

# What ssh does for mpirun: [OPTION...] HOST COMMAND-LINE...; a remote shell reads the rest once more.
agent() {
  while [[ ${1:-} == -* ]]; do shift; done
  local host=${1:?no host}
  shift
  on "$host" sh -c "$*"
}

run() {
  export OMPI_MCA_plm_rsh_agent="$self agent"
  export OMPI_MCA_btl=tcp,vader,self OMPI_MCA_btl_tcp_if_include=$link OMPI_MCA_oob_tcp_if_include=$link
  on dt1 "$@"
}

(($# > 0)) || die "what to do? $0 up | run | on | cut | mend | down"
verb=$1
shift
case $verb in
  -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$self" && exit 0 ;;
esac
for program in ip tc unshare; do
  command -v $program >/dev/null || die "the program '$program' is missing (packages iproute2, util-linux)"
done
(($(id -u) == 0)) || die "network namespaces need root"
case $verb in
  up) up "$@" ;;
  down) down ;;
  run) need_up && run "$@" ;;
  on) need_up && on "$@" ;;
  agent) agent "$@" ;;
  cut) need_up && ip -n dt2 link set $link down ;;
  mend) need_up && ip -n dt2 link set $link up ;;
  *) die "unknown verb '$verb'; up, run, on, cut, mend and down are known" ;;
esac
