#!/usr/bin/env bash
# Runs the whole job: environment, data, training, evaluation.
set -euo pipefail

usage() {
  cat >&2 <<'TEXT'
usage: bash launch/run_learning.sh MODE [options]

  train-local      prepare the shipped texts, train preset `local` (CPU or GPU), evaluate, predict
      --samples N              how many texts (default: all 2,000 shipped ones, of which the LLM reads 32; 64 of your own)
  train-test       the same chain as a quick trial: 12 texts and 6 steps unless told otherwise
      --samples N
  train-cloud      preset `330m`; without a GPU it says so and runs on the CPU where the memory suffices
      --full-dataset           all texts (default: 64)
      --checkpoint-interval N  steps between checkpoints (default: the preset's)
  train-validate   held-out metrics of a checkpoint
      --load-checkpoint [PATH] a checkpoint, an export or a run (default: the best of the last run)

  every mode:
      --dataset FILE           your own processed_dataset.json (or .jsonl) instead of the shipped texts
      --debug                  show tracebacks
      --verbose                show all tables, and what the libraries say
      --help

Everything a run makes lies under runs/MODE-DATE-TIME/: config.yaml, checkpoints/, tensorboard/, report.html, report.md.
TEXT
}
wrong() { echo "run_learning: $*" >&2; usage; exit 2; }

[ $# -gt 0 ] || wrong "no mode given"
mode=$1
shift
strategy=zero2_offload # that of the preset
case "$mode" in
  train-local) samples=default preset=local ;;
  train-test) samples=12 preset=local ;;
  train-cloud) samples=64 preset=330m strategy=zero2_offload_8bit ;;
  train-validate) samples="" preset="" ;;
  -h | --help) usage; exit 0 ;;
  *) wrong "unknown mode '$mode'" ;;
esac

allowed() { # OPTION MODE… : this option belongs to these modes
  local option=$1
  shift
  [[ " $* " == *" $mode "* ]] || wrong "$option does not go with $mode"
}
number() { [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || wrong "$1 needs a positive whole number"; }

checkpoint="" dataset="" settings=() brief=(--brief)
while [ $# -gt 0 ]; do
  case "$1" in
    --samples) allowed "$1" train-local train-test; number "$1" "${2:-}"; samples=$2; shift 2 ;;
    --full-dataset) allowed "$1" train-cloud; samples=""; shift ;;
    --checkpoint-interval)
      allowed "$1" train-cloud; number "$1" "${2:-}"
      settings+=(--set "training.checkpoint_every=$2" --set "training.evaluate_every=$2"); shift 2 ;;
    --load-checkpoint)
      allowed "$1" train-validate; shift
      if [ $# -gt 0 ] && [[ "$1" != --* ]]; then checkpoint=$1; shift; fi ;;
    --dataset) [ -n "${2:-}" ] || wrong "--dataset needs a file"; dataset=$2; shift 2 ;;
    --debug) export REDHEART_DEBUG=1; shift ;;
    --verbose) export REDHEART_VERBOSE=1 TRANSFORMERS_VERBOSITY=info DS_LOG_LEVEL=info; brief=(); shift ;;
    -h | --help) usage; exit 0 ;;
    *) wrong "unknown option '$1'" ;;
  esac
done
absolute() { case "$1" in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
if [ -n "$dataset" ]; then
  [ -f "$dataset" ] || { echo "run_learning: --dataset $dataset is no file" >&2; exit 1; }
  dataset=$(absolute "$dataset")
fi
if [ -n "$checkpoint" ]; then checkpoint=$(absolute "$checkpoint"); fi

export DS_LOG_LEVEL=${DS_LOG_LEVEL:-error} # of the launchers too

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launch/setup_env.sh"
cd "$root"
export PATH="$root/red_heart_env/bin:$PATH"
mkdir -p runs

if [ "$mode" = train-validate ]; then
  if [ -z "$checkpoint" ]; then
    [ -f runs/last ] || { echo "run_learning: no run yet: start one with train-local, or give --load-checkpoint PATH" >&2; exit 1; }
    checkpoint="runs/$(cat runs/last)"
  fi
  exec redheart evaluate --checkpoint "$checkpoint"
fi

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu # else every process of the launch says that it looked for one
if [ "$mode" = train-cloud ] && [ "$gpus" -eq 0 ]; then
  parameters=$(redheart params --preset "$preset" --json | python -c 'import json, sys; print(json.load(sys.stdin)["total"])')
  needed=$((parameters * 18 / 1073741824 + 3)) # about 18 bytes per parameter with 8-bit states, plus activations
  free=$(awk '/MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo)
  echo "run_learning: no NVIDIA GPU is visible; $preset is made for one. On the CPU it needs about ${needed} GiB of memory (${free} GiB are free) and much more time." >&2
  [ "$free" -ge "$needed" ] || { echo "run_learning: that is too little memory: use a machine with a GPU, or train-local" >&2; exit 1; }
fi
[ "$mode" = train-test ] && settings+=(--set training.max_steps=6 --set training.evaluate_every=3)

if [ "$samples" = default ]; then samples=${dataset:+64}; fi
# directories are named by what is read and by the code that prepares it: what an earlier version prepared is not taken for it
code=(redheart/data/*.py)
source_name=everyday preparing=()
if [ -n "$dataset" ]; then
  source_name="own=$dataset"
  data="data/own-$(echo "$dataset" | cat - "$dataset" "${code[@]}" | sha256sum | cut -c1-8)-${samples:-all}"
else
  data="data/everyday-$(cat redheart/data/corpus/*.json "${code[@]}" | sha256sum | cut -c1-8)-${samples:-all}"
  if [ "$preset" = local ]; then # what lacks a label would take the LLM minutes
    preparing=(--set data.labeler.max_texts=32)
    data+=-local
  fi
fi
run="$mode-$(date +%Y%m%d-%H%M%S)"

redheart prepare --preset "$preset" --source "$source_name" --out "$data" ${samples:+--samples "$samples"} ${preparing[@]+"${preparing[@]}"}
accelerate launch --config_file "launch/accelerate/$strategy.yaml" --num_processes $((gpus > 0 ? gpus : 1)) --main_process_port 0 \
  -m redheart train --preset "$preset" --data "$data" --out "runs/$run" ${settings[@]+"${settings[@]}"}
echo "$run" >runs/last
redheart evaluate --checkpoint "runs/$run" --data "$data" ${brief[@]+"${brief[@]}"}
redheart predict --checkpoint "runs/$run" ${brief[@]+"${brief[@]}"} "I promised my father I would call on Sunday, and I forgot again."
cat >&2 <<TEXT
everything is in $root/runs/$run (report.html, report.md; tensorboard --logdir $root/runs/$run/tensorboard)
use it:          source $root/red_heart_env/bin/activate
your own texts:  redheart train --data texts.csv --text body --label sorry=regret --label happy=emotion.joy --out runs/mine
TEXT
