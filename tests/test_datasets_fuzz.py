"""Seeded damage to tables: a typed error with file and row, or a correct parse; no row is dropped silently.

Half of the cases damage one known row (or the whole file) in a known way; all other rows must be unchanged. The other
half flip, cut or repeat random bytes; then an error must name the file and a row, and the rows read must be valid.
"""

import csv
import io
import json

import numpy as np
import pytest

from input_pipeline.datasets import open_dataset
from input_pipeline.datasets.rows import bad_path, bad_text
from input_pipeline.samples import RowError, Text

HEADER = ["img_root_dir", "Figure_path", "Question", "Answer"]
RNG = np.random.default_rng  # of a sample; nothing that is compared here depends on it


def content(dataset) -> dict[str, tuple]:
    """Return row id -> sorted texts and paths of the row."""
    out = {}
    for i in range(len(dataset)):
        sample = dataset.sample(i, RNG(0))
        # Paths, and the texts that do not come from a drawn prompt.
        roles = ("response", "context") if dataset.name == "rad3d_caption" else ("response", "instruction", "context")
        text = sorted(p.text for p in sample.parts if isinstance(p, Text) and p.role in roles)
        assert all(p.text == p.text.strip() != "" and not bad_text(p.text) for p in sample.parts if isinstance(p, Text))
        assert all(not bad_path(s.path) for s in dataset.scans(i)) and dataset.scans(i)
        out[sample.row_id] = (*text, *(s.path for s in dataset.scans(i)))
    return out


def opened(name, file):
    """Return (content, rows of the problems, good rows, bad rows), or the error, which must name file and row."""
    try:
        dataset = open_dataset(name, table=file, root=file.parent, quarantine=True)
    except RowError as error:
        assert (
            error.file == str(file) and isinstance(error.row, int) and error.row >= 0 and error.reason and error.remedy
        )
        assert len(str(error)) < 60_000
        return error
    assert all(p.file == str(file) and isinstance(p.row, int) and p.reason and p.remedy for p in dataset.problems)
    return content(dataset), {p.row for p in dataset.problems}, len(dataset), len(dataset.problems)


# --- rows of each format, and damage to one row ---


def csv_line(cells) -> bytes:
    out = io.StringIO()
    csv.writer(out).writerow(cells)
    return out.getvalue().encode()


def csv_rows(rng, n):
    pieces = ['Is "it" big?', "a,b", "two\nlines", "plain", "ümläut 2.5 cm", "x" * 300, " padded "]
    word = lambda: pieces[rng.integers(len(pieces))]  # noqa: E731
    return [["img", f"{k}.png", f"{word()} {k}", f"{word()} answer"] for k in range(n)]


def damage_csv(rng, rows, k):
    """Return the damaged bytes of row k, and True if it becomes a problem, else its new cells."""
    cells, column = list(rows[k]), int(rng.integers(1, 4))
    fault = rng.integers(12)
    if fault == 0:
        cells[column] += "\x00"
    elif fault == 1:
        return csv_line(cells[:3]).replace(b"\r\n", b"") + b",ab\xff\xfec\r\n", True
    elif fault == 2:
        cells[column] = ["", " ", "nan", "NaN", "NULL", "null", "<NA>"][rng.integers(7)]
    elif fault == 3:
        cells.pop(column)
    elif fault == 4:
        cells.append("extra")
    elif fault == 5:
        return b"\r\n", True
    elif fault == 6:
        cells[column] = "y" * 1_000_001
    elif fault == 7:
        cells[1] = ["../x.png", "a/../../b.png", "..\\x.png", "a\x1b.png"][rng.integers(4)]
    elif fault == 8:
        return csv_line(cells[:3]).replace(b"\r\n", b"") + b',"a" b\r\n', True
    elif fault == 9:
        return b",,,\r\n", True
    elif fault == 10:
        cells[3] = "a\ud800".encode("utf-8", "surrogatepass").decode("latin-1")
        return csv_line(cells).decode().encode("latin-1", "ignore"), True
    else:
        cells[2] = 'quoted "" and, a\nline break'
        return csv_line(cells), cells
    return csv_line(cells), True


GOOD = {"task": "vqa", "scans": ["a.png", "b.png"], "instruction": "<image-2> or <image-1>?", "response": "yes"}


def jsonl_rows(rng, n):
    return [{**GOOD, "id": f"r{k}", "response": f"yes {k}", "context": "c\n<image-1>"} for k in range(n)]


def damage_jsonl(rng, rows, k):
    row = dict(rows[k])
    text = json.dumps(row)
    faults = [
        text[: int(rng.integers(1, len(text)))],
        text.replace('"yes', '\x00"yes'),
        text + "}",
        "[1]",
        "3",
        "null",
        "",
        text.replace(f'"yes {k}"', "NaN"),
        text.replace(f'"yes {k}"', "1e999"),
        text[:-1] + ', "id": "twice"}',
        "[" * 50_000,
        json.dumps({**row, "extra": 1}),
        json.dumps({**row, "scans": ["a.png"]}),
        json.dumps({**row, "scans": [["a.png"]]}),
        json.dumps({**row, "task": "vqaa"}),
        json.dumps({**row, "id": rows[(k or 1) - 1]["id"]}) if k else "{}",
        json.dumps({**row, "response": "\ud800"}),
        json.dumps({**row, "response": "y" * 1_000_001}),
        json.dumps({**row, "instruction": "<image-1>"}),
        json.dumps({**row, "response": 10**4000})[:-1] + "}",
        json.dumps({**row, "id": None}),
        text.replace("yes", "\udcff"),
    ]
    return faults[rng.integers(len(faults))].encode("utf-8", "surrogateescape") + b"\n", True


CASE = {"pre": "P.", "pat": None, "npy_path": "a.nii", "finding": "F 2.5 cm.", "impression": "I.", "title": "T"}


def json_rows(rng, n):
    return [{**CASE, "finding": f"Finding {k}."} for k in range(n)]


def damage_json(rng, rows, k):
    row = dict(rows[k])
    fault = rng.integers(6)
    if fault == 0:
        row.pop(["npy_path", "finding", "impression"][rng.integers(3)])
    elif fault == 1:
        row["finding"] = [3, True, {"a": 1}, [["a"]], ["a", 2], "a\x00"][rng.integers(6)]
    elif fault == 2:
        row["finding"], row["impression"] = None, "nan"
    elif fault == 3:
        row["npy_path"] = ["../a.nii", "/etc/x.nii", "", None, 3, "a\x00.nii"][rng.integers(6)]
    elif fault == 4:
        return json.dumps([row, 3, "x", None][1 + rng.integers(3)]).encode(), True
    else:
        row["pat"] = 7
    return json.dumps(row).encode(), True


FORMATS = {
    "vqa_rad": (csv_rows, csv_line, damage_csv, csv_line(HEADER), b"", b""),
    "jsonl": (jsonl_rows, lambda row: json.dumps(row).encode() + b"\n", damage_jsonl, b"", b"", b""),
    "rad3d_caption": (json_rows, lambda row: json.dumps(row).encode(), damage_json, b"[", b",\n", b"]"),
}


def known_fault(rng, file, name):
    make, line, damage, head, between, tail = FORMATS[name]
    rows = make(rng, int(rng.integers(2, 12)))
    lines = [line(row) for row in rows]
    file.write_bytes(head + between.join(lines) + tail)
    before, problems, *_ = opened(name, file)
    assert len(before) == len(rows) and not problems
    k = int(rng.integers(len(rows)))
    lines[k], outcome = damage(rng, rows, k)
    bom = b"\xef\xbb\xbf" if rng.random() < 0.3 else b""
    file.write_bytes(bom + head + between.join(lines) + tail)
    after, problems, n, reported = opened(name, file)
    key = list(before)[k]
    expected = {row_id: value for row_id, value in before.items() if row_id != key}
    if outcome is True:
        assert problems == {k + 1} and n + reported == len(rows)
        assert after == expected
    else:
        assert not problems and {r: v for r, v in after.items() if r != key} == expected
        assert after[key] == (*sorted(c.strip() for c in outcome[2:]), "img/" + outcome[1])


def whole_file_fault(rng, file, name):
    make, line, _, head, between, tail = FORMATS[name]
    text = head + between.join(line(row) for row in make(rng, 5)) + tail
    name_in_head = "Question" if name == "vqa_rad" else "id" if name == "jsonl" else "npy_path"
    faults = [
        b"",
        text.decode().encode("utf-16"),
        text.replace(name_in_head.encode(), b"Quest", 99),
        b"\x00" * 50,
        b"\xff" * 50,
    ]
    file.write_bytes(faults[rng.integers(len(faults))])
    assert isinstance(opened(name, file), RowError)


def random_bytes(rng, file, name):
    make, line, _, head, between, tail = FORMATS[name]
    data = bytearray(head + between.join(line(row) for row in make(rng, 6)) + tail)
    for _ in range(int(rng.integers(1, 8))):
        a, b = sorted(int(x) for x in rng.integers(len(data) + 1, size=2))
        kind = rng.integers(5)
        if kind == 0 and a < len(data):
            data[a] = int(rng.integers(256))
        elif kind == 1:
            data[a:a] = [b'"', b",", b"\n", b"\x00", b"\xef\xbb\xbf", b"\xff", b"NaN", b"[", b"{", b"\r", b"\\"][
                rng.integers(11)
            ]
        elif kind == 2:
            del data[a : min(b, a + 40)]
        elif kind == 3:
            data[a:a] = data[a : min(b, a + 200)]
        elif kind == 4 and rng.random() < 0.3:
            del data[a:]
        if not data:
            break
    file.write_bytes(data)
    opened(name, file)


def attempt(seed, file):
    rng = np.random.default_rng(seed)
    name = list(FORMATS)[seed % 3]
    kind = rng.random()
    if kind < 0.5:
        known_fault(rng, file, name)
    elif kind < 0.6:
        whole_file_fault(rng, file, name)
    else:
        random_bytes(rng, file, name)


def run(seeds, tmp_path):
    failures = []
    for seed in seeds:
        try:
            attempt(seed, tmp_path / "table")
        except Exception as error:
            failures.append((seed, f"{type(error).__name__}: {str(error)[:200]}"))
    assert not failures, f"{len(failures)} of {len(seeds)}: {failures[:10]}"


def test_damaged_tables(tmp_path):
    run(range(100), tmp_path)


@pytest.mark.slow
def test_damaged_tables_a_thousand(tmp_path):
    run(range(100, 1100), tmp_path)


def test_a_ten_megabyte_cell(tmp_path):
    rows = csv_rows(np.random.default_rng(0), 4)
    rows[1][3] = "z" * 10_000_000
    (tmp_path / "t.csv").write_bytes(csv_line(HEADER) + b"".join(map(csv_line, rows)))
    found, problems, *_ = opened("vqa_rad", tmp_path / "t.csv")
    assert problems == {2} and found.keys() == {"1", "3", "4"}
