"""A plan -> voxels. Letters: D slices, H rows, W columns; pictures are drawn in intensities from 0 to 1.

Lesions change the mean and the deviation of a picture, which would tell that there is one without a look at it. So a
phantom with lesions gets the mean and the deviation of the same phantom without: by slightly other tissue, air and body
size (`_balanced`), which differ much more from phantom to phantom anyhow.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from input_pipeline.phantoms import plan
from input_pipeline.phantoms.plan import Labels, Study


def draw(seed: int, split: str, index: int, size: int = 128, volumes: float = 0.12) -> tuple[np.ndarray, Labels]:
    """Draw phantom `index` of a split: voxels[H, W, D, 1] as its file stores them, and its labels.

    uint8, uint16, or int16 in HU (CT as DICOM or NIfTI); D = 1 for a 2D image. Arguments and errors as `plan.describe`.
    """
    study = plan.describe(seed, split, index, size, volumes)
    return to_stored(study, paint(study)), study.labels


def to_stored(study: Study, intensities: np.ndarray) -> np.ndarray:
    """float32[H, W, D] in [0, 1] -> [H, W, D, 1] in the study's value range and dtype."""
    low, high = study.value_range
    dtype = np.uint8 if high <= 255 else np.int16 if low < 0 or study.file_format == "nifti" else np.uint16
    return np.rint(intensities * np.float32(high - low) + np.float32(low)).astype(dtype)[..., None]


def paint(study: Study) -> np.ndarray:
    """float32[H, W, D] in [0, 1] (a view of [D, H, W], the order that files and slices want)."""
    rng = plan.random((study.seed, study.split, study.index), stream=1)
    picture, study = _noiseless(study)
    if study.labels.modality == "ultrasound":
        picture *= 1 + np.float32(study.body.noise) * _speckle(rng, study.size)
    else:
        noise = rng.standard_normal(picture.shape, dtype=np.float32)
        noise *= np.float32(study.body.noise)
        picture += noise
        if study.labels.modality == "MRI":  # magnitude images fold the noise of air upwards
            np.abs(picture, out=picture)
    return np.moveaxis(np.clip(picture, 0, 1, out=picture), 0, -1)


def _noiseless(study: Study) -> tuple[np.ndarray, Study]:
    """float32[D, H, W], and the study with its body as drawn: see `_balanced`."""
    if not study.lesions:
        return _bare(study)[0], study
    balanced = _balanced(study)
    return _with_lesions(balanced, mean=_bare(study)[0].mean(dtype=np.float64)), balanced


def _with_lesions(study: Study, mean: float) -> np.ndarray:
    """float32[D, H, W] of this mean: the tissue gives way; what lies in front of a lesion (a spine) stays."""
    picture, tissue = _bare(study)
    for lesion in study.lesions:
        box, cover = lesion_cover(study, lesion)
        picture[box] += np.float32(lesion.amplitude) * cover * tissue[box]
    excess = picture.mean(dtype=np.float64) - mean
    picture -= tissue * np.float32(excess / tissue.mean(dtype=np.float64))
    return picture


def _balanced(study: Study) -> Study:
    """The body in which the lesions leave the deviation as it is: secant steps on a coarse copy.

    More air and a larger body mean less deviation at the same mean; in ultrasound, a wider fan and weaker speckle.
    """
    coarse = dataclasses.replace(study, size=64, depth=min(study.depth, 8))
    mean, variance = _moments(coarse, _bare(coarse)[0])

    def excess(change: float) -> float:
        changed = _changed(coarse, change)
        return _moments(changed, _with_lesions(changed, mean))[1] - variance

    change, step, before = 0.0, 0.5, excess(0.0)
    for _ in range(2):
        after = excess(change + step)
        change, step, before = change + step, -step * after / (after - before), after
    return _changed(study, change + step)


def _moments(study: Study, picture: np.ndarray) -> tuple[float, float]:
    """Mean and variance, the speckle that multiplies an ultrasound picture included."""
    mean, variance = picture.mean(dtype=np.float64), picture.var(dtype=np.float64)
    speckle = study.body.noise if study.labels.modality == "ultrasound" else 0
    return mean, variance + speckle**2 * (variance + mean**2)


def _changed(study: Study, change: float) -> Study:
    """0 leaves the body as planned; 1 is about what two big lesions need."""
    body = study.body
    if study.labels.modality == "ultrasound":
        body = dataclasses.replace(body, fan=body.fan + 0.05 * change, noise=body.noise * (1 - 0.2 * change))
    else:
        axes = (body.axes[0] * (1 + 0.02 * change), body.axes[1] * (1 + 0.02 * change))
        body = dataclasses.replace(body, air=body.air + 0.03 * change, axes=axes)
    return dataclasses.replace(study, body=body)


def _bare(study: Study) -> tuple[np.ndarray, np.ndarray]:
    """The picture without lesions and noise, and the share of each voxel that is tissue: float32[D, H, W] both."""
    x, y, z = coordinates(study)
    # A body is symmetric about its middle slice: half of the slices are drawn, `mirror` says which one each repeats.
    mirror = np.minimum(np.arange(study.depth), np.arange(study.depth)[::-1])
    painter = {"X-ray": _film, "CT": _ct, "MRI": _mri, "ultrasound": _fan}[study.labels.modality]
    picture, tissue = painter(study, x, y, z[: (study.depth + 1) // 2])
    return picture[mirror], tissue[mirror]


def coordinates(study: Study) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x[1, 1, W], y[1, H, 1], z[D, 1, 1] of voxel centres, float32 in (-1, 1)."""

    def axis(n):
        return (2 * np.arange(n, dtype=np.float32) + 1) / np.float32(n) - 1

    return axis(study.size)[None, None, :], axis(study.size)[None, :, None], axis(study.depth)[:, None, None]


def lesion_cover(study: Study, lesion: plan.Lesion) -> tuple[tuple[slice, slice, slice], np.ndarray]:
    """The box [D, H, W] that holds a lesion, and how much of each voxel it covers: float32, soft over 2 pixels."""
    box, squares = [], []
    for line, centre, radius in reversed(list(zip(coordinates(study), lesion.centre, lesion.radii, strict=True))):
        near = np.flatnonzero(np.abs(line - np.float32(centre)) <= radius + 4 / study.size)
        box.append(slice(int(near[0]), int(near[-1]) + 1))
        squares.append((line - np.float32(centre)) ** 2 / np.float32(radius**2))
    if study.depth == 1:
        squares[0] = squares[0] * 0
    w, v, u = (
        square.ravel()[near].reshape([-1 if k == axis else 1 for k in range(3)])
        for axis, (square, near) in enumerate(zip(squares, box, strict=True))
    )
    softness = np.float32(lesion.radii[0] * study.size / 4)
    return tuple(box), np.clip((1 - np.sqrt(u + v + w)) * softness + np.float32(0.5), 0, 1)


def _radius(study: Study, x, y, z) -> np.ndarray:
    """Distance from the body's axis in units of the body's outline, which narrows towards both ends of a volume."""
    (a, b), (cx, cy) = (np.float32(study.body.axes), np.float32(study.body.centre))
    narrowing = 1 - np.float32(0.1) * z * z if study.depth > 1 else np.ones_like(z)
    return np.sqrt(((x - cx) / a) ** 2 + ((y - cy) / b) ** 2) / narrowing


def _below(r: np.ndarray, limit: float, size: int) -> np.ndarray:
    """1 where r < limit, 0 beyond, soft over about a pixel."""
    return np.clip((np.float32(limit) - r) * np.float32(size / 2) + np.float32(0.5), 0, 1)


def _shading(study: Study, x, y) -> np.ndarray:
    tx, ty = np.float32(study.body.tilt)
    return np.float32(study.body.level) + tx * x + ty * y


# Each painter gives what `_bare` does, for the slices z.


def _film(study: Study, x, y, z) -> tuple[np.ndarray, np.ndarray]:
    """A frontal X-ray: the body gets thinner towards its edge; a spine in the middle, faint ribs."""
    body = study.body
    r = _radius(study, x, y, z)
    inside = _below(r, 1, study.size)
    thickness = np.float32(0.6) + np.float32(0.4) * np.sqrt(np.clip(1 - r * r, 0, 1))
    spine = np.exp(-(((x - np.float32(body.centre[0])) / np.float32(0.08 * body.frame_width)) ** 4))
    ribs = np.sin(np.float32(2 * np.pi) * (np.float32(3.5) * y - np.float32(1.5) * x * x + np.float32(body.phase)))
    tissue = inside * (1 - spine)
    picture = tissue * (_shading(study, x, y) * thickness + np.float32(0.025) * ribs)
    return picture + np.float32(body.frame) * inside * spine + np.float32(body.air) * (1 - inside), tissue


def _ct(study: Study, x, y, z) -> tuple[np.ndarray, np.ndarray]:
    """An axial CT of a head: bright skull around even tissue, black air."""
    r = _radius(study, x, y, z)
    outer, inner = _below(r, 1, study.size), _below(r, 1 - 0.1 * study.body.frame_width, study.size)
    picture = np.float32(study.body.frame) * (outer - inner) + np.float32(study.body.air) * (1 - outer)
    return picture + _shading(study, x, y) * inner, inner


def _mri(study: Study, x, y, z) -> tuple[np.ndarray, np.ndarray]:
    """An axial MRI of a head: bright fat, dark bone, tissue with faint shells and the slow shading of the coil."""
    r = _radius(study, x, y, z)
    fat = 1 - 0.08 * study.body.frame_width
    outer, bone, inner = (_below(r, limit, study.size) for limit in (1, fat, fat - 0.07))
    shells = np.float32(0.02) * np.cos(np.float32(14) * r)
    picture = np.float32(study.body.frame) * (outer - bone) + np.float32(0.1) * (bone - inner)
    return picture + np.float32(study.body.air) * (1 - outer) + inner * (_shading(study, x, y) + shells), inner


def _fan(study: Study, x, y, z) -> tuple[np.ndarray, np.ndarray]:
    """Ultrasound through a curved probe at the top: a fan with a bright skin line and faint layers, speckled later.

              apex (0, -2.2)
                 / \\
            __---   ---__        radius 1.3, the skin
           /             \\
          /               \\
          --___       ___--
               -------           radius 3.1
    """
    body = study.body
    down = y + np.float32(2.2)
    r = np.sqrt(x * x + down * down) + 0 * z
    sector = _below(np.abs(np.arctan2(x, down)) * 2, 2 * body.fan, study.size)
    sector = sector * _below(r, 3.1, study.size) * (1 - _below(r, 1.3, study.size))
    skin = _below(r, 1.3 + 0.12 * body.frame_width, study.size)
    layers = np.float32(0.015) * np.sin(np.float32(2 * np.pi) * (np.float32(2.5) * r + np.float32(body.phase)))
    tissue = sector * (1 - skin)
    return tissue * (_shading(study, x, y) + layers) + np.float32(body.frame) * skin * sector, tissue


def _speckle(rng: np.random.Generator, size: int) -> np.ndarray:
    """Rayleigh speckle of about two pixels, scaled to mean 0 and deviation 1: float32[1, H, W]."""
    w = rng.standard_normal((2, size + 1, size + 1), dtype=np.float32)
    w = w[:, 1:, 1:] + w[:, 1:, :-1] + w[:, :-1, 1:] + w[:, :-1, :-1]
    magnitude = np.hypot(w[0], w[1])
    return ((magnitude - magnitude.mean()) / magnitude.std())[None]


def contrast_to_noise(study: Study) -> list[float]:
    """Of each lesion: |contrast with the tissue around it| / deviation of the noise of that tissue, as drawn.

    The contrast is what the lesions change (the phantom minus the same body without them): the mean within half the
    lesion's radii minus the median within 1.2 to 1.8 radii, where the noise is measured too.
    """
    clean, balanced = _noiseless(study)
    picture = paint(study)
    change = picture - paint(dataclasses.replace(balanced, lesions=()))
    noise = picture - np.moveaxis(np.clip(clean, 0, 1), 0, -1)
    x, y, z = (np.moveaxis(c, 0, -1) for c in coordinates(study))
    result = []
    for lesion in study.lesions:
        u, v, w = ((c - m) / r for c, m, r in zip((x, y, z), lesion.centre, lesion.radii, strict=True))
        distance = np.sqrt(u * u + v * v + (w * w if study.depth > 1 else 0))
        middle, around = distance < 0.5, (distance > 1.2) & (distance < 1.8)
        contrast = change[middle].mean() - np.median(change[around])
        result.append(float(abs(contrast) / noise[around].std()))
    return result
