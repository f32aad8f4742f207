"""diagnosis: label files of X-ray sets -> the open and the yes/no table of CXR-Mix and of the VinDr sets."""

from __future__ import annotations

import heapq
import posixpath
from pathlib import Path

from input_pipeline.curate import console, jobs, layouts, xray_sets
from input_pipeline.curate.jobs import Report, Result
from input_pipeline.curate.labels import NORMAL, UNCERTAIN, Policy
from input_pipeline.curate.radmd import order
from input_pipeline.datasets import diseases
from input_pipeline.datasets.rows import bad_path

DESCRIPTION = """\
Make diagnosis tables from the label files of public X-ray sets, as published: an open table (what does the image show?)
and a balanced yes/no table (is there ...?). Several sets make one table, CXR-Mix.
"""
EPILOG = f"""\
members: {", ".join(xray_sets.MEMBERS)}
(the first {len(xray_sets.CXR_MIX)} are CXR-Mix; input_pipeline/curate/xray_sets.py lists the files of each)

output in DIR:
  open.csv      image_path, label, source, study, split    images with findings, and normal ones
  yes_no.csv    image_path, disease, label, source, study, split    equally many 1 and 0 per disease and member
  report.json, problems.jsonl

A "no" is always true: the set has a 0 (or looked for every finding), and no finding of the image is a kind, part or
synonym of the disease. Unlabelled diseases, such as CheXpert's blanks, never count as absent. Paths start with the
name of the member's folder, so the root of the tables is --root:
`{{"family": "cxr_mix", "root": ROOT, "table": "DIR/yes_no.csv"}}`.

examples:
  python -m input_pipeline.curate diagnosis --root cxr --out cxr/tables chestxray14=NIH chexpert=CheXpert-v1.0 rsna=RSNA
  python -m input_pipeline.curate diagnosis --root cxr --out t chexpert=CheXpert-v1.0 --uncertain positive \\
      --uncertain Consolidation=negative
  python -m input_pipeline.curate diagnosis --root spine --out t vindr_spinexr=vindr-spinexr
"""


def _add_options(parser) -> None:
    parser.add_argument("tables", nargs="+", metavar="MEMBER=FOLDER", help="a set and its folder below --root")
    parser.add_argument("--root", required=True, metavar="DIR", help="directory of all folders")
    text = "meaning of CheXpert's -1: ignore (default), positive or negative; DISEASE=POLICY for one; repeatable"
    parser.add_argument("--uncertain", action="append", default=[], metavar="POLICY", help=text)
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of images (%(default)s)")
    text = "at most N questions per disease, member, answer"
    parser.add_argument("--per-disease", type=console.at_least(1), metavar="N", help=text)


def parse_policy(values: list[str]) -> Policy:
    """Return the policy of the --uncertain options. Raises ValueError."""
    policy = Policy()
    for text in values:
        disease, equals, choice = text.rpartition("=")
        if choice not in UNCERTAIN or (equals and disease not in xray_sets.CHEXPERT):
            raise ValueError(f"--uncertain {text}: write {', '.join(UNCERTAIN)}, or DISEASE=POLICY with one of the "
                             f"diseases {', '.join(xray_sets.CHEXPERT)}")  # fmt: skip
        if equals:
            policy.by_disease[disease] = choice
        else:
            policy.uncertain = choice
    return policy


def curate(specs: list[str], root, directory, options: dict, progress=jobs.no_progress, log=jobs.no_log) -> dict:
    """Write both tables. Returns the report. Raises ValueError."""
    root, directory = Path(root).absolute(), Path(directory).absolute()
    policy = parse_policy(options["uncertain"])
    report = Report(directory, "diagnosis", {"root": str(root), "members": specs} | options)
    members = [_member(spec) for spec in specs]
    if len(set(members)) < len(members):
        raise ValueError(f"{', '.join(specs)}: a set is repeated, so its images would be used twice")
    done = progress("diagnosis", "members", len(specs))
    report.more["diseases"] = {}
    base = ["source", "study", "split"]
    headers = {"open.csv": ["image_path", "label", *base], "yes_no.csv": ["image_path", "disease", "label", *base]}
    with layouts.Tables(directory, headers) as out:
        for member, folder in members:
            result = Result()
            # One set at a time is in memory.
            images = xray_sets.read(member, root / folder, policy, result)
            report.more["diseases"][member] = _write(images, member, folder, options, out, result)
            report.add(result)
            done(1, bool(result.problems))
        if not any(out.rows.values()):
            report.write()
            raise ValueError(f"no image has a label that can be used: see {report.problems_file}")
    report.counts |= {f"{name}: rows": count for name, count in out.rows.items()}
    return report.write()


def _member(spec: str) -> tuple[str, str]:
    member, equals, folder = spec.partition("=")
    if not equals or member not in xray_sets.MEMBERS:
        raise ValueError(f"{spec!r}: write MEMBER=FOLDER, with one of the members {', '.join(xray_sets.MEMBERS)}")
    folder = posixpath.normpath(folder.strip("/"))
    if bad_path(folder):
        raise ValueError(f"{spec!r}: the folder must be below --root: {bad_path(folder)}")
    return member, folder


def _write(images, member: str, folder: str, options: dict, out: layouts.Tables, result: Result) -> dict:
    """Write the rows of a set, with equally many yes and no per disease. Returns the counts of each disease."""
    result.count(f"{member}: images", len(images))
    unlabelled = 0
    for image in images:
        image.path = f"{folder}/{image.path}"
        label = _open_label(image)
        if label is None:
            unlabelled += 1
        else:
            out.write("open.csv", _row(image, member, label=label))
    result.count(f"{member}: images without a label for the open table", unlabelled)
    counts, most = {}, options["per_disease"]
    for disease, (yes, no) in sorted(_sides(images).items()):
        count = min(len(yes), len(no), len(yes) if most is None else most)
        counts[disease] = {"present": len(yes), "absent": len(no), "asked": 2 * count}
        key = lambda image, disease=disease: order(options["seed"], member, disease, image.path)  # noqa: E731
        for side, label in ((yes, "1"), (no, "0")):
            for image in sorted(heapq.nsmallest(count, side, key=key), key=lambda image: image.path):
                out.write("yes_no.csv", _row(image, member, disease=disease, label=label))
    result.count(f"{member}: yes/no questions", sum(count["asked"] for count in counts.values()))
    return counts


def _row(image, member: str, **cells) -> dict:
    return {"image_path": image.path} | cells | {"source": member, "study": image.study, "split": image.split}


def _open_label(image) -> str | None:
    """Return the label for the open table; None if an image has no positive finding and is not labelled normal."""
    if image.is_normal:
        return NORMAL
    if not image.positives:
        return None
    # A list literal if needed, because names of diseases may contain commas.
    has_comma = any("," in name for name in image.positives)
    return str(list(image.positives)) if has_comma else ", ".join(image.positives)


def _is_safe_no(disease: str, positives, findings: dict) -> bool:
    """Return whether the label "absent" is certain: no finding is a kind, part or synonym of the disease."""
    # A vague finding ("Other lesion") may be any disease.
    if disease != NORMAL and any(diseases.is_vague(p) or diseases.may_coexist(p, disease) for p in positives):
        return False
    return not any(label is None and diseases.may_coexist(d, disease) for d, label in findings.items())


def _sides(images) -> dict[str, tuple[list, list]]:
    """Return {disease: (images that have it, images that certainly do not)}."""
    sides: dict[str, tuple[list, list]] = {}
    for image in images:
        findings, normal, positives = dict(image.findings), image.is_normal, image.positives
        if normal or positives:
            findings[NORMAL] = normal
        for disease, present in findings.items():
            if present is None or diseases.is_vague(disease):
                continue
            if present or _is_safe_no(disease, positives, findings):
                sides.setdefault(disease, ([], []))[not present].append(image)
    return sides


_run = console.run_on_tables(curate, "uncertain seed per_disease")
TOOLS = {"diagnosis": console.Tool(DESCRIPTION, EPILOG, _add_options, _run)}
