#!/usr/bin/env bash
# The three stages of the paper one after the other, each starting from the one before. Stopped at any point, the same
# command goes on: a stage that is done says so and ends at once.
#   bash launch/stages.sh RUNS [--config.a.b=value ...]         one process, on this machine
#   TRAIN="sbatch --wait launch/slurm.sbatch" bash launch/stages.sh /shared/runs
#   TRAIN="bash launch/local.sh 2 --" bash launch/stages.sh RUNS --config.train.batch=8
#   TRAIN="bash launch/tpu_vm.sh run NAME ZONE --" bash launch/stages.sh /mnt/runs
# RUNS/pretrain_align, RUNS/pretrain and RUNS/finetune are the run directories. What follows RUNS goes to every stage.
#
# environment:
#   TRAIN    what training is called with, instead of `python -m radfm_jax.train`
#   STAGES   "CONFIG ..." (default: configs/pretrain_align.py configs/pretrain.py configs/finetune.py); the name of a run
#            is the file's name, or what stands behind its colon (configs/quickstart.py:align)
#   FIRST    checkpoint that the first stage starts from, instead of the one its config names
#   RETRIES  how often a stage that ends with 75 is started again here (default 100; a scheduler does it by itself)
# exit codes: 0 all stages are done; else that of the stage that ended otherwise.
set -uo pipefail
case "${1:-}" in
  -h | --help) sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 0 ;;
  "" | -*) echo "launch/stages.sh: the directory of the runs comes first (--help explains)" >&2; exit 2 ;;
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
    # Told to end itself, a script gets the signal too; only a lost peer brings it here.
    echo "=== $(date '+%F %T') $name ended early: started again"
  done
  if [ "$code" != 0 ]; then
    echo "=== $(date '+%F %T') $name ended with $code; the same command goes on" >&2
    exit "$code"
  fi
  from=$workdir # its best step, or its newest
done
echo "=== $(date '+%F %T') all stages are done: $from"
