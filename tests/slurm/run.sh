#!/usr/bin/env bash
# Test launch/slurm.sbatch under a real SLURM on this machine: a run of two tasks gets SIGTERM, is requeued and finishes.
# Its parameters, moments and losses must be bit-equal to those of an uninterrupted run.
#   bash tests/slurm/run.sh [DIR]        DIR (default: runs/slurm) gets the scheduler, the practice data and the runs
# Needs slurm-wlm and munge (apt-get install slurm-wlm munge), two cores, no root; takes minutes. Exits with 0 on success.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
dir=${1:-$repository/runs/slurm}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
cd "$dir"
export RADFM_HOME=$repository PLATFORM=cpu PYTHON=${PYTHON:-$repository/.venv/bin/python}
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} JAX_COMPILATION_CACHE_DIR=$dir/compiled
steps=${STEPS:-300}
# As in tests/conftest.py: compilation dominates, and these flags make it four times faster.
export XLA_FLAGS=${XLA_FLAGS-"--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"}

say() { printf '== %s (%d s)\n' "$*" "$SECONDS"; }
fail() { echo "FAILED: $*" >&2; exit 1; }

say "practice data"
[ -f practice/index/index.json ] || {
  "$PYTHON" -m input_pipeline.phantoms --out practice --train 400 --volumes 0.12 --workers 2
  "$PYTHON" -m input_pipeline.prepare --config="$repository/configs/tiny.py" --out practice/index --records
} >prepared.log 2>&1 || { tail prepared.log >&2; fail "no practice data"; }

bash "$repository/tests/slurm/scheduler.sh" start "$dir/scheduler"
trap 'bash "$repository/tests/slurm/scheduler.sh" stop "$dir/scheduler"' EXIT
export SLURM_CONF=$dir/scheduler/slurm.conf
rm -rf broken ./*.log.txt # the unbroken run can be reused: it exits at once if it is complete

submit() { # NAME -> job id
  sbatch --parsable --job-name="$1" --output="$1.log.txt" --nodes=1 --ntasks-per-node=2 --cpus-per-task=1 \
    --gpus-per-node=0 "$repository/launch/slurm.sbatch" --config="$repository/configs/tiny.py" --workdir="$dir/$1" \
    --config.train.steps="$steps" --config.train.log_every=1 --config.checkpoint.save_every=1000 --config.data.workers=0
}
state() { scontrol -o show job "$1" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p'; }
until_state() { # JOB STATE SECONDS
  for _ in $(seq "$3"); do
    [ "$(state "$1")" != "$2" ] || return 0
    case "$(state "$1")" in FAILED | CANCELLED | TIMEOUT | NODE_FAIL) break ;; esac
    sleep 1
  done
  fail "job $1 is $(state "$1"), not $2: see $dir/*.log.txt"
}
lines() { cat "$1/metrics.jsonl" 2>/dev/null | wc -l; }

job=$(submit unbroken)
say "unbroken run: job $job"
until_state "$job" COMPLETED 1800

job=$(submit broken)
say "broken run: job $job, until a third of its steps are done"
until [ "$(lines broken)" -ge $((steps / 3)) ]; do
  case "$(state "$job")" in PENDING | CONFIGURING | RUNNING) sleep 0.2 ;; *) fail "job $job is $(state "$job")" ;; esac
done
# Signal the tasks, as --signal=TERM@... does before the time limit.
scancel --signal=TERM "$job"
say "SIGTERM sent after $(lines broken) steps"
for _ in $(seq 120); do [ "$(state "$job")" = RUNNING ] || break; sleep 1; done
saved=$(find broken/checkpoints -maxdepth 1 -name '[0-9]*' -printf '%f\n' | sort -n | tail -n 1)
[ -n "$saved" ] || fail "nothing was saved: see broken.log.txt"
[ "$saved" -lt "$steps" ] || fail "the signal came too late: step $saved is saved"
say "step $saved is saved, the job is $(state "$job") (restarts: $(scontrol -o show job "$job" | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p'))"
until_state "$job" COMPLETED 1800
grep -q "^=== .* start 2" broken.log.txt || fail "the job was not started a second time"
grep -q "process .* got SIGTERM: saved step $saved" broken.log.txt || fail "broken.log.txt does not mention SIGTERM"
say "both runs have finished; comparing"

"$PYTHON" "$repository/tests/slurm/compare.py" unbroken broken "$steps" || fail "the runs differ"
[ "$(grep -c train/loss broken/metrics.jsonl)" = "$steps" ] || fail "broken/metrics.jsonl does not have the losses of $steps steps"
say "passed: cancelled after step $saved of $steps, requeued, and bit-equal at the end"
