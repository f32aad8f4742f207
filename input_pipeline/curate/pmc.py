"""pmc-inline and pmc-oa: packages of the PubMed Central open-access subset -> the layouts of PMC-Inline and PMC-OA."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from input_pipeline.curate import console, jobs, layouts, packages
from input_pipeline.curate.captions import panels
from input_pipeline.curate.jobs import Result
from input_pipeline.curate.language import is_english
from input_pipeline.files import atomic_write
from input_pipeline.parallel import chunk_files

_REFERENCE_PROBLEMS = ("a reference ", "no figure has the number")  # prefix of the reasons that jats reports

INLINE = """\
Tie sentences of papers to the figures that they refer to: PMC-Inline. Reads packages of the PubMed Central open-access
subset (.tar.gz files or folders named PMC<number>, at any depth below SOURCE). Writes the list of sentences of each
paper with the names of their figures. Finds linked and unlinked references: "Fig. 2", "Figs. 1-3 and 5b", panels,
ranges. Captions are written separately, to captions.jsonl.
"""
INLINE_EPILOG = """\
output in DIR:
  inline.csv                PMC_path: one line per paper; family pmc_inline
  papers/PMC<number>.json   [{"text": "...", "img_ref": ["F1"]}, ...]
  figures/PMC<number>_<ref>.jpg
  captions.jsonl            one line per figure: paper, figure, label, caption, pictures
  cases.jsonl               with --cases: papers that are case reports, for pmc-casereport
  report.json, problems.jsonl   counts, and input that cannot be used: file, row (line of the XML), reason, remedy

examples:
  python -m input_pipeline.curate pmc-inline oa_package --out pmc
  python -m input_pipeline.curate pmc-inline oa_package --out pmc --cases --workers 16
  python -m input_pipeline.curate pmc-inline /shared/oa_package --out /shared/pmc --runner flink --runner-option=--flink_master=host:8081

An interrupted run resumes with the same command. The result depends on neither --workers nor --runner.
These references are problems and get no figure: those that contradict their link, and those whose figure has no image. A
reference with a dead link is a problem too; it gets the figure with its number, if there is one. References to
supplements and to figures of other papers are counted and get no figure.
"""  # noqa: E501
OA = "Extract the figures of papers with their captions: PMC-OA. Reads the same packages as pmc-inline."
OA_EPILOG = """\
output in DIR:
  oa.csv                    Figure_path, Caption (family pmc_oa), PMC_id, figure, label, panels
  figures/PMC<number>_<ref>.jpg
  report.json, problems.jsonl

The marks of sub-figures, "(a) ... (b) ...", stay in the caption, and `panels` lists them. A figure with several images
is one row, whose Figure_path is the list of its images, because the caption is about all of them.

examples:
  python -m input_pipeline.curate pmc-oa oa_package --out pmc_oa
"""
_OA_HEADER = ["Figure_path", "Caption", "PMC_id", "figure", "label", "panels"]


def _add_oa_options(parser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="directory with packages at any depth")
    parser.add_argument("--any-language", action="store_true", help="include papers that are not in English")
    text = "write no images; they must already exist in DIR"
    parser.add_argument("--no-pictures", dest="pictures", action="store_false", help=text)
    console.add_job_options(parser)


def _add_inline_options(parser) -> None:
    _add_oa_options(parser)
    parser.add_argument("--cases", action="store_true", help="also write the case reports, for pmc-casereport")
    parser.add_argument("--keep-unillustrated", action="store_true", help="include papers without a tied figure")


def curate(tool: str, source: str | Path, directory: Path, options: dict, **running) -> dict:
    """Run pmc-inline or pmc-oa. Returns the report. `running`: see jobs.run. Raises ValueError."""
    source, inline = Path(source).absolute(), tool == "pmc-inline"
    if not source.is_dir():
        raise ValueError(f"{source} is not a directory")
    directory = Path(directory).absolute()
    for name in ("papers", "figures") if inline else ("figures",):
        (directory / name).mkdir(parents=True, exist_ok=True)
    repeated = Result()
    paths = _unique(packages.find_packages(source), repeated)
    function = inline_paper if inline else oa_paper
    items = jobs.run(directory, tool, function, options | {"out": str(directory)}, paths, **running)
    report = jobs.Report(directory, tool, options | {"source": str(source)})
    report.add(repeated)
    # Name in Result.tables -> file, header.
    files: dict[str, tuple[str, list[str] | None]] = {"pairs": ("oa.csv", _OA_HEADER)}
    if inline:
        files = {"papers": ("inline.csv", ["PMC_path"]), "captions": ("captions.jsonl", None)}
        files |= {"cases": ("cases.jsonl", None)} if options["cases"] else {}
    with contextlib.ExitStack() as stack:
        writers = {k: stack.enter_context(layouts.row_writer(directory / v[0], v[1])) for k, v in files.items()}
        for _, result in jobs.results(directory, items):
            report.add(result)
            for name, write in writers.items():
                for row in result.tables.get(name, ()):
                    write(row)
    written = report.write()
    chunk_files.remove_parts(directory)
    log = running.get("log")
    if log and inline and not options["cases"] and (directory / "cases.jsonl").exists():
        log(f"{directory / 'cases.jsonl'} is from an earlier run with --cases and is unchanged")
    return written


def _unique(paths: Iterator[str], result: Result) -> Iterator[str]:
    """Yield the first package of each paper; others become problems. Takes one bit of memory per paper number."""
    seen = bytearray()
    for path in paths:
        number = int(packages.paper_id(path)[3:])
        if len(seen) <= number >> 3:
            seen.extend(bytes((number >> 3) + 1 - len(seen)))
        if seen[number >> 3] >> (number & 7) & 1:
            result.problem(path, 0, f"the paper is repeated: {packages.paper_id(path)}", "remove one of the packages")
        else:
            seen[number >> 3] |= 1 << (number & 7)
            yield path


def _open(options: dict, path: str, result: Result):
    """Return (package, paper, key), or None with the reason in the result."""
    from input_pipeline.curate import jats  # imports lxml, which only these two tools need

    result.count("papers read")
    key = packages.paper_id(path)
    try:
        package = packages.open_package(path, images=options["pictures"])
        paper = jats.read(package.xml)
        if paper.key and paper.key != key:
            raise packages.PackageError(f"the article belongs to another paper: {paper.key}", "rename the package")
    except packages.PackageError as error:
        result.count("papers that cannot be used")
        result.problem(path, 0, error.reason, error.remedy)
        return None
    for name, reason in package.rejected:
        result.problem(path, name, f"a member was not read: {reason}", "check the package")
    if not options["any_language"] and not _is_english(paper):
        result.count("papers in other languages")
        result.problem(path, 0, "the paper is not in English", "add --any-language to include it")
        return None
    for line, reason in paper.problems:
        dead_link = reason.startswith("a reference leads to ")
        remedy = "the figure with its number is used, if there is one" if dead_link else "the sentence gets no figure"
        result.problem(f"{path}/{package.xml_name}", line, reason, remedy)
    for label, count in sorted(paper.counts.items()):
        result.count(label, count)
    return package, paper, key


def _is_english(paper) -> bool:
    if paper.language not in ("", "en"):
        return False
    return is_english(" ".join(s.text for s in paper.sentences[:40]) or " ".join(f.caption for f in paper.figures))


def _write_images(options: dict, path: str, package, key: str, figures, result: Result) -> set[str]:
    """Write the images of these figures. Returns the img_ref of each existing image."""
    written, remedy = set(), "references to it get no figure"
    for figure in figures:
        if not figure.graphics:
            name = figure.label or figure.name
            result.problem(path, figure.row, f"a figure has no image in the XML: {name}", remedy)
        for name, link in zip(figure.names, figure.graphics, strict=False):
            try:
                member = package.find_image(link)
                reason = None if member else f"an image is missing in the package: {link}"
            except ValueError as error:
                member, reason = None, str(error)
            if member and options["pictures"]:
                reason = _write_image(package, member, Path(options["out"]) / "figures" / f"{key}_{name}.jpg")
            if reason:
                result.count("images missing or broken")
                result.problem(path, figure.row, reason, remedy)
            else:
                written.add(name)
                result.count("pictures")
    return written


def _write_image(package, name: str, file: Path) -> str | None:
    """Write an image in a format that `images.scans` reads. Returns the reason if that is impossible.

    JPEG and PNG are copied, because readers identify a format by its first bytes, not by its name. Other formats are
    converted to PNG, without loss.
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
        return f"an image cannot be read: {name} ({str(error)[:100]})"
    with atomic_write(file, unique=True) as partial:
        partial.write_bytes(data)
    return None


def inline_paper(options: dict, path: str) -> Result:
    """Return the pmc-inline rows of a package, and write the paper's JSON and its images."""
    result = Result()
    opened = _open(options, path, result)
    if opened is None:
        return result
    package, paper, key = opened
    figures = dict.fromkeys(f for s in paper.sentences for f in s.figures)
    images = _write_images(options, path, package, key, figures, result)
    sentences, tied = [], 0
    for sentence in paper.sentences:
        names = [name for figure in sentence.figures for name in figure.names if name in images]
        missing = sum(images.isdisjoint(figure.names) for figure in sentence.figures)
        if missing:
            result.count("references to figures without an image", missing)
        tied += len(sentence.figures) - missing
        sentences.append({"text": sentence.text, "img_ref": names})
    result.count("sentences", len(sentences))
    if not sentences:
        result.count("papers without text")
        result.problem(path, 0, "the paper has no text in its body", "remove it")
        return result
    if not tied and not options["keep_unillustrated"]:
        result.count("papers without a reference to an image")
        return result
    result.count("papers written")
    result.count("references to images", tied)
    result.count("sentences with a figure", sum(bool(s["img_ref"]) for s in sentences))
    with atomic_write(Path(options["out"]) / "papers" / f"{key}.json", unique=True) as partial:
        partial.write_text(json.dumps(sentences, ensure_ascii=False, indent=0), encoding="utf-8")
    result.add("papers", {"PMC_path": f"papers/{key}.json"})
    for figure in paper.figures:
        names = [name for name in figure.names if name in images]
        if names:
            row = {"paper": key, "figure": figure.name, "label": figure.label, "caption": figure.caption}
            result.add("captions", row | {"pictures": names})
    if options["cases"] and paper.is_case_report:
        result.count("case reports")
        with_section = [
            {"text": row["text"], "section": sentence.section, "img_ref": row["img_ref"]}
            for sentence, row in zip(paper.sentences, sentences, strict=True)
        ]
        captions = {name: f.caption for f in paper.figures for name in f.names if name in images}
        case = {"paper": key, "title": paper.title, "abstract": paper.abstract, "sentences": with_section}
        result.add("cases", case | {"captions": captions})
    return result


def oa_paper(options: dict, path: str) -> Result:
    """Return the pmc-oa rows of a package, one per figure with a caption, and write the images."""
    result = Result()
    opened = _open(options, path, result)
    if opened is None:
        return result
    package, paper, key = opened
    # References in the text do not matter here.
    result.counts = {k: v for k, v in result.counts.items() if not k.startswith("references")}
    result.problems = [p for p in result.problems if not p["reason"].startswith(_REFERENCE_PROBLEMS)]
    figures = []
    for figure in paper.figures:
        result.count("figures")
        if figure.caption:
            figures.append(figure)
        else:
            result.count("figures without a caption")
            name = figure.label or figure.name
            result.problem(path, figure.row, f"a figure has no caption: {name}", "the figure is not used")
    images = _write_images(options, path, package, key, figures, result)
    for figure in figures:
        paths = [f"figures/{key}_{name}.jpg" for name in figure.names if name in images]
        if paths:
            shown = paths[0] if len(paths) == 1 else str(paths)
            cells = (shown, figure.caption, key, figure.name, figure.label, " ".join(panels(figure.caption)))
            result.add("pairs", dict(zip(_OA_HEADER, cells, strict=True)))
            result.count("pairs")
    return result


_run_oa = console.run_on_source(curate, "any_language pictures")
_run_inline = console.run_on_source(curate, "any_language pictures cases keep_unillustrated")
TOOLS = {
    "pmc-inline": console.Tool(INLINE, INLINE_EPILOG, _add_inline_options, _run_inline),
    "pmc-oa": console.Tool(OA, OA_EPILOG, _add_oa_options, _run_oa),
}
