# shellcheck shell=bash
# Sourced by supervise.sh and multinode/run_node.sh: the processes of the line that they start, past its launcher.
#
# A launcher that is told to end gives its processes 30 s (accelerate, torchrun) or leaves them behind (deepspeed), and dies of SIGUSR1.
# So signals go to redheart's own processes, which end with a checkpoint, however long it takes; the launcher ends after them. Each tells
# its pid in the file of REDHEART_EXIT_CODES (redheart/ends.py), here $codes. A pid may be another process's by now, or be told on another
# machine: only what has $mark, NAME=VALUE, in its environment on this machine belongs to the line.

child="" asked="" # the line's launcher while it runs; the signal by which this script was asked to end
declare -A sent=() # pids that were told to end
: "${codes:?}" "${mark:?}"

start() { # LINE, in the background; SIGUSR1, which batch systems send to all processes of a job, ends none of it
  (trap '' USR1; declare -x "$mark" REDHEART_EXIT_CODES="$codes"; exec "$@") &
  child=$!
  [ -z "$asked" ] || pass_on "$asked" # it came before there was a child
}

find_processes() { # all: the pids of the line's processes; ranks: those of redheart among them
  local pid found # $! stays what it is, for a signal may come between `&` and what keeps it: no process substitution, which sets it
  all=() ranks=()
  found=$(exec grep -lszxF "$mark" /proc/[0-9]*/environ) || true
  while IFS= read -r pid; do
    [ -n "$pid" ] || continue
    pid=${pid#/proc/} pid=${pid%/environ}
    all+=("$pid")
    if grep -qsx "pid $pid" "$codes"; then ranks+=("$pid"); fi
  done <<<"$found"
}

end() { # SIGNAL PID…
  local pid
  for pid in "${@:2}"; do sent[$pid]=1; done
  kill "-$1" "${@:2}" 2>/dev/null || true # what has ended meanwhile is no mistake
}

pass_on() { # SIGNAL; before the first process of redheart there is nothing to save, and all that was started ends
  find_processes
  if [ ${#ranks[@]} -gt 0 ]; then
    if [ "$1" = USR1 ]; then kill -USR1 "${ranks[@]}" 2>/dev/null || true; else end "$1" "${ranks[@]}"; fi
  elif [ "$1" != USR1 ]; then
    [ -z "$child" ] || [[ " ${all[*]} " == *" $child "* ]] || all+=("$child")
    end TERM "${all[@]}"
  fi
}

listen() { # SIGTERM, SIGINT and SIGUSR1 go on to the line
  trap 'asked=TERM; pass_on TERM' TERM
  trap 'asked=INT; pass_on INT' INT
  trap 'pass_on USR1' USR1
}

launcher_erred() { # whether a process ended with 70 or 75, or told how it began and not how it ended, as one does that is killed
  grep -qxE '70|75' "$codes" || [ "$(grep -c '^pid ' "$codes")" -gt "$(grep -vc '^pid ' "$codes")" ]
}

wait_for_line() { # until its launcher, whose exit code is then `code`, and all its processes have ended
  local pid rounds=0 left
  while :; do # a signal interrupts `wait`; the line still has to end, with a checkpoint
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  child=""
  find_processes
  while [ ${#all[@]} -gt 0 ]; do
    left=("${ranks[@]}")
    [ ${#left[@]} -gt 0 ] || left=("${all[@]}")
    if [ $((rounds++)) = 5 ]; then
      echo "$(basename "$0" .sh): the launcher has ended (exit code $code) before ${left[*]}: waiting for their end" >&2
    fi
    if [ -n "$asked" ] || [[ "$code" =~ ^(130|143)$ ]]; then # also of a launcher that was asked and told nobody
      for pid in "${left[@]}"; do
        [ -n "${sent[$pid]-}" ] || end TERM "$pid"
      done
    fi
    sleep 0.2
    find_processes
  done
  sent=()
  if [ "$code" -eq 0 ] && launcher_erred; then code=137; fi # deepspeed's runner calls it well when its own launcher was killed
}
