"""Voxel axes -> rows, columns and slices in radiological display. Axes are reordered and flipped, never resampled.

Display conventions, and the codes of the directions of increasing row, column and slice index:

    plane      image (top row, left column)                                         slices               code
    axial      anterior at the top, the patient's right at the left                 feet to head         PLS
    coronal    head at the top, the patient's right at the left                     front to back        ILP
    sagittal   head at the top, anterior at the left                                right to left        IPL
"""

from __future__ import annotations

import dataclasses

import numpy as np
from nibabel import orientations

DISPLAY_CODES = {"S": "PLS", "P": "ILP", "L": "IPL"}
PLANE = ("L", "P", "S")  # the anatomical axis across the slices: sagittal, coronal, axial
TOLERANCE = 1e-3  # maximum difference of equal orientations (direction cosines) and spacings (mm)
THICK = 1.5  # slice spacing over in-plane spacing from which the thick axis is taken as the slice axis


@dataclasses.dataclass(frozen=True)
class DisplayLayout:
    """The axis order and flips that turn an array [a, b, c, ...] into [rows, columns, slices, ...]."""

    order: tuple[int, int, int]  # array axes that become rows, columns and slices
    flip: tuple[bool, bool, bool]  # which of these are reversed
    codes: str  # their directions after the flips
    spacing_mm: tuple[float, float, float]
    oblique_degrees: float

    def apply(self, voxels: np.ndarray) -> np.ndarray:
        """Return a view of [a, b, c, ...] as [H, W, D, ...]."""
        moved = np.transpose(voxels, (*self.order, *range(3, voxels.ndim)))
        return moved[tuple(slice(None, None, -1) if f else slice(None) for f in self.flip)]

    def affine(self, affine: np.ndarray, shape) -> np.ndarray:
        """Return the affine [3, 4] of the displayed voxels, from that of the array (a, b, c)."""
        out = affine[:, [*self.order, 3]].copy()
        for axis, (source, flipped) in enumerate(zip(self.order, self.flip, strict=True)):
            if flipped:
                out[:, 3] += out[:, axis] * (shape[source] - 1)
                out[:, axis] *= -1
        return out

    def shape(self, shape) -> tuple[int, int, int]:
        """Return (a, b, c) as (H, W, D)."""
        return tuple(int(shape[axis]) for axis in self.order)


def display_layout(affine: np.ndarray, shape, slice_axis: int | None = None) -> DisplayLayout:
    """Return the display layout of voxels (a, b, c). Raises ValueError if steps are not finite, zero, or coplanar.

    Args:
      affine: [3, 3 or more]; column a is the step in mm along array axis a, in RAS (x to the patient's Right, y to
        Anterior, z to Superior).
      slice_axis: the array axis across the slices, if the format defines it. Otherwise it is the axis of one voxel;
        else the axis whose spacing exceeds both others by the factor THICK (a thick-slice sagittal spine stays
        sagittal); else the head-feet axis, so isotropic volumes are axial.
    """
    steps = np.asarray(affine, np.float64)[:3, :3]
    spacing = np.linalg.norm(steps, axis=0)
    if not np.isfinite(steps).all() or not (spacing > 1e-6).all() or not (spacing < 1e6).all():
        raise ValueError(f"zero, huge or non-finite voxel spacing: {[float(f'{s:.3g}') for s in spacing]} mm")
    unit = steps / spacing
    if abs(np.linalg.det(unit)) < 0.1:
        raise ValueError("coplanar voxel axes")
    full = np.eye(4)
    full[:3, :3] = steps
    ornt = orientations.io_orientation(full)
    if slice_axis is None:
        single = [a for a in range(3) if shape[a] == 1]
        coarse = int(np.argmax(spacing))
        if len(single) == 1:
            slice_axis = single[0]
        elif spacing[coarse] > THICK * np.delete(spacing, coarse).max():
            slice_axis = coarse
        else:
            slice_axis = int(np.argmax(ornt[:, 0] == 2))
    codes = DISPLAY_CODES[PLANE[int(ornt[slice_axis, 0])]]
    # transform[a] = (display axis of array axis a, direction)
    transform = orientations.ornt_transform(ornt, orientations.axcodes2ornt(codes))
    order = tuple(int(np.argmax(transform[:, 0] == axis)) for axis in range(3))
    flip = tuple(bool(transform[a, 1] < 0) for a in order)
    along = [abs(unit[int(ornt[a, 0]), a]) for a in range(3)]
    oblique = float(np.degrees(np.arccos(np.clip(min(along), 0, 1))))
    return DisplayLayout(order, flip, codes, tuple(float(spacing[a]) for a in order), round(oblique, 3))
