"""The annotated papers of tests/data/jats as packages with images, and the accuracy of reference ties on them.

python tests/jats_papers.py        # the table of docs/curate.md
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

from PIL import Image

from input_pipeline.curate import jats

FOLDER = Path(__file__).parent / "data" / "jats"
EXPECTED: dict[str, dict[str, list[str]]] = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))


def xml(paper: str) -> bytes:
    return (FOLDER / f"{paper}.nxml").read_bytes()


def picture(k: int) -> bytes:
    """Return a small JPEG that differs for each k."""
    image = Image.effect_noise((24, 16), 40 + k % 50)
    out = io.BytesIO()
    image.save(out, "JPEG")
    return out.getvalue()


def links(paper: str) -> list[str]:
    return [link for figure in jats.read(xml(paper)).figures for link in figure.graphics]


def packages(root: Path, papers=tuple(EXPECTED), archives: bool = True, left_out=()) -> Path:
    """Write packages as PubMed Central serves them, one archive or folder per paper, without the images `left_out`."""
    root.mkdir(parents=True, exist_ok=True)
    for paper in papers:
        members = {f"{paper.lower()}.nxml": xml(paper)}
        for k, link in enumerate(links(paper)):
            name = Path(link).stem if link.endswith((".tif", ".svg", ".jpg")) else link
            if name not in left_out:
                members[f"{name}.jpg"] = picture(k)
        if archives:
            with tarfile.open(root / f"{paper}.tar.gz", "w:gz") as archive:
                for name, data in members.items():
                    info = tarfile.TarInfo(f"{paper}/{name}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        else:
            (root / paper).mkdir()
            for name, data in members.items():
                (root / paper / name).write_bytes(data)
    return root


def score(paper: str) -> tuple[int, list[tuple[str, str]], list[tuple[str, str]]]:
    """Return (correct, invented, missed) pairs of sentence and figure of a paper."""
    want, taken = set(), set()
    read = jats.read(xml(paper))
    have = {(s.text, figure.name) for s in read.sentences for figure in s.figures}
    for begin, figures in EXPECTED[paper].items():
        matching = [s.text for s in read.sentences if s.text.startswith(begin)]
        assert len(matching) == 1 and begin not in taken, (paper, begin, matching)
        taken.add(begin)
        want |= {(matching[0], figure) for figure in figures}
    return len(have & want), sorted(have - want), sorted(want - have)


def main() -> int:
    right = invented = missed = 0
    print("| paper | pairs | right | invented | missed |\n|---|---|---|---|---|")
    for paper in EXPECTED:
        good, extra, lost = score(paper)
        right, invented, missed = right + good, invented + len(extra), missed + len(lost)
        print(f"| {paper} | {good + len(lost)} | {good} | {len(extra)} | {len(lost)} |")
        for what, pairs in (("invented", extra), ("missed", lost)):
            for sentence, figure in pairs:
                print(f"  {what}: {figure} in {sentence!r}", file=sys.stderr)
    print(f"| all | {right + missed} | {right} | {invented} | {missed} |")
    print(f"\nprecision {right / (right + invented):.3f}, recall {right / (right + missed):.3f}")
    return 0 if not invented and not missed else 1


if __name__ == "__main__":
    sys.exit(main())
