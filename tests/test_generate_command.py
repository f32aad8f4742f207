"""Answers from Python and from the command line: prompts, scans, chats, batch files and errors."""

import dataclasses
import errno
import fcntl
import functools
import io
import json
import os
import shutil
from types import SimpleNamespace

import jax
import nibabel
import numpy as np
import parity
import pytest
import sentencepiece
from PIL import Image

import radfm_jax
from input_pipeline.samples import Scan
from input_pipeline.text.tokenizer import Tokenizer
from radfm_jax.checkpoints import checkpoint
from radfm_jax.inference import GenerationError, Request, Sampling, batch_run, inputs
from radfm_jax.inference.answer_text import AnswerText
from radfm_jax.inference.batch_files import read_batch_file
from radfm_jax.inference.command import main, mesh_of
from radfm_jax.models import radfm
from radfm_jax.models.decoder import DecoderConfig
from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.models.vit3d import ViTConfig

CONFIG = radfm.RadFMConfig(
    ViTConfig(width=24, num_layers=1, num_heads=2, head_dim=8, mlp_width=32, dropout=0.0),
    PerceiverConfig(width=24, num_layers=1, num_heads=2, head_dim=8, num_latents=4),
    DecoderConfig(vocab_size=360, width=32, mlp_width=64, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=8),
)
PREPARED = {"preprocess": "paper", "storage": "uint8", "size_2d": 64, "size_3d": 32, "depth": 8, "num_latents": 4}
SHORT = ["--max-new-tokens", "12", "--devices", "1", "--no-verify"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Train a tokenizer of 360 pieces with byte fallback, like LLaMA's."""
    words = "is there a lesion in the left lung right none seen size small large report findings normal".split()
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(words, 8)) for _ in range(400)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=360, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Write a 2D scan, a volume and a broken file."""
    folder, rng = tmp_path_factory.mktemp("scans"), np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 255, (60, 80), np.uint8)).save(folder / "film.png")
    volume = rng.integers(-1000, 1000, (40, 30, 8)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([1, 1, 2, 1])), folder / "ct.nii.gz")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    """Write a training run with two checkpoints, of which the first is the best."""
    workdir = tmp_path_factory.mktemp("run")
    config = dataclasses.replace(CONFIG, llama=dataclasses.replace(CONFIG.llama, vocab_size=size_of(tokenizer)))
    params = parity.recipe_params(config)
    for step in (5, 10):
        with checkpoint.new_directory(workdir / "checkpoints" / str(step)) as directory:
            checkpoint.save_params(directory, jax.tree.map(lambda x, step=step: x * (10 - step) / 5, params))
            checkpoint.write_description(directory, "radfm", config.to_dict(), source={"training": "run", "step": step})
            (directory / "tokenizer.model").write_bytes(tokenizer.read_bytes())
            data = PREPARED | {"text_length": 128, "terms": "none"}
            (directory / "run.json").write_text(json.dumps({"step": step, "config": {"data": data}}))
    (workdir / "checkpoints" / "best.json").write_text(json.dumps({"step": 5}))
    return workdir


@functools.cache
def size_of(tokenizer) -> int:
    return Tokenizer(tokenizer).vocab_size


@pytest.fixture(scope="module")
def model(run):
    return radfm_jax.load(run)


def greedy(model, *args, **options):
    return model.answer(*args, max_new_tokens=12, **options)


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
@pytest.mark.parametrize("stop", [(), ("lung",), ("the right", "left lung"), ("zzz", "é")])
def test_pieces_of_text(tokenizer, chunk, stop):
    """Pieces concatenate to the answer, never change, and end at the same position for all chunk sizes."""
    t = Tokenizer(tokenizer)
    text = "none seen in the left lung é😀 the right"
    ids = t.encode(text)
    answer, pieces = AnswerText(t, stop), []
    for start in range(0, len(ids), chunk):
        pieces.append(answer.add(ids[start : start + chunk]))
        if answer.stopped:
            break
    pieces.append(answer.finish())
    found = [text.index(s) for s in stop if s in text]
    expected = text[: min(found)].rstrip() if found else text
    assert "".join(pieces) == answer.text == expected
    assert answer.stopped == bool(found)
    assert not any("\ufffd" in piece for piece in pieces)
    whole = AnswerText(t, stop)
    whole.add(ids)
    assert answer.ids == whole.ids and (t.decode(answer.ids).startswith(expected))


# --- from Python ------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_plain_forward_pass(model, scans):
    """Compare with the plain forward pass over prompt and scans in one training row."""
    files = [scans / "ct.nii.gz", scans / "film.png"]
    prompt = "Is there a lesion in <image-2> or <image-1>, none in <image-2>?"
    (answer,) = model.generator.answers([Request(prompt, files)], Sampling(6, stop_ids=()))
    encoded = inputs.encode_prompt(prompt, 2, model.tokenizer, model.preparation)
    n = len(encoded.ids)
    volumes = inputs.read_scans(files, model.preparation)
    row = inputs.one_row(encoded, volumes, 4)
    assert [v.shape for v in volumes] == [(32, 32, 8), (64, 64, 4)]
    # Append the answer to the row; the pass is causal.
    pad = lambda x, value: np.pad(x, ((0, 0), (0, 6)), constant_values=value)  # noqa: E731
    row |= {k: pad(row[k], v) for k, v in (("visual_index", -1), ("segments", 1), ("key_ok", True))}
    row["ids"] = np.concatenate([row["ids"], np.array(answer.ids)[None]], axis=1)
    row["positions"] = np.arange(n + 6)[None]
    logits, _ = jax.jit(lambda p, b: radfm.RadFM(model.config).apply({"params": p}, b))(model.params, row)
    expected = np.asarray(jax.nn.log_softmax(logits[0, n - 1 : -1]))
    assert list(answer.ids) == expected.argmax(-1).tolist()
    np.testing.assert_allclose(answer.logprobs, expected.max(-1), rtol=0, atol=2e-5)
    assert answer.text == model.tokenizer.decode(answer.ids).strip()


def test_one_by_one_batched_streamed_and_with_kept_scans(model, scans):
    film, ct = scans / "film.png", scans / "ct.nii.gz"
    alone = [greedy(model, "Is there a lesion?", [film]), greedy(model, "Report the findings.")]
    alone.append(greedy(model, "Compare <image-2> with <image-1>.", [film, ct]))
    requests = [("Is there a lesion?", [film]), ("Report the findings.",)]
    requests.append(Request("Compare <image-2> with <image-1>.", [film, ct]))
    assert model.answers(requests, max_new_tokens=12) == alone and len(set(alone)) == 3
    seen = model.encode_scans([film, ct])
    assert greedy(model, "Compare <image-2> with <image-1>.", seen) == alone[2]
    pieces = list(model.stream("Is there a lesion?", [film], max_new_tokens=12, chunk=4))
    assert "".join(pieces) == alone[0] and len(pieces) == 4
    pieces_seen = []
    assert greedy(model, "Is there a lesion?", [film], on_text=pieces_seen.append) == alone[0]
    assert "".join(pieces_seen) == alone[0] and len(pieces_seen) > 1
    stop = alone[0][5:8]
    assert greedy(model, "Is there a lesion?", [film], stop=stop) == alone[0][: alone[0].index(stop)].strip()
    # The answer depends on the scans and on their positions.
    assert greedy(model, "Is there a lesion?", [ct]) != alone[0]
    assert greedy(model, "<image-1> Is there a lesion?", [film]) == alone[0]
    last = greedy(model, "Is there a lesion?", [film], place="last")
    assert last == greedy(model, "Is there a lesion? <image-1>", [film]) != alone[0]
    told = greedy(model, "Is there a lesion?", [film], context="small lung")
    assert told == greedy(model, "small lung Is there a lesion?", [film])


def test_arrays_as_scans(model, scans):
    pixels = np.asarray(Image.open(scans / "film.png"))[..., None, None]
    assert greedy(model, "Is there a lesion?", [pixels]) == greedy(model, "Is there a lesion?", [scans / "film.png"])
    windowed = inputs.read_scans([Scan(str(scans / "ct.nii.gz"), window=(-100.0, 100.0))], model.preparation)
    plain = inputs.read_scans([str(scans / "ct.nii.gz")], model.preparation)
    assert windowed[0].voxels.std() > 1.5 * plain[0].voxels.std()


def test_released_form(tokenizer, scans):
    """2D scans are 512 x 512, all scans have one depth, and an image at the end precedes the last character."""
    t, released = Tokenizer(tokenizer), dataclasses.replace(inputs.RELEASED, num_latents=4)
    volumes = inputs.read_scans([scans / "film.png", scans / "ct.nii.gz"], released)
    assert [v.shape for v in volumes] == [(256, 256, 8)] * 2 and volumes[0].voxels.dtype == np.float32
    tested = inputs.read_scans([scans / "ct.nii.gz"], dataclasses.replace(released, size_3d=512))
    assert tested[0].shape == (512, 512, 8)
    encoded = inputs.encode_prompt("Is there a lesion?", 1, t, released, place="last")
    image = [t.image_id, 0, 0, 0, 0, t.image_end_id]
    assert encoded.ids.tolist() == [1, *t.encode("Is there a lesion"), *image, *t.encode("?")]
    assert inputs.visual_index(encoded, 4)[-6 - len(t.encode("?")) :][1:5].tolist() == [0, 1, 2, 3]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, files, options, words",
    [
        ("<image-2> Lesion?", ["film.png"], {}, "no scan for <image-2>.*no mark <image-1>"),
        ("<image-1> Lesion?", ["film.png", "ct.nii.gz"], {}, "2 scans, but no mark <image-2>"),
        ("  ", ["film.png"], {}, "the prompt is empty: write a question"),
        (None, ["film.png"], {}, "prompt and context must be str .got NoneType and str"),
        ("<image-1>", ["film.png"], {}, "has scans but no text"),
        ("<image-1> Lesion?", [], {}, "no scan for <image-1> .no scans are given"),
        (
            "<image> or <Image-1>?",
            ["film.png"],
            {},
            "contains <image>, <Image-1>, which is not a valid mark: write <image-1>",
        ),
        ("<image 1> Lesion?", [], {}, "contains <image 1>, which is not a valid mark"),
        (
            "Lesion?",
            ["film.png"],
            {"context": "was <Image-1>"},
            "the context contains <Image-1>, which is not a valid mark",
        ),
        ("Lesion?", ["broken.png"], {}, "broken.png: "),
        ("Lesion?", ["absent.png"], {}, "absent.png: there is no such file"),
        ("Lesion? " * 60, [], {}, "prompt 1 has .* tokens: with an answer of 1 it exceeds the cache length of 128"),
        ("Lesion?", [], {"max_new_tokens": 500}, "with an answer of 500 it exceeds"),
        ("Lesion?", [], {"place": "middle"}, "place is 'middle'; known: first, last"),
        ("Lesion \ud800?", [], {}, "not valid Unicode"),
        ("Lesion?", "film.png", {}, "scans are a str: pass a list"),
        ("Lesion?", [np.zeros((3, 20, 20))], {}, "scan 1 .array.*channels seem to stand before rows"),
        ("Lesion?", [np.zeros((20, 20, 5))], {}, "scan 1 .array.*constant"),
        ("Lesion?", [7], {}, "scan 1 is a int: pass a path"),
    ],
)
def test_invalid_prompts(model, scans, prompt, files, options, words):
    files = files if isinstance(files, str) else [scans / f if isinstance(f, str) else f for f in files]
    with pytest.raises(ValueError, match=words):
        model.answer(prompt, files, **options)


def test_a_prompt_that_fails_has_no_answer(model, scans):
    seen = model.encode_scans([scans / "film.png"])
    broken = dataclasses.replace(seen, tokens=seen.tokens * np.nan)
    with pytest.raises(GenerationError, match="answer 2 are not finite"):
        model.answers([("Lesion?", seen), ("Lesion?", broken)], max_new_tokens=4)


def test_checkpoints_that_lack_something(model, run, tokenizer, scans, tmp_path):
    directory = run / "checkpoints" / "5"
    assert model.directory == directory and model.preparation == inputs.Preparation(**PREPARED, text_length=128)
    with checkpoint.new_directory(tmp_path / "bare") as bare:
        checkpoint.save_params(bare, model.params)
        checkpoint.write_description(bare, "radfm", model.config.to_dict())
    bare = radfm_jax.load(tmp_path / "bare")
    with pytest.raises(ValueError, match="bare has no tokenizer.model: load it with tokenizer=FILE .*--tokenizer FILE"):
        bare.answer("Lesion?")
    bare = radfm_jax.load(tmp_path / "bare", tokenizer=tokenizer)
    assert bare.answer("Lesion?", max_new_tokens=4) == model.answer("Lesion?", max_new_tokens=4)
    with pytest.raises(
        ValueError, match="bare has no run.json that records how scans were prepared.*--preprocess paper"
    ):
        bare.answer("Lesion?", [scans / "film.png"])
    told = radfm_jax.load(tmp_path / "bare", tokenizer=tokenizer, prepared=model.preparation)
    assert greedy(told, "Lesion?", [scans / "film.png"]) == greedy(model, "Lesion?", [scans / "film.png"])
    # Converted weights have the released preparation; a saved model keeps its own.
    description = json.loads((tmp_path / "bare" / "radfm.json").read_text()) | {"source": {"file": "pytorch_model.bin"}}
    (tmp_path / "bare" / "radfm.json").write_text(json.dumps(description))
    converted = radfm_jax.api.preparation_of(tmp_path / "bare", model.config)
    assert converted == dataclasses.replace(inputs.RELEASED, num_latents=4)
    radfm_jax.save(model, tmp_path / "again")
    assert radfm_jax.load(tmp_path / "again").preparation == model.preparation
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="a training run without any saved step"):
        radfm_jax.load(tmp_path / "empty")
    with pytest.raises(ValueError, match="tokenizer nowhere does not exist"):
        radfm_jax.load(run, tokenizer="nowhere")


# --- the command line -------------------------------------------------------------------------------------------------


def test_one_question(run, model, scans, tmp_path, capsys):
    film = scans / "film.png"
    command = ["--checkpoint", str(run), "--scan", str(film), "--scan", str(scans / "ct.nii.gz"), *SHORT]
    picture = tmp_path / "new" / "seen.png"
    assert main([*command, "--prompt", "<image-2> Compare <image-1>.", "--show", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert out == greedy(model, "<image-2> Compare <image-1>.", [film, scans / "ct.nii.gz"]) + "\n"
    page = np.asarray(Image.open(picture).convert("L"))
    # One slice of the film and eight of the volume, each 160 pixels high below its caption.
    shown = [
        page[k * 180 + 20 : k * 180 + 170, j * 164 + 5 : j * 164 + 155].std() > 5 for k in (0, 1) for j in range(8)
    ]
    assert shown == [True, *[False] * 7, *[True] * 8]
    drawn = [*command, "--prompt", "Lesion?", "--temperature", "1.5", "--top-p", "0.9", "--seed"]
    said = []
    for seed in ("1", "1", "2"):
        assert main([*drawn, seed]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert main([*command, "--prompt", "<image-1> Lesion?"]) == 2
    assert "error: the prompt does not fit its scans: 2 scans, but no mark <image-2>" in capsys.readouterr().err
    # Other sizes than in training change the answer.
    assert (
        main([*command[:4], *SHORT, "--prompt", "Lesion?", "--size-2d", "32", "--show", str(tmp_path / "s.png")]) == 0
    )
    assert capsys.readouterr().out != greedy(model, "Lesion?", [film]) + "\n"


def test_text_is_checked_before_scans(run, scans, capsys):
    command = ["--checkpoint", str(run), "--scan", str(scans / "broken.png"), "--prompt"]
    assert main([*command, "<image-2> Lesion?"]) == 2
    assert "no scan for <image-2>" in capsys.readouterr().err
    assert main([*command, "<image-1> Lesion?"]) == 2
    assert "broken.png" in capsys.readouterr().err


def test_chat(run, model, scans, capsys, monkeypatch):
    film = scans / "film.png"
    lines = iter(
        [
            "Lesion?",
            "/nonsense",
            "/scan",
            "/scan " + str(scans / "broken.png"),
            f"/scan {film}",
            "/scans",
            "<image-1> Lesion?",
            f"/scan {film}",
            "Lesion?",
            "",
        ]
    )

    def typed(prompt):
        assert prompt == "> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert main(["--checkpoint", str(run), "--chat", "--history", *SHORT]) == 0
    out, err = capsys.readouterr()
    first = greedy(model, "Lesion?")
    second = greedy(model, "<image-1> Lesion?", [film], context=f"Lesion? {first}")
    # The history has no marks. The third question has none either, so both scans come first.
    before = f"Lesion? {first}\nscan 1 Lesion? {inputs.without_marks(second)}"
    assert out == f"{first}\n{second}\n{greedy(model, 'Lesion?', [film, film], context=before)}\n"
    assert (
        "unknown command /nonsense" in err
        and "/scan needs a file" in err
        and "broken.png" in err
        and f"<image-1> {film}" in err
    )


@pytest.mark.parametrize("lines, code", [("Lesion?\n", 0), ("/nonsense\nLesion?\n/quit\nLesion?\n", 1)])
def test_chat_from_a_pipe(run, model, capsys, monkeypatch, lines, code):
    """Standard output has the answers only, and the exit code reports failed lines."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["--checkpoint", str(run), "--chat", *SHORT]) == code
    out, err = capsys.readouterr()
    assert out == greedy(model, "Lesion?") + "\n" and ("unknown command /nonsense" in err) == bool(code)


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
    for words in ("c: ", "broken.png", "e: the prompt does not fit", "f: ", "climbs with '..'", "g: the prompt has",
                  "prompt is missing"):  # fmt: skip
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
        assert f"line 1 answers 'a' with a different {key} than the batch file has" in capsys.readouterr().err
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
    assert (
        f"line 1 was made with another checkpoint, or by a version that did not record it ({here.resolve()} then, "
        in (capsys.readouterr().err)
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


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--prompt", "x", "--window", "lung"], "--window and --volume need a --scan"),
        (["--prompt", "x", "--window", "-1000,400"], "--window and --volume need a --scan"),
        (["--jsonl", "x", "--out", "y", "--volume", "1"], "--jsonl excludes --scan, --window, --volume"),
        (["--prompt", "x", "--history"], "--history needs --chat"),
    ],
)
def test_options_without_effect_are_errors(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--checkpoint", "x", *arguments])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--prompt", "x", "--top-p", "2"], "top_p must be above 0 and at most 1 (got 2.0)"),
        (
            ["--prompt", "x", "--devices", "3"],
            "--devices must be at most 8 and divide the model's 4 key/value heads (got 3)",
        ),
        (["--prompt", "x", "--scan", "f", "--window", "brian"], "CT window 'brian' is none of"),
        (["--prompt", "x", "--show", "x.png"], "--show needs a --scan"),
        (["--prompt", "x", "--size-2d", "50"], "size_2d, size_3d, depth: "),
    ],
)
def test_invalid_options(run, capsys, arguments, words):
    assert main(["--checkpoint", str(run), "--no-verify", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_mesh_of(model):
    """There are eight devices and four heads."""
    assert mesh_of(model.config, None).shape == {"data": 1, "fsdp": 1, "tensor": 4}
    assert mesh_of(model.config, 1) is None
