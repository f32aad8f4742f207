"""Models behind an endpoint: requests, images, costs, resuming, and exports of the same questions."""

import base64
import csv
import io
import json
import re
import types

import numpy as np
import pytest
import yaml
from chat_server import VisionServer, text_of
from PIL import Image
from radbench_parts import config_file

from input_pipeline.curate import llm
from input_pipeline.samples import Scan
from radfm_jax.evaluate import endpoint, figures, lmms_eval_utils, model_answers, montage, radbench
from radfm_jax.evaluate.__main__ import main
from radfm_jax.evaluate.radbench import Benchmark, Question
from radfm_jax.evaluate.radbench_build import build

KEY = "sk-test-0123456789abcdef"
BLACK = Image.new("L", (1, 1))


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    small = lambda pyplot, figure, file: (pyplot.close(figure), file.parent.mkdir(exist_ok=True), BLACK.save(file))  # noqa: E731
    monkeypatch.setattr(figures, "_save", small)  # drawing takes seconds


def write_data(root):
    """Write VQA about volumes and reports about films, whose voxels tell the files apart."""
    root.mkdir(parents=True)
    rows = []
    for i in range(3):
        np.save(root / f"ct{i}.npy", np.full((40, 20, 6), 10 * i, np.int16) + np.arange(6, dtype=np.int16) * 100)
        rows.append(
            {"img_root_dir": "", "Figure_path": f"ct{i}.npy", "Question": f"Side of case {i}?", "Answer": "left"}
        )
    with open(root / "vqa.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    lines = ["image_path,label"]
    for i in range(2):
        Image.fromarray(np.arange(64 * 32, dtype=np.uint8).reshape(64, 32) + i).save(root / f"s{i}.png")
        lines.append(f"s{i}.png,No acute finding {i}.")
    (root / "reports.csv").write_text("\n".join(lines) + "\n")
    return root


def benchmark(root, **changes) -> Benchmark:
    of = {"root": str(root)}
    sets = {
        "vqa_rad": {**of, "family": "vqa_rad", "table": "vqa.csv"},
        "mimic_cxr": {**of, "family": "mimic_cxr", "table": "reports.csv", "study": r"(s\d+)"},
    }
    return Benchmark(**{"sets": sets, "terms": "none", "resamples": 5, **changes})


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


@pytest.fixture
def command(data, tmp_path):
    return [
        "radbench", f"--config={config_file(benchmark(data), tmp_path / 'c.py')}", "--model=m", "--timeout=20",
        f"--out={tmp_path / 'out'}", "--retries=0",
    ]  # fmt: skip


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def reply(content):
    text = text_of(content)
    return "I cannot say." if "case 1" in text else "Left." if "Side" in text else "No acute finding 0."


# --- images -----------------------------------------------------------------------------------------------------------


def test_a_montage(tmp_path):
    """Six slices in four tiles: the first and the last are included, tall slices keep their shape."""
    voxels = np.zeros((40, 20, 6), np.int16) + np.arange(6, dtype=np.int16) * 100
    np.save(tmp_path / "ct.npy", voxels)
    shown = montage.scan_image(Scan(str(tmp_path / "ct.npy")), montage.Layout(2, 64))
    assert (shown.numbers, shown.count, shown.low, shown.high) == ((1, 3, 4, 6), 6, 0, 500)
    pixels = np.asarray(shown.image)
    assert pixels.shape == (64, 64)
    assert [int(pixels[16, 16]), int(pixels[16, 48]), int(pixels[48, 16]), int(pixels[48, 48])] == [0, 102, 153, 255]
    assert pixels[48, 33] == 0 and pixels[48, 40] == 255  # a tile is 32 wide, its slice 16
    text = shown.description()
    assert "4 of the 6 slices" in text and "slices 1, 3, 4, 6" in text and "Black is 0 and white 500" in text
    windowed = montage.scan_image(Scan(str(tmp_path / "ct.npy"), window=(100.0, 300.0)), montage.Layout(2, 64))
    assert (windowed.low, windowed.high) == (100, 300)


def test_a_film_is_one_image(tmp_path):
    Image.fromarray(np.arange(64 * 32, dtype=np.uint8).reshape(64, 32)).save(tmp_path / "a.png")
    shown = montage.scan_image(Scan(str(tmp_path / "a.png")), montage.Layout(1, 32))
    assert shown.image.size == (16, 32) and shown.description() == ""
    with pytest.raises(ValueError, match="16 pixels per tile"):
        montage.Layout(4, 32)
    assert montage.image_tokens(montage.Layout(4, 1024)) == 85 + 170 * 4
    assert montage.image_tokens(montage.Layout(4, 512)) == 85 + 170


def test_images_are_where_their_marks_are(tmp_path):
    for i in (1, 2):
        Image.fromarray(np.full((20, 20 + i), 50 * i, np.uint8) + np.arange(20 + i, dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
    scans = tuple(Scan(str(tmp_path / f"{i}.png")) for i in (1, 2))
    asked = Question("x/1", "diagnosis", "x", "New in <image-2>?", ("no",), "Age 3.", scans, closed=("yes", "no"))
    made = endpoint.Baseline(llm.Endpoint("http://localhost/v1", "m", ""), system="Be brief.")
    system, user = made.messages(asked)
    assert system == {"role": "system", "content": "Be brief."}
    kinds = [part["type"] for part in user["content"]]
    assert kinds == ["image_url", "text", "image_url", "text"]  # scan 1 has no mark and comes first
    assert [p["text"] for p in user["content"] if p["type"] == "text"] == [
        "Age 3. New in",
        "? Answer with one of: yes, no.",
    ]
    widths = []
    for part in user["content"]:
        if part["type"] == "image_url":
            content = part["image_url"]["url"].removeprefix("data:image/png;base64,")
            widths.append(Image.open(io.BytesIO(base64.b64decode(content))).size[0])
    assert widths == [21, 22]


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_run_from_costs_to_report(command, tmp_path, capsys):
    """Costs are shown before anything is sent; the report has the model, its refusal and its scores."""
    prices = ["--price-in=2", "--price-out=10"]
    with VisionServer(reply) as server:
        run = [*command, f"--endpoint={server.url}", *prices]
        assert main(run) == 2
        shown = " ".join(capsys.readouterr().err.split())
        assert not server.requests and "nothing was sent: add --yes" in shown
        # 5 images of 765 tokens; 5 answers of 200 tokens.
        tokens = int(re.search(r"prompt tokens, estimated: ([\d,]+)", shown)[1].replace(",", ""))
        assert "images: 5," in shown and 5 * 765 < tokens < 5 * 765 + 500
        assert f"cost, at most: {(2 * tokens + 10 * 1000) / 1e6:.2f}" in shown
        assert main([*run, "--yes", "--rexrank"]) == 0
        assert len(server.requests) == 5 and set(server.authorizations) <= {None, "Bearer none"}
        assert all(body["temperature"] == 0 and body["max_tokens"] == 200 for body in server.requests)
        capsys.readouterr()
        assert main([*run, "--yes"]) == 0 and len(server.requests) == 5  # all are answered
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    (vqa,) = [row for row in report["scores"] if row["task"] == "vqa" and row["grouping"] == "task"]
    assert (vqa["refused"], vqa["failed"]) == (1, 0) and vqa["metrics"]["exact"]["value"] == pytest.approx(2 / 3)
    assert "4 x 4 slices" in report["models"]["m"] and "| m | 3 | 0 | 1 |" in (out / "report.md").read_text()
    for file in ("answers/m.jsonl", "questions.jsonl", "scores/m.jsonl", "answers/m.requests.jsonl"):
        assert str(tmp_path) not in (out / file).read_text(), file
    submission = json.loads((out / "rexrank" / "m.json").read_text())
    assert submission["s0"]["model_prediction"] == "No acute finding 0." and submission["s0"]["image_path"] == [
        "s0.png"
    ]
    assert "next: open the page" in " ".join(capsys.readouterr().err.split())


def test_a_terminal_asks(command, monkeypatch, capsys):
    replies = iter(["n", "", "y"])
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda prompt: next(replies))
    with VisionServer(reply) as server:
        for sent in (0, 0, 1):
            main([*command, f"--endpoint={server.url}", "--limit=1"])
            assert len(server.requests) == sent
    assert "are sent to http://127.0.0.1" in " ".join(capsys.readouterr().err.split())


def test_a_partial_run_resumes_also_after_a_move(command, data, tmp_path, capsys):
    with VisionServer(reply) as server:
        run = [*command, f"--endpoint={server.url}", "--yes"]
        assert main([*run, "--limit=2"]) == 1 and len(server.requests) == 2
        assert "3 of 5 questions have no answer yet" in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out" / "report.json").exists()
        with open(tmp_path / "out" / "answers" / "m.requests.jsonl", "ab") as log:
            log.write(b'{"key": "half a li')
        moved = data.rename(tmp_path / "moved")
        config_file(benchmark(moved), tmp_path / "c.py")
        (tmp_path / "out").rename(tmp_path / "copied")
        run = [word.replace(f"--out={tmp_path / 'out'}", f"--out={tmp_path / 'copied'}") for word in run]
        for other in ("--temperature=1", "--grid=2", "--model=n", "--max-new-tokens=9", "--system=Hi", "--no-choices"):
            assert main([*run, "--name=m", other]) == 2, other
            assert "answers with other settings" in " ".join(capsys.readouterr().err.split())
        assert len(server.requests) == 2
        assert main(run) == 0
        assert len(server.requests) == 5 == len({json.dumps(body) for body in server.requests})
    assert len(lines(tmp_path / "copied" / "answers" / "m.jsonl")) == 5


def test_failures_are_listed_and_retried(command, data, tmp_path):
    (data / "ct0.npy").write_bytes(b"damaged")
    status = [500]
    with VisionServer(lambda content: status[0] if "case 2" in text_of(content) else reply(content)) as server:
        run = [*command, f"--endpoint={server.url}", "--yes"]
        assert main(run) == 1
        failed = {line["id"]: line["error"] for line in lines(tmp_path / "out" / "answers" / "m.failed.jsonl")}
        assert len(failed) == 2 and any("ct0.npy" in error for error in failed.values())
        assert any("run the command again" in error for error in failed.values())
        status[0] = "Left."
        assert main(run) == 1 and len(lines(tmp_path / "out" / "answers" / "m.failed.jsonl")) == 1


@pytest.mark.parametrize("status", [400, 401])
def test_no_form_of_the_key_is_recorded(command, tmp_path, capsys, status):
    """The server echoes the header; a wrong key stops the run."""
    with VisionServer(lambda content: status) as server:
        run = [*command, f"--endpoint={server.url}", "--yes", "--key-variable=OPENAI_API_KEY"]
        assert main(run) == (2 if status == 401 else 1)
        assert server.authorizations[0] == f"Bearer {KEY}"
    written = "".join(p.read_text() for p in (tmp_path / "out").rglob("*") if p.suffix in (".json", ".jsonl", ".html"))
    assert KEY not in written + capsys.readouterr().err and "no: Bearer" in written + "no: Bearer" * (status == 401)


def test_images_stay_on_this_machine(command, monkeypatch, capsys):
    """Remote endpoints need --allow-remote; a local one is asked directly, without a proxy or a redirect."""
    for url in (
        "https://api.example.com/v1",
        "http://127.0.0.1.example.com/v1",
        "http://10.0.0.7/v1",
        "http://0.0.0.0/v1",
    ):
        assert main([*command, f"--endpoint={url}", "--yes"]) == 2
        assert "is not on this machine" in " ".join(capsys.readouterr().err.split())
    for url in ("localhost:8000", "ftp://localhost/", "http://user:secret@localhost/v1"):
        assert main([*command, f"--endpoint={url}", "--yes"]) == 2
        assert "secret" not in capsys.readouterr().err
    assert all(map(endpoint.is_loopback, ("http://localhost:1/v1", "http://127.0.0.5/v1", "http://[::1]:8000/v1")))
    monkeypatch.delenv("OPENAI_API_KEY")
    assert main([*command, "--endpoint=https://api.example.com/v1", "--allow-remote", "--yes"]) == 2
    assert "OPENAI_API_KEY has no key" in " ".join(capsys.readouterr().err.split())
    with VisionServer(lambda content: "elsewhere") as elsewhere, VisionServer(lambda content: 307) as server:
        server.location = f"{elsewhere.url}/chat/completions"
        monkeypatch.setenv("HTTP_PROXY", elsewhere.url.removesuffix("/v1"))
        assert main([*command, f"--endpoint={server.url}", "--yes"]) == 2
        assert server.requests and not elsewhere.requests


def test_two_models_in_one_report(command, data, tmp_path):
    given = tmp_path / "given.jsonl"
    questions = build(benchmark(data)).questions
    given.write_text("".join(json.dumps({"id": q.row_id, "answer": q.references[0]}) + "\n" for q in questions))
    with VisionServer(reply) as server:
        assert main([*command, f"--endpoint={server.url}", "--yes", f"--answers=Perfect={given}"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["models"]) == ["m", "Perfect"]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--endpoint=http://localhost/v1", "--budget=1"], "--budget needs"),
        (["--endpoint=http://localhost/v1", "--limit=0"], "--limit must be at least 1"),
        (["--endpoint=http://localhost/v1", "--temperature=hot"], "--temperature must be"),
        (["--endpoint=http://localhost/v1", "--grid=0"], "at least 1"),
        ([], "--model needs --endpoint"),
    ],
)
def test_invalid_options(command, more, message, capsys):
    try:
        code = main([*command, *more])
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_the_images_can_be_looked_at(command, tmp_path):
    shown = [word for word in command if not word.startswith(("--out", "--model"))]
    assert main([*shown, f"--montages={tmp_path / 'seen'}"]) == 0
    listed = lines(tmp_path / "seen" / "montages.jsonl")
    assert len(listed) == 5 and {line["of"] for line in listed} == {1, 6}
    for line in listed:
        content = io.BytesIO((tmp_path / "seen" / line["file"]).read_bytes())
        assert max(Image.open(content).size) <= 1024


def test_each_question_has_its_own_image():
    names = [endpoint._file_name(row_id) for row_id in ("a/1", "a_1", "a 1", "x" * 300, "x" * 299)]
    assert len(set(names)) == 5 and names[1] == "a_1" and max(map(len, names)) < 100


# --- exports ----------------------------------------------------------------------------------------------------------


def test_the_task_of_lmms_eval(command, data, tmp_path):
    """The files have the form of lmms-eval's task guide, and its answers can be scored here."""
    folder = tmp_path / "task"
    shown = [word for word in command if not word.startswith(("--out", "--model"))]
    assert main([*shown, f"--lmms-eval={folder}"]) == 0
    assert {p.name for p in folder.iterdir()} >= {"utils.py", "README.txt", "radbench_vqa.yaml", "radbench_report.yaml"}

    class Loader(yaml.SafeLoader):
        pass

    functions = []
    Loader.add_constructor("!function", lambda loader, node: functions.append(loader.construct_scalar(node)))
    task = yaml.load((folder / "radbench_vqa.yaml").read_text(), Loader)  # noqa: S506
    assert task["task"] == "radbench_vqa" and task["output_type"] == "generate_until" and task["test_split"] == "test"
    names = [name.removeprefix("utils.") for name in functions]
    assert names == ["doc_to_visual", "doc_to_text", "process_results", "write_vqa_answers"]
    assert all(callable(getattr(lmms_eval_utils, name)) for name in names)
    scope = {"__file__": str(folder / "utils.py"), "__name__": "utils"}
    exec((folder / "utils.py").read_text(), scope)  # as lmms-eval imports it
    docs = lines(folder / task["dataset_kwargs"]["data_files"]["test"])
    assert len(docs) == 3 and all(task["doc_to_target"] in doc for doc in docs)
    (image,) = scope["doc_to_visual"](docs[0])
    assert image.mode == "RGB" and "[image 1]" in scope["doc_to_text"](docs[0])
    results = [
        scope["process_results"](doc, [text]) for doc, text in zip(docs, ("Left.", "right", "left"), strict=True)
    ]
    assert [r["radbench_match"] for r in results] == [1, 0, 1]
    assert scope["write_vqa_answers"]([r["radbench_answers"] for r in results]) == 3
    questions = build(benchmark(data)).questions
    assert len(model_answers.read_answers(folder / "answers_vqa.jsonl", questions)) == 3
    closed = {"id": "x", "reference": "no", "choices": ["yes", "no"]}
    assert [scope["process_results"](closed, [a])["radbench_match"] for a in ("No mass.", "Yes, no doubt", "n")] == [
        1,
        0,
        0,
    ]


def test_a_submission_to_rexrank_keeps_the_fields_of_its_test_file(command, tmp_path, capsys):
    test_file = tmp_path / "test.json"
    studies = {"s1": {"report": "r", "split": "test"}, "s9": {"report": "q"}}
    test_file.write_text(json.dumps(studies))
    with VisionServer(reply) as server:
        run = [*command, f"--endpoint={server.url}", "--yes"]
        assert main([*run, f"--rexrank={test_file}"]) == 0
        submission = json.loads((tmp_path / "out" / "rexrank" / "m.json").read_text())
        assert submission == {"s1": {**studies["s1"], "model_prediction": "No acute finding 0."}}
        assert "1 studies, 0 without a report, 1 not in the benchmark" in " ".join(capsys.readouterr().err.split())
        test_file.write_text(json.dumps({"x": {}}))
        assert main([*run, f"--rexrank={test_file}"]) == 2
        assert "shares no study" in capsys.readouterr().err


def test_tasks_of_the_export_are_those_of_radbench():
    assert tuple(radbench.TASKS) == lmms_eval_utils.TASKS
