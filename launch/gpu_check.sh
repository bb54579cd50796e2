#!/usr/bin/env bash
# Everything that only a GPU can tell, in at most eight minutes: the tests of tests/gpu, then `redheart bench gpu`.
#   bash launch/gpu_check.sh [--out DIR] [--skip PART]... [--minutes N] [--wheels DIR] [--device gpu|cpu]
#
# Parts, in this order; each ends in time, and the next one follows whatever became of it:
#   setup  the wheels of --wheels into a folder of its own (no network is asked), a GPU looked for, the kernels compiled
#   tests  tests/gpu: a step per strategy beside the CPU's, the planner's peak, the promise of 8 GB, swap, resuming, answers
#   bench  330m with 64 tokens inside 8 GiB: every strategy that fits, and the reference on the whole card
#   memory configurations drawn by a seed, each planned and run for two steps, six side by side
#   more   the plan's own choices for 330m and 1b3, 64 and 128 tokens, 8 and 4 GiB
#
# --out DIR      for the results: gpu_check.json, tests.json, gpu-CARD-CAP.json, memory.json, gpu_check.log [default: $OUT, else runs/gpu-check]
# --minutes N    for all of it [default: 8]; what is left of it when a part's turn comes bounds the part
# --wheels DIR   Python packages that this machine lacks [default: .whl, where there is one]
# --device cpu   the same on a machine without a GPU: the CPU stands in, and the bench runs preset `local` in little
# PYTHON names the interpreter [default: red_heart_env's, where it is and no wheels are; else python3].
set -euo pipefail

usage() { sed -n '2,18s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
wrong() { echo "gpu_check: $*" >&2; usage >&2; exit 2; }
say() { echo "gpu_check: $*" | tee -a "$log" >&2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
parts=(setup tests bench memory more)
out=${OUT:-$root/runs/gpu-check} minutes=8 wheels="" device=gpu skipped=" "
while [ $# -gt 0 ]; do
  case "$1" in
    --out) [ -n "${2:-}" ] || wrong "--out needs a directory"; out=$2; shift 2 ;;
    --skip)
      [[ " ${parts[*]} " == *" ${2:-} "* ]] || wrong "--skip needs one of: ${parts[*]}"
      skipped+="$2 "; shift 2 ;;
    --minutes) [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || wrong "--minutes needs a positive whole number"; minutes=$2; shift 2 ;;
    --wheels) [ -d "${2:-}" ] || wrong "--wheels needs a directory"; wheels=$(cd "$2" && pwd); shift 2 ;;
    --device) [[ "${2:-}" =~ ^(gpu|cpu)$ ]] || wrong "--device needs gpu or cpu"; device=$2; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *) wrong "unknown option '$1'" ;;
  esac
done
mkdir -p "$out" || { echo "gpu_check: $out cannot be made" >&2; exit 1; }
out=$(cd "$out" && pwd)
log="$out/gpu_check.log"
: >"$log"
cd "$root"

if [ -z "$wheels" ] && compgen -G ".whl/*.whl" >/dev/null; then wheels="$root/.whl"; fi
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -z "$wheels" ] && [ -x red_heart_env/bin/python ]; then python="$root/red_heart_env/bin/python"; fi
command -v "$python" >/dev/null || { echo "gpu_check: $python is not there: set PYTHON" >&2; exit 1; }
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH="$site:$root${PYTHONPATH:+:$PYTHONPATH}" PATH="$site/bin:$PATH"
export HF_HUB_OFFLINE=1 COLUMNS=160 PYTHONUNBUFFERED=1
if [ "$device" = cpu ]; then export CUDA_VISIBLE_DEVICES="" REDHEART_GPU_STAND_IN=cpu; fi

setup() {
  if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$wheels"/*.whl
  fi
  "$python" - "$device" <<'CODE'
import sys

import torch

from redheart.train.engine import compile_kernels

there = torch.cuda.is_available()
print("torch", torch.__version__, "on", torch.cuda.get_device_name() if there else "the CPU")
if sys.argv[1] == "gpu" and not there:
    sys.exit("torch sees no GPU here; --device cpu runs the same on the CPU")
compile_kernels()
CODE
}
tests() {
  local workers=()
  # the checks spend their time starting processes; on a small machine these would get into each other's way
  export OMP_NUM_THREADS=$(($(nproc) / 8 + 1)) # each starts two or three at once: with all cores for every one they stood in line for minutes
  if [ "$(nproc)" -ge 8 ] && "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 6 --dist loadgroup); fi
  REDHEART_GPU_RESULTS="$out/tests.json" "$python" -m pytest -q -p no:cacheprovider ${workers[@]+"${workers[@]}"} tests/gpu
}
bench() {
  if [ "$device" = cpu ]; then
    "$python" -m redheart bench gpu --presets local --tokens 8 --steps 1 --strategies plain --strategies zero2_offload_8bit --seconds "$seconds" --out "$out"
  else
    "$python" -m redheart bench gpu --presets 330m --tokens 64 --caps 8GiB --timeout 120 --seconds "$seconds" --out "$out"
  fi
}
memory() {
  local many=(--configurations 100 --at-once 6)
  if [ "$device" = cpu ]; then many=(--configurations 1); fi
  OMP_NUM_THREADS=1 "$python" -m redheart bench memory "${many[@]}" --seconds "$seconds" --out "$out/memory.json"
}
more() {
  if [ "$device" = cpu ]; then
    "$python" -m redheart bench gpu --presets local --tokens 8 --steps 1 --chosen-only --seconds "$seconds" --out "$out"
  else
    "$python" -m redheart bench gpu --presets 330m --presets 1b3 --timeout 120 --chosen-only --seconds "$seconds" --out "$out"
  fi
}
export -f setup tests bench memory more
export python device out site wheels seconds

declare -A share=([setup]=150 [tests]=240 [bench]=240 [memory]=120 [more]=480) # seconds of eight minutes that a part may take at most
records=() failed=no end=$((SECONDS + 60 * minutes))
finish() {
  local joined
  joined=$(IFS=,; echo "${records[*]}")
  printf '{"device": "%s", "minutes": %d, "seconds": %d, "parts": [%s]}\n' "$device" "$minutes" "$SECONDS" "$joined" >"$out/gpu_check.json"
}
for part in "${parts[@]}"; do
  began=$SECONDS
  limit=$((end - SECONDS - 5)) most=$((share[$part] * minutes / 8))
  if [ "$limit" -gt "$most" ]; then limit=$most; fi
  if [[ "$skipped" == *" $part "* ]]; then
    outcome=skipped
  elif [ "$limit" -lt 5 ]; then
    outcome="no time left"
    failed=yes
  else
    say "$part, at most $limit s …"
    code=0
    seconds=$((limit > 40 ? limit - 20 : limit)) # a case that would take longer than what is left of them does not start
    timeout -k 5 "$limit" bash -euo pipefail -c "$part" </dev/null >>"$log" 2>&1 || code=$?
    case $code in
      0) outcome=ok ;;
      124 | 137) outcome="cut off after $limit s" failed=yes ;;
      *) outcome="failed with exit code $code" failed=yes ;;
    esac
  fi
  say "$part: $outcome, $((SECONDS - began)) s"
  records+=("$(printf '{"part": "%s", "outcome": "%s", "seconds": %d}' "$part" "$outcome" $((SECONDS - began)))")
  finish
  if [ "$part" = setup ] && [[ "$outcome" == failed* ]]; then
    tail -n 3 "$log" | head -n 2 >&2
    say "nothing can follow without it: see $log"
    exit 1
  fi
done
say "all of it: $SECONDS s; results in $out"
[ "$failed" = no ]
