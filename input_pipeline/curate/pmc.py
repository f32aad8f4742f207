"""pmc-inline and pmc-oa: packages of the PubMed Central open-access subset -> the layouts of PMC-Inline and PMC-OA."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from input_pipeline.curate import console, jobs, packages
from input_pipeline.curate.jobs import Result
from input_pipeline.files import atomic_write
from input_pipeline.parallel import chunk_files

LANGUAGES = ("en",)
_REFERENCES = ("a reference ", "no figure has the number")  # how problems of references begin

INLINE = """\
Tie the sentences of papers to the figures that they refer to: PMC-Inline. Reads packages of the PubMed Central
open-access subset (.tar.gz files or folders named PMC<number>, at any depth below SOURCE) and writes for each paper
the list of its sentences, each with the names of the figures that it mentions: "Fig. 2", "Figs. 1-3 and 5b", panels,
ranges, whatever the publisher links or only prints. Captions stand apart, in captions.jsonl.
"""
INLINE_EPILOG = """\
what is written to DIR:
  inline.csv                PMC_path: one line a paper, read as the family pmc_inline
  papers/PMC<number>.json   [{"text": "...", "img_ref": ["F1"]}, ...]
  figures/PMC<number>_<ref>.jpg
  captions.jsonl            one figure a line: paper, figure, label, caption, pictures
  cases.jsonl               with --cases: papers that are case reports, for pmc-casereport
  report.json, problems.jsonl   counts, and what could not be used: file, row (line of the XML), reason, remedy

examples:
  python -m input_pipeline.curate pmc-inline oa_package --out pmc
  python -m input_pipeline.curate pmc-inline oa_package --out pmc --cases --workers 16
  python -m input_pipeline.curate pmc-inline /shared/oa_package --out /shared/pmc --runner flink --runner-option=--flink_master=host:8081

Ended in the middle, the same command goes on where it was. The result depends on neither --workers nor --runner.
A reference that contradicts its link, or names a figure whose picture is missing, is listed and ties to nothing; one
whose link leads nowhere is listed, and ties to the figure that has its number, if there is one. References to supplements and to other papers' figures are counted and left alone.
"""  # noqa: E501
OA = """\
Take the figures of papers with their captions: PMC-OA. Reads the same packages as pmc-inline.
"""
OA_EPILOG = """\
what is written to DIR:
  oa.csv                    Figure_path, Caption (read as the family pmc_oa), PMC_id, figure, label, part, panels
  figures/PMC<number>_<ref>.jpg
  report.json, problems.jsonl

The marks of sub-figures, "(a) ... (b) ...", stay in the caption, and `panels` lists them. A figure that consists of
several pictures gives a line for each, `part` saying "1 of 2".

examples:
  python -m input_pipeline.curate pmc-oa oa_package --out pmc_oa
"""


def main(tool: str, argv: list[str]) -> int:
    inline = tool == "pmc-inline"
    parser = console.parser(tool, INLINE if inline else OA, INLINE_EPILOG if inline else OA_EPILOG)
    parser.add_argument("source", metavar="SOURCE", help="a folder with packages below it")
    parser.add_argument("--any-language", action="store_true", help="also papers that are not in English")
    parser.add_argument(
        "--no-pictures", action="store_true", help="write the texts only; figures must be there already"
    )
    if inline:
        parser.add_argument("--cases", action="store_true", help="also list the case reports, with their context")
        parser.add_argument(
            "--keep-unillustrated", action="store_true", help="also papers none of whose sentences shows a figure"
        )
    console.add_job_options(parser)
    args = parser.parse_args(argv)
    options = {"any_language": args.any_language, "pictures": not args.no_pictures}
    if inline:
        options |= {"cases": args.cases, "keep_unillustrated": args.keep_unillustrated}
    return console.run(
        args, lambda out, **more: build(tool, args.source, out, options, **console.job_options(args), **more)
    )


def build(tool: str, source: str | Path, directory: Path, options: dict, **running) -> dict:
    """Runs pmc-inline or pmc-oa; returns the report. `running`: see jobs.run. Raises ValueError."""
    source = Path(source).absolute()
    if not source.is_dir():
        raise ValueError(f"{source} is no folder")
    directory = Path(directory).absolute()
    for name in ("papers", "figures") if tool == "pmc-inline" else ("figures",):
        (directory / name).mkdir(parents=True, exist_ok=True)
    twice = Result()
    function = inline_paper if tool == "pmc-inline" else oa_paper
    options = options | {"out": str(directory)}
    items = jobs.run(directory, tool, function, options, _once(packages.find_packages(source), twice), **running)
    shown = {k: v for k, v in options.items() if k != "out"} | {"source": str(source)}
    report = jobs.Report(directory, tool, shown)
    report.add(twice)
    (_merge_inline if tool == "pmc-inline" else _merge_oa)(directory, items, report, options)
    written = report.write()
    chunk_files.remove_parts(directory)
    said = running.get("said")
    if said and tool == "pmc-inline" and not options["cases"] and (directory / "cases.jsonl").exists():
        said(f"{directory / 'cases.jsonl'} is of an earlier run with --cases and stays as it is")
    return written


def _once(found: Iterator[str], result: Result) -> Iterator[str]:
    """Packages without those whose paper came before: one bit a number, so that memory does not grow with them."""
    seen = bytearray()
    for path in found:
        number = int(packages.paper_id(path)[3:])
        if len(seen) <= number >> 3:
            seen.extend(bytes((number >> 3) + 1 - len(seen)))
        if seen[number >> 3] >> (number & 7) & 1:
            result.problem(path, 0, f"the paper stands twice: {packages.paper_id(path)}", "remove one of the packages")
        else:
            seen[number >> 3] |= 1 << (number & 7)
            yield path


# --- one paper --------------------------------------------------------------------------------------------------------


def _open(options: dict, path: str, result: Result):
    """(package, paper, key), or None with the reason in the result."""
    from input_pipeline.curate import jats  # lxml is needed by these two tools only

    result.count("papers read")
    key = packages.paper_id(path)
    try:
        package = packages.open_package(path, pictures=options["pictures"])
        paper = jats.read(package.xml)
    except (packages.PackageError, jats.JatsError) as error:
        result.count("papers that cannot be used")
        result.problem(path, 0, error.reason, error.remedy)
        return None
    for name, reason in package.refused:
        result.problem(path, name, f"a member was not looked at: {reason}", "look at the package")
    if paper.key and paper.key != key:
        result.count("papers that cannot be used")
        result.problem(path, 0, f"the article says that it is another paper: {paper.key}", "rename the package")
        return None
    if not options["any_language"] and not _is_english(paper):
        result.count("papers in other languages")
        result.problem(path, 0, "the paper is not in English", "add --any-language to have it")
        return None
    for line, reason in paper.problems:
        astray = reason.startswith("a reference leads to ")
        remedy = "its number alone can tie it, if a figure has it" if astray else "nothing was tied to it"
        result.problem(f"{path}/{package.xml_name}", line, reason, remedy)
    for what, count in sorted(paper.counts.items()):
        result.count(what, count)
    return package, paper, key


def _is_english(paper) -> bool:
    from input_pipeline.curate.language import is_english

    if paper.language and paper.language not in LANGUAGES:
        return False
    return is_english(" ".join(s.text for s in paper.sentences[:40]) or " ".join(f.caption for f in paper.figures))


def _pictures(options: dict, path: str, package, key: str, figures, result: Result) -> dict[str, str]:
    """Writes the pictures of these figures. Returns the pictures that are there: img_ref -> link in the XML."""
    there = {}
    for figure in figures:
        if not figure.graphics:
            result.problem(path, figure.row, f"a figure has no picture in the XML: {figure.label or figure.name}",
                           "references to it are left untied")  # fmt: skip
        for name, link in zip(figure.names, figure.graphics, strict=False):
            reason = None
            try:
                found = package.picture(link)
                if found is None:
                    reason = f"a picture is missing in the package: {link}"
            except ValueError as error:
                found, reason = None, str(error)
            if found is not None and options["pictures"]:
                reason = _write_picture(package, found, Path(options["out"]) / "figures" / f"{key}_{name}.jpg")
            if reason:
                result.count("pictures missing or broken")
                result.problem(path, figure.row, reason, "references to it are left untied")
            else:
                there[name] = link
                result.count("pictures")
    return there


def _write_picture(package, name: str, file: Path) -> str | None:
    """Writes a picture as the reader of scans takes it; returns why not, or None.

    JPEG and PNG keep their bytes, as what a picture is is told by its first bytes and not by its name; other formats
    become PNG, which loses nothing.
    """
    try:
        data = package.data(name)
        if not data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
            with Image.open(io.BytesIO(data), formats=["GIF", "TIFF"]) as image:
                image.load()
                out = io.BytesIO()
                image.convert("L" if image.mode in ("1", "L") else "RGB").save(out, "PNG")
                data = out.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, EOFError) as error:
        return f"a picture cannot be read: {name} ({str(error)[:100]})"
    with atomic_write(file, unique=True) as partial:
        partial.write_bytes(data)
    return None


def inline_paper(options: dict, path: str) -> Result:
    """A package -> its line, captions, counts; writes the paper's JSON and pictures."""
    result = Result()
    opened = _open(options, path, result)
    if opened is None:
        return result
    package, paper, key = opened
    wanted = {id(f): f for s in paper.sentences for f in s.figures}
    there = _pictures(options, path, package, key, wanted.values(), result)
    sentences, tied = [], 0
    for sentence in paper.sentences:
        names = [name for figure in sentence.figures for name in figure.names if name in there]
        lost = sum(not any(n in there for n in figure.names) for figure in sentence.figures)
        if lost:
            result.count("references to figures without a picture", lost)
        tied += len(sentence.figures) - lost
        sentences.append({"text": sentence.text, "img_ref": names})
    result.count("sentences", len(sentences))
    if not sentences:
        result.count("papers without text")
        result.problem(path, 0, "the paper has no text in its body", "leave it out")
        return result
    if not tied and not options["keep_unillustrated"]:
        result.count("papers without a reference to a picture")
        return result
    result.count("papers written")
    result.count("references to pictures", tied)
    result.count("sentences with a figure", sum(bool(s["img_ref"]) for s in sentences))
    with atomic_write(Path(options["out"]) / "papers" / f"{key}.json", unique=True) as partial:
        partial.write_text(json.dumps(sentences, ensure_ascii=False, indent=0), encoding="utf-8")
    result.add("papers", f"papers/{key}.json")
    for figure in paper.figures:
        names = [name for name in figure.names if name in there]
        if names:
            result.add("captions", _caption(key, figure, names))
    if options["cases"] and paper.is_case_report:
        result.count("case reports")
        result.add("cases", _case(key, paper, there))
    return result


def _caption(key: str, figure, names: list[str]) -> dict:
    return {"paper": key, "figure": figure.name, "label": figure.label, "caption": figure.caption, "pictures": names}


def _case(key: str, paper, there) -> dict:
    """What pmc-casereport asks about: the sentences, with their sections and pictures, and the captions."""
    return {
        "paper": key,
        "title": paper.title,
        "abstract": paper.abstract,
        "sentences": [
            {
                "text": s.text,
                "section": s.section,
                "img_ref": [name for figure in s.figures for name in figure.names if name in there],
            }
            for s in paper.sentences
        ],
        "captions": {name: f.caption for f in paper.figures for name in f.names if name in there},
    }


def oa_paper(options: dict, path: str) -> Result:
    """A package -> its figures with captions."""
    from input_pipeline.curate.captions import panels

    result = Result()
    opened = _open(options, path, result)
    if opened is None:
        return result
    package, paper, key = opened
    # What the text refers to is no matter here.
    result.counts = {k: v for k, v in result.counts.items() if not k.startswith("references")}
    result.problems = [p for p in result.problems if not p["reason"].startswith(_REFERENCES)]
    figures = []
    for figure in paper.figures:
        result.count("figures")
        if figure.caption:
            figures.append(figure)
        else:
            result.count("figures without a caption")
            result.problem(path, figure.row, f"a figure has no caption: {figure.label or figure.name}", "leave it out")
    there = _pictures(options, path, package, key, figures, result)
    for figure in figures:
        for k, name in enumerate(figure.names, 1):
            if name in there:
                part = f"{k} of {len(figure.names)}" if len(figure.names) > 1 else ""
                marks = " ".join(panels(figure.caption))
                result.add("pairs", [f"figures/{key}_{name}.jpg", figure.caption, key, name, figure.label, part, marks])
                result.count("pairs")
    return result


# --- all papers -------------------------------------------------------------------------------------------------------


def _merge_inline(directory: Path, items, report, options) -> None:
    with (
        atomic_write(directory / "inline.csv") as table,
        atomic_write(directory / "captions.jsonl") as captions,
        atomic_write(directory / "cases.jsonl") if options["cases"] else contextlib.nullcontext(os.devnull) as cases,
        open(table, "w", encoding="utf-8", newline="") as table,
        open(captions, "w", encoding="utf-8") as captions,
        open(cases, "w", encoding="utf-8") as cases,
    ):
        lines = csv.writer(table)
        lines.writerow(["PMC_path"])
        for _, result in jobs.results(directory, items):
            report.add(result)
            lines.writerows([path] for path in result.tables.get("papers", ()))
            for name, file in (("captions", captions), ("cases", cases)):
                for row in result.tables.get(name, ()):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _merge_oa(directory: Path, items, report, options) -> None:
    with atomic_write(directory / "oa.csv") as partial, open(partial, "w", encoding="utf-8", newline="") as table:
        lines = csv.writer(table)
        lines.writerow(["Figure_path", "Caption", "PMC_id", "figure", "label", "part", "panels"])
        for _, result in jobs.results(directory, items):
            report.add(result)
            lines.writerows(result.tables.get("pairs", ()))
