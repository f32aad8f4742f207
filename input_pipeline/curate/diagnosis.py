"""diagnosis: label files of X-ray sets -> the open and the yes/no table of CXR-Mix and of the VinDr sets."""

from __future__ import annotations

import heapq
import posixpath
from collections.abc import Iterator
from pathlib import Path

from input_pipeline.curate import console, jobs, labels, layouts
from input_pipeline.curate.jobs import Report, Result
from input_pipeline.curate.radmd import order
from input_pipeline.datasets import diseases, tables

DESCRIPTION = """\
Make diagnosis tables from the label files of public X-ray sets as their owners publish them: an open table (what does
the image show?) and a balanced yes/no table (is there ...?). Several sets together make one table: CXR-Mix.
"""
EPILOG = f"""\
members: {", ".join(labels.MEMBERS)}
(the first {len(labels.CXR_MIX)} are CXR-Mix; input_pipeline/curate/labels.py says which file of each is read)

what is written to DIR:
  open.csv      image_path, label, source, study, split    images with findings, and normal ones
  yes_no.csv    image_path, disease, label, source, study, split    as many 1 as 0 for each disease of each member
  report.json, problems.jsonl

A "no" is true: the set says 0 (or looked for everything), and none of the image's findings is a kind, part or synonym
of what is asked. What a set does not say, CheXpert's blanks for one, is never taken for absent. Paths begin with the
name of the member's folder, so --root is the folder above:
`{{"family": "cxr_mix", "root": ROOT, "table": "DIR/yes_no.csv"}}`.

examples:
  python -m input_pipeline.curate diagnosis --root cxr --out cxr/tables chestxray14=NIH chexpert=CheXpert-v1.0 rsna=RSNA
  python -m input_pipeline.curate diagnosis --root cxr --out t chexpert=CheXpert-v1.0 --uncertain positive \\
      --uncertain Consolidation=negative
  python -m input_pipeline.curate diagnosis --root spine --out t vindr_spinexr=vindr-spinexr
"""


def main(tool: str, argv: list[str]) -> int:
    parser = console.parser(tool, DESCRIPTION, EPILOG)
    parser.add_argument("members", nargs="+", metavar="MEMBER=FOLDER", help="a set, and its folder below --root")
    parser.add_argument("--root", required=True, metavar="DIR", help="below which all the folders lie")
    parser.add_argument(
        "--uncertain",
        action="append",
        default=[],
        metavar="POLICY",
        help="what CheXpert's -1 counts as: ignore (default), positive, negative; DISEASE=POLICY for one; repeatable",
    )
    parser.add_argument("--seed", type=int, default=0, help="which images of the larger side are asked (%(default)s)")
    parser.add_argument("--per-disease", type=int, metavar="N", help="at most N questions a disease, member and answer")
    args = parser.parse_args(argv)
    if args.per_disease is not None and args.per_disease < 1:
        parser.error(f"--per-disease {args.per_disease}: at least 1 is needed")
    options = {"uncertain": args.uncertain, "seed": args.seed, "per_disease": args.per_disease}
    return console.run(args, lambda out, **more: build(args.members, args.root, out, options, **more))


def policy(said: list[str]) -> labels.Policy:
    """From --uncertain. Raises ValueError."""
    made = labels.Policy()
    for text in said:
        disease, equals, choice = text.rpartition("=")
        if choice not in labels.UNCERTAIN or (equals and disease not in labels.CHEXPERT):
            raise ValueError(f"--uncertain {text}: {', '.join(labels.UNCERTAIN)}, or DISEASE=one of them, the disease "
                             f"being one of {', '.join(labels.CHEXPERT)}")  # fmt: skip
        if equals:
            made.of_disease[disease] = choice
        else:
            made.uncertain = choice
    return made


def build(specs: list[str], root, directory, options: dict, progress=jobs.silent, said=None) -> dict:
    """Writes both tables; returns the report. Raises ValueError."""
    root, directory = Path(root).absolute(), Path(directory).absolute()
    rule, seed, most = policy(options["uncertain"]), options["seed"], options["per_disease"]
    report = Report(directory, "diagnosis", {"root": str(root), "members": specs} | options)
    named = [_member(spec) for spec in specs]
    if len(set(named)) < len(named):
        raise ValueError(f"{', '.join(specs)}: a set stands twice; its images would be asked about twice")
    done = progress("diagnosis", "members", len(specs))
    report.more["diseases"] = {}
    base = ["source", "study", "split"]
    headers = {"open.csv": ["image_path", "label", *base], "yes_no.csv": ["image_path", "disease", "label", *base]}
    with layouts.Tables(directory, headers) as out:
        for member, folder in named:
            result = Result()
            _add(member, folder, root, rule, seed, most, out, result, report)
            report.add(result)
            done(1, bool(result.problems))
        if not any(out.rows.values()):
            report.write()
            raise ValueError(f"no image has a label that can be used: see {report.listed}")
    report.counts |= {f"{name}: rows": count for name, count in out.rows.items()}
    return report.write()


def _member(spec: str) -> tuple[str, str]:
    member, equals, folder = spec.partition("=")
    if not equals or member not in labels.MEMBERS:
        raise ValueError(f"{spec!r}: MEMBER=FOLDER is needed, the member being one of {', '.join(labels.MEMBERS)}")
    folder = posixpath.normpath(folder.strip("/"))
    if tables.bad_path(folder):
        raise ValueError(f"{spec!r}: the folder must lie below --root: {tables.bad_path(folder)}")
    return member, folder


def _add(member: str, folder: str, root: Path, rule, seed: int, most, out, result: Result, report: Report) -> None:
    """The rows of one set, whose images alone are in memory."""
    images = labels.read(member, root / folder, rule, result)
    result.count(f"{member}: images", len(images))
    labelled = 0
    for image in images:
        image.path = f"{folder}/{image.path}"
        row = _open(image, member)
        if row is not None:
            out.write("open.csv", row)
            labelled += 1
    result.count(f"{member}: images without a label for the open table", len(images) - labelled)
    asked, report.more["diseases"][member] = _ask(images, member, seed, most)
    questions = 0
    for row in asked:
        out.write("yes_no.csv", row)
        questions += 1
    result.count(f"{member}: yes/no questions", questions)


def _row(image, member: str, **cells) -> dict:
    return {"image_path": image.path} | cells | {"source": member, "study": image.study, "split": image.split}


def _open(image, member: str) -> dict | None:
    """The line of the open table; None where nothing positive is known, and it is not said to be normal either."""
    if image.is_normal:
        return _row(image, member, label=labels.NORMAL)
    if not image.positives:
        return None
    # A list literal: names of diseases may hold commas.
    return _row(
        image,
        member,
        label=str(list(image.positives)) if "," in "".join(image.positives) else ", ".join(image.positives),
    )


def _ask(images, member: str, seed: int, most: int | None) -> tuple[Iterator[dict], dict]:
    """Balanced questions: for each disease as many images that have it as images that certainly lack it."""
    sides: dict[str, tuple[list, list]] = {}
    for image in images:
        said = dict(image.findings)
        normal = image.is_normal
        if normal or image.positives:
            said[labels.NORMAL] = normal
        for disease, present in said.items():
            if present is None or diseases.is_vague(disease):
                continue
            if not present and disease != labels.NORMAL and any(
                diseases.may_coexist(own, disease) for own in image.positives
            ):  # fmt: skip
                continue
            if not present and disease != labels.NORMAL and any(map(diseases.is_vague, image.positives)):
                continue  # "Other lesion" may be any of them
            if not present and any(v is None and diseases.may_coexist(d, disease) for d, v in said.items()):
                continue
            sides.setdefault(disease, ([], []))[not present].append(image)
    counts = {}
    for disease, (yes, no) in sorted(sides.items()):
        count = min(len(yes), len(no), len(yes) if most is None else most)
        counts[disease] = {"present": len(yes), "absent": len(no), "asked": 2 * count}

    def rows() -> Iterator[dict]:
        for disease, (yes, no) in sorted(sides.items()):
            for side, label in ((yes, "1"), (no, "0")):
                chosen = heapq.nsmallest(
                    counts[disease]["asked"] // 2, side, key=lambda image: order(seed, member, disease, image.path)
                )
                for image in sorted(chosen, key=lambda image: image.path):
                    yield _row(image, member, disease=disease, label=label)

    return rows(), counts
