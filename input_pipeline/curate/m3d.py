"""M3D-Cap and M3D-VQA (Bai et al., arXiv 2404.00578): CT volumes as folders of slices, or as arrays [1, D, H, W]."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from input_pipeline.curate.labels import reject
from input_pipeline.curate.published_pairs import CHOICES
from input_pipeline.curate.source_files import Case, SourceFiles, text
from input_pipeline.datasets.json_tables import load_json
from input_pipeline.datasets.rows import bad_path
from input_pipeline.images import scans

SHORTEST = 5  # characters of a caption
SLICES = (".jpeg", ".jpg", ".png")
SPLITS = {"train": "train", "validation": "validation", "test": "test"}
TABLES = {"train": "M3D_VQA_train.csv", "validation": "M3D_VQA_val.csv", "test": "M3D_VQA_test.csv"}


def m3d_cap(files: SourceFiles) -> Iterator[Case]:
    """Yield the captions of M3D_Cap.json: {split: [{"image", "text"}]}, where `text` is a file."""
    table, volumes = files.find("M3D_Cap.json"), Volumes(files)
    content = load_json(table)
    if not isinstance(content, dict) or not content.keys() <= SPLITS.keys():
        raise ValueError(f"{table} must be an object with the lists {', '.join(SPLITS)}")
    for split, cases in content.items():
        for number, case in enumerate(cases, 1):
            image, caption = str(case.get("image", "")), _first(files, str(case.get("text", "")))
            path = volumes.path(image)
            answer = _caption(caption.read_text(encoding="utf-8", errors="replace")) if caption else ""
            if not path or not answer:
                reject(files.result, table, f"{split} {number}", f"no {'caption' if path else 'volume'}: {image[:80]}")
                continue
            yield Case(
                f"{split}-{number}", "report", (path,), answer, prompts="report", study=_case(image), split=split
            )


def m3d_vqa(files: SourceFiles, with_choices: bool = False) -> Iterator[Case]:
    """Yield the questions of M3D_VQA_*.csv about the volumes of M3D-Cap."""
    volumes = Volumes(files)
    for split, name in TABLES.items():
        table = files.find(name)
        for number, cells in files.rows(table, ("Image Path", "Question", "Answer", "Answer Choice", *CHOICES)):
            image, question, answer = (text(cells, name) for name in ("Image Path", "Question", "Answer"))
            path = volumes.path(image)
            if not path or not question or not answer:
                reject(files.result, table, number, f"no volume, question or answer: {image[:80]}")
                continue
            if with_choices:
                choices = [f"{name[-1]}: {text(cells, name)}" for name in CHOICES]
                question, answer = " ".join([question, *choices]), f"{text(cells, 'Answer Choice')}: {answer}"
            yield Case(f"{split}-{number}", "vqa", (path,), answer, question, study=_case(image), split=split)


class Volumes:
    """The volumes of M3D-Cap, which its tables name by the .npy files that the owners' script makes of the slices."""

    def __init__(self, files: SourceFiles):
        self.files = files
        self._paths: dict[str, str] = {}  # path in a table -> path of the unpacked scan; "" if there is none

    def path(self, image: str) -> str:
        """Return the path of a volume as [H, W, D], relative to the folder of the set; "" if it is missing."""
        if image not in self._paths:
            array = self._array(image)
            self._paths[image] = "" if array is None else self.files.stack(*array)
        return self._paths[image]

    def _array(self, image: str) -> tuple[np.ndarray, str] | None:
        """Return a volume and its axes, from the array of the owners' script or from the slices 0.jpeg, 1.jpeg, ..."""
        if (file := _first(self.files, image)) is not None:
            array = np.load(file, allow_pickle=False)
            return (array, "CDHW") if array.ndim == 4 else None
        if (folder := _first(self.files, image.removesuffix(".npy"))) is None or not folder.is_dir():
            return None
        slices = [file for file in folder.iterdir() if file.suffix in SLICES and file.stem.isdecimal()]
        images = [gray(scans.read(file)[0]) for file in sorted(slices, key=lambda file: int(file.stem))]
        shapes = [image.shape for image in images]
        if not images:
            return None
        # A few folders have slices of another size, which the owners' script drops as well.
        usual = max(set(shapes), key=shapes.count)
        self.files.result.count("m3d: slices of another size", sum(shape != usual for shape in shapes))
        return np.stack([image for image in images if image.shape == usual]), "DHW"


def gray(voxels: np.ndarray) -> np.ndarray:
    """Return the slice [H, W] of a 2D image [H, W, 1, C]; colours become their mean, rounded."""
    return voxels[:, :, 0].mean(-1).round().astype(voxels.dtype)


def _case(image: str) -> str:
    """Return the case of a volume: "ct_case/000006" of "M3D_Cap_npy/ct_case/000006/Axial.npy"."""
    return "/".join(image.split("/")[:-1]).removeprefix("M3D_Cap_npy/")


def _first(files: SourceFiles, path: str) -> Path | None:
    """Return where a path of the tables is: with the folder M3D_Cap_npy, M3D_Cap, or without."""
    if bad_path(path):
        return None
    inner = path.split("/", 1)[-1] if path.startswith(("M3D_Cap_npy/", "M3D_Cap/")) else path
    candidates = (files.root / candidate for candidate in (path, f"M3D_Cap_npy/{inner}", f"M3D_Cap/{inner}", inner))
    return next((candidate for candidate in candidates if candidate.exists()), None)


def _caption(content: str) -> str:
    """Return the findings of a text.txt, else its discussion, else all of it."""
    for heading in ("study_findings:", "discussion:", ""):
        _, mark, part = content.partition(heading) if heading else ("", "all", content)
        part = " ".join(part.split())
        if mark and len(part.replace(" ", "")) >= SHORTEST:
            return part
    return ""
