"""The page that shows what the model sees: it matches the arrays, and no text can break it."""

import base64
import dataclasses
import html.parser
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from practice import practice, reseal, write_index

from input_pipeline.batching.collate import LoadedRow, ScanPlanes, collate_row
from input_pipeline.batching.plan import RowLimits
from input_pipeline.batching.report import RowInfo, SampleInfo
from input_pipeline.datasets import sample_rng
from input_pipeline.images import scans
from input_pipeline.images.intensity import one_channel_if_gray
from input_pipeline.images.planes import Sizes, Volume
from input_pipeline.images.volumes import prepare_volume
from input_pipeline.index import index
from input_pipeline.inspect import __main__ as command
from input_pipeline.inspect.escaping import visible
from input_pipeline.inspect.page import page
from input_pipeline.inspect.sampling import Overview, Source, first_rows
from input_pipeline.inspect.views import row_view
from input_pipeline.samples import Sample, Scan, Text
from input_pipeline.sources import open_sources
from input_pipeline.text.tokenizer import load_tokenizer
from input_pipeline.text.tokens import encode

HOSTILE = "<script>alert('1')</script> &amp; \"two\" \u202e \x00 caf\u00e9\nEND</div><!-- -->"
LATENTS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return practice(tmp_path_factory.mktemp("inspect"), train=10, test=6)


@pytest.fixture(scope="module")
def tokenizer(config):
    return load_tokenizer(config.tokenizer)


class Terms:
    """Finds one word."""

    def __init__(self, word):
        self.word = word

    def find(self, text):
        return [match.span() for match in re.finditer(self.word, text)]


# --- the page ---------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """A parsed page; refuses event handlers and tags that do not close in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.said, self.titles, self.styles = [], [], [], [], []
        self.classes = []  # of the open tags
        self.by_class = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert not [name for name in attrs if name.startswith("on")]
        self.tags.append((tag, attrs))
        self.titles.append(attrs.get("title", ""))
        if tag not in self.VOID:
            self.open.append(tag)
            self.classes.append(attrs.get("class"))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.classes.pop()

    def handle_data(self, data):
        for name in {*self.classes} - {None}:
            self.by_class[name] = self.by_class.get(name, "") + data
        (self.styles if self.open and self.open[-1] == "style" else self.said).append(data)

    def of(self, tag, name):
        return [attrs[name] for found, attrs in self.tags if found == tag and name in attrs]

    def of_class(self, name):
        return self.by_class.get(name, "")

    @property
    def text(self):
        return "".join(self.said)


def head(**changes):
    sources = (Source("mine", "jsonl", 1, 0, 1, 1.0),)
    return dataclasses.replace(
        Overview("c.py", "train", 0, True, 1, {"seed": "0"}, sources, {"real tokens": 1.0}, 0.5, 0.1), **changes
    )


def row_by_hand(tokenizer, parts, volumes, **changes):
    """Return a collated row of one sample; Scan("0") is volumes[0], and None could not be loaded."""
    sample = Sample("7", "jsonl", "report", None, parts)
    text = encode(sample, tokenizer, Terms("lesion"), max_scans=9, num_latents=LATENTS)
    limits = RowLimits(len(text.ids) + 3, 2, 16, 200, 4)
    slots = {slot: volumes[int(scan.path)] for slot, scan in enumerate(text.scans)}
    loaded = {slot: ScanPlanes.of(volume) for slot, volume in slots.items() if volume is not None}
    row = LoadedRow([text], [tuple(slots)], {slot: slot % 2 for slot in slots}, loaded)
    arrays = collate_row(row, limits, num_latents=LATENTS)
    sample = SampleInfo("mine", "7", "report", "a study", len(text.ids), 0, 0)
    info = RowInfo(0, 0, 0, (dataclasses.replace(sample, **changes),), len(text.ids), "end of the window", len(loaded))
    return arrays, info


def volume(shape=(64, 64, 1, 1)):
    return prepare_volume(np.random.default_rng(4).random(shape, np.float32), sizes=Sizes(64, 32, 8))


def test_hostile_text_is_escaped(tokenizer):
    """Markup, quotes, a bidirectional override and NUL, in texts, names, row ids and errors."""
    parts = (Scan("0"), Text("What is " + HOSTILE, "instruction"), Text("A lesion: " + HOSTILE, "response"))
    arrays, info = row_by_hand(tokenizer, parts, [volume()], source=HOSTILE, row_id=HOSTILE, task=HOSTILE)
    info = dataclasses.replace(info, left_out=(HOSTILE,), padding=HOSTILE)
    view = row_view(arrays, info, tokenizer, LATENTS)
    sources = (Source(HOSTILE, HOSTILE, 1, 0, 1, 1.0),)
    written = page(head(config=HOSTILE, sources=sources, settings={"index": HOSTILE}), [view])
    assert "\x00" not in written and "\u202e" not in written and "<script" not in written
    found = Page(written)
    assert not {"script", "iframe", "object", "link", "form"} & {tag for tag, _ in found.tags}
    shown = HOSTILE.replace("\u202e", "⟨U+202E⟩").replace("\x00", "⟨U+0000⟩")
    named = shown.replace("\n", "⟨U+000A⟩")
    # The config twice, a source and its family, a setting, padding, task, source, row id, and the error twice.
    assert found.text.count(named) == 11
    assert sum(named in title for title in found.titles) == 2
    normalized = tokenizer.decode(tokenizer.encode(HOSTILE))  # the tokenizer may change NUL
    texts = normalized.replace("\u202e", "⟨U+202E⟩").replace("\x00", "⟨U+0000⟩").replace("\n", "↵\n")
    text = found.text.replace("▪", "")  # another byte of a character
    assert f"What is {texts}" in text and f"A lesion: {texts}" in text


def test_every_character_is_visible_or_named():
    assert visible("a<b>&\"'") == "a&lt;b&gt;&amp;&quot;&#x27;"
    assert visible("\u200f\u200b\ufeff\u00a0\u2028\ud800") == "⟨U+200F⟩⟨U+200B⟩⟨U+FEFF⟩⟨U+00A0⟩⟨U+2028⟩⟨U+D800⟩"
    assert visible("5 × 3 mm, µ, 中, é") == "5 × 3 mm, µ, 中, é"


def test_classes_and_bars_of_a_row_by_hand(tokenizer):
    parts = (Scan("0"), Text("Why", "instruction"), Text("mild lesion", "response"), Scan("1"))
    arrays, info = row_by_hand(tokenizer, parts, [volume(), volume((32, 32, 8, 1))])
    view = row_view(arrays, info, tokenizer, LATENTS)
    assert view.warnings == () and view.samples[0].warnings == ()
    written = page(head(), [view])
    found = Page(written)
    tokens = [found.of_class(f"t w{weight}") for weight in (0, 1, 3)]
    legend = "not trained on", "trained, weight 1", "trained, weight 3: a medical term"
    assert tokens == [legend[0] + " Why", legend[1] + " mild", legend[2] + " lesion"]
    assert found.of_class("chip w1") == "EOSEOS"  # of the legend, and of the text
    assert f"image 1 · {LATENTS} tokens" in found.text and f"image 2 · {LATENTS} tokens" in found.text
    assert "64 × 64 × 4 voxels (one slice, repeated), gray · 4 patches" in found.text
    assert "32 × 32 × 8 voxels, gray · 2 patches" in found.text
    assert "Padding: 3 positions, end of the window." in found.text
    n = len(arrays["segments"])
    styles = [(attrs["class"], attrs["style"]) for tag, attrs in found.tags if tag == "i"]
    assert ("task-report", f"left:{0:.4%};width:{(n - 3) / n:.4%}") in styles
    assert ("hatched", f"left:{2 / n:.4%};width:{LATENTS / n:.4%}") in styles
    assert ("padding", f"left:{(n - 3) / n:.4%};width:{3 / n:.4%}") in styles
    assert ("slot", "left:0.0000%;width:12.5000%;--hue:138") in styles  # slot 1, 2 of 16 patches
    # One image of the 2D scan, eight slices of the volume.
    assert [attrs["alt"] for tag, attrs in found.tags if tag == "img"] == [
        "image 1, its slice", *(f"image 2, slice {k} of 8" for k in range(1, 9))
    ]  # fmt: skip


def test_warnings_are_in_a_box(tokenizer):
    flat = Volume(np.full((32, 32, 1, 1), 7, np.uint8), 1 / 255)
    parts = (Scan("0"), Text("Why", "instruction"), Text("mild", "response"))
    arrays, info = row_by_hand(tokenizer, parts, [flat], cut=3, dropped_scans=1)
    arrays["weights"][:] = 0
    arrays["scan_offset"][0] = 2
    found = Page(page(head(asked=5), [row_view(arrays, info, tokenizer, LATENTS)]))
    for words in (
        "3 warnings",
        "the scan in slot 0 is constant: every value is 2.02745",
        "the scan in slot 0 has values from 2.02745 to 2.02745; the images show 0 to 1",
        "no token is trained on: every weight is zero",
        "3 tokens of text cut: the sample was too long.",
        "1 scan left out: more than data.max_scans",
        "5 rows were requested; the epoch has only these.",
    ):
        assert words in found.text
    # One of two scans did not load: no visual tokens, no weights.
    parts = (Scan("0"), Scan("1"), Text("Why", "instruction"), Text("mild", "response"))
    arrays, info = row_by_hand(tokenizer, parts, [volume(), None])
    view = row_view(arrays, dataclasses.replace(info, left_out=("x.png, row 7 of mine: broken",)), tokenizer, LATENTS)
    found = Page(page(head(), [view]))
    assert found.text.count(f"image left out · {LATENTS} tokens") == 2
    for words in ("left out: x.png, row 7 of mine: broken", "slot 0 is not shown by any", "every weight is zero"):
        assert words in found.text


# --- the command ------------------------------------------------------------------------------------------------------


def config_file(directory: Path, config) -> Path:
    file = directory / "my_config.py"
    fields = json.dumps(config.to_dict())
    file.write_text(
        "import json\nfrom ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({{'data': json.loads({fields!r})}}).lock()\n"
    )
    return file


def pixels(uri):
    kind, code = uri.split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(code))))


def test_page_shows_the_scans_of_the_files_and_the_rows_of_the_pipeline(config, tmp_path, capsys):
    out = tmp_path / "page"
    arguments = [f"--config={config_file(tmp_path, config)}", "--out", str(out), "--split", "test", "--rows", "3"]
    assert command.main(arguments) == 0
    assert f"{out / 'index.html'}: 3 rows" in capsys.readouterr().out
    found, facts = Page((out / "index.html").read_text()), json.loads((out / "rows.json").read_text())
    assert {uri[:5] for uri in found.of("img", "src")} == {"data:"}
    ids = {attrs["id"] for _, attrs in found.tags if "id" in attrs}
    assert found.of("a", "href") and {link[1:] for link in found.of("a", "href")} <= ids
    assert not re.search(r"url\(|@import|http", "".join(found.styles))
    # Images are the files' scans after prepare_volume, at the first sample that shows the slot.
    datasets = open_sources(config, "test")
    numbers = {name: {d.row_id(i): i for i in range(len(d))} for name, d in datasets.items()}
    articles = (out / "index.html").read_text().split('<article class="sample" id="')[1:]
    strips = {a.split('"')[0]: [re.findall(r'src="([^"]+)"', s) for s in a.split("</div></div>")] for a in articles}
    compared = []
    for number, row in enumerate(facts["rows"]):
        assert row["tokens"] == sum(sample["places"] for sample in row["samples"])
        seen = set()
        for sample in row["samples"]:
            assert "study" not in sample
            name, row_id = sample["source"], sample["row_id"]
            rng = sample_rng(config.seed, 0, name, row_id)
            shown = dict.fromkeys(datasets[name].sample(numbers[name][row_id], rng).scans)
            images = strips[f"row-{number}-sample-{sample['number']}"]
            for slot, scan, uris in zip(sample["slots"], shown, images[:-1], strict=True):
                if slot not in seen:
                    voxels, header = scans.read(datasets[name].root / scan.path)
                    volume = prepare_volume(one_channel_if_gray(voxels), sizes=config.sizes, padding=header.padding)
                    picked = np.rint(np.linspace(0, len(volume.slices) - 1, min(8, len(volume.slices)))).astype(int)
                    assert np.array_equal(np.stack([pixels(uri) for uri in uris]), volume.slices[picked, 0])
                    compared.append(len(uris))
                seen.add(slot)
    assert len(compared) >= 3
    tokens = sum(row["tokens"] for row in facts["rows"])
    assert facts["head"]["packing"]["real tokens"] == pytest.approx(tokens / (3 * config.text_length))
    assert {s["name"]: s["rows"] for s in facts["head"]["sources"]} == {name: len(d) for name, d in datasets.items()}
    assert sum(s["share"] for s in facts["head"]["sources"]) == pytest.approx(1)
    assert command.main(arguments) == 0  # a second run replaces its own page


def test_epochs_differ_and_end(config):
    """Epochs differ in order, and the rows end with the epoch."""
    names = lambda rows: [[(s.source, s.row_id) for s in row.samples] for row in rows]  # noqa: E731
    _, first = first_rows(config, "train", 1000, 0, "x")
    shown, second = first_rows(config, "train", 1000, 1, "x")
    assert {row.epoch for row in second} == {1} and names(first) != names(second)
    assert sorted(sum(names(first), [])) == sorted(sum(names(second), []))
    assert sum(len(row.samples) for row in second) == sum(s.samples for s in shown.sources)
    _, seeded = first_rows(dataclasses.replace(config, seed=5), "train", 1000, 0, "x")
    assert names(seeded) != names(first)


def test_quarantined_rows_are_counted(tmp_path):
    """Count a line of the table that is no sample, and a row that the index marks as bad."""
    config = practice(tmp_path, train=4, test=4)
    table = tmp_path / "data" / config.test["vqa_test"]["table"]
    rows = len(open_sources(config, "test")["vqa_test"])
    table.write_text(table.read_text() + "scans,,,\n")
    write_index(config)
    listed = pq.read_table(tmp_path / "index" / "rows.parquet").to_pylist()
    next(line for line in listed if line["source"] == "vqa_test")["state"] = "scan missing"
    pq.write_table(pa.Table.from_pylist(listed, schema=index.ROWS), tmp_path / "index" / "rows.parquet")
    reseal(tmp_path / "index")
    shown, _ = first_rows(config, "test", 1, 0, "x")
    counts = {source.name: (source.rows, source.quarantined, source.samples) for source in shown.sources}
    assert counts["vqa_test"] == (rows - 1, 2, rows - 1) and counts["modality_test"][1] == 0


def test_missing_scan_is_reported_by_name(config, tmp_path):
    moved = practice(tmp_path, train=4, test=4)
    gone = next(iter(open_sources(moved, "test").values())).scans(0)[0].path
    (tmp_path / "data" / gone).unlink()
    _, rows = first_rows(dataclasses.replace(moved, allowed_loss=99), "test", 100, 0, "x")
    assert any(gone in warning for row in rows for warning in row.warnings)
    lost = [s for row in rows for s in row.samples if any(token.kind == "lost" for token in s.tokens)]
    assert lost and all("no token is trained on: every weight is zero" in s.warnings for s in lost)
    with pytest.raises(ValueError, match=re.escape(gone)):
        first_rows(moved, "test", 100, 0, "x")


def test_errors_are_one_line_with_exit_code_2(config, tmp_path, capsys):
    none = config_file(tmp_path, dataclasses.replace(config, index=str(tmp_path / "nowhere")))
    assert command.main([f"--config={none}", "--out", str(tmp_path / "a")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'nowhere'} is not an index") and "input_pipeline.prepare" in said
    assert said.count("\n") == 1 and not (tmp_path / "a").exists()
    good = f"--config={config_file(tmp_path, config)}"
    foreign = tmp_path / "site"
    foreign.mkdir()
    (foreign / "index.html").write_text("<html>mine</html>")
    assert command.main([good, "--out", str(foreign)]) == 2
    assert "was not written by this command" in capsys.readouterr().err
    assert (foreign / "index.html").read_text() == "<html>mine</html>"
    for arguments, words in (
        (["--rows", "0"], "--rows must be at least 1 (got 0)"),
        (["--epoch", "-1"], "--epoch must be at least 0 (got -1)"),
        (["--split", "all"], "invalid choice"),
        (["--config.data.sed=3"], "sed"),
    ):
        with pytest.raises(SystemExit) as ended:
            command.main([good, "--out", str(tmp_path / "b"), *arguments])
        assert ended.value.code == 2 and words in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0 and "examples:" in capsys.readouterr().out


@pytest.mark.slow
def test_command_with_a_worker(config, tmp_path):
    command_line = [sys.executable, "-m", "input_pipeline.inspect", f"--config={config_file(tmp_path, config)}"]
    done = subprocess.run(
        [*command_line, "--out", tmp_path / "page", "--rows", "1", "--workers", "1"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert command.main([*command_line[3:], "--out", str(tmp_path / "alone"), "--rows", "1"]) == 0
    assert (tmp_path / "page" / "rows.json").read_bytes() == (tmp_path / "alone" / "rows.json").read_bytes()
    assert (tmp_path / "page" / "index.html").read_bytes() == (tmp_path / "alone" / "index.html").read_bytes()
