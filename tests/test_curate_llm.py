"""Pairs by a language model: with any endpoint behaviour, no answer is lost or repeated, and all is counted."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import pytest

from input_pipeline.curate import jobs, llm, pmc, qa_prompts, question_answers
from input_pipeline.curate.__main__ import main
from input_pipeline.curate.qa_prompts import Pair
from input_pipeline.datasets import open_dataset
from tests import jats_papers
from tests.chat_server import FailingServer
from tests.dataset_tables import CASE, volumes, write_json

KEY = "sk-test-0123456789"
FAST = {"timeout": 5.0, "first_wait": 0.01, "concurrency": 4, "retries": 4}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def ask(server, folder, texts, **changes):
    endpoint = llm.Endpoint(server.url, "m", **(FAST | changes))
    answers = llm.Answers(folder / "answers.jsonl")
    requests = [[{"role": "user", "content": text}] for text in texts]
    return endpoint, answers, lambda: llm.ask_all(endpoint, answers, requests)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_misbehaviour_is_counted_exactly(tmp_path):
    plans = {
        "case 1 ": ["429", "429", "ok"], "case 2 ": ["500", "503", "ok"], "case 3 ": ["slow", "ok"],
        "case 4 ": ["cut off", "ok"], "case 5 ": ["bad json", "shape", "nothing", "ok"], "case 6 ": ["refusal"],
        "case 7 ": ["length"], "case 8 ": ["empty"], "case 9 ": ["400"], "case 10 ": ["500"],
    }  # fmt: skip
    texts = [f"case {k} ." for k in range(20)]
    with FailingServer(plans) as server:
        _, answers, go = ask(server, tmp_path, [*texts, "case 0 ."], timeout=2.0)
        counts = go()
        assert counts.ended == {"answered": 15, "refused": 1, "cut": 1, "empty": 1, "rejected": 1}
        assert counts.retried == {
            "429 (too many requests)": 2, "500 (server error)": 5, "503 (server error)": 1,
            "no answer in time": 1, "a broken connection": 1, "an invalid response": 3,
        }  # fmt: skip
        assert (counts.requests, counts.known, counts.left, len(answers)) == (21, 1, 1, 19)
        assert counts.sent == sum(server.tries.values()) == 20 + 2 + 2 + 1 + 1 + 3 + 4
        assert counts.tokens_in == 18 * 100 and max(server.served.values()) == 1 and sum(server.served.values()) == 18
        server.plans = {}
        again = go()
        assert (again.known, again.sent, again.ended) == (20, 1, {"answered": 1})
        assert go().sent == 0
        assert server.most <= 4 and max(server.served.values()) == 1
    found = lines(tmp_path)
    assert len({a["key"] for a in found}) == len(found) == 20
    assert KEY not in (tmp_path / "answers.jsonl").read_text(), "also where the server quotes it"


def test_odd_answers_are_paid_for_once(tmp_path):
    """Half a surrogate pair, which UTF-8 cannot store, and token counts that are not numbers."""
    with FailingServer({"case 1 ": ["surrogate"], "case 2 ": ["token texts"]}) as server:
        _, answers, go = ask(server, tmp_path, ["case 1 .", "case 2 ."])
        counts = go()
    assert (counts.sent, counts.left, counts.ended) == (2, 0, {"answered": 2})
    assert "User: What?\nAssistant: ?." in [answers[key]["text"] for key in answers._offsets]


@pytest.mark.parametrize("line", ["null", "[1]", "{}", '{"key": ["a"]}', '{"key": "a"}'])
def test_a_log_with_other_lines_is_refused_and_kept(tmp_path, line):
    """Only an incomplete last line is removed: the lines after another one are paid for."""
    answer = json.dumps({"key": "b", "kind": "answered", "text": "t", "finish": "stop", "tokens_out": 1})
    text = f"{answer}\n{line}\n{answer}\n"
    (tmp_path / "answers.jsonl").write_text(text)
    with pytest.raises(ValueError, match="a line is not an answer with"):
        llm.Answers(tmp_path / "answers.jsonl")
    assert (tmp_path / "answers.jsonl").read_text() == text


@pytest.mark.parametrize("text, seconds", [(None, 0), ("2.5", 2.5), ("nan", 0), ("-1", 0), ("inf", 600), ("soon", 0)])
def test_seconds_of_retry_after(text, seconds):
    assert llm._seconds(text) == seconds


@pytest.mark.parametrize(("what", "words"), [("401", r"refuses requests \(401\)"), ("404", "404")])
def test_what_stops_a_run(tmp_path, what, words):
    with FailingServer({"case 2 ": [what]}, pause=0.05) as server:
        _, answers, go = ask(server, tmp_path, [f"case {k} ." for k in range(40)])
        with pytest.raises(llm.Stop, match=words) as stopped:
            go()
        assert KEY not in str(stopped.value)
        assert len(answers) == sum(server.served.values()) == stopped.value.counts.ended["answered"] < 12


def test_budget_rate_and_key(tmp_path, monkeypatch):
    with FailingServer() as server:
        _, answers, go = ask(
            server, tmp_path, [f"case {k} ." for k in range(30)], price_in=1e4, budget=5.0, concurrency=1
        )
        with pytest.raises(llm.Stop, match="budget of 5"):
            go()
        assert len(answers) == 5, "1 a request"
        (tmp_path / "b").mkdir()
        _, _, go = ask(server, tmp_path / "b", [f"case {k} ." for k in range(6)], per_minute=1200)
        start = time.monotonic()
        go()
        assert time.monotonic() - start >= 0.25, "six requests, 50 ms apart"
        monkeypatch.delenv("OPENAI_API_KEY")
        with pytest.raises(ValueError, match="OPENAI_API_KEY has no key"):
            go()
        assert server.keys == {f"Bearer {KEY}"}


def test_killed_at_any_moment(tmp_path):
    """After SIGKILL and with half a line, every answer is stored once; only requests in flight are sent again."""
    write_json(tmp_path / "cap.json", [CASE | {"finding": f"Lesion {k}.", "npy_path": f"{k}.npy"} for k in range(60)])
    command = [sys.executable, "-m", "input_pipeline.curate", "vqa", "cap.json", "--out", "out", "--model", "m"]
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    with FailingServer(pause=0.1) as server:
        command += ["--base-url", server.url, "--concurrency", "4"]
        run = lambda: subprocess.Popen(  # noqa: E731
            command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for least in (20,):
            with run() as process:
                until = time.monotonic() + 200
                while sum(server.served.values()) < least and process.poll() is None and time.monotonic() < until:
                    time.sleep(0.005)
                process.send_signal(signal.SIGKILL)
                assert process.wait() == -signal.SIGKILL
        with open(tmp_path / "out" / "answers.jsonl", "ab") as file:
            file.write(b'{"key": "half a li')
        with run() as process:
            assert process.wait(200) == 0
        assert 60 <= sum(server.served.values()) <= 60 + 4
    found = lines(tmp_path / "out")
    assert len({a["key"] for a in found}) == len(found) == 60
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["counts"]["rows written"] == 120
    table = (tmp_path / "out" / "vqa.csv").read_text()
    assert [r["image_path"] for r in csv.DictReader(io.StringIO(table))][::2] == [f"{k}.npy" for k in range(60)]


@pytest.mark.parametrize(
    ("text", "cut", "pairs", "why"),
    [
        ("User: A?\nAssistant: B.\nUser: C?\nAssistant: D.", False, [("A?", "B."), ("C?", "D.")], ""),
        ("**User:** A?\n**Assistant:** B\nmore.", False, [("A?", "B more.")], ""),
        ("1. Q: A?\n   A: B.", False, [("A?", "B.")], ""),
        ("User: A?\nAssistant: B.\nUser: C?\nAssistant: D is cut", True, [("A?", "B.")], ""),
        ("User: A?\nUser: C?\nAssistant: D.", False, [("C?", "D.")], ""),
        # On one line, as in the paper's Figure 3.
        (
            "User: A 2? Assistant: B. User: C? Assistant: Less than 2. User: E? Assistant: F",
            False,
            [("A 2?", "B."), ("C?", "Less than 2."), ("E?", "F")],
            "",
        ),
        ("User: A? Assistant: B.\nUser: C? Assistant: D.", False, [("A?", "B."), ("C?", "D.")], ""),
        ("**User:** A? **Assistant:** B. User: C? Assistant: D is cut", True, [("A?", "B.")], ""),
        ("1. Q: A? A: B. 2. Q: C? A: Hepatitis A: D.", False, [("A?", "B."), ("C?", "Hepatitis A: D.")], ""),
        (
            "User: A? Assistant: Two panels. A: axial. B: coronal.",
            False,
            [("A?", "Two panels. A: axial. B: coronal.")],
            "",
        ),
        ("NONE.", False, [], "nothing to ask"),
        ("I'm sorry, I can't.", False, [], "refused"),
        ("Some prose.", False, [], "no turns"),
        ("", False, [], "no turns"),
    ],
)
def test_turns(text, cut, pairs, why):
    assert qa_prompts.parse_turns(text, cut) == ([Pair(*p) for p in pairs], why)


@pytest.mark.parametrize(
    ("question", "answer", "fault"),
    [
        ("What is seen in the left lung?", "A consolidation.", ""),
        ("According to the CT image, is it displaced?", "No.", ""),
        ("What does the report describe?", "A cyst.", "it refers to the text"),
        ("What is mentioned?", "A cyst.", "it refers to the text"),
        ("How big is it?", "3 cm.", ""),  # MedMD has sizes and ages; radmd removes them
        ("What does the image of the 54-year-old show?", "A cyst.", ""),
        ("What changed since March 2019?", "The cyst.", "it states a date"),
        ("Who is seen?", "Mr. Miller.", "it names a person"),
        ("Which symptoms are there?", "Cough.", "the image cannot answer it"),
        ("What treatment was given?", "None.", "the image cannot answer it"),
        ("Is it malignant?", "It cannot be determined from the image.", "it is not answered"),
        ("What is it?", "A cyst; consult a physician.", "it is not answered"),
        ("Describe it.", "A cyst.", "the question does not end with a question mark"),
        (
            "¿Qué se observa en la imagen del tórax de este paciente con la tos?",
            "Una masa en el pulmón.",
            "not English",
        ),
        ("这是什么?", "囊肿", "not English"),
        ("What is <image-1>?", "A cyst.", "image marks"),
        ("What is it?", "", "a question or an answer is blank"),
    ],
)
def test_checks(question, answer, fault):
    assert qa_prompts.rejection(Pair(question, answer)) == fault


def test_our_own_examples_pass_our_checks():
    for _, said in qa_prompts.EXAMPLES:
        pairs, why = qa_prompts.parse_turns(said)
        assert not why and 2 <= len(pairs) <= 3 and [qa_prompts.rejection(p) for p in pairs] == [""] * len(pairs)


def test_case_reports(tmp_path, capsys):
    """From packages to a table that the reader accepts: contexts without figures, on request only radiologic ones."""
    source = jats_papers.packages(tmp_path / "oa", ("PMC9000003", "PMC9000008"))
    (tmp_path / "pmc").mkdir()
    options = {"any_language": False, "pictures": True, "cases": True, "keep_unillustrated": False}
    pmc.curate("pmc-inline", source, tmp_path / "pmc", options, workers=0)
    common = ["pmc-casereport", str(tmp_path / "pmc" / "cases.jsonl"), "--out", str(tmp_path / "pmc"), "--model", "m"]
    common += ["--radiologic"]
    with FailingServer({"Caption: Coronal CT.": ["sorry"]}) as server:
        common += ["--base-url", server.url, "--concurrency", "2"]
        assert main([*common, "--dry-run", "--price-in", "1"]) == 0
        assert not server.tries and "requests to send" in capsys.readouterr().out
        assert main([*common, "--limit", "2"]) == 0
        assert main(common) == 0
        assert max(server.tries.values()) == 1
    assert json.loads((tmp_path / "pmc" / "report.json").read_text())["tool"] == "pmc-inline", "it is not overwritten"
    report = json.loads((tmp_path / "pmc" / "report-pmc-casereport.json").read_text())
    assert (tmp_path / "pmc" / "report-pmc-casereport-dry-run.json").is_file()
    assert report["counts"]["answers: refused"] == 1
    assert report["counts"]["requests answered before, or equal to another"] == 2
    dataset = open_dataset("pmc_casereport", table="casereport.csv", root=tmp_path / "pmc")
    assert len(dataset) == report["counts"]["rows written"]
    contexts = {v[2] for v in dataset._rows if v[1] == "PMC9000003"}
    assert "A 61-year-old woman presented with pelvic pain." in contexts
    assert any(c.endswith("She was discharged on day 12.") for c in contexts) is False, (
        "the discussion is not asked about"
    )
    assert not any("Fig" in c for c in contexts)
    asked = list(server.tries)
    assert not any("proptosis" in text for text in asked), "a face is not radiologic"
    every = question_answers.case_requests(tmp_path / "pmc" / "cases.jsonl", {"radiologic": False}, jobs.Result())
    assert any("proptosis" in r.messages[-1]["content"] for r in every), "but MedMD has it"
    for scan in {s for i in range(len(dataset)) for s in dataset.scans(i)}:
        assert (tmp_path / "pmc" / scan.path).is_file()


def test_vqa_reads_back_and_says_what_is_left(tmp_path, capsys):
    for name in ("v/1.npy", "v/2.npy"):
        volumes(tmp_path, name, 1)
    rows = [CASE, CASE | {"finding": "Other.", "npy_path": "v/2.npy"}, CASE | {"finding": "", "impression": ""}]
    write_json(tmp_path / "cap.json", rows)
    command = ["vqa", str(tmp_path / "cap.json"), "--out", str(tmp_path), "--model", "m", "--retries", "0"]
    with FailingServer({"Other": ["500", "ok"]}) as server:
        assert main([*command, "--base-url", server.url]) == 1
        assert len(open_dataset("rad3d_vqa", table="vqa.csv", root=tmp_path)) == 2
        assert main([*command, "--base-url", server.url]) == 0
    assert len(open_dataset("rad3d_vqa", table="vqa.csv", root=tmp_path)) == 4
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["problems"] == 1 and report["counts"]["requests answered before, or equal to another"] == 1
    assert KEY not in "".join(f.read_text() for f in tmp_path.glob("*.json*"))
    assert main([*command[:1], str(tmp_path / "none.json"), *command[2:]]) == 2
    assert "table not found" in capsys.readouterr().err


def test_a_key_in_an_answer_is_removed(tmp_path, capsys):
    """The key is removed from files and messages; without a key, an answer "none" is unchanged."""
    rows = [CASE | {"npy_path": f"v/{k}.npy", "finding": f"Case {k} of a mass."} for k in range(3)]
    write_json(tmp_path / "cap.json", rows)
    plans = {"Case 0": ["echo"], "Case 1": ["echo refusal"], "Case 2": ["400"]}
    with FailingServer(plans) as server:
        command = ["vqa", str(tmp_path / "cap.json"), "--model", "m", "--base-url", server.url]
        assert main([*command, "--out", str(tmp_path / "out")]) == 0
        assert server.keys == {f"Bearer {KEY}"}
        assert main([*command, "--out", str(tmp_path / "keyless"), "--key-variable", ""]) == 0
    written = {f.name: f.read_text() for f in (tmp_path / "out").iterdir() if f.is_file()}
    assert "It is ..., or none." in written["vqa.csv"] and "Not with Bearer ..." in written["problems.jsonl"]
    assert len(written["answers.jsonl"].splitlines()) == 3
    shown = capsys.readouterr()
    for name, text in (written | {"stdout": shown.out, "stderr": shown.err}).items():
        assert KEY not in text, name
    assert "It is none, or none." in (tmp_path / "keyless" / "vqa.csv").read_text()


@pytest.mark.parametrize("form", ["base64", "percent", "part"])
def test_a_key_in_another_form_is_removed(tmp_path, form):
    """The server of the endpoint repeats the key encoded, in an error or in an answer."""
    secret = "sk-test/Ab3dE5fG7hI9jK1lM2nO"
    shown = {
        "base64": base64.b64encode(f"Bearer {secret}".encode()).decode(),
        "percent": urllib.parse.quote(secret, safe=""),
        "part": secret[:20],
    }[form]
    client = llm._Client.__new__(llm._Client)
    client.secret = secret
    assert shown not in client._message(f"wrong key {shown}") and secret[:12] not in client._without_key(shown)


def test_another_request_is_another_key():
    endpoint = llm.Endpoint("http://a", "m")
    one = llm.request_key(endpoint, [{"role": "user", "content": "a"}])
    assert one == llm.request_key(dataclasses.replace(endpoint, base_url="http://b", retries=1), [
        {"role": "user", "content": "a"}])  # fmt: skip
    others = [dataclasses.replace(endpoint, model="n"), dataclasses.replace(endpoint, temperature=0.0)]
    assert one not in [llm.request_key(e, [{"role": "user", "content": "a"}]) for e in others]
    assert question_answers.background(
        [("He fell.", "Case", []), ("See Figure 1.", "Case", []), ("Rare.", "Discussion", [])]
    ) == ("He fell.")


def test_a_case_of_several_scans_is_asked_about_once(tmp_path):
    rows = [
        CASE | {"npy_path": ["a.png", "b.png"], "impression": "None"}, CASE | {"npy_path": "c.png", "finding": ["-"]},
        CASE | {"finding": "nan", "impression": "N/A"},
    ]  # fmt: skip
    write_json(tmp_path / "cap.json", rows)
    result = jobs.Result()
    requests = list(question_answers.caption_requests(tmp_path / "cap.json", {}, result))
    assert [r.cells["image_path"] for r in requests] == ["['a.png', 'b.png']", "c.png"]
    assert [r.messages[-1]["content"] for r in requests] == [
        "Findings: A 3 x 2.5 cm mass. No effusion.", "Impression: Lung abscess"
    ]  # fmt: skip
    assert [p["row"] for p in result.problems] == ["3"]
