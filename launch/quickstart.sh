#!/usr/bin/env bash
# Fresh machine -> .venv -> practice scans -> trained in three stages -> scored -> asked -> exported -> one page of it all.
# Some six minutes on two cores, no accelerator needed. Run again, it goes on where it was stopped; what is done is not done twice.
#   bash launch/quickstart.sh [DIR]          everything is written below DIR (default: runs/quickstart)
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
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$dir/compiled} # the second stage finds what the first compiled
mkdir -p "$dir"
began=$SECONDS

say() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - began)); }
stage() { # NAME INIT_FROM OVERRIDES...: a run of its own, begun with the parameters of the one before
  local name=$1 from=$2
  shift 2
  say "training: $name"
  "$python" -m radfm_jax.train --config="$config:$name" --workdir="$dir/$name" ${from:+--config.checkpoint.init_from="$from"} "$@"
}

say "practice scans: drawn phantoms, written as PNG, JPEG, DICOM and NIfTI, and a tokenizer of their reports"
"$python" -m input_pipeline.phantoms --out "$practice"

say "checking every scan and row, and keeping the scans at the size the model reads"
"$python" -m input_pipeline.prepare --config="$config" --out "$practice/index" --records

stage align ""                      # the language model is frozen, scans learn to speak to it
stage pretrain "$dir/align"         # everything learns
stage finetune "$dir/pretrain"      # once more, slower

trained=$dir/finetune/checkpoints # what is newer than this was made of it
if [ "$dir/scores/accuracy.json" -nt "$trained" ] && [ "$dir/radbench/report.html" -nt "$trained" ]; then
  say "scored before: $dir/scores/accuracy.json, $dir/radbench/report.html"
else
  [ "$dir/radbench/questions.jsonl" -nt "$trained" ] || rm -rf "$dir/radbench/answers" # of weights that are no more
  say "scoring on scans it has never seen, and with the scans exchanged"
  # Beside it, RadBench's five tasks, 30 questions of each: answers in free text, their scores, a report. Mostly compiling.
  "$python" -m radfm_jax.evaluate radbench --config=configs/radbench_practice.py --config.limit=30 \
    --config.index="$practice/index" --checkpoint="$dir/finetune" --out="$dir/radbench" > "$dir/radbench.log" 2>&1 &
  "$python" -m radfm_jax.evaluate --config="$config" --checkpoint="$dir/finetune" --out="$dir/scores"
  say "the five tasks of RadBench"
  wait $! || { cat "$dir/radbench.log"; exit 1; }
  cat "$dir/radbench.log"
fi

say "asking about a phantom and about real scans"
[ "$dir/asked/answers.jsonl" -nt "$trained" ] || rm -f "$dir/asked/answers.jsonl"
# Real scans come with pydicom and nibabel. What the model says of them means nothing: it has seen drawings only.
"$python" - "$practice" "$dir/asked" <<'PYTHON'
import json, pathlib, shutil, sys
import nibabel, pydicom.data

practice, asked = map(pathlib.Path, sys.argv[1:])
asked.mkdir(parents=True, exist_ok=True)
real = [pydicom.data.get_testdata_file("CT_small.dcm"), pathlib.Path(nibabel.__file__).parent / "tests/data/anatomical.nii"]
questions = [json.loads(line) for line in open(practice / "test/all.jsonl")][:11]
for question in questions:
    question["scans"] = [str(practice / scan) for scan in question["scans"]]
for path in map(pathlib.Path, real):
    shutil.copy(path, asked / path.name)
    for name, text in {"modality": "What kind of scan is this?", "report": "Write the report of this scan."}.items():
        questions.append({"id": f"{path.name}-{name}", "scans": [str(asked / path.name)], "instruction": f"<image-1> {text}"})
with open(asked / "questions.jsonl", "w") as file:
    file.writelines(json.dumps(question) + "\n" for question in questions)
PYTHON
"$python" -m radfm_jax.generate --checkpoint="$dir/finetune" --jsonl "$dir/asked/questions.jsonl" --root . \
  --out "$dir/asked/answers.jsonl" --max-new-tokens 64

if [ ! "$dir/pytorch" -nt "$trained" ]; then
  say "writing the weights as PyTorch safetensors"
  rm -rf "$dir/pytorch"
  "$python" -m radfm_jax.convert to-torch "$dir/finetune" "$dir/pytorch"
fi

"$python" -m radfm_jax.summary --runs "$dir/align" "$dir/pretrain" "$dir/finetune" --scores "$dir/scores" \
  --questions "$dir/asked/questions.jsonl" --answers "$dir/asked/answers.jsonl" --root . \
  --note "Trained on drawn phantoms. Answers about the real scans show that they can be read, nothing else." \
  --place "practice scans=$practice" --place "what was checked=$practice/index/summary.txt" \
  --place "PyTorch weights=$dir/pytorch" --place "accuracies=$dir/scores/accuracy.json" --place "RadBench's report=$dir/radbench/report.html" --out "$dir/summary.html"
say "done: open $dir/summary.html"
