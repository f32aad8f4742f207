#!/usr/bin/env bash
# Trains on the machines of a TPU slice, from creating it to its logs. Needs gcloud, logged in.
#   bash launch/tpu_vm.sh create NAME ZONE TYPE [--spot]       TYPE: v5p-64 (32 chips), v5litepod-64, v6e-32, v4-64
#   bash launch/tpu_vm.sh copy NAME ZONE                       this repository to all machines, and its environment
#   bash launch/tpu_vm.sh run NAME ZONE -- --config=... --workdir=...     on all machines; waits; its exit code
#   bash launch/tpu_vm.sh logs NAME ZONE DIR WORKDIR           logs of all processes into DIR
#   bash launch/tpu_vm.sh keep NAME ZONE TYPE [--spot] -- --config=... --workdir=...
#                          run; when the slice is preempted, create it anew, copy, and go on where it was saved
#   bash launch/tpu_vm.sh delete NAME ZONE
# --dry-run before the command prints what it would do and does nothing:  bash launch/tpu_vm.sh --dry-run create ...
#
# WORKDIR and the data must be seen by all machines under one path (Filestore, or a bucket mounted with gcsfuse), and
# outlive the slice. JAX finds the machines of a slice by itself.
set -uo pipefail

usage() { sed -n '2,14s/^# \{0,1\}//p' "$0"; }
mistake() { echo "launch/tpu_vm.sh: $1 (--help explains)" >&2; exit 2; }

dry=
[ "${1:-}" != --dry-run ] || { dry=yes; shift; }
case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  create | copy | run | logs | keep | delete) command=$1 ;;
  *) mistake "'${1:-}' is no command" ;;
esac
name=${2:-} zone=${3:-}
[ -n "$name" ] && [ -n "$zone" ] || mistake "$command needs NAME and ZONE"
shift 3
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

do_() { # prints a command in a form that can be pasted, and runs it
  printf '%q ' "$@"
  echo
  [ -n "$dry" ] || "$@"
}
tpu=(gcloud compute tpus tpu-vm)
where=("--zone=$zone")

runtime() { # the image that the documentation names for a generation
  case "$1" in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) mistake "'$1' is no type: v5p-64, v5litepod-64, v6e-32 or v4-64" ;;
  esac
}
create() { # TYPE [--spot]
  local version
  version=$(runtime "${1:-}") || exit 2
  case "${2:-}" in "" | --spot) ;; *) mistake "'$2' is not known here" ;; esac
  do_ "${tpu[@]}" create "$name" "${where[@]}" --accelerator-type="$1" --version="$version" ${2:+"$2"}
}
copy() { # git's files alone: no data, no runs, nothing that is ignored
  local archive=radfm_jax.tgz
  [ -n "$dry" ] || archive=$(mktemp --suffix=.tgz) || exit 1
  # The images are Ubuntu 22.04, whose Python 3.10 is too old: uv fetches one that is not.
  do_ git archive --format=tgz --prefix=radfm_jax/ --output="$archive" HEAD &&
    do_ "${tpu[@]}" scp "$archive" "$name:radfm_jax.tgz" "${where[@]}" --worker=all &&
    do_ "${tpu[@]}" ssh "$name" "${where[@]}" --worker=all --command="tar xzf radfm_jax.tgz && cd radfm_jax && \
python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --clear --python 3.12 .venv && \
python3 -m uv pip install --quiet --python .venv/bin/python -r requirements.txt 'jax[tpu]'"
  local code=$?
  [ -n "$dry" ] || rm -f "$archive"
  return "$code"
}
run() { # ARGUMENTS of training
  local quoted
  quoted=$(printf ' %q' "$@")
  # exec: a signal to the remote shell is one to training. Its code comes back through ssh and gcloud.
  do_ "${tpu[@]}" ssh "$name" "${where[@]}" --worker=all \
    --command="cd radfm_jax && . launch/flags/tpu.sh && exec .venv/bin/python -m radfm_jax.train$quoted"
}
state() { "${tpu[@]}" describe "$name" "${where[@]}" --format='value(state)' 2>/dev/null; }

case "$command" in
  create) create "$@" ;;
  copy) copy ;;
  delete) do_ "${tpu[@]}" delete "$name" "${where[@]}" --quiet ;;
  run)
    [ "${1:-}" = -- ] && [ $# -gt 1 ] || mistake "what is meant for training comes after --"
    shift
    run "$@"
    ;;
  logs)
    [ $# = 2 ] || mistake "logs needs DIR and WORKDIR"
    [ -n "$dry" ] || mkdir -p "$1"
    # Processes write to WORKDIR/logs, which all machines see: one of them has them all.
    do_ "${tpu[@]}" scp --recurse "$name:$2/logs" "$1" "${where[@]}" --worker=0
    ;;
  keep)
    type=${1:-}
    [ $# = 0 ] || shift
    spot=()
    [ "${1:-}" != --spot ] || { spot=(--spot); shift; }
    [ "${1:-}" = -- ] && [ $# -gt 1 ] || mistake "what is meant for training comes after --"
    shift
    there() { # makes the slice, once; what is left of one that was taken away is in its way
      if [ -z "$dry" ]; then
        case "$(state)" in
          READY) return 0 ;;
          "" | CREATING) ;;
          *) do_ "${tpu[@]}" delete "$name" "${where[@]}" --quiet ;;
        esac
      fi
      create "$type" "${spot[@]}"
    }
    while :; do
      if [ -n "$dry" ] || [ "$(state)" != READY ]; then
        until there && copy; do
          echo "no slice yet, or not ready for ssh: trying again in ${RETRY:-300} seconds"
          sleep "${RETRY:-300}"
        done
      fi
      run "$@"
      code=$?
      [ -z "$dry" ] || exit 0
      # 75: saved, or a process was lost. Any other code with the slice gone is preemption too; with it there, it is final.
      [ "$code" != 0 ] || exit 0
      [ "$code" = 75 ] || [ "$(state)" != READY ] || exit "$code"
      echo "=== $(date '+%F %T') training ended with $code, the slice is $(state): going on"
    done
    ;;
esac
