"""Batch files: answers, resuming, locks and the cache of scans."""

# ruff: noqa: F811 (fixtures that are imported)

import dataclasses
import errno
import fcntl
import json
import os
import shutil

import jax
import pytest
from generation_parts import SHORT, greedy, model, run, scans, tokenizer  # noqa: F401

import radfm_jax
from radfm_jax.checkpoints import checkpoint
from radfm_jax.inference import Sampling, batch_run
from radfm_jax.inference.batch_files import read_batch_file
from radfm_jax.inference.command import main


def test_a_batch_file(run, model, scans, tmp_path, capsys):
    questions = [
        {"id": "a", "prompt": "Is there a lesion?", "scans": ["film.png"]},
        {"id": "b", "instruction": "<image-2> or <image-1>?", "scans": ["ct.nii.gz", {"path": "film.png"}],
         "context": "small lung", "task": "vqa", "response": "none"},
        {"id": "c", "prompt": "Is there a lesion?", "scans": ["broken.png"]},
        {"id": "d", "prompt": "Report the findings."},
        {"id": "e", "prompt": "<image-3>?", "scans": ["film.png"]},
        {"id": "f", "prompt": "Lesion?", "scans": ["../film.png"]},
        {"id": "g", "prompt": "Lesion? " * 60},
        {"id": "h", "scans": ["film.png"]},
    ]  # fmt: skip
    file, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(q) + "\n" for q in questions))
    command = ["--checkpoint", str(run), "--jsonl", str(file), "--out", str(out), "--root", str(scans), "--batch", "2"]
    command += SHORT
    assert main(command) == 1
    err = capsys.readouterr().err
    assert "3 answers in" in err and "5 failed" in err and "samples/s" in err
    for words in ("c: ", "broken.png", "e: the prompt does not fit", "f: ", "leaves its folder with '..'",
                  "g: the prompt has", "prompt is missing"):  # fmt: skip
        assert words in err, words
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    film, ct = scans / "film.png", scans / "ct.nii.gz"
    assert {line["id"]: line["answer"] for line in lines} == {
        "a": greedy(model, "Is there a lesion?", [film]),
        "b": greedy(model, "<image-2> or <image-1>?", [ct, film], context="small lung"),
        "d": greedy(model, "Report the findings."),
    }
    assert [line["scans"] for line in lines] == [["film.png"], ["ct.nii.gz", "film.png"], []]  # as the file has them
    # An incomplete last line, as after a kill, is the only one that is generated again.
    whole = out.read_text().splitlines(keepends=True)
    out.write_text(whole[0] + whole[1] + whole[2][:30])
    assert main(command) == 1
    assert out.read_text().splitlines(keepends=True) == whole and "1 answers in" in capsys.readouterr().err
    file.write_text("".join(json.dumps(q) + "\n" for q in questions if q["id"] in "abd"))
    assert main(command) == 0
    assert "0 answers in" in capsys.readouterr().err and out.read_text().splitlines(keepends=True) == whole
    # The answer to a changed prompt is rejected.
    windowed = [{"path": "film.png", "window": [0, 100]}]
    for key, value in [("prompt", "Other?"), ("scans", ["ct.nii.gz"]), ("scans", windowed), ("context", "fever")]:
        file.write_text(json.dumps(questions[0] | {key: value}) + "\n")
        assert main(command) == 2 and out.read_text().splitlines(keepends=True) == whole
        assert f"line 1 has an answer to 'a', but the batch file has changed ({key})" in capsys.readouterr().err
    file.write_text("".join(json.dumps(q) + "\n" for q in questions if q["id"] in "abd"))
    # Answers made with other settings are rejected.
    assert main([*command, "--temperature", "1"]) == 2
    assert (
        "line 1 was made with other settings (temperature): use another --out, or set temperature=0.0"
        in capsys.readouterr().err
    )
    assert main([*command, "--int8"]) == 2
    assert "made with other settings (weights): use another --out, or set weights='float32'" in capsys.readouterr().err
    file.write_text('{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n{"prompt": "z"}\nnonsense\n')
    assert main(command) == 2
    err = capsys.readouterr().err
    assert all(w in err for w in ("line 2: duplicate id 'a'", "line 3 has no `id`", "line 4 is not JSON"))


def test_answers_belong_to_weights_not_to_their_path(run, model, tmp_path, capsys):
    step = run / "checkpoints" / "5"
    here, there = shutil.copytree(step, tmp_path / "here"), shutil.copytree(step, tmp_path / "there")
    file, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    file.write_text('\ufeff{"id": "a", "prompt": "Lesion?"}\n')  # a byte order mark, as Windows programs write it
    asked = lambda where: main(["--checkpoint", str(where), "--jsonl", str(file), "--out", str(out), *SHORT])  # noqa: E731
    assert asked(here) == 0 and asked(there) == 0
    assert "0 answers in" in capsys.readouterr().err
    shutil.rmtree(here)
    radfm_jax.save(dataclasses.replace(model, params=jax.tree.map(lambda x: 2 * x, model.params)), here)
    assert asked(here) == 2
    assert "line 1 was made with another checkpoint, or by a version that did not record it (here then, here now)" in (
        capsys.readouterr().err
    )
    assert len(out.read_text().splitlines()) == 1
    # Only parameters count: a checkpoint with the same parameters and another run.json is the same.
    described = json.loads((there / "run.json").read_text())
    (there / "run.json").write_text(json.dumps(described | {"metrics": {"loss": 1.0}}))
    (there / "manifest.json").unlink()
    checkpoint.write_manifest(there)
    assert asked(there) == 0
    # The tokenizer counts by its content, not by its path.
    moved = there.parent / "pieces.model"
    (there / "tokenizer.model").rename(moved)
    assert asked(there) == 2 and "missing: tokenizer.model" in capsys.readouterr().err
    command = ["--checkpoint", str(there), "--jsonl", str(file), "--out", str(out), *SHORT]
    assert main([*command, "--tokenizer", str(moved)]) == 0


def test_one_process_writes_answers(run, tmp_path, capsys):
    file, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    file.write_text('{"id": "a", "prompt": "Lesion?"}\n')
    command = ["--checkpoint", str(run), "--jsonl", str(file), "--out", str(out), *SHORT]
    with open(out, "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(command) == 2 and "another process is writing" in capsys.readouterr().err
    assert main(command) == 0
    out.write_text(2 * out.read_text())
    assert main(command) == 2 and "line 2: duplicate id 'a'; did two runs" in capsys.readouterr().err
    command[command.index(str(out))] = "/dev/full"
    assert main(command) == 2 and "/dev/full is not a regular file" in capsys.readouterr().err
    fresh = tmp_path / "fresh.jsonl"
    command[command.index("/dev/full")] = str(fresh)
    assert main([*command, "--max-new-tokens", "128"]) == 2
    assert "max_new_tokens is 128: it must be below the cache length of 128" in capsys.readouterr().err
    # After an error, an empty new file is removed; an existing empty file is kept.
    on_start = lambda: 1 / 0  # noqa: E731
    for there in (False, True):
        with pytest.raises(ZeroDivisionError):
            batch_run.answer_file(radfm_jax.load(run).generator, file, fresh, Sampling(2), on_start=on_start)
        assert fresh.exists() == there
        fresh.touch()


def test_without_locks(model, tmp_path, monkeypatch):
    file, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    file.write_text('{"id": "a", "prompt": "Lesion?"}\n')

    def none(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match="answers.jsonl cannot be locked .Function not implemented."):
        assert batch_run.answer_file(model.generator, file, out, Sampling(2)).answered == 1


def test_a_batch_file_from_a_pipe(run, tmp_path, capsys):
    """A pipe can be read only once."""
    out, (end, begin) = tmp_path / "answers.jsonl", os.pipe()
    os.write(begin, b'{"id": "a", "prompt": "Lesion?"}\n')
    os.close(begin)
    assert main(["--checkpoint", str(run), "--jsonl", f"/dev/fd/{end}", "--out", str(out), *SHORT]) == 0
    os.close(end)
    assert "1 answers in" in capsys.readouterr().err and json.loads(out.read_text())["id"] == "a"


def test_absolute_paths_are_repeated_unchanged(model, scans, tmp_path):
    file, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    given = [str(scans / "film.png"), {"path": str(scans / "ct.nii.gz"), "volume": 0}]
    file.write_text(json.dumps({"id": "a", "prompt": "Lesion?", "scans": given}) + "\n")
    assert batch_run.answer_file(model.generator, file, out, Sampling(2), root=scans).answered == 1
    assert json.loads(out.read_text())["scans"] == given


@pytest.mark.parametrize("kept", [1, batch_run.CACHE_BYTES])
def test_a_cached_scan_is_not_encoded_again(model, scans, tmp_path, monkeypatch, kept):
    ct, film = "ct.nii.gz", "film.png"
    of = [[film], [film], [ct, film], [], [film], [ct], [ct, film], [film]]
    file, out = tmp_path / "questions.jsonl", tmp_path / f"{kept}.jsonl"
    rows = [{"id": str(i), "prompt": f"Lesion {i}?", "scans": names} for i, names in enumerate(of)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoded, encode = [], model.generator.encode_volumes

    def counting(questions, *args):
        encoded.extend(map(len, questions))
        return encode(questions, *args)

    monkeypatch.setattr(batch_run, "CACHE_BYTES", kept)
    monkeypatch.setattr(model.generator, "encode_volumes", counting)
    sampling = Sampling(6, stop_ids=())
    assert batch_run.answer_file(model.generator, file, out, sampling, root=scans, batch=2).answered == len(of)
    # Batches of two: film; ct and film; film (cached) and ct; both cached. With one entry, film is encoded again.
    times = sorted(n for n in encoded if n)
    assert times == ([1, 1, 2] if kept > 1 else [1, 1, 1, 2]), encoded
    monkeypatch.undo()
    expected = [
        model.answer(row["prompt"], [scans / name for name in names], max_new_tokens=6, stop_ids=())
        for row, names in zip(rows, of, strict=True)
    ]
    assert [json.loads(line)["answer"] for line in out.read_text().splitlines()] == expected


def test_lines_end_at_line_feeds_alone(tmp_path):
    """JSON may contain U+2028 and U+0085 unescaped."""
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"id": "a", "prompt": "One\u2028two\x85three?"}, ensure_ascii=False) + "\r\n\n")
    (question,) = read_batch_file(file, tmp_path)
    assert question.prompt == "One\u2028two\x85three?" and not question.error


def test_empty_optional_fields_of_a_batch_line_are_absent(tmp_path):
    blank = {"context": "", "instruction": "", "scans": None, "study": ""}
    file = tmp_path / "q.jsonl"
    file.write_text(
        "".join(json.dumps(q) + "\n" for q in ({"id": "a", "prompt": "Q?"}, {"id": "b", "prompt": "Q?"} | blank))
    )
    one, same = read_batch_file(file, tmp_path)
    assert dataclasses.replace(same, row_id="a") == one and not one.error
