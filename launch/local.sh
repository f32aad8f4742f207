#!/usr/bin/env bash
# Several processes on this machine, as they would run on several: to try a config, or to find a fault.
set -uo pipefail

usage() {
  cat <<'EOF'
usage: bash launch/local.sh N [--devices D] -- ARGUMENTS OF radfm_jax.train

Starts N processes of `python -m radfm_jax.train` here, each with D simulated devices of the CPU (default 1), which find
each other through a free port. Process 0 has this console; the others write to WORKDIR/logs/PROCESS.log.

  bash launch/local.sh 4 -- --config=configs/quickstart.py --workdir=runs/four
  bash launch/local.sh 2 --devices 2 -- --config=configs/quickstart.py --workdir=runs/two --config.train.steps=20

Ctrl-C or SIGTERM goes to all of them: they save and end with 75; the same command goes on. A second one ends them at
once. If one ends, the others have 60 seconds (GRACE) to end by themselves.

exit code: 0 if all ended with 0; 75 if all ended with 75 (start again); else the highest code of those that have another.
environment: PYTHON (default: .venv/bin/python of this repository, else python3), GRACE, PORT (default: a free one).
EOF
}

mistake() {
  echo "launch/local.sh: $1 (--help explains)" >&2
  exit 2
}

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  "" | *[!0-9]* | 0) mistake "the number of processes comes first, not '${1:-}'" ;;
esac
processes=$1
shift
devices=1
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --devices) devices=${2:-}; shift ;;
    --devices=*) devices=${1#*=} ;;
    *) mistake "'$1' is not known here; what is meant for training comes after --" ;;
  esac
  shift
done
case "$devices" in "" | *[!0-9]* | 0) mistake "--devices needs a number, not '$devices'" ;; esac
[ $# -gt 1 ] || mistake "there is nothing after --"
shift

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$repository/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3) || mistake "there is no Python: bash launch/test.sh makes an environment"

workdir=
previous=
for argument in "$@"; do
  case "$argument" in --workdir=*) workdir=${argument#*=} ;; esac
  [ "$previous" != --workdir ] || workdir=$argument
  previous=$argument
done
[ -n "$workdir" ] || mistake "--workdir=DIR is missing behind --"
mkdir -p "$workdir/logs" || exit 2

free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
port=${PORT:-$("$python" -c "$free_port")} || exit 1
export RADFM_COORDINATOR=127.0.0.1:$port RADFM_PROCESSES=$processes
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# Each in a process group of its own: Ctrl-C reaches only this script, which passes it on once.
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

pass_on() {
  for pid in "${pids[@]}"; do kill -s "$1" "$pid" 2>/dev/null; done
  return 0
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

# A stopped process counts as running; `wait -n` would not tell which one has ended.
ended_at=
while :; do
  running=0
  for pid in "${pids[@]}"; do ! kill -0 "$pid" 2>/dev/null || running=$((running + 1)); done
  [ "$running" -gt 0 ] || break
  if [ "$running" -lt "$processes" ]; then
    : "${ended_at:=$SECONDS}"
    if [ $((SECONDS - ended_at)) -ge "${GRACE:-60}" ]; then
      echo "launch/local.sh: $running of $processes processes have not ended by themselves and are killed" >&2
      pass_on KILL
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
    # What it said before it knew its log is there too.
    [ "$i" = 0 ] || { echo "process $i ended with code $code; the end of $workdir/logs/$i.log:"; tail -n 5 "$workdir/logs/$i.log"; } >&2
  fi
done
[ "$worst" = 0 ] || exit "$worst"
for code in "${codes[@]}"; do
  [ "$code" = "${codes[0]}" ] || { echo "launch/local.sh: some ended with 0, some with 75: ${codes[*]}" >&2; exit 1; }
done
exit "${codes[0]}"
