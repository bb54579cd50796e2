#!/usr/bin/env bash
# Starts a training again when it ends by what starting again can cure; exit codes in launch/README.md.
set -euo pipefail

usage() {
  cat >&2 <<'TEXT'
usage: bash launch/supervise.sh [options] -- LINE

LINE is any line that trains, with --out: redheart train …, accelerate launch … -m redheart train …, deepspeed …, torchrun …,
bash launch/multinode/run_node.sh … -- train …

  --restarts N   at most N starts in a row that brought no new checkpoint (default 5)
  --wait S       seconds before the first of them, doubled with each (default 5, at most 300)
  --help

LINE is started as it is. It is started again with --resume, and without --init, once it has made a checkpoint. Before that it is started
again as it began: with --overwrite as well where this supervisor began the run, sees it in --out, and nobody saved it. It is not started
again when it ended well or by a signal that it was sent, when it refused its settings, its data or its command line (exit codes 1 and 2),
and when this supervisor is asked to end: SIGTERM and SIGINT, and SIGUSR1 for a checkpoint, go on to the processes that train, past their
launcher. Nothing is started again before all processes of LINE have ended.
TEXT
}
wrong() { echo "supervise: $*" >&2; echo "supervise: see --help" >&2; exit 2; }
say() { echo "supervise: $*" >&2; }
number() { [[ "${2:-}" =~ ^(0|[1-9][0-9]{0,5})$ ]] || wrong "$1 needs a whole number"; }

restarts=5 wait=5
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --restarts) number "$1" "${2:-}"; restarts=$2; shift 2 ;;
    --wait) number "$1" "${2:-}"; wait=$2; shift 2 ;;
    --) shift; break ;;
    *) wrong "unknown option '$1' (the line that trains goes behind --)" ;;
  esac
done
[ $# -gt 0 ] || wrong "behind -- comes the line that trains"

line=("$@") first=("$@") again=() run="" begun=no from="" # again: the line without how it was to begin
while [ $# -gt 0 ]; do
  case "$1" in
    run_node.sh | */run_node.sh) from=$(cd "$(dirname "$1")/../.." 2>/dev/null && pwd)/ || from="" ;; # where its relative paths start
    --out) run=${2:-} ;;
    --out=*) run=${1#--out=} ;;
  esac
  case "$1" in
    --overwrite | --resume=*) begun=yes ;;
    --init=*) ;;
    --init) [ $# -lt 2 ] || shift ;;
    --resume) begun=yes; if [ $# -gt 1 ] && [[ "$2" != -* ]]; then shift; fi ;;
    *) again+=("$1") ;;
  esac
  shift
done
[ -n "$run" ] || wrong "the line names no --out, so nobody could tell whether its run has a checkpoint"
[[ "$run" == /* ]] || run=$from$run

committed() { # a line for each checkpoint, which no other one has, even of the same step
  stat -c '%i %y' "$run"/checkpoints/step-????????{,.old}/manifest.json 2>/dev/null | LC_ALL=C sort || true
}
made() { [ -n "$(LC_ALL=C comm -13 <(echo "$1") <(committed))" ]; } # whether there is one beside those of $1

at_first=$(committed)
if [ -n "$at_first" ] || [ -e "$run/.redheart.json" ]; then begun=yes; fi # not ours to replace, unless the line says so

codes=$(mktemp) # where every process of the line says how it ended; a launcher says something of its own
trap 'rm -f "$codes"' EXIT
mark=REDHEART_EXIT_CODES=$codes
# shellcheck source=launch/processes.sh
source "$(dirname "${BASH_SOURCE[0]}")/processes.sh"
listen
any() { grep -qxE "$1" "$codes"; } # whether a process ended with such a code

without=0
while :; do
  : >"$codes"
  before=$(committed)
  start "${line[@]}"
  wait_for_line
  [ "$code" -ne 0 ] || exit 0
  if [ -n "$asked" ]; then
    say "ended by SIG$asked, as asked"
    exit "$code"
  fi
  if any '1|2'; then
    say "not started again: its settings, its data or its files were refused (exit code $code), and would be again"
    exit "$code"
  fi
  if { [[ "$code" =~ ^(130|143)$ ]] || any '130|143'; } && ! any '70|75'; then
    say "not started again: somebody asked it to end (exit code $code)"
    exit "$code"
  fi
  if any 141; then
    say "not started again: nobody reads its stdout any more (exit code $code)"
    exit "$code"
  fi
  if [[ "$code" =~ ^(2|126|127)$ ]] && [ ! -s "$codes" ]; then
    say "not started again: the line cannot be started (exit code $code)"
    exit "$code"
  fi
  if any 70; then why="an error that nobody foresaw"
  elif any 75; then why="a process, a node or the network was lost"
  else why="it was killed"; fi
  if made "$before"; then without=0; else without=$((without + 1)); fi
  if [ "$without" -gt "$restarts" ]; then
    say "not started again: $why (exit code $code), and $without starts in a row brought no checkpoint"
    exit "$code"
  fi
  pause=0
  if [ "$without" -gt 0 ]; then pause=$((wait << (without < 16 ? without - 1 : 15))); fi
  pause=$((pause < 300 ? pause : 300))
  if made "$at_first"; then
    line=("${again[@]}" --resume) how=--resume
  elif [ "$begun" = no ] && [ -e "$run/.redheart.json" ]; then
    line=("${first[@]}" --overwrite) how=--overwrite
  else # where this supervisor sees no run there may be one: the line may have its own idea of where --out lies
    line=("${first[@]}") how="the same line"
  fi
  say "$why (exit code $code): $how in $pause s"
  sleep "$pause" &
  child=$!
  [ -z "$asked" ] || pass_on "$asked" # it came before there was a child
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a signal interrupts `wait`
  child=""
  [ -z "$asked" ] || { say "ended by SIG$asked, as asked"; exit "$code"; }
done
