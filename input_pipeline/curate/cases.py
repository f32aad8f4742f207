"""rad3d and mpx: case folders -> the layouts of the Rad3D and MPx families.

Radiopaedia and MedPix have their own terms of use. Users with access provide each case as a folder with its scans and
a case.json, or all cases in one cases.csv:

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
from input_pipeline.datasets import diseases, modalities
from input_pipeline.datasets.csv_tables import stream_csv
from input_pipeline.datasets.json_tables import load_json
from input_pipeline.datasets.rows import NO_PROSE, Row, bad_path, present
from input_pipeline.files import atomic_write, parse_json
from input_pipeline.images import scans
from input_pipeline.parallel import chunk_files
from input_pipeline.samples import RowError

CASE_FORMAT = """
A case folder has a case.json. Alternatively, SOURCE has a cases.csv with one line per case: its column `case` is the
folder's name, lists are separated by '|', and `scans` is a list of paths.
  title          the diagnosis                    findings, impression     texts, or lists of texts
  patient        "Age: 40 years Gender: Male"     presentation, history    reason for the examination
  articles       names of the diseases            features                 radiographic features (of the article)
  discussion, exam, ddx, dxHow, followup          texts of MedPix
  scans          [{"path": "ct", "modality": "CT", "plane": "axial", "caption": "..."}]; default: every scan below the
                 folder, with the modality of its DICOM header
A scan is a file (NIfTI, DICOM, PNG, JPEG, TIFF, .npy) or the folder of a DICOM series.
"""
RAD3D = "Convert case folders to Rad3D: captions, modality labels and rationales, with the scans as NIfTI."
RAD3D_EPILOG = f"""{CASE_FORMAT}
output in DIR:
  scans/CASE_K.nii.gz or .png   every scan in display order; of the header, only the spacing is kept
  caption.json     families rad3d_caption and, with title and features, rad3d_rationale; input of vqa
  rationale.json   the cases with features, for rad3d_rationale
  modality.csv     family rad3d_modality
  report.json, problems.jsonl

A case is one row of caption.json and rationale.json: `npy_path` is the list of its scans, and `modality` the list of
their labels. modality.csv has one row per scan, because the modality is that of a scan. --first uses only the first
scan of a case.

examples:
  python -m input_pipeline.curate rad3d cases --out rad3d
  python -m input_pipeline.curate vqa rad3d/caption.json --out rad3d --model gpt-4o-mini --dry-run
"""
MPX = """\
Convert case folders with 2D images to MPx-Single (modality, plane, caption of an image) and MPx-Multi (findings,
discussion, diagnosis ... of a case).
"""
MPX_EPILOG = f"""{CASE_FORMAT}
output in DIR:
  images/CASE_K.png   every image
  single.csv          family mpx_single
  multi.csv           family mpx_multi
  report.json, problems.jsonl

examples:
  python -m input_pipeline.curate mpx cases --out mpx
"""
_TABLES: dict[str, dict[str, list[str] | None]] = {
    "rad3d": {"caption.json": None, "rationale.json": None, "modality.csv": ["image_path", "answer", "study"]},
    "mpx": {
        "single.csv": ["name", "type", "context", "study"],
        "multi.csv": ["name", "type", "context", "history", "study"],
    },
}
_TEXTS = (
    "title findings impression patient presentation history discussion exam ddx dxHow followup articles features"
).split()
# Text of a case -> type of MPx-Multi.
_MULTI = {
    "findings": "findings", "discussion": "discussion", "title": "diagnosis", "exam": "exam", "ddx": "ddx",
    "dxHow": "dxHow", "followup": "txFollowup",
}  # fmt: skip
_EXTENSIONS = (".nii", ".nii.gz", ".dcm", ".npy", ".png", ".jpg", ".jpeg", ".tif", ".tiff")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
# DICOM modality code -> label of the families.
DICOM_MODALITIES = {
    "MR": "MRI", "US": "ultrasound", "CR": "X-ray", "DX": "X-ray", "MG": "mammography", "XA": "angiography",
    "RF": "fluoroscopy", "NM": "nuclear medicine", "PT": "PET", "CT": "CT",
}  # fmt: skip


def _add_options(parser) -> None:
    parser.set_defaults(first=False)
    parser.add_argument("source", metavar="SOURCE", help="directory of the case folders")
    console.add_job_options(parser)


def _add_rad3d_options(parser) -> None:
    parser.add_argument("--first", action="store_true", help="use only the first scan of a case")
    _add_options(parser)


def curate(tool: str, source, directory, options: dict, **running) -> dict:
    """Run rad3d or mpx. Returns the report. `running`: see jobs.run. Raises ValueError."""
    source, directory = Path(source).absolute(), Path(directory).absolute()
    if not source.is_dir():
        raise ValueError(f"{source} is not a directory")
    (directory / ("scans" if tool == "rad3d" else "images")).mkdir(parents=True, exist_ok=True)
    options = options | {"tool": tool, "out": str(directory)}
    items = jobs.run(directory, tool, one_case, options, _items(source), **running)
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


def _items(source: Path) -> Iterator[str]:
    """Yield one item per case, as JSON of [source, folder, row, cells, problem].

    `row` and `cells` are the line of cases.csv (0 and null for a case.json), so the row function needs no other input.
    """
    table = source / "cases.csv"
    if not table.is_file():
        cases = ((0, {"case": f.name}) for f in sorted(f for f in source.iterdir() if f.is_dir()))
    else:
        _, cases = stream_csv(table, ("case",), None)
    files: set[int] = set()  # 8-byte hashes of the names of output files
    for row in cases:
        if isinstance(row, RowError):
            yield json.dumps([str(source), "", row.row, None, row.reason])
            continue
        number, cells = row
        name = cells["case"].strip()
        key = int.from_bytes(hashlib.blake2b(_UNSAFE.sub("_", name).encode(), digest_size=8).digest(), "big")
        problem = "another case has this name or the same output file names" if key in files else ""
        files.add(key)
        texts = {k: v for k, v in cells.items() if k in (*_TEXTS, "scans") and present(v)} if number else None
        yield json.dumps([str(source), name, number, texts, problem])


def one_case(options: dict, item: str) -> Result:
    """Return the rows of a case, and write its scans."""
    root, name, number, cells, problem = parse_json(item)
    result, folder = Result(), Path(root) / name
    result.count("cases read")
    file = Path(root) / "cases.csv" if number else folder / "case.json"
    try:
        if problem:
            raise RowError(file, number, problem, "correct or rename it")
        if bad_path(name) or "/" in name or "\\" in name:
            raise RowError(file, number, f"the case is not a plain folder name: {name[:60]!r}", "rename it")
        case = _checked(file, number, _from_csv(cells) if cells is not None else _load(file))
        written = _write_scans(folder, name, case, options, result)
    except RowError as error:
        result.count("cases that cannot be used")
        result.error(error)
        return result
    if not written:
        result.count("cases without a usable scan")
        return result
    study = f"{options['tool']}-{name}"
    (_rad3d if options["tool"] == "rad3d" else _mpx)(study, case, written, file, number, result)
    return result


def _load(file: Path) -> dict:
    if not file.is_file():
        raise RowError(file, 0, "case.json not found", "add one per case, or a cases.csv in the directory above")
    value = load_json(file)
    if not isinstance(value, dict):
        raise RowError(file, 0, "a case must be an object", "see --help")
    return value


def _from_csv(cells: dict) -> dict:
    split = lambda text: [part.strip() for part in text.split("|") if part.strip()]  # noqa: E731
    case: dict = {k: split(v) if k in ("articles", "features") else v for k, v in cells.items()}
    if "scans" in case:
        case["scans"] = [{"path": path} for path in split(case["scans"])]
    return case


def _checked(file: Path, number: int, case: dict) -> dict:
    """Return the case with its texts checked and lists joined, without blank texts. Raises RowError."""
    row = Row(file, number, case, file.parent)
    if unknown := row.unknown_keys((*_TEXTS, "scans")):
        raise row.error(unknown, f"known: {', '.join(_TEXTS)}, scans")
    out: dict = {}
    for key in _TEXTS:
        texts = row.prose(key)
        if texts:
            out[key] = texts if key in ("articles", "features") else " ".join(texts)
    listed = case.get("scans")
    if listed not in (None, [], ""):  # else the scans of the folder
        if not isinstance(listed, list) or not all(
            isinstance(s, dict) and isinstance(s.get("path"), str)
            and all(v is None or isinstance(v, str) for v in s.values()) for s in listed
        ):  # fmt: skip
            raise RowError(file, number, "scans must be a list of objects with a path", "see --help")
        out["scans"] = listed
    return out


def _write_scans(folder: Path, name: str, case: dict, options: dict, result: Result) -> list[dict]:
    """Write the scans that can be read. Returns {file, modality, plane, caption} of each."""
    listed = case["scans"] if "scans" in case else [{"path": path} for path in _find_scans(folder)]
    if not listed:
        result.problem(folder, 0, "the case has no scan", "add its scans")
    mpx, out = options["tool"] == "mpx", []
    for k, entry in enumerate(listed[:1] if options["first"] else listed, 1):
        try:
            path = scans.resolve(folder, entry["path"])
            voxels, header = scans.read(path)
            is_2d = header.kind == "2d"
            if mpx and not is_2d:
                raise scans.ScanError(path, "a volume, but MPx has 2D images only", "use rad3d for volumes")
            if mpx and voxels.dtype != np.uint8:
                low, high = header.value_range
                voxels = np.round((voxels.astype(np.float64) - low) * (255.0 / (high - low))).astype(np.uint8)
            extension = "png" if is_2d and voxels.dtype == np.uint8 else "nii.gz"
            file = f"{'images' if mpx else 'scans'}/{_UNSAFE.sub('_', name)}_{k}.{extension}"
            _write_scan(Path(options["out"]) / file, voxels, header.spacing_mm)
        except scans.ScanError as error:
            result.count("scans that cannot be used")
            result.problem(folder / entry["path"], k, error.reason, error.remedy)
            continue
        result.count("scans")
        texts = {name: present(entry.get(name) or "", NO_PROSE) for name in ("modality", "plane", "caption")}
        if not texts["modality"]:
            texts["modality"] = DICOM_MODALITIES.get(header.modality or "", "")
        out.append({"file": file} | texts)
    return out


def _find_scans(root: Path) -> list[str]:
    """Return the scans below a folder: files, and subfolders with several .dcm files as series."""
    out: list[str] = []
    for folder, subfolders, names in os.walk(root):
        subfolders.sort()
        relative = Path(os.path.relpath(folder, root))
        dicom = [n for n in names if n.lower().endswith((".dcm", ".dicom"))]
        if len(dicom) > 1 and folder != str(root):
            out.append(relative.as_posix())
        else:
            out += [(relative / n).as_posix() for n in dicom]
        out += [(relative / n).as_posix() for n in names if n.lower().endswith(_EXTENSIONS) and n not in dicom]
    return sorted(out)


def _write_scan(file: Path, voxels: np.ndarray, spacing) -> None:
    """Write voxels[H, W, D, C] as PNG (one slice) or NIfTI in the same display order, with the spacing only."""
    with atomic_write(file, unique=True) as partial:
        if file.suffix == ".png":
            from PIL import Image

            pixels = np.ascontiguousarray(voxels[:, :, 0, 0] if voxels.shape[3] == 1 else voxels[:, :, 0])
            Image.fromarray(pixels).save(partial, "PNG")
            return
        if voxels.shape[3] != 1:
            raise scans.ScanError(file, "a colour volume cannot be written as NIfTI", "remove it", "unsupported")
        # Display order is rows front to back, columns right to left, slices feet to head (scans/orientation.py). So
        # the NIfTI axes are W, H, D, with W towards the left, H towards the back and D towards the head.
        h, w, d = (float(s) if s else 1.0 for s in (spacing or (1, 1, 1)))
        affine = np.diag([-w, -h, d, 1.0])
        image = nibabel.Nifti1Image(np.ascontiguousarray(voxels[..., 0].swapaxes(0, 1)), affine)
        image.header.set_xyzt_units("mm")
        with open(partial, "wb") as out, gzip.GzipFile(fileobj=out, mode="wb", mtime=0, filename="") as packed:
            packed.write(image.to_bytes())


def _rad3d(study: str, case: dict, written: list[dict], file, number, result: Result) -> None:
    row = {
        "pre": " ".join(case[k] for k in ("presentation", "history") if k in case),
        "pat": case.get("patient", ""),
        "finding": case.get("findings", ""),
        "impression": case.get("impression", ""),
        "title": case.get("title", ""),
        "articles": case.get("articles", []),
        "radiographic_features": case.get("features", []),
        "npy_path": [scan["file"] for scan in written],
        "modality": [scan["modality"] for scan in written],
        "study": study,
    }
    if row["finding"] or row["impression"]:
        result.add("caption.json", row)
    else:
        result.count("cases without findings and impression")
        result.problem(file, number, "findings and impression are blank", "the case gives modality labels only")
    if row["title"] and diseases.words(row["title"]) and row["radiographic_features"]:
        result.add("rationale.json", row)
    for scan in written:
        if _known_modality(scan["modality"], file, number, result):
            result.add("modality.csv", {"image_path": scan["file"], "answer": scan["modality"], "study": study})
        else:
            result.count("scans without a known modality")


def _mpx(study: str, case: dict, written: list[dict], file, number, result: Result) -> None:
    for scan in written:
        for kind in ("modality", "plane", "caption"):
            text = scan[kind]
            if text and (kind != "modality" or _known_modality(text, file, number, result)):
                result.add("single.csv", {"name": scan["file"], "type": kind, "context": text, "study": study})
    names = ", ".join(scan["file"] for scan in written)
    history = " ".join(case[k] for k in ("patient", "presentation", "history") if k in case)
    for key, kind in _MULTI.items():
        if key in case:
            row = {"name": names, "type": kind, "context": case[key], "history": history, "study": study}
            result.add("multi.csv", row)


def _known_modality(label: str, file, number, result: Result) -> bool:
    """Return whether a label names a known modality. An unknown label becomes a problem, a blank one does not."""
    if label and not modalities.modalities(label):
        result.problem(file, number, f"the modality is unknown: {label}", "write CT, MRI, X-ray, ultrasound ...")
        return False
    return bool(label)


_run = console.run_on_source(curate, "first")
TOOLS = {
    "rad3d": console.Tool(RAD3D, RAD3D_EPILOG, _add_rad3d_options, _run),
    "mpx": console.Tool(MPX, MPX_EPILOG, _add_options, _run),
}
