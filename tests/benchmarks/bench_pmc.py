"""Papers per second and core of pmc-inline on small packages; or the references tied in your own papers.

    python tests/benchmarks/bench_pmc.py --papers 2000
    python tests/benchmarks/bench_pmc.py --read FOLDER      # prints every reference of the .nxml files there, to check

The packages are the annotated papers of tests/data/jats (about 4 kB of XML, images of 24 x 16), copied under other
numbers. They measure reading, parsing, tying and writing, not unpacking large images."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from input_pipeline.curate import jats, jobs, pmc  # noqa: E402
from tests import jats_papers  # noqa: E402


def show(folder: Path) -> None:
    for file in sorted(folder.glob("*.nxml")):
        paper = jats.read(file.read_bytes())
        print(f"== {file.name}: {len(paper.figures)} figures, {paper.counts}, {paper.problems}")
        for sentence in paper.sentences:
            for found in re.finditer(r"\bfig", sentence.text, re.IGNORECASE):
                around = sentence.text[max(0, found.start() - 30) : found.end() + 40]
                print(f"{[f.name for f in sentence.figures]}: ...{around}...")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--papers", type=int, default=1000, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--read", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.read:
        show(args.read)
        return 0
    rates: dict[str, list[float]] = {"archives": [], "folders": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        listed = {}
        for kind in rates:
            base = jats_papers.packages(root / kind / "base", archives=kind == "archives")
            originals, listed[kind] = sorted(base.iterdir()), []
            for k in range(args.papers):
                original = originals[k % len(originals)]
                folder = root / kind / f"{k // len(originals):05d}"
                folder.mkdir(exist_ok=True)
                (folder / original.name).symlink_to(original)
                listed[kind].append(str(folder / original.name))
        out = root / "out"
        for name in ("papers", "figures"):
            (out / name).mkdir(parents=True)
        options = {
            "any_language": False,
            "pictures": True,
            "cases": False,
            "keep_unillustrated": False,
            "out": str(out),
        }
        for _ in range(args.rounds):
            for kind in rates:
                start = time.process_time()
                jobs.make_results(None, listed[kind], pmc.inline_paper, options)
                rates[kind].append(args.papers / (time.process_time() - start))
    for kind, found in rates.items():
        found.sort()
        print(f"{kind}: {found[len(found) // 2]:,.0f} papers/s of one core (median of {args.rounds})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
