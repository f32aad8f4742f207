#!/usr/bin/env bash
# Run the whole pipeline on practice scans: install, train in three stages, evaluate, generate, export, and summarize.
# Takes about six minutes on two CPU cores; no accelerator needed. Run it again to resume; finished steps are skipped.
#   bash launch/quickstart.sh [DIR]          output directory (default: runs/quickstart)
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in -h | --help)
  sed -n '2,4s/^# \{0,1\}//p' "$0"
  exit 0
  ;;
esac

. launch/environment.sh
environment requirements.txt

dir=${1:-runs/quickstart}
python=.venv/bin/python
practice=practice
config=configs/quickstart.py
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$dir/compiled} # later stages reuse what the first compiled
mkdir -p "$dir"
start=$SECONDS

say() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - start)); }
stage() { # NAME INIT_FROM OVERRIDES...: a run initialized from the previous one
  local name=$1 from=$2
  shift 2
  say "training: $name"
  "$python" -m radfm_jax.train --config="$config:$name" --workdir="$dir/$name" ${from:+--config.checkpoint.init_from="$from"} "$@"
}

say "creating practice scans (phantoms as PNG, JPEG, DICOM and NIfTI) and a tokenizer"
"$python" -m input_pipeline.phantoms --out "$practice"

say "checking every scan and row, and storing the scans at the size the model reads"
"$python" -m input_pipeline.prepare --config="$config" --out "$practice/index" --records

stage align ""                      # trains the vision side; the language model is frozen
stage pretrain "$dir/align"         # trains everything
stage finetune "$dir/pretrain"      # trains everything at a lower learning rate

trained=$dir/finetune/checkpoints # results newer than this are up to date
if [ "$dir/scores/accuracy.json" -nt "$trained" ] && [ "$dir/radbench/report.html" -nt "$trained" ]; then
  say "already scored: $dir/scores/accuracy.json, $dir/radbench/report.html"
else
  [ "$dir/radbench/questions.jsonl" -nt "$trained" ] || rm -rf "$dir/radbench/answers" # from older weights
  say "scoring on unseen scans, and with the scans exchanged"
  # In parallel, 30 questions of each of RadBench's five tasks; most of that time is compilation.
  "$python" -m radfm_jax.evaluate radbench --config=configs/radbench_practice.py --config.limit=30 \
    --config.index="$practice/index" --checkpoint="$dir/finetune" --out="$dir/radbench" > "$dir/radbench.log" 2>&1 &
  "$python" -m radfm_jax.evaluate --config="$config" --checkpoint="$dir/finetune" --out="$dir/scores" --answers 10
  say "scoring the five tasks of RadBench"
  wait $! || { cat "$dir/radbench.log"; exit 1; }
  cat "$dir/radbench.log"
fi

say "generating answers about phantoms and real scans"
[ "$dir/asked/answers.jsonl" -nt "$trained" ] || rm -f "$dir/asked/answers.jsonl"
# The real scans are part of pydicom and nibabel. Answers about them are meaningless: the model was trained on phantoms.
"$python" - "$practice" "$dir/asked" <<'PYTHON'
import json, pathlib, shutil, sys
import nibabel, pydicom.data

practice, folder = map(pathlib.Path, sys.argv[1:])
folder.mkdir(parents=True, exist_ok=True)
real = [pydicom.data.get_testdata_file("CT_small.dcm"), pathlib.Path(nibabel.__file__).parent / "tests/data/anatomical.nii"]
questions = [json.loads(line) for line in open(practice / "test/all.jsonl")][:11]
for question in questions:
    question["scans"] = [str(practice / scan) for scan in question["scans"]]
for path in map(pathlib.Path, real):
    shutil.copy(path, folder / path.name)
    for name, text in {"modality": "What kind of scan is this?", "report": "Write the report of this scan."}.items():
        questions.append({"id": f"{path.name}-{name}", "scans": [str(folder / path.name)], "instruction": f"<image-1> {text}"})
with open(folder / "questions.jsonl", "w") as file:
    file.writelines(json.dumps(question) + "\n" for question in questions)
PYTHON
"$python" -m radfm_jax.generate --checkpoint="$dir/finetune" --jsonl "$dir/asked/questions.jsonl" --root . \
  --out "$dir/asked/answers.jsonl" --max-new-tokens 64

if [ ! "$dir/pytorch" -nt "$trained" ]; then
  say "exporting to PyTorch: a folder for transformers"
  rm -rf "$dir/pytorch"
  "$python" -m radfm_jax.convert to-hf "$dir/finetune" "$dir/pytorch" --scores "$dir/scores"
fi

"$python" -m radfm_jax.summary --runs "$dir/align" "$dir/pretrain" "$dir/finetune" --scores "$dir/scores" \
  --questions "$dir/asked/questions.jsonl" --answers "$dir/asked/answers.jsonl" --root . \
  --note "Trained on drawn phantoms. Answers about the real scans only show that such files can be read." \
  --place "practice scans=$practice" --place "data check=$practice/index/summary.txt" \
  --place "PyTorch model=$dir/pytorch" --place "accuracies=$dir/scores/accuracy.json" --place "RadBench report=$dir/radbench/report.html" --out "$dir/summary.html"
say "done: open $dir/summary.html"
