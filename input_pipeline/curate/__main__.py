"""`python -m input_pipeline.curate TOOL ...`: build MedMD and RadMD from published sources."""

from __future__ import annotations

import importlib
import sys

from input_pipeline.files import nearest

# tool -> (its module, what it does)
TOOLS = {
    "pmc-inline": ("pmc", "papers of PubMed Central -> sentences with their figures"),
    "pmc-oa": ("pmc", "the same papers -> figures with captions"),
    "rad3d": ("cases", "case folders -> Rad3D: captions, modalities, rationales, scans as NIfTI"),
    "mpx": ("cases", "case folders with 2D images -> MPx-Single and MPx-Multi"),
    "pmc-casereport": ("question_answers", "case reports -> questions and answers by a language model"),
    "vqa": ("question_answers", "findings of scans -> questions and answers by a language model (Rad3D-VQA)"),
    "radmd": ("radmd", "tables of MedMD -> RadMD, by the rules of Table 2"),
    "diagnosis": ("diagnosis", "label files of X-ray sets -> open and yes/no tables (CXR-Mix, VinDr)"),
    "published": ("published", "data sets as their owners publish them -> JSON Lines, with the official splits"),
    "splits": ("splits", "train and test without leaks: studies, scans, near duplicates"),
    "statistics": ("statistics", "2D and 3D, modalities, tasks (Figure 4), and a data card"),
}


def usage() -> str:
    width = max(map(len, TOOLS))
    lines = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in TOOLS.items())
    return (
        "usage: python -m input_pipeline.curate TOOL [options]\n\n"
        "Build MedMD and RadMD (paper, section 3) from published files, in the layouts that input_pipeline.datasets\n"
        "reads. An interrupted run resumes with the same command. No tool guesses: input that cannot be used is\n"
        f"counted and listed with file, row and reason.\n\n{lines}\n\n"
        "`python -m input_pipeline.curate TOOL --help` shows the options of a tool; docs/curate.md describes all.\n"
    )


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, *options = argv
    if name not in TOOLS:
        print(f"error: tool {name!r} is unknown{nearest(name, TOOLS)}\n\n{usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"input_pipeline.curate.{TOOLS[name][0]}")
    from input_pipeline.curate import console  # imports rich and pyarrow, which the usage does not need

    return console.main(module.TOOLS[name], name, options)


if __name__ == "__main__":
    sys.exit(main())
