#!/usr/bin/env bash
# Sets up what is missing, then runs the linters, the type checker and the tests.
#   bash launch/run_tests.sh [pytest arguments]      e.g.  -m slow,  tests/causality,  -k resume
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case "${1:-}" in
  -h | --help) sed -n '2,3s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
bash "$root/launch/setup_env.sh"
cd "$root"
export PATH="$root/red_heart_env/bin:$PATH"
if [ $# -gt 0 ]; then
  exec pytest "$@"
fi
ruff check redheart tests setup.py
ruff format --check redheart tests setup.py
mypy redheart
shellcheck -x launch/*.sh launch/multinode/*.sh launch/multinode/*.sbatch tests/benchmarks/*.sh .ci/run
workers=$(nproc)  # tests that start two processes each: more than four at once help no more
export OMP_NUM_THREADS=1
pytest -n "$((workers < 4 ? workers : 4))" --dist worksteal -m "not slow and not gpu and not multinode and not faults and not soak"

# two nodes as network namespaces: a launch by accelerate, and a node that is cut off; all of it with  -m multinode
probe="rhprobe-$$"
if [ "$(id -u)" -ne 0 ]; then
  echo "run_tests: multinode tests left out: they need root" >&2
elif ! command -v ip >/dev/null; then
  echo "run_tests: multinode tests left out: they need the command ip (Debian: apt-get install iproute2)" >&2
elif ! ip netns add "$probe" 2>/dev/null; then
  echo "run_tests: multinode tests left out: this system makes no network namespace" >&2
else
  linked=yes
  ip -n "$probe" link add rh0 type veth peer name rh1 2>/dev/null || linked=no
  ip netns del "$probe"
  if [ "$linked" = yes ]; then
    pytest -m "multinode and not slow"
  else
    echo "run_tests: multinode tests left out: this system makes no virtual network link" >&2
  fi
fi
