"""Plans a phantom: modality, lesions, body and file format, as a pure function of (seed, split, index, size, volumes).

Image coordinates run from -1 to 1 and have the same meaning in every modality:

        patient's right          patient's left
       (-1, -1) ------------------- (1, -1)     upper
           |      right  |  left       |
           |      upper  |  upper      |        x = column: from the patient's right to the left
           |  -----------+-----------  |        y = row: down
           |      right  |  left       |        z = slice: from the feet to the head (CT, MRI volumes)
           |      lower  |  lower      |
       (-1, 1) -------------------- (1, 1)      lower

The patient's left is on the right of the image, as in radiology. CT and MRI are axial: their upper half is anterior.
X-rays are frontal: their upper half is superior.
"""

from __future__ import annotations

import dataclasses

import numpy as np

MODALITIES = ("X-ray", "CT", "MRI", "ultrasound")
SPLITS = {"train": 0, "validation": 2, "test": 1}  # the number seeds the random stream
SIDES, LEVELS, SIZES = ("left", "right"), ("upper", "lower"), ("small", "big")
DIAGNOSES = ("normal", "nodule", "mass", "multiple lesions")

COUNT_SHARES = (0.5, 0.3, 0.2)  # scans with 0, 1, 2 lesions
RADII = {"small": (0.14, 0.19), "big": (0.26, 0.33)}  # in half-widths of the image
AMPLITUDE = (0.32, 0.38)  # contrast of a lesion, as a share of the intensity range
# Lesions are brighter or darker than the tissue, as most lesions of the modality.
SIGNS = {"X-ray": 1, "CT": 1, "MRI": 1, "ultrasound": -1}
# Standard deviation; in ultrasound relative to the brightness.
NOISE = {"X-ray": 0.03, "CT": 0.05, "MRI": 0.05, "ultrasound": 0.25}
NOISE_SPREAD = (0.75, 1.33)
DEPTHS = (8, 32)
# Every modality has the same shares, so that the format does not reveal the modality.
FORMATS_2D = {"png8": 0.35, "png16": 0.2, "jpeg": 0.2, "dicom": 0.25}
FORMATS_3D = {"nifti": 0.5, "dicom": 0.5}


@dataclasses.dataclass(frozen=True)
class Labels:
    """The visible facts of a phantom. `side`, `level` and `size` describe a solitary lesion, else they are None."""

    modality: str
    count: int
    side: str | None = None
    level: str | None = None
    size: str | None = None

    @property
    def diagnosis(self) -> str:
        """Return `normal`, `nodule` (one small lesion), `mass` (one big lesion) or `multiple lesions`."""
        if self.count == 1:
            return {"small": "nodule", "big": "mass"}[self.size]
        return {0: "normal", 2: "multiple lesions"}[self.count]


@dataclasses.dataclass(frozen=True)
class Lesion:
    """An ellipse, or an ellipsoid in a volume: centre and radii (x, y, z) in image coordinates."""

    side: str
    level: str
    size: str
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    amplitude: float


@dataclasses.dataclass(frozen=True)
class Body:
    """Random properties of a phantom that are not the subject of any question."""

    axes: tuple[float, float]  # half-axes of the body ellipse (x, y); in ultrasound (a fan) they only limit the lesions
    centre: tuple[float, float]  # centre of the ellipse (x, y)
    level: float  # intensity of the tissue, from 0 to 1
    air: float  # intensity outside the body (0 outside an ultrasound fan)
    frame: float  # intensity of the brightest structure (spine, skull, fat, skin line)
    frame_width: float  # width of that structure, relative to its usual width
    noise: float  # standard deviation; in ultrasound of the speckle, relative to the brightness
    tilt: tuple[float, float]  # (x, y) slope of the shading, intensity per half-width
    phase: float  # phase of ribs and layers, in turns
    fan: float  # half-angle of the ultrasound fan, radians


@dataclasses.dataclass(frozen=True)
class Study:
    """The complete plan of a phantom, from which `drawing.paint` draws its voxels."""

    seed: int
    split: str
    index: int
    size: int  # rows and columns
    depth: int  # slices; 1 for a 2D image
    labels: Labels
    lesions: tuple[Lesion, ...]
    body: Body
    file_format: str  # png8, png16, jpeg, dicom (a file, or a directory for a volume) or nifti
    inverted: bool  # stored as MONOCHROME1 (X-ray as DICOM only)
    stored_as: str  # axes of the NIfTI array on disk, such as LPS, as its affine states
    spacing: tuple[float, float, float]  # mm (row, column, slice)
    value_range: tuple[int, int]  # stored values (HU for CT) of the intensities 0 and 1

    @property
    def study_id(self) -> str:
        return f"p{self.seed}-{self.split}-{self.index:06d}"

    @property
    def path(self) -> str:
        """Return the path relative to the data set; a DICOM volume is a directory with one file per slice."""
        suffix = {"png8": ".png", "png16": ".png", "jpeg": ".jpg", "nifti": ".nii.gz"}.get(self.file_format)
        if suffix is None:
            suffix = ".dcm" if self.depth == 1 else ""
        return f"scans/{self.split}/{self.study_id}{suffix}"


def random_generator(key: tuple[int, str, int], stream: int) -> np.random.Generator:
    """Return the generator of one of the independent streams of (seed, split, index).

    Stream 0 plans, 1 draws noise, 2 chooses a disease to ask about, 3 orders slice numbers. SFC64 is NumPy's fastest
    generator.
    """
    seed, split, index = key
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, SPLITS[split], index, stream])))


def describe(seed: int, split: str, index: int, size: int = 128, volumes: float = 0.12) -> Study:
    """Plan phantom `index` of a split.

    Args:
      seed: seed of the data set, 0 or more.
      split: `train`, `validation` or `test`; their random streams differ.
      index: 0 or more; a phantom does not depend on the size of the data set.
      size: rows and columns, 64 to 1024.
      volumes: share of volumes among all phantoms, 0 to 0.5 (X-ray and ultrasound are always 2D).
    Raises:
      ValueError: with every argument that is out of range.
    """
    problems = [f"split {split!r}: use one of {', '.join(SPLITS)}"] if split not in SPLITS else []
    problems += [f"{k} {v}: use 0 or more" for k, v in (("seed", seed), ("index", index)) if v < 0]
    problems += [f"size {size}: use 64 to 1024"] if not 64 <= size <= 1024 else []
    problems += [f"volumes {volumes}: use 0 to 0.5"] if not 0 <= volumes <= 0.5 else []
    if problems:
        raise ValueError("; ".join(problems))

    rng = random_generator((seed, split, index), stream=0)
    modality = MODALITIES[rng.integers(4)]
    is_volume = modality in ("CT", "MRI") and rng.random() < 2 * volumes
    depth = int(rng.integers(DEPTHS[0], DEPTHS[1] + 1)) if is_volume else 1
    body = _body(rng, modality)
    lesions = _lesions(rng, body, int(rng.choice(3, p=COUNT_SHARES)), depth, SIGNS[modality])
    labels = Labels(modality, len(lesions))
    if len(lesions) == 1:
        labels = dataclasses.replace(labels, side=lesions[0].side, level=lesions[0].level, size=lesions[0].size)

    formats = FORMATS_3D if is_volume else FORMATS_2D
    file_format = str(rng.choice(list(formats), p=list(formats.values())))
    in_plane = round(float(rng.uniform(0.5, 1.5)) * 128 / size, 4)
    return Study(
        seed=seed,
        split=split,
        index=index,
        size=size,
        depth=depth,
        labels=labels,
        lesions=lesions,
        body=body,
        file_format=file_format,
        inverted=bool(rng.random() < 0.5) and file_format == "dicom" and modality == "X-ray",
        stored_as=str(rng.choice(["RAS", "LAS", "LPS", "RPS"])),
        spacing=(in_plane, in_plane, round(float(rng.uniform(1.5, 6.0)), 4)),
        value_range=_value_range(rng, modality, file_format),
    )


def _body(rng: np.random.Generator, modality: str) -> Body:
    uniform = rng.uniform
    return Body(
        axes=(0.86, 0.84) if modality == "ultrasound" else (uniform(0.86, 0.98), uniform(0.84, 0.96)),
        centre=(uniform(-0.02, 0.02), uniform(-0.02, 0.02)),
        level=uniform(0.43, 0.57),
        air=uniform(0.06, 0.14),
        frame=uniform(0.9, 1.0),
        frame_width=uniform(0.7, 1.5),
        noise=NOISE[modality] * uniform(*NOISE_SPREAD),
        tilt=(uniform(-0.05, 0.05), uniform(-0.05, 0.05)),
        phase=uniform(0, 1),
        fan=uniform(np.radians(25), np.radians(33)),
    )


def _lesions(rng: np.random.Generator, body: Body, count: int, depth: int, sign: int) -> tuple[Lesion, ...]:
    """Place lesions in different quadrants, inside the body, without overlap, with centres away from both midlines."""
    quadrants = [(SIDES[q % 2], LEVELS[q // 2]) for q in rng.permutation(4)[:count]]
    sizes = [SIZES[k] for k in rng.integers(2, size=count)]
    signs = np.array([(1 if side == "left" else -1, 1 if level == "lower" else -1) for side, level in quadrants])
    low, high = np.array([RADII[size] for size in sizes]).reshape(-1, 2).T
    for _ in range(20_000):
        # Radii are drawn again with the centres, because two of the biggest lesions may not fit. 64 tries at once.
        centres = rng.uniform(0.22, 0.65, (64, count, 2)) * signs.reshape(count, 2)
        radii = rng.uniform(low, high, (64, count))
        fitting = np.flatnonzero(_fit(centres, radii, body))
        if fitting.size:
            centres, radii = centres[fitting[0]].tolist(), radii[fitting[0]].tolist()
            break
    else:
        raise AssertionError(f"no room for {sizes} lesions in {quadrants} of {body}")

    lesions = []
    for (side, level), size, (x, y), radius in zip(quadrants, sizes, centres, radii, strict=True):
        stretch = rng.uniform(0.93, 1.07)
        # An ellipsoid spans at least three slices of the thinnest volume, regardless of its radius in the plane.
        z, half_depth = (0.0, 1.0) if depth == 1 else (rng.uniform(-0.3, 0.3), rng.uniform(0.45, 0.65))
        amplitude = sign * rng.uniform(*AMPLITUDE)
        lesions.append(
            Lesion(side, level, size, (x, y, z), (radius * stretch, radius / stretch, half_depth), amplitude)
        )
    return tuple(lesions)


def _fit(centres: np.ndarray, radii: np.ndarray, body: Body) -> np.ndarray:
    """Return bool[N]: centres[N, lesions, 2] with radii[N, lesions] are inside the body and do not overlap."""
    reach = np.hypot(*np.moveaxis((centres - body.centre) / body.axes, -1, 0)) + 1.07 * radii / min(body.axes)
    apart = np.hypot(*(centres[:, 0] - centres[:, -1]).T) > 1.07 * radii.sum(1) + 0.03 if radii.shape[1] == 2 else True
    return (reach < 0.88).all(axis=1) & apart


def _value_range(rng: np.random.Generator, modality: str, file_format: str) -> tuple[int, int]:
    """Draw the stored values of the intensities 0 and 1, independently of the phantom's content."""
    low, high = {
        "png8": ((0, 25), (200, 255)),
        "jpeg": ((0, 25), (200, 255)),
        "png16": ((0, 3000), (20_000, 65_535)),
    }.get(file_format) or {
        "X-ray": ((0, 300), (2500, 4095)),
        "CT": ((-1020, -980), (800, 1600)),
        "MRI": ((0, 50), (300, 1500)),
        "ultrasound": ((0, 25), (200, 255)),
    }[modality]
    return int(rng.integers(*low)), int(rng.integers(*high))
