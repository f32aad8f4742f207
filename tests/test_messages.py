"""What reaches a terminal, a spreadsheet or a log: no control characters, no formulas, no secrets."""

from __future__ import annotations

import base64
import csv
import io
import re
import urllib.parse
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

import input_pipeline
import radfm_jax
from input_pipeline.console import SafeConsole, print_error
from input_pipeline.messages import printable, redacted, spreadsheet_cell
from radfm_jax import terminal
from radfm_jax.runtime import console

HOSTILE = "a\x1b]0;title\x07\x1b[2J\x9b31m\u202eb\ud800\r\x08c"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain é 中 \xa0", "plain é 中 \xa0"),
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        (b"caf\xe9", "caf\\udce9"),
        (Path("x\x07"), "x\\x07"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


def test_kept_characters():
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def is_safe(text: str) -> bool:
    return all(c.isprintable() or c in "\n " for c in text)


def test_a_console_escapes_every_text():
    out = io.StringIO()
    safe = SafeConsole(file=out, width=400, force_terminal=False)
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(Text(HOSTILE))
    for item in (HOSTILE, Text(HOSTILE), table):
        safe.print(item, markup=False)
    print_error(safe, HOSTILE)
    assert is_safe(out.getvalue()) and out.getvalue().count("\\x1b]0;title") == 6


def test_styles_still_reach_a_terminal():
    out = io.StringIO()
    SafeConsole(file=out, force_terminal=True, color_system="standard").print("[red]x[/red]\x1b[5m", highlight=False)
    assert out.getvalue() == "\x1b[31mx\x1b[0m\\x1b[5m\n"


def test_messages_of_commands(capsys):
    console.log(HOSTILE)
    terminal.message(HOSTILE)

    def fail():
        raise ValueError(HOSTILE)

    assert terminal.run(fail) == 2
    err = capsys.readouterr().err
    assert is_safe(err) and err.count("\\x1b") == 6


def lines_of_code():
    root = Path(input_pipeline.__file__).parents[1]
    for package in (input_pipeline, radfm_jax):
        for file in sorted(Path(package.__file__).parent.rglob("*.py")):
            for number, line in enumerate(file.read_text().splitlines(), 1):
                yield f"{file.relative_to(root)}:{number}", line


def test_there_is_no_other_console():
    found = [where for where, line in lines_of_code() if re.search(r"(?<![\w.])Console\(", line)]
    # summary.txt is a file.
    assert {where.split(":")[0] for where in found} == {"input_pipeline/index/summary.py"}


def test_errors_are_printed_as_printable_text():
    """A print call with an error must escape it."""
    for where, line in lines_of_code():
        if re.search(r"(?<![\w.])print\(", line) and re.search(r"\{(?:error|e|line)\b|\berror\b(?!:)", line):
            assert "printable(" in line or "unknown" in line or "json.dumps" in line, f"{where}: {line}"


@pytest.mark.parametrize("text", ["=1+1", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "  =1", "-", '=HYPERLINK("x")'])
def test_formulas_become_text(text):
    assert spreadsheet_cell(text) == "'" + text


@pytest.mark.parametrize("value", ["-0.5", "+3", "1e-3", "model", "", "a=b", 3, -0.5, "x@y"])
def test_numbers_and_other_texts_are_unchanged(value):
    assert spreadsheet_cell(value) == value


def test_scores_in_csv_have_no_formulas():
    from types import SimpleNamespace

    from radfm_jax.evaluate import report
    from radfm_jax.evaluate.metrics import Interval

    interval = Interval(*(-0.5,) * len(__import__("dataclasses").fields(Interval)))
    row = SimpleNamespace(model="=cmd()", task="vqa", grouping="task", group="@x", metrics={"f1": interval},
                          questions=1, failed=0, refused=0, studies=1)  # fmt: skip
    lines = list(csv.reader(io.StringIO(report.as_csv(SimpleNamespace(rows=[row])))))
    assert lines[1][:6] == ["'=cmd()", "ours", "vqa", "task", "'@x", "f1"] and lines[1][6] == "-0.500000"


SECRET = "sk-proj-Ab3/dE5+fG7hI9jK1lM2nO4pQ6rS8tU0"


def forms(secret: str) -> dict[str, str]:
    coded = {shift: base64.b64encode(b"x" * shift + secret.encode() + b"yz").decode() for shift in range(3)}
    return {
        "whole": secret,
        "header": f"Authorization: Bearer {secret}",
        "upper case": secret.upper(),
        "first half": secret[: len(secret) // 2],
        "last half": secret[len(secret) // 2 :],
        "middle": secret[8:24],
        "masked": f"{secret[:7]}{'*' * 20}{secret[-4:]}",
        "masked end": f"****{secret[-4:]}",
        "percent": urllib.parse.quote(secret, safe=""),
        "percent twice": urllib.parse.quote(urllib.parse.quote(secret, safe=""), safe=""),
        "every character": "".join(f"%{ord(c):02X}" for c in secret),
        "base64": coded[0],
        "base64 after one": coded[1],
        "base64 after two": coded[2],
        "url-safe": base64.urlsafe_b64encode(secret.encode()).decode(),
        "hex": secret.encode().hex(),
        "escapes": "".join(f"\\u{ord(c):04x}" for c in secret),
    }


@pytest.mark.parametrize("form", forms(SECRET))
def test_a_secret_is_removed_in_every_form(form):
    said = forms(SECRET)[form]
    result = redacted(f"Incorrect key: <{said}>. See the docs.", SECRET)
    assert result.startswith("Incorrect key: <") and result.endswith(">. See the docs.") and "..." in result
    remains = result.removeprefix("Incorrect key: <").removesuffix(">. See the docs.")
    for size in range(6, len(said)):
        for i in range(len(said) - size):
            part = said[i : i + size]
            assert part not in remains or part in "Authorization: Bearer "


def test_other_text_is_unchanged():
    text = "The lungs are clear. sk- is a prefix, project a word, and **** a mask."
    assert redacted(text, SECRET) == text and redacted(text, "") == text
    assert redacted("none of it", "abc") == "none of it" and redacted("key abc", "abc") == "key ..."
