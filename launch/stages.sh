#!/usr/bin/env bash
# Run the three training stages of the paper, each initialized from the previous one. After an interruption the same
# command resumes; finished stages are skipped.
#   bash launch/stages.sh RUNS [--config.a.b=value ...]         one process, on this machine
#   TRAIN="sbatch --wait launch/slurm.sbatch" bash launch/stages.sh /shared/runs
#   TRAIN="bash launch/local.sh 2 --" bash launch/stages.sh RUNS --config.train.batch=8
#   TRAIN="bash launch/tpu_vm.sh run NAME ZONE --" bash launch/stages.sh /mnt/runs
# The run directories are RUNS/pretrain_align, RUNS/pretrain and RUNS/finetune. Arguments after RUNS go to every stage.
#
# environment:
#   TRAIN    the training command (default: python -m radfm_jax.train)
#   STAGES   "CONFIG ..." (default: configs/pretrain_align.py configs/pretrain.py configs/finetune.py); a run is named
#            after the file, or after the variant that follows its colon (configs/quickstart.py:align)
#   FIRST    initial checkpoint of the first stage (default: that of its config)
#   RETRIES  maximum restarts of a stage that exits with 75 (default 100); a scheduler restarts by itself
# exit codes: 0 all stages are done; otherwise the code of the stage that failed.
set -uo pipefail
case "${1:-}" in
  -h | --help) sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 0 ;;
  "" | -*) echo "launch/stages.sh: the first argument must be the directory of the runs (see --help)" >&2; exit 2 ;;
esac
runs=$1
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
read -ra train <<<"${TRAIN:-$python -m radfm_jax.train}"
read -ra stages <<<"${STAGES:-configs/pretrain_align.py configs/pretrain.py configs/finetune.py}"

from=${FIRST:-}
for config in "${stages[@]}"; do
  case "$config" in
    *.py:*) name=${config##*:} ;;
    *) name=$(basename "$config" .py) ;;
  esac
  workdir=$runs/$name
  echo "=== $(date '+%F %T') $name: ${train[*]} --config=$config --workdir=$workdir"
  for ((start = 0; ; start++)); do
    "${train[@]}" --config="$config" --workdir="$workdir" ${from:+--config.checkpoint.init_from="$from"} "$@"
    code=$?
    [ "$code" = 75 ] && [ "$start" -lt "${RETRIES:-100}" ] || break
    # A SIGTERM ends this script too, so 75 here means that training lost a process.
    echo "=== $(date '+%F %T') $name was interrupted: restarting"
  done
  if [ "$code" != 0 ]; then
    echo "=== $(date '+%F %T') $name exited with code $code; run the same command to resume" >&2
    exit "$code"
  fi
  from=$workdir # init_from selects its best step, or its newest
done
echo "=== $(date '+%F %T') all stages are done: $from"
