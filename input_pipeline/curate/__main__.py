"""`python -m input_pipeline.curate TOOL ...`: build MedMD and RadMD from what the data sets' owners publish."""

from __future__ import annotations

import importlib
import sys

# tool -> its module, and what it does
TOOLS = {
    "pmc-inline": ("pmc", "papers of PubMed Central -> sentences tied to figures"),
    "pmc-oa": ("pmc", "the same papers -> figures with captions"),
    "rad3d": ("cases", "folders of cases -> Rad3D: captions, modalities, rationales, scans as NIfTI"),
    "mpx": ("cases", "folders of cases with pictures -> MPx-Single and MPx-Multi"),
    "pmc-casereport": ("asking", "case reports -> questions and answers by a language model"),
    "vqa": ("asking", "findings of scans -> questions and answers by a language model (Rad3D-VQA)"),
    "radmd": ("radmd", "tables of MedMD -> RadMD, by the rules of Table 2"),
    "diagnosis": ("diagnosis", "label files of X-ray sets -> open and yes/no tables (CXR-Mix, VinDr)"),
    "splits": ("splits", "train and test without leaks: studies, scans, near duplicates"),
    "statistics": ("statistics", "2D and 3D, modalities, tasks (Figure 4), and a data card"),
}


def usage() -> str:
    width = max(map(len, TOOLS))
    lines = "\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in TOOLS.items())
    return (
        "usage: python -m input_pipeline.curate TOOL [options]\n\n"
        "Build MedMD and RadMD (paper, section 3) from the files of their owners, in the layouts that\n"
        "input_pipeline.datasets reads. Every tool can be stopped and goes on; none guesses: what it cannot use is\n"
        f"counted and listed with file, row and reason.\n\n{lines}\n\n"
        "`python -m input_pipeline.curate TOOL --help` says the rest; docs/building.md goes through all of them.\n"
    )


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] not in TOOLS:
        print(f"error: there is no tool {argv[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"input_pipeline.curate.{TOOLS[argv[0]][0]}")
    return module.main(argv[0], argv[1:])


if __name__ == "__main__":
    sys.exit(main())
