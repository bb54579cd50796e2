#!/usr/bin/env bash
# Starts this node's part of a run that spans several nodes; the same command, with its own --node-rank, goes to every node.
set -euo pipefail

usage() {
  cat >&2 <<'TEXT'
usage: bash launch/multinode/run_node.sh --node-rank R [options] -- train --preset 330m --data DIR --out DIR [more of redheart train]

  --node-rank R          which line of the hostfile this node is, from 0
  --hostfile FILE        NAME slots=PROCESSES per node (default launch/multinode/hostfile); the same file on every node
  --launcher NAME        accelerate (default), deepspeed or torchrun
  --main-address NAME    name or IPv4 address of node 0, as the other nodes reach it (default: the hostfile's first name)
  --main-port PORT       a free port of node 0 (default 29500)
  --interface NAME       network interface that all nodes talk over, e.g. eth0 (sets GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME)
  --config-file FILE     for accelerate (default launch/multinode/accelerate.yaml, which leaves the strategy to memory.strategy)
  --help

Nothing is sent to other nodes: no ssh, no .deepspeed_env, no environment variable. Each node runs with its own environment.
The data must be the same on every node, and --out a directory that all of them share. Relative paths start at the checkout.
launch/multinode/README.md tells about ports, interfaces, time-outs and what to do after a node was lost.
TEXT
}
wrong() { echo "run_node: $*" >&2; echo "run_node: see --help" >&2; exit 2; }

name_pattern='^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$'
check() { # OPTION VALUE PATTERN WHAT
  [[ "$2" =~ $3 ]] || wrong "$1 needs $4, not '$2'"
}
check_range() { # OPTION VALUE LOW HIGH
  check "$1" "$2" '^(0|[1-9][0-9]{0,5})$' "a whole number"
  { [ "$2" -ge "$3" ] && [ "$2" -le "$4" ]; } || wrong "$1 needs a number from $3 to $4, not '$2'"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
launcher=accelerate hostfile="$root/launch/multinode/hostfile" node_rank="" main_address="" main_port=29500 interface=""
config_file="$root/launch/multinode/accelerate.yaml"
[ $# -gt 0 ] || { usage; exit 2; }
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    --node-rank | --hostfile | --launcher | --main-address | --main-port | --interface | --config-file)
      [ $# -ge 2 ] || wrong "$1 needs a value" ;;
    *) wrong "unknown option '$1' (redheart's own words go behind --)" ;;
  esac
  case "$1" in
    --node-rank) node_rank=$2 ;;
    --hostfile) hostfile=$2 ;;
    --launcher) launcher=$2 ;;
    --main-address) main_address=$2 ;;
    --main-port) main_port=$2 ;;
    --interface) interface=$2 ;;
    --config-file) config_file=$2 ;;
  esac
  shift 2
done
[ "${1:-}" = train ] || wrong "behind -- comes what redheart is to do: train …"

[ -f "$hostfile" ] || wrong "--hostfile: there is no file '$hostfile'"
hosts=() slots=()
line_pattern='^([^[:space:]]+)[[:space:]]+slots=([1-9][0-9]{0,2})[[:space:]]*$'
mapfile -t lines <"$hostfile"
for line in "${lines[@]}"; do
  [[ "$line" =~ ^[[:space:]]*(#.*)?$ ]] && continue
  [[ "$line" =~ $line_pattern ]] || wrong "$hostfile: '$line' is not NAME slots=NUMBER"
  name=${BASH_REMATCH[1]} count=${BASH_REMATCH[2]}
  check "$hostfile" "$name" "$name_pattern" "host names of letters, digits, dots and hyphens"
  [[ " ${hosts[*]-} " != *" $name "* ]] || wrong "$hostfile: $name is there twice"
  hosts+=("$name") slots+=("$count")
done
nodes=${#hosts[@]}
[ "$nodes" -ge 1 ] || wrong "$hostfile names no node"
[ -n "$node_rank" ] || wrong "--node-rank is missing"
check_range --node-rank "$node_rank" 0 $((nodes - 1))
: "${main_address:=${hosts[0]}}"
check --main-address "$main_address" "$name_pattern" "a host name or an IPv4 address"
check_range --main-port "$main_port" 1024 65535
processes=0
for count in "${slots[@]}"; do
  processes=$((processes + count))
  [ "$launcher" = deepspeed ] || [ "$count" = "${slots[0]}" ] || wrong "$launcher needs equal slots on all nodes ($hostfile); deepspeed does not"
done
if [ -n "$interface" ]; then
  check --interface "$interface" '^[A-Za-z0-9][A-Za-z0-9._-]{0,14}$' "the name of a network interface"
  [ -e "/sys/class/net/$interface" ] || wrong "--interface: this node has no '$interface' (it has $(cd /sys/class/net && echo *))"
  export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME="=$interface" # =: exactly this one, not every name that begins so
fi

case "$launcher" in
  accelerate)
    [ -f "$config_file" ] || wrong "--config-file: there is no file '$config_file'"
    command=(accelerate launch --config_file "$(realpath "$config_file")" --num_machines "$nodes" --machine_rank "$node_rank"
      --num_processes "$processes" --deepspeed_multinode_launcher standard --same_network --main_process_ip "$main_address"
      --main_process_port "$main_port" -m redheart) ;;
  deepspeed)
    command=(deepspeed --hostfile "$(realpath "$hostfile")" --no_ssh --node_rank "$node_rank" --master_addr "$main_address"
      --master_port "$main_port" --log_level error --module redheart) ;;
  torchrun)
    command=(torchrun --nnodes "$nodes" --nproc_per_node "${slots[0]}" --node_rank "$node_rank" --master_addr "$main_address"
      --master_port "$main_port" -m redheart) ;;
  *) wrong "--launcher is accelerate, deepspeed or torchrun, not '$launcher'" ;;
esac

cd "$root"
if [ -d "$root/red_heart_env/bin" ]; then export PATH="$root/red_heart_env/bin:$PATH"; fi
command -v "${command[0]}" >/dev/null || wrong "${command[0]} is not installed here: run launch/setup_env.sh on every node"

codes=${REDHEART_EXIT_CODES:-} # of a supervisor
[ -n "$codes" ] || { codes=$(mktemp); trap 'rm -f "$codes"' EXIT; }
mark=REDHEART_NODE=$$:$codes
# shellcheck source=launch/processes.sh
source "$root/launch/processes.sh"
listen
start "${command[@]}" "$@"
wait_for_line
if [ "$code" -ne 0 ]; then
  echo "run_node: node $node_rank of $nodes (${hosts[$node_rank]}) ended with code $code; once all nodes have ended, the same commands with --resume go on from the last checkpoint" >&2
fi
exit "$code"
