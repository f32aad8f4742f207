"""Draws the voxels of a planned phantom. D slices, H rows, W columns; intensities are from 0 to 1.

Lesions change the mean and the standard deviation of an image. A model could detect lesions from these statistics
alone. So a phantom with lesions is drawn with the mean and deviation that it has without them: `_balance` changes
tissue, air and body size slightly, by much less than they vary between phantoms.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from input_pipeline.phantoms import plan
from input_pipeline.phantoms.plan import Labels, Study


def draw(seed: int, split: str, index: int, size: int = 128, volumes: float = 0.12) -> tuple[np.ndarray, Labels]:
    """Draw phantom `index` of a split. Returns voxels[H, W, D, 1] as its file stores them, and its labels.

    The voxels are uint8, uint16, or int16 in HU (CT as DICOM or NIfTI); D is 1 for a 2D image. Arguments and errors are
    those of `plan.describe`.
    """
    study = plan.describe(seed, split, index, size, volumes)
    return to_stored(study, paint(study)), study.labels


def to_stored(study: Study, intensities: np.ndarray) -> np.ndarray:
    """Convert float32[H, W, D] in [0, 1] to [H, W, D, 1] in the study's value range and dtype."""
    low, high = study.value_range
    dtype = np.uint8 if high <= 255 else np.int16 if low < 0 or study.file_format == "nifti" else np.uint16
    return np.rint(intensities * np.float32(high - low) + np.float32(low)).astype(dtype)[..., None]


def paint(study: Study) -> np.ndarray:
    """Draw float32[H, W, D] in [0, 1]. It is a view of [D, H, W], the memory order that files and slices need."""
    rng = plan.random_generator((study.seed, study.split, study.index), stream=1)
    image, study = _noiseless(study)
    if study.labels.modality == "ultrasound":
        image *= 1 + np.float32(study.body.noise) * _speckle(rng, study.size)
    else:
        noise = rng.standard_normal(image.shape, dtype=np.float32)
        noise *= np.float32(study.body.noise)
        image += noise
        if study.labels.modality == "MRI":  # in magnitude images, negative noise becomes positive
            np.abs(image, out=image)
    return np.moveaxis(np.clip(image, 0, 1, out=image), 0, -1)


def _noiseless(study: Study) -> tuple[np.ndarray, Study]:
    """Return float32[D, H, W] without noise, and the study with its balanced body (`_balance`)."""
    if not study.lesions:
        return _draw_body(study)[0], study
    balanced = _balance(study)
    return _with_lesions(balanced, mean=_draw_body(study)[0].mean(dtype=np.float64)), balanced


def _with_lesions(study: Study, mean: float) -> np.ndarray:
    """Draw lesions with this mean, float32[D, H, W]. Only tissue changes, not a structure in front of it (a spine)."""
    image, tissue = _draw_body(study)
    for lesion in study.lesions:
        box, cover = lesion_cover(study, lesion)
        image[box] += np.float32(lesion.amplitude) * cover * tissue[box]
    excess = image.mean(dtype=np.float64) - mean
    image -= tissue * np.float32(excess / tissue.mean(dtype=np.float64))
    return image


def _balance(study: Study) -> Study:
    """Change the body (by the secant method, on a coarse copy) until the deviation is that without lesions.

    Brighter air and a larger body reduce the deviation at the same mean; so do a wider ultrasound fan and less speckle.
    """
    coarse = dataclasses.replace(study, size=64, depth=min(study.depth, 8))
    mean, variance = _moments(coarse, _draw_body(coarse)[0])

    def excess(change: float) -> float:
        changed = _change_body(coarse, change)
        return _moments(changed, _with_lesions(changed, mean))[1] - variance

    change, step, before = 0.0, 0.5, excess(0.0)
    for _ in range(2):
        after = excess(change + step)
        change, step, before = change + step, -step * after / (after - before), after
    return _change_body(study, change + step)


def _moments(study: Study, image: np.ndarray) -> tuple[float, float]:
    """Return mean and variance, including the multiplicative speckle of ultrasound."""
    mean, variance = image.mean(dtype=np.float64), image.var(dtype=np.float64)
    speckle = study.body.noise if study.labels.modality == "ultrasound" else 0
    return mean, variance + speckle**2 * (variance + mean**2)


def _change_body(study: Study, change: float) -> Study:
    """Return the study with a changed body. A change of 0 is the planned body; about 1 balances two big lesions."""
    body = study.body
    if study.labels.modality == "ultrasound":
        body = dataclasses.replace(body, fan=body.fan + 0.05 * change, noise=body.noise * (1 - 0.2 * change))
    else:
        axes = (body.axes[0] * (1 + 0.02 * change), body.axes[1] * (1 + 0.02 * change))
        body = dataclasses.replace(body, air=body.air + 0.03 * change, axes=axes)
    return dataclasses.replace(study, body=body)


def _draw_body(study: Study) -> tuple[np.ndarray, np.ndarray]:
    """Draw the image without lesions and noise, and the tissue share of each voxel: both float32[D, H, W]."""
    x, y, z = coordinates(study)
    # A body is symmetric about its middle slice, so half of the slices are drawn and `mirror` repeats them.
    mirror = np.minimum(np.arange(study.depth), np.arange(study.depth)[::-1])
    painter = {"X-ray": _film, "CT": _ct, "MRI": _mri, "ultrasound": _fan}[study.labels.modality]
    image, tissue = painter(study, x, y, z[: (study.depth + 1) // 2])
    return image[mirror], tissue[mirror]


def coordinates(study: Study) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the voxel centres x[1, 1, W], y[1, H, 1], z[D, 1, 1], float32 in (-1, 1)."""

    def axis(n):
        return (2 * np.arange(n, dtype=np.float32) + 1) / np.float32(n) - 1

    return axis(study.size)[None, None, :], axis(study.size)[None, :, None], axis(study.depth)[:, None, None]


def lesion_cover(study: Study, lesion: plan.Lesion) -> tuple[tuple[slice, slice, slice], np.ndarray]:
    """Return the bounding box [D, H, W] of a lesion, and the covered share of each voxel. Edges are 2 pixels wide."""
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
    """Return the distance from the body's axis; 1 is the outline, which narrows towards both ends of a volume."""
    (a, b), (cx, cy) = (np.float32(study.body.axes), np.float32(study.body.centre))
    narrowing = 1 - np.float32(0.1) * z * z if study.depth > 1 else np.ones_like(z)
    return np.sqrt(((x - cx) / a) ** 2 + ((y - cy) / b) ** 2) / narrowing


def _below(r: np.ndarray, limit: float, size: int) -> np.ndarray:
    """Return 1 where r < limit and 0 elsewhere, soft over about a pixel."""
    return np.clip((np.float32(limit) - r) * np.float32(size / 2) + np.float32(0.5), 0, 1)


def _shading(study: Study, x, y) -> np.ndarray:
    tx, ty = np.float32(study.body.tilt)
    return np.float32(study.body.level) + tx * x + ty * y


# Each painter returns the image and the tissue share of `_draw_body`, for the slices z.


def _film(study: Study, x, y, z) -> tuple[np.ndarray, np.ndarray]:
    """Draw a frontal X-ray: a body that is thinner at its edge, a spine in the middle, faint ribs."""
    body = study.body
    r = _radius(study, x, y, z)
    inside = _below(r, 1, study.size)
    thickness = np.float32(0.6) + np.float32(0.4) * np.sqrt(np.clip(1 - r * r, 0, 1))
    spine = np.exp(-(((x - np.float32(body.centre[0])) / np.float32(0.08 * body.frame_width)) ** 4))
    ribs = np.sin(np.float32(2 * np.pi) * (np.float32(3.5) * y - np.float32(1.5) * x * x + np.float32(body.phase)))
    tissue = inside * (1 - spine)
    image = tissue * (_shading(study, x, y) * thickness + np.float32(0.025) * ribs)
    return image + np.float32(body.frame) * inside * spine + np.float32(body.air) * (1 - inside), tissue


def _ct(study: Study, x, y, z) -> tuple[np.ndarray, np.ndarray]:
    """Draw an axial CT of a head: a bright skull around even tissue, black air."""
    r = _radius(study, x, y, z)
    outer, inner = _below(r, 1, study.size), _below(r, 1 - 0.1 * study.body.frame_width, study.size)
    image = np.float32(study.body.frame) * (outer - inner) + np.float32(study.body.air) * (1 - outer)
    return image + _shading(study, x, y) * inner, inner


def _mri(study: Study, x, y, z) -> tuple[np.ndarray, np.ndarray]:
    """Draw an axial MRI of a head: bright fat, dark bone, tissue with faint shells and the shading of the coil."""
    r = _radius(study, x, y, z)
    fat = 1 - 0.08 * study.body.frame_width
    outer, bone, inner = (_below(r, limit, study.size) for limit in (1, fat, fat - 0.07))
    shells = np.float32(0.02) * np.cos(np.float32(14) * r)
    image = np.float32(study.body.frame) * (outer - bone) + np.float32(0.1) * (bone - inner)
    return image + np.float32(study.body.air) * (1 - outer) + inner * (_shading(study, x, y) + shells), inner


def _fan(study: Study, x, y, z) -> tuple[np.ndarray, np.ndarray]:
    """Draw ultrasound through a curved probe at the top: a fan, a bright skin line, faint layers. `paint` adds speckle.

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
    """Return Rayleigh speckle float32[1, H, W] of about two pixels, with mean 0 and deviation 1."""
    w = rng.standard_normal((2, size + 1, size + 1), dtype=np.float32)
    w = w[:, 1:, 1:] + w[:, 1:, :-1] + w[:, :-1, 1:] + w[:, :-1, :-1]
    magnitude = np.hypot(w[0], w[1])
    return ((magnitude - magnitude.mean()) / magnitude.std())[None]


def contrast_to_noise(study: Study) -> list[float]:
    """Return the contrast-to-noise ratio of each lesion, as drawn.

    The contrast is measured on the phantom minus the same body without lesions: the mean within half the lesion's radii
    minus the median from 1.2 to 1.8 radii. The noise is the deviation in this outer ring.
    """
    clean, balanced = _noiseless(study)
    image = paint(study)
    change = image - paint(dataclasses.replace(balanced, lesions=()))
    noise = image - np.moveaxis(np.clip(clean, 0, 1), 0, -1)
    x, y, z = (np.moveaxis(c, 0, -1) for c in coordinates(study))
    result = []
    for lesion in study.lesions:
        u, v, w = ((c - m) / r for c, m, r in zip((x, y, z), lesion.centre, lesion.radii, strict=True))
        distance = np.sqrt(u * u + v * v + (w * w if study.depth > 1 else 0))
        centre, ring = distance < 0.5, (distance > 1.2) & (distance < 1.8)
        contrast = change[centre].mean() - np.median(change[ring])
        result.append(float(abs(contrast) / noise[ring].std()))
    return result
