"""RadBench end to end: questions, generated and recorded answers, scores, report, export, ratings."""

import base64
import csv
import io
import json
import re
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from practice import practice
from radbench_parts import MODEL, benchmark, config_file, save_model, sets

import radfm_jax
from input_pipeline.images.slices import slices
from input_pipeline.samples import Scan
from input_pipeline.text.terms import Terms
from input_pipeline.text.tokenizer import load_tokenizer
from radfm_jax.evaluate import (
    model_answers,
    radbench,
    ratings,
    report,
    scoring,
)
from radfm_jax.evaluate.__main__ import main
from radfm_jax.evaluate.model_answers import RecordedAnswer
from radfm_jax.evaluate.radbench import Question
from radfm_jax.evaluate.radbench_build import BuiltBenchmark, build, read_questions
from radfm_jax.evaluate.radbench_command import _replace_questions
from radfm_jax.evaluate.results import Results
from radfm_jax.inference import Request, Sampling
from radfm_jax.inference.batch_files import read_batch_file

NASTY = "<script>alert(1)</script> \u202e<img src=x onerror=alert(2)> & 'quoted'"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return practice(tmp_path_factory.mktemp("scores"), train=4, test=6, num_latents=4)


@pytest.fixture(scope="module")
def root(data) -> Path:
    return Path(data.tokenizer).parent


@pytest.fixture(scope="module")
def model(data, tmp_path_factory) -> Path:
    return save_model(data, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def config(root, tmp_path_factory) -> Path:
    return config_file(benchmark(root, limit=4), tmp_path_factory.mktemp("config") / "config.py")


@pytest.fixture(scope="module")
def bench(root) -> BuiltBenchmark:
    return build(benchmark(root, limit=4))


@pytest.fixture(scope="module")
def ran(config, model, bench, tmp_path_factory):
    """Run the command on a checkpoint, and on a file of answers with one failed and one missing answer."""
    out = tmp_path_factory.mktemp("out")
    given = [{"id": q.row_id, "answer": q.references[0]} for q in bench.questions]
    given[0]["answer"], given[1] = NASTY, {"id": given[1]["id"], "error": "refused"}
    write(out / "given.jsonl", given[:-1])
    command = ["radbench", f"--config={config}", f"--checkpoint={model}", "--max-new-tokens=6", "--devices=1"]
    command += [f"--out={out}", f"--answers=Perfect={out / 'given.jsonl'}", "--rating-cases=5"]
    command += [f"--rating-sheet={out / 'sheet.html'}", "--clinical=radgraph"]
    return out, command, main(command)


def write(file: Path, lines) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# --- end to end -------------------------------------------------------------------------------------------------------


def test_every_question_is_answered_once(ran, bench):
    out, _, code = ran
    assert code == 1  # two of the recorded answers are missing
    answers = lines(out / "answers" / "tiny.jsonl")
    assert [a["id"] for a in answers] == [q.row_id for q in bench.questions]
    assert read_questions(out / "questions.jsonl") == bench.questions
    asked = {q.row_id: q for q in bench.questions}
    for answer in answers:
        assert answer["prompt"] == asked[answer["id"]].prompt and answer["made_with"]["temperature"] == 0
        assert ("p_yes" in answer) == (asked[answer["id"]].task == "diagnosis")


def test_answers_and_probabilities_are_the_model_s_own(ran, bench, model):
    """Compare with single prompts from Python, and with the softmax over all first tokens."""
    out, _, _ = ran
    loaded = radfm_jax.load(model)
    yes, no = model_answers.first_tokens(loaded.tokenizer)
    answers = {a["id"]: a for a in lines(out / "answers" / "tiny.jsonl")}
    for q in [q for q in bench.questions if q.task == "diagnosis"][:2] + bench.questions[-1:]:
        (alone,) = loaded.generator.answers(
            [Request(q.prompt, list(q.scans), q.context)], Sampling(6), watch=range(MODEL.llama.vocab_size)
        )
        assert alone.text == answers[q.row_id]["answer"]
        p = np.exp(alone.watched)
        assert p.sum() == pytest.approx(1, abs=1e-5) and alone.ids[0] == p.argmax()
        assert alone.logprobs[0] == pytest.approx(max(alone.watched))
        if q.task == "diagnosis":
            masses = p[list(yes)].sum(), p[list(no)].sum()
            assert answers[q.row_id]["p_yes"] == pytest.approx(masses[0] / sum(masses), abs=1e-5)
            assert answers[q.row_id]["p_yes_or_no"] == pytest.approx(sum(masses), abs=1e-6)


def test_a_run_resumes(ran, capsys):
    """After the last two answers are lost, one of them partly, only these two are generated again."""
    out, command, _ = ran
    file = out / "answers" / "tiny.jsonl"
    whole = file.read_bytes()
    kept = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(kept[:-2]) + kept[-2][:40])
    assert main(command) == 1
    # Probabilities differ in their last bits between batches.
    plain = lambda text: [{**json.loads(x), "logprob": 0, "p_yes": 0, "p_yes_or_no": 0} for x in text.splitlines()]  # noqa: E731
    assert plain(file.read_bytes()) == plain(whole)
    assert "2 answers in" in capsys.readouterr().err.replace("\n", " ")
    scores = lines(out / "scores" / "tiny.jsonl")
    assert len(scores) == len(kept) == len({line["id"] for line in scores})


def test_failures_count_as_wrong_and_are_listed(ran, bench):
    out, _, _ = ran
    found = json.loads((out / "report.json").read_text())
    first, last = bench.questions[1].row_id, bench.questions[-1].row_id
    assert found["failed"] == {"tiny": found["failed"]["tiny"], "Perfect": {first: "refused", last: found_no_answer()}}
    of = {(s["model"], s["task"]): s for s in found["scores"] if s["grouping"] == "task"}
    for task in radbench.TASKS:
        wrong = sum(q.task == task for q in bench.questions if q.row_id in (bench.questions[0].row_id, first, last))
        line, n = of["Perfect", task], sum(q.task == task for q in bench.questions)
        metric = "accuracy" if "accuracy" in line["metrics"] else "bleu"
        assert line["questions"] == n and line["metrics"][metric]["value"] == pytest.approx((n - wrong) / n)
    page = (out / "report.html").read_text()
    assert "refused" in page and found_no_answer() in page


def found_no_answer() -> str:
    return "no answer in the file"


def test_the_page_is_safe_and_complete(ran):
    out, _, _ = ran
    for name in ("report.html", "sheet.html"):
        page = (out / name).read_text()
        assert "<script>alert" not in page and "<img src=x" not in page and "\u202e" not in page
        assert not re.search(r"(src|href)=[\"']?https?:", page)
    page = (out / "report.html").read_text()
    assert "Not for clinical use" in page and "RadFM (published)" in page and "SLAKE" in page
    assert "&lt;script&gt;" in page and "none.csv is missing" in page
    assert "RadEval is not installed" in page
    for picture in ("radar", "bars", "lengths", "calibration"):
        content = (out / "pictures" / f"{picture}.png").read_bytes()
        assert Image.open(io.BytesIO(content)).size[0] > 300 and base64.b64encode(content).decode() in page


def test_tables_agree(ran):
    """JSON, CSV and Markdown agree; each published value is listed once and marked."""
    out, _, _ = ran
    found = json.loads((out / "report.json").read_text())
    rows = list(csv.DictReader(io.StringIO((out / "scores.csv").read_text())))
    ours = {(r["model"], r["task"], r["grouping"], r["group"], r["metric"]): r for r in rows if r["source"] == "ours"}
    count = 0
    for line in found["scores"]:
        for name, i in line["metrics"].items():
            row = ours[line["model"], line["task"], line["grouping"], line["group"], name]
            count += 1
            for key in ("value", "low", "high"):
                assert row[key] == ("" if i[key] is None else f"{i[key]:.6f}")
    assert count == len(ours) and sum(r["source"] == "published" for r in rows) == 45
    markdown = (out / "report.md").read_text()
    assert "| RadFM (published) | 154,540 |  |  | 31.43 (31.20, 31.65) |" in markdown
    assert found["not_scored"]["mimic_cxr"] in markdown and "5 of RadBench's 13" in markdown


def test_other_data_have_no_published_rows(root, tmp_path):
    own = {"mine": {**sets(root)["vqa_rad"], "task": "vqa"}}
    found = benchmark(root, sets=own, limit=3)
    bench = build(found)
    answers = {q.row_id: RecordedAnswer("zero") for q in bench.questions}
    scored = {"m": scoring.score(bench.questions, answers, Terms(["mass"]))}
    lines_of = scoring.score_rows("m", scored["m"], resamples=5, seed=0, by_study=False)
    report.write(Results(found, bench, scored, lines_of), tmp_path)
    assert "(published)" not in (tmp_path / "report.html").read_text() + (tmp_path / "report.md").read_text()
    assert "other data sets were scored: mine" in (tmp_path / "report.md").read_text()


def test_leaks_are_reported(root, data, tmp_path, capsys):
    fields = {k: v for k, v in sets(root)["vqa_rad"].items() if k not in ("study", "facts")}
    found = benchmark(root, sets={"vqa_rad": {**fields, "table": "train/vqa.csv"}}, index=data.index)
    questions = build(found).questions
    given = write(tmp_path / "a.jsonl", ({"id": q.row_id, "answer": q.references[0]} for q in questions))
    command = ["radbench", f"--config={config_file(found, tmp_path / 'c.py')}", f"--answers=m={given}"]
    assert main([*command, f"--out={tmp_path}"]) == 1
    assert "are about studies or scans of the training data" in " ".join(capsys.readouterr().err.split())
    assert len(lines(tmp_path / "leaks.jsonl")) == 2 * len(questions)
    assert main([*command, f"--out={tmp_path}", "--allow-leaks"]) == 0


def test_recorded_answers_do_not_replace_questions_of_generated_ones(tmp_path):
    questions = [Question(f"x/{i}", "vqa", "x", "Q?", ("a",)) for i in (1, 2)]
    _replace_questions(questions, tmp_path)
    _replace_questions(questions[:1], tmp_path)  # there are no answers yet
    assert read_questions(tmp_path / "questions.jsonl") == questions[:1]
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "m.jsonl").touch()
    _replace_questions(questions[:1], tmp_path)
    with pytest.raises(ValueError, match="has other questions, which .*m.jsonl answers: use another --out"):
        _replace_questions(questions, tmp_path)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["answers", "questions.jsonl"]


def test_first_tokens(data):
    """No token begins both answers, however the tokenizer splits capitals."""
    tokenizer = load_tokenizer(data.tokenizer)
    yes, no = model_answers.first_tokens(tokenizer)
    assert yes[0] == tokenizer.encode("yes")[0] and no[0] == tokenizer.encode("no")[0] and not set(yes) & set(no)
    letters = types.SimpleNamespace(encode=lambda text, **_: [0, *map(ord, text)], decode=lambda ids: "")
    assert model_answers.first_tokens(letters) == ((), ())


def test_an_unreadable_scan_is_a_failure(root, model, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    good = next(s.path for s in map(Scan, map(str, sorted((root / "scans/test").glob("*.png")))))
    ask = lambda i, path: Question(f"x/{i}", "vqa", "x", "<image-1> Q?", ("a",), scans=(Scan(path),))  # noqa: E731
    questions = [ask(1, str(broken)), ask(2, good), ask(3, str(tmp_path / "none.png"))]
    loaded = radfm_jax.load(model)
    file = tmp_path / "a.jsonl"
    outcome = model_answers.generate_answers(
        loaded.generator, questions, file, tmp_path / "q.jsonl", model="m", sampling=Sampling(4)
    )
    assert outcome.answered == 1 and outcome.failed.keys() == {"x/1", "x/3"}
    found = scoring.score(questions, model_answers.read_answers(file, questions), Terms(["mass"]))
    assert [bool(one.error) for one in found] == [True, False, True] and "broken.png" in found[0].error


# --- export -----------------------------------------------------------------------------------------------------------


def test_export(bench, config, tmp_path):
    assert main(["radbench", f"--config={config}", f"--export={tmp_path / 'x'}"]) == 0
    exported = lines(tmp_path / "x" / "questions.jsonl")
    assert [q["id"] for q in exported] == [q.row_id for q in bench.questions]
    assert read_questions(tmp_path / "x" / "questions.jsonl") == bench.questions
    volumes = 0
    batch = {line.row_id: line for line in read_batch_file(tmp_path / "x" / "questions.jsonl", tmp_path)}
    for question, line in zip(bench.questions, exported, strict=True):
        assert batch[question.row_id].scans == question.scans
        for scan, listed, shown in zip(question.scans, line["scans"], line["slices"], strict=True):
            assert Path(question.root, listed["path"]) == Path(scan.path) and not Path(listed["path"]).is_absolute()
            picture = np.asarray(Image.open(io.BytesIO((tmp_path / "x" / shown["path"]).read_bytes())))
            assert picture.shape == (64, 64) and picture.dtype == np.uint8
            assert shown["slice"] == shown["of"] // 2 + 1
            volumes += shown["of"] > 1
            np.testing.assert_array_equal(picture, slices(scan)[0].image)
    assert volumes
    # A full disk leaves the description of a slice empty: both files are written again.
    files = sorted((tmp_path / "x" / "slices").iterdir())
    before = {file: file.read_bytes() for file in files}
    next(file for file in files if file.suffix == ".json").write_text("")
    assert main(["radbench", f"--config={config}", f"--export={tmp_path / 'x'}"]) == 0
    assert {file: file.read_bytes() for file in files} == before


def test_the_middle_slice(tmp_path):
    """The minimum of the whole scan is black and its maximum white, unless there is a window."""
    voxels = np.arange(16 * 16 * 5, dtype=np.int16).reshape(16, 16, 5)
    np.save(tmp_path / "a.npy", voxels)
    (middle,) = slices(Scan(str(tmp_path / "a.npy")))
    assert (middle.number, middle.count) == (3, 5)
    np.testing.assert_array_equal(middle.image, np.rint(voxels[:, :, 2].astype(np.float32) / 1279 * 255))
    (windowed,) = slices(Scan(str(tmp_path / "a.npy"), window=(100.0, 300.0)))
    np.testing.assert_array_equal(windowed.image, np.rint(np.clip((voxels[:, :, 2] - 100) / 200, 0, 1) * 255))
    assert [s.number for s in slices(Scan(str(tmp_path / "a.npy")), 3)] == [1, 3, 5]


# --- ratings ----------------------------------------------------------------------------------------------------------


def test_the_rating_sheet_is_blind(ran):
    out, _, _ = ran
    page, key = (out / "sheet.html").read_text(), json.loads((out / "sheet.key.json").read_text())
    assert "tiny" not in page and "Perfect" not in page and len(key["cases"]) == 5
    assert {case["task"] for case in key["cases"]} == {"vqa", "report", "rationale"}
    names = re.findall(r'type="radio" name="([^"]+)" value="5"', page)
    assert names == [f"{case['case']}/{letter}" for case in key["cases"] for letter in case["letters"]]
    given = {line["id"]: line["answer"] for line in lines(out / "answers" / "tiny.jsonl")}
    for number, case in enumerate(key["cases"], 1):
        section = page.split('<section class="case">')[number]
        texts = re.findall(r"<b>([A-Z])</b> (.*?)<fieldset>", section, re.S)
        assert [letter for letter, _ in texts] == sorted(case["letters"])
        said = dict(texts)
        (ours,) = [letter for letter, name in case["letters"].items() if name == "tiny"]
        assert given[case["id"]].split()[0][:3] in said[ours] or not given[case["id"]].isascii()
    assert len({tuple(case["letters"].values()) for case in key["cases"]}) == 2  # each model comes first in some case


def test_grades_are_summarised(ran, tmp_path, capsys):
    out, _, _ = ran
    key = json.loads((out / "sheet.key.json").read_text())
    grade = {"Perfect": 5, "tiny": 1}
    grades = {f"{c['case']}/{x}": grade[m] for c in key["cases"] for x, m in c["letters"].items()}
    with pytest.raises(ValueError, match="sheet.key.json is the key of another sheet"):
        ratings.write_sheet({"m": []}, out / "sheet.html")
    one = {"sheet": key["sheet"], "rater": "[/a]", "ratings": grades}
    two = {**one, "rater": "b", "ratings": {k: max(v - 1, 0) for k, v in list(grades.items())[:6]}}
    files = [str(write(tmp_path / f"{i}.json", [x])) for i, x in enumerate((one, two))]
    command = ["ratings", "--key", str(out / "sheet.key.json")]
    assert main([*command, *files, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "ratings.json").read_text())
    means = {(line["model"], line["task"]): line for line in found["means"]}
    assert means["Perfect", ""]["value"] == pytest.approx((5 * 5 + 3 * 4) / 8) and means["tiny", ""]["grades"] == 8
    (agreement,) = found["agreement"]
    # Grades 5 and 4, or 1 and 0, three times each: 1 - 6 x 1 / (9 (1 + 25 + 9 + 1) / 6).
    assert agreement["both"] == 6 and agreement["kappa"] == pytest.approx(1 - 6 / (9 * (1 + 25 + 9 + 1) / 6))
    wrong = {"sheet": "other", "rater": "c", "ratings": {}}, {**one, "rater": "d", "ratings": {"1/A": 6}}, one
    bad = [str(write(tmp_path / f"bad{i}.json", [x])) for i, x in enumerate(wrong)]
    assert main([*command, *files, *bad]) == 2
    said = capsys.readouterr().err
    assert "of another sheet" in said and "the grade 6" in said and "rater '[/a]' is already in" in said
    with pytest.raises(ValueError, match="the files contain no grades"):
        ratings.read_ratings(out / "sheet.key.json", [write(tmp_path / "e.json", [{**one, "ratings": {}}])])
    damaged = write(tmp_path / "k.json", [{"sheet": one["sheet"], "cases": [{"case": 1, "letters": {"A": "m"}}]}])
    with pytest.raises(ValueError, match="k.json is not a key of a rating sheet"):
        ratings.read_ratings(damaged, [write(tmp_path / "f.json", [{**one, "ratings": {"1/A": 3}}])])


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, message",
    [
        (["--answers=x"], "write NAME=FILE"),
        (["--answers=x=none.jsonl"], "none.jsonl cannot be read"),
        (["--answers=x=a", "--answers=x=b"], "two models are called x"),
        (["--answers=x|y=a", "--answers=x/y=b"], "scores of x|y and x/y would share x_y.jsonl"),
        (["--config.set.x=1", "--answers=x=a"], "set"),
        (["--checkpoint=nowhere"], "nowhere"),
    ],
)
def test_invalid_options(config, more, message, tmp_path, capsys):
    try:
        code = main(["radbench", f"--config={config}", f"--out={tmp_path}", *more])
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "given, message",
    [
        ("--config.terms=umls:nowhere", "MRCONSO.RRF"),
        ("--config.index=nowhere", "nowhere is not an index"),
        ("--answers=other=nowhere.jsonl", "nowhere.jsonl cannot be read"),
    ],
)
def test_inputs_of_scoring_are_checked_before_generation(ran, given, message, tmp_path, capsys):
    command = [f"--out={tmp_path}" if word.startswith("--out=") else word for word in ran[1]]
    assert main([*command, given]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_config_without_questions_is_an_error(root, tmp_path, capsys):
    name, fields = next(iter(sets(root).items()))
    config = config_file(benchmark(root, sets={name: fields | {"study": "no group"}}), tmp_path / "c.py")
    assert main(["radbench", f"--config={config}", f"--export={tmp_path / 'e'}"]) == 2
    assert "of the config has questions: " in (err := capsys.readouterr().err) and "must have exactly one group" in err


@pytest.mark.parametrize(
    "changes, more, message",
    [
        ({"seed": 5}, [], r"has changed \(prompt\)|is not in the batch file"),  # the same ids, other wording
        ({"limit": 3}, [], "is not in the batch file"),
        ({"seed": 5}, ["--max-new-tokens=5"], "other settings .max_new_tokens"),
        ({"seed": 5}, ["--tokenizer=nowhere"], "tokenizer nowhere does not exist"),
    ],
)
def test_a_refused_run_leaves_the_directory_as_it_was(ran, root, tmp_path, capsys, changes, more, message):
    """Earlier answers are kept with their own questions."""
    out, command, _ = ran
    # Drop --answers: its file would be rejected first.
    kept = [word for word in command if not word.startswith(("--config=", "--answers="))]
    other = config_file(benchmark(root, **{"limit": 4, **changes}), tmp_path / "other.py")
    before = contents(out)
    assert main([*kept, f"--config={other}", *more]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert contents(out) == before


def contents(directory: Path) -> dict[Path, tuple[bytes, int]]:
    """Return the content and modification time of all files, including hidden ones."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in directory.rglob("*") if p.is_file()}


def test_help_and_the_exact_command(capsys):
    for words in (["--help"], ["radbench", "--help"], ["ratings", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
    assert "radbench" in capsys.readouterr().out
