#!/usr/bin/env bash
# Create a TPU slice, train on it and fetch the logs. Needs an authenticated gcloud.
#   bash launch/tpu_vm.sh create NAME ZONE TYPE [--spot]       TYPE: v5p-64 (32 chips), v5litepod-64, v6e-32, v4-64
#   bash launch/tpu_vm.sh copy NAME ZONE                       copy this repository to all machines and install it
#   bash launch/tpu_vm.sh run NAME ZONE -- --config=... --workdir=...     train on all machines and wait
#   bash launch/tpu_vm.sh logs NAME ZONE DIR WORKDIR           copy the logs of all processes to DIR
#   bash launch/tpu_vm.sh keep NAME ZONE TYPE [--spot] -- --config=... --workdir=...
#                          run; after a preemption create the slice again, copy, and resume
#   bash launch/tpu_vm.sh delete NAME ZONE
# --dry-run before the command only prints the gcloud calls:  bash launch/tpu_vm.sh --dry-run create ...
#
# WORKDIR and the data need the same path on all machines (Filestore, or a bucket mounted with gcsfuse) and must outlive
# the slice. JAX finds the machines of a slice by itself. The exit code of `run` is that of training.
set -uo pipefail

usage() { sed -n '2,14s/^# \{0,1\}//p' "$0"; }
mistake() { echo "launch/tpu_vm.sh: $1 (see --help)" >&2; exit 2; }

dry=
[ "${1:-}" != --dry-run ] || { dry=yes; shift; }
case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  create | copy | run | logs | keep | delete) command=$1 ;;
  *) mistake "unknown command '${1:-}'" ;;
esac
name=${2:-} zone=${3:-}
[ -n "$name" ] && [ -n "$zone" ] || mistake "$command needs NAME and ZONE"
shift 3
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

do_() { # print a command with shell quoting, and run it
  printf '%q ' "$@"
  echo
  [ -n "$dry" ] || "$@"
}
tpu=(gcloud compute tpus tpu-vm)
where=("--zone=$zone")

runtime() { # the documented image of a TPU generation
  case "$1" in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) mistake "unknown type '$1': use for example v5p-64, v5litepod-64, v6e-32 or v4-64" ;;
  esac
}
create() { # TYPE [--spot]
  local version
  version=$(runtime "${1:-}") || exit 2
  case "${2:-}" in "" | --spot) ;; *) mistake "unknown option '$2'" ;; esac
  do_ "${tpu[@]}" create "$name" "${where[@]}" --accelerator-type="$1" --version="$version" ${2:+"$2"}
}
copy() { # only files tracked by git: no data, no runs
  local archive=radfm_jax.tgz
  [ -n "$dry" ] || archive=$(mktemp --suffix=.tgz) || exit 1
  # The images are Ubuntu 22.04, whose Python 3.10 is too old; uv installs a newer one.
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
  # exec: training receives the signals of the remote shell, and ssh and gcloud return its exit code.
  do_ "${tpu[@]}" ssh "$name" "${where[@]}" --worker=all \
    --command="cd radfm_jax && . launch/flags/tpu.sh && exec .venv/bin/python -m radfm_jax.train$quoted"
}
state() { "${tpu[@]}" describe "$name" "${where[@]}" --format='value(state)' 2>/dev/null; }

case "$command" in
  create) create "$@" ;;
  copy) copy ;;
  delete) do_ "${tpu[@]}" delete "$name" "${where[@]}" --quiet ;;
  run)
    [ "${1:-}" = -- ] && [ $# -gt 1 ] || mistake "arguments of training go after --"
    shift
    run "$@"
    ;;
  logs)
    [ $# = 2 ] || mistake "logs needs DIR and WORKDIR"
    [ -n "$dry" ] || mkdir -p "$1"
    # WORKDIR/logs is on the shared file system, so one machine has all logs.
    do_ "${tpu[@]}" scp --recurse "$name:$2/logs" "$1" "${where[@]}" --worker=0
    ;;
  keep)
    type=${1:-}
    [ $# = 0 ] || shift
    spot=()
    [ "${1:-}" != --spot ] || { spot=(--spot); shift; }
    [ "${1:-}" = -- ] && [ $# -gt 1 ] || mistake "arguments of training go after --"
    shift
    ensure() { # create the slice unless it exists; delete a preempted one first
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
        until ensure && copy; do
          echo "no slice, or not ready for ssh: retrying in ${RETRY:-300} seconds"
          sleep "${RETRY:-300}"
        done
      fi
      run "$@"
      code=$?
      [ -z "$dry" ] || exit 0
      # 75: saved, or a process was lost. Any other code is final, unless the slice is gone, which means preemption.
      [ "$code" != 0 ] || exit 0
      [ "$code" = 75 ] || [ "$(state)" != READY ] || exit "$code"
      echo "=== $(date '+%F %T') training exited with code $code, the slice is $(state): resuming"
    done
    ;;
esac
