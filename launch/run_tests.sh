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
shellcheck -x launch/*.sh launch/multinode/*.sh launch/multinode/*.sbatch .ci/run
workers=$(nproc)  # tests that start two processes each: more than four at once help no more
export OMP_NUM_THREADS=1
pytest -n "$((workers < 4 ? workers : 4))" --dist worksteal -m "not slow and not gpu and not multinode"
