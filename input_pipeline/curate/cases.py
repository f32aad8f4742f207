"""rad3d and mpx: folders of cases -> the layouts of the Rad3D and MPx families.

Radiopaedia and MedPix have terms of their own; whoever may use them brings each case as a folder with its scans and
one case.json, or all cases in one cases.csv:

    cases/17/case.json        {"title": "Lung abscess", "findings": "...", "impression": "...", "patient": "Age: 40",
                               "presentation": "...", "articles": [...], "features": [...], "discussion": "...",
                               "scans": [{"path": "ct", "modality": "CT", "plane": "axial", "caption": "..."}]}
    cases/17/ct/*.dcm         a DICOM series; or .nii.gz, .nii, .npy, .png, .jpg, .tif
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np

from input_pipeline.curate import console, jobs, layouts
from input_pipeline.curate.jobs import Result
from input_pipeline.datasets import diseases, modalities, tables
from input_pipeline.files import atomic_write
from input_pipeline.images import scans
from input_pipeline.parallel import chunk_files
from input_pipeline.samples import RowError

LAYOUT = """
the folder of a case holds case.json (or SOURCE holds cases.csv, a line a case, with a column `case`, the folder's name;
lists are separated by '|', `scans` being paths):
  title          the diagnosis                    findings, impression     texts, or lists of texts
  patient        "Age: 40 years Gender: Male"     presentation, history    why the patient came
  articles       names of the diseases            features                 what they look like (of the article)
  discussion, exam, ddx, dxHow, followup          texts of MedPix
  scans          [{"path": "ct", "modality": "CT", "plane": "axial", "caption": "..."}]; without it, every scan
                 below the folder is taken, and DICOM says its modality
A scan is a file (NIfTI, DICOM, PNG, JPEG, TIFF, .npy) or the folder of a DICOM series.
"""
RAD3D = """\
Turn folders of cases into Rad3D: captions, modality labels and rationales, with their scans as NIfTI.
"""
RAD3D_EPILOG = (
    LAYOUT
    + """
what is written to DIR:
  scans/CASE_K.nii.gz or .png   every scan, in display order, without anything of its header but spacing
  caption.json     families rad3d_caption and, with title and features, rad3d_rationale (also what vqa asks about)
  rationale.json   its part with features, for rad3d_rationale
  modality.csv     family rad3d_modality
  report.json, problems.jsonl

A case of several scans gives a line a scan in modality.csv, and in caption.json: a report on all of them is asked of
each. --first takes a case's first scan only.

examples:
  python -m input_pipeline.curate rad3d cases --out rad3d
  python -m input_pipeline.curate vqa rad3d/caption.json --out rad3d --model gpt-4o-mini --dry-run
"""
)
MPX = """\
Turn folders of cases with pictures into MPx-Single (modality, plane, caption of a picture) and MPx-Multi (findings,
discussion, diagnosis ... of a case).
"""
MPX_EPILOG = (
    LAYOUT
    + """
what is written to DIR:
  images/CASE_K.png   every picture
  single.csv          family mpx_single
  multi.csv           family mpx_multi
  report.json, problems.jsonl

examples:
  python -m input_pipeline.curate mpx cases --out mpx
"""
)
_TABLES: dict[str, dict[str, list[str] | None]] = {
    "rad3d": {"caption.json": None, "rationale.json": None, "modality.csv": ["image_path", "answer"]},
    "mpx": {"single.csv": ["name", "type", "context"], "multi.csv": ["name", "type", "context", "history"]},
}
_TEXTS = (
    "title findings impression patient presentation history discussion exam ddx dxHow followup articles features"
).split()
_MULTI = {
    "findings": "findings",
    "discussion": "discussion",
    "title": "diagnosis",
    "exam": "exam",
    "ddx": "ddx",
    "dxHow": "dxHow",
    "followup": "txFollowup",
}
_SCANS = (".nii", ".nii.gz", ".dcm", ".npy", ".png", ".jpg", ".jpeg", ".tif", ".tiff")
_SAFE = re.compile(r"[^A-Za-z0-9._-]+")
# DICOM codes as the families' labels have them.
_CODES = {"MR": "MRI", "US": "ultrasound", "CR": "X-ray", "DX": "X-ray", "MG": "mammography", "XA": "angiography",
          "RF": "fluoroscopy", "NM": "nuclear medicine", "PT": "PET", "CT": "CT"}  # fmt: skip


def main(tool: str, argv: list[str]) -> int:
    rad3d = tool == "rad3d"
    parser = console.parser(tool, RAD3D if rad3d else MPX, RAD3D_EPILOG if rad3d else MPX_EPILOG)
    parser.add_argument("source", metavar="SOURCE", help="a folder of case folders")
    if rad3d:
        parser.add_argument("--first", action="store_true", help="only the first scan of a case")
    console.add_job_options(parser)
    args = parser.parse_args(argv)
    options = {"first": rad3d and args.first}
    return console.run(
        args, lambda out, **more: build(tool, args.source, out, options, **console.job_options(args), **more)
    )


def build(tool: str, source, directory, options: dict, **running) -> dict:
    """Runs rad3d or mpx; returns the report. `running`: see jobs.run. Raises ValueError."""
    source, directory = Path(source).absolute(), Path(directory).absolute()
    if not source.is_dir():
        raise ValueError(f"{source} is no folder")
    (directory / ("scans" if tool == "rad3d" else "images")).mkdir(parents=True, exist_ok=True)
    options = options | {"tool": tool, "out": str(directory)}
    items = jobs.run(directory, tool, one_case, options, _listed(source), **running)
    report = jobs.Report(directory, tool, {"source": str(source), "first": options["first"]})
    with layouts.Tables(directory, _TABLES[tool]) as out:
        for _, result in jobs.results(directory, items):
            report.add(result)
            for name, rows in result.tables.items():
                for row in rows:
                    out.write(name, row)
    report.counts |= {f"{name}: rows": count for name, count in out.rows.items()}
    written = report.write()
    chunk_files.remove_parts(directory)
    return written


def _listed(source: Path) -> Iterator[str]:
    """One item a case, so that a row function needs nothing else: JSON of the place, the folder's name, the row of
    cases.csv with its cells (0 and null without one), and what is wrong with it."""
    table = source / "cases.csv"
    if not table.is_file():
        cases = ((0, {"case": f.name}) for f in sorted(f for f in source.iterdir() if f.is_dir()))
    else:
        _, cases = tables.stream_csv(table, ("case",), None)
    files: set[int] = set()  # names of what is written, 8 bytes of a hash each
    for row in cases:
        if isinstance(row, RowError):
            yield json.dumps([str(source), "", row.row, None, row.reason])
            continue
        number, cells = row
        name = cells["case"].strip()
        written = int.from_bytes(hashlib.blake2b(_SAFE.sub("_", name).encode(), digest_size=8).digest(), "big")
        fault = "another case has this name, or one whose files would be called the same" if written in files else ""
        files.add(written)
        more = {k: v for k, v in cells.items() if k in (*_TEXTS, "scans") and v.strip()} if number else None
        yield json.dumps([str(source), name, number, more, fault])


def one_case(options: dict, item: str) -> Result:
    """A case -> its rows; writes its scans."""
    root, name, number, cells, fault = json.loads(item)
    result, place = Result(), Path(root) / name
    result.count("cases read")
    where = Path(root) / "cases.csv" if number else place / "case.json"
    if fault:
        result.count("cases that cannot be used")
        result.problem(where, number, fault, "correct or rename it")
        return result
    if tables.bad_path(name) or "/" in name or "\\" in name:
        result.count("cases that cannot be used")
        result.problem(where, number, f"the case is no plain folder name: {name[:60]!r}", "rename it")
        return result
    try:
        case = _texts(where, number, _from_csv(cells) if cells is not None else _load(where))
        pictures = _scans(place, name, case, options, result)
    except RowError as error:
        result.count("cases that cannot be used")
        result.problem(error.file, error.row, error.reason, error.remedy)
        return result
    if not pictures:
        result.count("cases without a usable scan")
        return result
    (_rad3d if options["tool"] == "rad3d" else _mpx)(name, case, pictures, where, number, result)
    return result


def _load(where: Path) -> dict:
    if not where.is_file():
        raise RowError(where, 0, "there is no case.json", "one a case, or cases.csv in the folder above")
    value = tables.load_json(where)
    if not isinstance(value, dict):
        raise RowError(where, 0, "a case must be an object", "see --help")
    return value


def _from_csv(cells: dict) -> dict:
    split = lambda text: [part.strip() for part in text.split("|") if part.strip()]  # noqa: E731
    case: dict = {k: split(v) if k in ("articles", "features") else v for k, v in cells.items()}
    if "scans" in case:
        case["scans"] = [{"path": path} for path in split(case["scans"])]
    return case


def _texts(where: Path, number: int, case: dict) -> dict:
    """The case with every text checked and lists joined; blank ones are left out."""
    unknown = sorted(set(case) - {*_TEXTS, "scans"})
    if unknown:
        raise RowError(where, number, f"unknown keys: {', '.join(unknown)[:80]}", f"known: {', '.join(_TEXTS)}, scans")
    row = tables.Row(where, number, case, where.parent)
    out: dict = {}
    for key in _TEXTS:
        parts = row.texts(key, literal=False)
        if parts:
            out[key] = parts if key in ("articles", "features") else " ".join(chunk_files)
    listed = case.get("scans")
    if listed is not None:
        if not isinstance(listed, list) or not all(
            isinstance(s, dict) and isinstance(s.get("path"), str)
            and all(v is None or isinstance(v, str) for v in s.values()) for s in listed
        ):  # fmt: skip
            raise RowError(where, number, "scans must be a list of objects with a path", "see --help")
        out["scans"] = listed
    return out


def _scans(place: Path, name: str, case: dict, options: dict, result: Result) -> list[dict]:
    """Writes the scans that can be read; returns {file, modality, plane, caption} of each."""
    listed = case.get("scans")
    if listed is None:
        listed = [{"path": path} for path in _found(place)]
    if not listed:
        result.problem(place, 0, "the case has no scan", "add its scans")
    out = []
    for k, said in enumerate(listed[:1] if options["first"] else listed, 1):
        try:
            path = scans.resolve(place, said["path"])
            voxels, header = scans.read(path)
        except scans.ScanError as error:
            result.count("scans that cannot be used")
            result.problem(place / said["path"], k, error.reason, error.remedy)
            continue
        flat = header.kind == "2d"
        if options["tool"] == "mpx" and not flat:
            result.count("scans that cannot be used")
            result.problem(path, k, "a volume, but MPx holds pictures", "use rad3d for volumes")
            continue
        folder = "scans" if options["tool"] == "rad3d" else "images"
        file = f"{_SAFE.sub('_', name)}_{k}.{'png' if flat and voxels.dtype == np.uint8 else 'nii.gz'}"
        if options["tool"] == "mpx" and not file.endswith(".png"):
            voxels = _as_bytes(voxels, header.extremes)
            file = f"{_SAFE.sub('_', name)}_{k}.png"
        _write_scan(Path(options["out"]) / folder / file, voxels, header.spacing_mm)
        result.count("scans")
        out.append({
            "file": f"{folder}/{file}",
            "modality": (said.get("modality") or _CODES.get(header.modality or "", "")).strip(),
            "plane": (said.get("plane") or "").strip(),
            "caption": (said.get("caption") or "").strip(),
        })  # fmt: skip
    return out


def _found(place: Path) -> list[str]:
    """Scans below a folder: files, and folders of .dcm files as series."""
    out: list[str] = []
    for folder, below, names in os.walk(place):
        below.sort()
        relative = Path(os.path.relpath(folder, place))
        series = [n for n in names if n.lower().endswith((".dcm", ".dicom"))]
        if len(series) > 1 and folder != str(place):
            out.append(relative.as_posix())
        else:
            out += [(relative / n).as_posix() for n in sorted(series)]
        out += [(relative / n).as_posix() for n in sorted(names) if n.lower().endswith(_SCANS) and n not in series]
    return sorted(out)


def _as_bytes(voxels: np.ndarray, extremes) -> np.ndarray:
    low, high = extremes
    return np.round((voxels.astype(np.float64) - low) * (255.0 / (high - low))).astype(np.uint8)


def _write_scan(file: Path, voxels: np.ndarray, spacing) -> None:
    """[H, W, D, C] as PNG (one slice) or NIfTI in the same display order; of the header, the spacing alone."""
    with atomic_write(file, unique=True) as partial:
        if file.suffix == ".png":
            from PIL import Image

            Image.fromarray(np.ascontiguousarray(voxels[:, :, 0, 0] if voxels.shape[3] == 1 else voxels[:, :, 0])).save(
                partial, "PNG"
            )
            return
        if voxels.shape[3] != 1:
            raise scans.ScanError(file, "a colour volume cannot be written as NIfTI", "leave it out", "unsupported")
        # Display order is rows front to back, columns right to left, slices feet to head (scans/orientation.py):
        # axes of the array are W, H, D with W towards the left, H towards the back, D towards the head.
        h, w, d = (float(s) if s else 1.0 for s in (spacing or (1, 1, 1)))
        affine = np.diag([-w, -h, d, 1.0])
        image = nibabel.Nifti1Image(np.ascontiguousarray(voxels[..., 0].swapaxes(0, 1)), affine)
        image.header.set_xyzt_units("mm")
        with open(partial, "wb") as out:
            with gzip.GzipFile(fileobj=out, mode="wb", mtime=0, filename="") as packed:
                packed.write(image.to_bytes())


def _rad3d(name: str, case: dict, pictures: list[dict], where, number, result: Result) -> None:
    base = {
        "pre": " ".join(case[k] for k in ("presentation", "history") if k in case),
        "pat": case.get("patient", ""),
        "finding": case.get("findings", ""),
        "impression": case.get("impression", ""),
        "title": case.get("title", ""),
        "articles": case.get("articles", []),
        "radiographic_features": case.get("features", []),
    }
    if not base["finding"] and not base["impression"]:
        result.count("cases without findings and impression")
        result.problem(where, number, "findings and impression are blank", "the case gives modality labels only")
    for picture in pictures:
        row = base | {"npy_path": picture["file"], "modality": picture["modality"]}
        if base["finding"] or base["impression"]:
            result.add("caption.json", row)
        if base["title"] and diseases.words(base["title"]) and base["radiographic_features"]:
            result.add("rationale.json", row)
        label = picture["modality"]
        if label and modalities.modalities(label):
            result.add("modality.csv", {"image_path": picture["file"], "answer": label})
        else:
            result.count("scans without a known modality")
            if label:
                result.problem(
                    where, number, f"the modality is not known: {label}", "write CT, MRI, X-ray, ultrasound ..."
                )


def _mpx(name: str, case: dict, pictures: list[dict], where, number, result: Result) -> None:
    for picture in pictures:
        for kind in ("modality", "plane", "caption"):
            text = picture[kind]
            if kind == "modality" and text and not modalities.modalities(text):
                result.problem(
                    where, number, f"the modality is not known: {text}", "write CT, MRI, X-ray, ultrasound ..."
                )
            elif text:
                result.add("single.csv", {"name": picture["file"], "type": kind, "context": text})
    names = ", ".join(picture["file"] for picture in pictures)
    history = " ".join(case[k] for k in ("patient", "presentation", "history") if k in case)
    for key, kind in _MULTI.items():
        if key in case:
            result.add("multi.csv", {"name": names, "type": kind, "context": case[key], "history": history})
