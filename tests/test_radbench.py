"""Questions of a benchmark: fixed wording, skipped rows, test studies in the training data."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from dataset_tables import write_csv
from practice import practice
from radbench_parts import benchmark, sets

from configs import radbench as paper
from configs import radbench_practice
from input_pipeline.datasets import open_dataset, sample_rng
from input_pipeline.samples import Sample, Scan, Text
from input_pipeline.sources import NoTerms
from input_pipeline.text.tokenizer import load_tokenizer
from input_pipeline.text.tokens import encode
from radfm_jax.evaluate import leaks
from radfm_jax.evaluate.leaks import find_leaks
from radfm_jax.evaluate.radbench import DATASETS, TASKS, Benchmark, Question
from radfm_jax.evaluate.radbench_build import Skipped, build, question_of, read_questions, write_questions, write_roots
from radfm_jax.inference import inputs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return practice(tmp_path_factory.mktemp("radbench"), train=4, test=8, num_latents=4)


@pytest.fixture(scope="module")
def root(data) -> Path:
    return Path(data.tokenizer).parent


@pytest.fixture(scope="module")
def bench(root):
    return build(benchmark(root))


def test_five_tasks_and_what_is_missing(bench, root):
    assert {q.task for q in bench.questions} == set(TASKS)
    assert len({q.row_id for q in bench.questions}) == len(bench.questions)
    assert bench.missing["slake"] == f"{root / 'test/none.csv'} is missing"
    assert bench.missing["mimic_cxr"] == "not in the config"
    assert bench.missing.keys() == DATASETS.keys() - {q.dataset for q in bench.questions}
    of = {name: [q for q in bench.questions if q.dataset == name] for name in sets(root)}
    assert len(of["rad3d_modality"]) == 8 and len(of["rad3d_caption"]) == 8
    answers = [q.references[0] for q in of["cxr_mix"]]
    assert answers.count("yes") == answers.count("no") > 0


def test_references_and_facts(bench, root):
    lines = (root / "test/labels.jsonl").read_text().splitlines()
    truth = {line["study_id"]: line for line in map(json.loads, lines)}
    for q in bench.questions:
        assert q.study in truth and q.modality == truth[q.study]["modality"]
        assert all(Path(scan.path).exists() and scan.path.startswith(str(root)) for scan in q.scans)
        if q.task == "modality":
            assert q.references == ({"ultrasound": "Ultrasound"}.get(q.modality, q.modality),)
            assert q.references[0] in q.closed and len(q.closed) == 6
        if q.dataset == "cxr_mix":
            assert q.closed == ("yes", "no") and q.anatomy == "chest"


def test_wording_is_fixed_by_the_seed(bench, root):
    assert build(benchmark(root)).questions == bench.questions
    other = build(benchmark(root, seed=1)).questions
    assert [q.row_id for q in other] == [q.row_id for q in bench.questions] and other != bench.questions


def test_a_question_has_the_tokens_of_training(root, data, bench):
    """For all positions of scans, a prompt has the tokens that training reads before the answer."""
    tokenizer, preparation = load_tokenizer(data.tokenizer), inputs.Preparation.from_config(data)
    of = {q.row_id: q for q in bench.questions}
    for name, fields in sets(root).items():
        if name == "slake":
            continue
        plain = {k: v for k, v in fields.items() if k not in ("family", "facts")}
        dataset = open_dataset(fields["family"], **plain, quarantine=True)
        for i in range(len(dataset)):
            row_id = dataset.row_id(i)
            sample = dataset.sample(i, sample_rng(0, 0, name, row_id))
            whole = encode(sample, tokenizer, NoTerms(), max_scans=8, num_latents=4, max_tokens=2**20)
            q = of[f"{name}/{row_id}"]
            asked = inputs.encode_prompt(q.prompt, len(q.scans), tokenizer, preparation, context=q.context)
            assert whole.ids[: len(asked.ids)].tolist() == asked.ids.tolist(), q
            assert not np.asarray(whole.weights)[: len(asked.ids) - 1].any()


def test_contexts_and_marks():
    parts = (
        Text("Age 35.", "context"), Scan("a.png"), Scan("b.png"), Text("What is new?", "instruction"), Scan("a.png"),
        Text("Nothing.", "response"),
    )  # fmt: skip
    q = question_of(Sample("1", "x", "vqa", "s", parts), "x", "vqa", "x/1", Path("/"))
    assert (q.context, q.prompt) == ("Age 35.", "<image-1> <image-2> What is new? <image-1>")
    assert [s.path for s in q.scans] == ["/a.png", "/b.png"] and q.references == ("Nothing.",)
    assert Question.from_dict(json.loads(json.dumps(q.to_dict())), {"x": "/"}) == q
    windowed = dataclasses.replace(q, scans=(Scan("/a.nii", 2, (-100.0, 200.0)),))
    assert Question.from_dict(json.loads(json.dumps(windowed.to_dict())), {"x": "/"}) == windowed


@pytest.mark.parametrize(
    "task, said, reason",
    [
        ("report", ("Q?", "a"), "task is vqa"),
        ("vqa", ("What is <image-1>?", "a"), "mark of a scan"),
        ("diagnosis", ("Q?", "Edema."), "an open question"),
        ("modality", ("Q?", "bone scan"), "not one of the six"),
        ("modality", ("Q?", "CT and MRI"), "several"),
    ],
)
def test_skipped_rows(task, said, reason):
    parts = (Scan("a.png"), Text(said[0], "instruction"), Text(said[1], "response"))
    with pytest.raises(Skipped, match=reason):
        question_of(Sample("1", "x", "vqa" if task == "report" else task, None, parts), "x", task, "x/1", Path("/"))


def test_a_scan_outside_the_root_is_skipped(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret.png")
    parts = (Scan("link.png"), Text("Q?", "instruction"), Text("a", "response"))
    with pytest.raises(Skipped, match="points outside the root"):
        question_of(Sample("1", "x", "vqa", None, parts), "x", "vqa", "x/1", tmp_path / "in")


def test_a_limit_is_drawn_by_the_seed(root, bench):
    few = build(benchmark(root, limit=3))
    assert few.skipped["vqa_rad"]["more than limit=3"] > 0
    by_set = {name: [q for q in few.questions if q.dataset == name] for name in sets(root)}
    assert all(len(of) == 3 for name, of in by_set.items() if name != "slake")
    assert set(few.questions) < set(bench.questions)
    assert build(benchmark(root, limit=3)).questions == few.questions


def test_bad_rows_are_counted(root, tmp_path):
    for name in ("scans", "test"):
        (tmp_path / name).symlink_to(root / name)
    head, first, *_ = (root / "test/vqa.csv").read_text().splitlines()
    (tmp_path / "vqa.csv").write_text("\n".join([head, first, "a,,,b", "too,few"]) + "\n")
    some = {"vqa_rad": {"family": "vqa_rad", "root": str(tmp_path), "table": "vqa.csv"}}
    found = build(Benchmark(sets=some))
    reasons = found.skipped["vqa_rad"]
    assert sum(n for why, n in reasons.items() if why.startswith("bad row: ")) == 2, reasons


def test_an_unreadable_stack_stays_a_question(tmp_path):
    """Like any unreadable scan, it fails for every model."""
    np.save(tmp_path / "good.npy", np.zeros((2, 3, 32, 32, 4), np.float32))
    (tmp_path / "empty.npy").write_bytes(b"")
    rows = [(f"{name}.npy", "Where?", "left") for name in ("good", "gone", "empty")]
    write_csv(tmp_path / "t.csv", ("image_path", "question", "answer"), *rows)
    some = {"rad3d_vqa": {"family": "rad3d_vqa", "root": str(tmp_path), "table": "t.csv"}}
    found = build(Benchmark(sets=some))
    assert not found.skipped["rad3d_vqa"]
    shown = [[(Path(s.path).name, s.volume) for s in q.scans] for q in found.questions]
    assert shown == [[("good.npy", 0), ("good.npy", 1)], [("gone.npy", None)], [("empty.npy", None)]]


def test_questions_are_written_and_read(bench, tmp_path):
    write_questions(bench.questions, tmp_path / "questions.jsonl")
    assert str(Path(bench.questions[0].root)) not in (tmp_path / "questions.jsonl").read_text()
    write_roots(bench.questions, tmp_path)
    assert read_questions(tmp_path / "questions.jsonl") == bench.questions
    odd = [Question("x/1", "vqa", "x", "One\u2028two\x85three?", ("a\u2029b",))]
    write_questions(odd, tmp_path / "odd.jsonl")
    assert read_questions(tmp_path / "odd.jsonl") == odd
    with open(tmp_path / "questions.jsonl", "a") as file:
        file.write(json.dumps(bench.questions[0].to_dict()) + "\n")
    with pytest.raises(ValueError, match="duplicate id"):
        read_questions(tmp_path / "questions.jsonl")


def test_leaks(root, data, bench, tmp_path):
    """The practice splits share nothing; questions about training scans are leaks, renamed copies as well."""
    assert find_leaks(bench.questions, data.index) == []
    fields = {**sets(root)["vqa_rad"], "table": "train/vqa.csv"}
    del fields["facts"], fields["study"]  # the index has no study pattern, so the path is the study
    trained = build(Benchmark(sets={"vqa_rad": fields})).questions
    found = find_leaks(trained, data.index)
    assert {(leak["id"], leak["kind"]) for leak in found} == {(q.row_id, k) for q in trained for k in ("study", "scan")}
    file = next(Path(s.path) for q in trained for s in q.scans if Path(s.path).is_file())
    copy = tmp_path / f"copy{file.suffix}"
    copy.write_bytes(file.read_bytes())
    renamed = Question("x/1", "vqa", "x", "Q?", ("a",), scans=(Scan(str(copy)),), study="other")
    (leak,) = find_leaks([renamed], data.index)
    assert leak["kind"] == "scan" and leak["in"].endswith(file.name)


def test_a_path_is_a_study_only_below_its_own_root():
    studies = {"images/1.png": {"/a": "one"}, "p12345678": {"/a": "one"}}
    q = Question("x/1", "vqa", "x", "Q?", ("a",), scans=(Scan("/b/images/1.png"),), study="images/1.png")
    assert leaks._training_source(q, studies) == ""
    assert leaks._training_source(dataclasses.replace(q, scans=(Scan("/a/images/1.png"),)), studies) == "one"
    assert leaks._training_source(dataclasses.replace(q, study="p12345678"), studies) == "one"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sets": {}}, "sets is empty"),
        ({"sets": {"own": {"family": "jsonl", "root": "r", "table": "t"}}}, "own.task is None"),
        ({"sets": {"slake": {"family": "slake", "root": "r", "table": "t", "task": "report"}}}, "rename the set"),
        ({"sets": {"slake": {"family": "slak", "root": "r"}}}, "slake.family is 'slak'.*needs `table`"),
        (
            {"sets": {"slake": {"family": "slake", "root": "r", "table": "t", "modalty": "CT"}}},
            r"slake has no field 'modalty' \(did you mean modality\?\)",
        ),
        ({"set": {}}, "did you mean sets"),
    ],
)
def test_mistakes_in_a_config(fields, message):
    with pytest.raises(ValueError, match=message):
        Benchmark.from_dict(fields)


def test_the_configs():
    found = Benchmark.from_dict(paper.get_config("/data"))
    assert found.sets.keys() == DATASETS.keys() and len(DATASETS) == 13
    assert {found.task(name) for name in found.sets} == set(TASKS)
    missing = build(found).missing
    assert missing["vqa_rad"] == "/data/vqa_rad is missing" and missing.keys() == DATASETS.keys()
    practised = Benchmark.from_dict(radbench_practice.get_config())
    assert {practised.task(name) for name in practised.sets} == set(TASKS)
