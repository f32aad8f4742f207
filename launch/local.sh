#!/usr/bin/env bash
# Run a multi-process job on one machine, to try a config or to debug.
# usage: bash launch/local.sh N [--devices D] -- ARGUMENTS OF radfm_jax.train
#
# Start N processes of `python -m radfm_jax.train` on this machine, each with D simulated CPU devices (default 1).
# Process 0 writes to this console, the others to WORKDIR/logs/PROCESS.log.
#
#   bash launch/local.sh 4 -- --config=configs/quickstart.py --workdir=runs/four
#   bash launch/local.sh 2 --devices 2 -- --config=configs/quickstart.py --workdir=runs/two --config.train.steps=20
#
# Ctrl-C and SIGTERM are forwarded: all processes save and exit with 75, and the same command resumes. A second signal
# ends them at once. After one process exits, the others are killed after GRACE seconds (default 60).
#
# exit code: 0 if all exit with 0; 75 if all exit with 75 (start again); otherwise the highest other code.
# environment: PYTHON (default: .venv/bin/python of this repository, else python3), GRACE, PORT (default: a free port).
set -uo pipefail

usage() { sed -n '2,15s/^# \{0,1\}//p' "$0"; }
mistake() { echo "launch/local.sh: $1 (see --help)" >&2; exit 2; }

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  "" | *[!0-9]* | 0) mistake "the first argument must be the number of processes, not '${1:-}'" ;;
esac
processes=$1
shift
devices=1
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --devices) devices=${2:-}; shift ;;
    --devices=*) devices=${1#*=} ;;
    *) mistake "unknown option '$1'; arguments of training go after --" ;;
  esac
  shift
done
case "$devices" in "" | *[!0-9]* | 0) mistake "--devices needs a number, not '$devices'" ;; esac
[ $# -gt 1 ] || mistake "arguments of training are missing after --"
shift

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$repository/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3) || mistake "Python not found: bash launch/test.sh creates an environment"

workdir=
previous=
for argument in "$@"; do
  case "$argument" in --workdir=*) workdir=${argument#*=} ;; esac
  [ "$previous" != --workdir ] || workdir=$argument
  previous=$argument
done
[ -n "$workdir" ] || mistake "--workdir=DIR is missing after --"
mkdir -p "$workdir/logs" || exit 2

free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
port=${PORT:-$("$python" -c "$free_port")} || exit 1
export RADFM_COORDINATOR=127.0.0.1:$port RADFM_PROCESSES=$processes
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# Each process has its own process group, so that Ctrl-C reaches only this script, which forwards it once.
set -m
pids=()
for ((i = 0; i < processes; i++)); do
  if [ "$i" = 0 ]; then
    RADFM_PROCESS=$i "$python" -m radfm_jax.train "$@" </dev/null &
  else
    RADFM_PROCESS=$i "$python" -m radfm_jax.train "$@" </dev/null >>"$workdir/logs/$i.log" 2>&1 &
  fi
  pids+=($!)
done

forward() {
  for pid in "${pids[@]}"; do kill -s "$1" "$pid" 2>/dev/null; done
  return 0
}
trap 'forward TERM' TERM
trap 'forward INT' INT

# `wait -n` would not tell which process has exited.
first_exit=
while :; do
  running=0
  for pid in "${pids[@]}"; do ! kill -0 "$pid" 2>/dev/null || running=$((running + 1)); done
  [ "$running" -gt 0 ] || break
  if [ "$running" -lt "$processes" ]; then
    : "${first_exit:=$SECONDS}"
    if [ $((SECONDS - first_exit)) -ge "${GRACE:-60}" ]; then
      echo "launch/local.sh: killing $running of $processes processes that did not exit in time" >&2
      forward KILL
    fi
  fi
  sleep 0.3 &
  wait $! 2>/dev/null  # a signal ends this wait at once, not the sleep
done

worst=0
codes=()
for i in "${!pids[@]}"; do
  wait "${pids[$i]}"
  code=$?
  codes+=("$code")
  if [ "$code" != 0 ] && [ "$code" != 75 ]; then
    [ "$code" -le "$worst" ] || worst=$code
    # The log also has what the process printed before it configured logging.
    [ "$i" = 0 ] || { echo "process $i exited with code $code; end of $workdir/logs/$i.log:"; tail -n 5 "$workdir/logs/$i.log"; } >&2
  fi
done
[ "$worst" = 0 ] || exit "$worst"
for code in "${codes[@]}"; do
  [ "$code" = "${codes[0]}" ] || { echo "launch/local.sh: some processes exited with 0, some with 75: ${codes[*]}" >&2; exit 1; }
done
exit "${codes[0]}"
