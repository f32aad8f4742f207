"""Voxel axes -> rows, columns and slices as a radiologist sees them. Axes are swapped and flipped, never resampled.

Displays, and the codes of where rows, columns and slices run to (patient directions):

    plane      picture (row 0 on top, column 0 at the left)                         slices               code
    axial      anterior on top, the patient's right at the left                     feet to head         PLS
    coronal    head on top, the patient's right at the left                         front to back        ILP
    sagittal   head on top, anterior at the left                                    right to left        IPL
"""

from __future__ import annotations

import dataclasses

import numpy as np
from nibabel import orientations

DISPLAY = {"S": "PLS", "P": "ILP", "L": "IPL"}
PLANE = ("L", "P", "S")  # the anatomical axis across the slices: sagittal, coronal, axial
THICK = 1.5  # slices this much further apart than voxels within them show the plane of acquisition


@dataclasses.dataclass(frozen=True)
class DisplayLayout:
    """How an array [a, b, c, ...] becomes [rows, columns, slices, ...].

    Attributes:
      order: array axes that become rows, columns and slices.
      flip: which of these run the other way in the file.
      codes: where they run to afterwards.
    """

    order: tuple[int, int, int]
    flip: tuple[bool, bool, bool]
    codes: str
    spacing_mm: tuple[float, float, float]
    oblique_degrees: float

    def apply(self, voxels: np.ndarray) -> np.ndarray:
        """A view of [a, b, c, ...] as [H, W, D, ...]."""
        moved = np.transpose(voxels, (*self.order, *range(3, voxels.ndim)))
        return moved[tuple(slice(None, None, -1) if f else slice(None) for f in self.flip)]

    def shape(self, shape) -> tuple[int, int, int]:
        """(a, b, c) as (H, W, D)."""
        return tuple(int(shape[axis]) for axis in self.order)


def display(affine: np.ndarray, shape, slice_axis: int | None = None) -> DisplayLayout:
    """The layout of voxels whose indices map to the patient by `affine`.

    Args:
      affine: [3, 3 or more]; column a is the step in mm of array axis a, in RAS (x to the patient's Right, y to
        Anterior, z to Superior).
      shape: (a, b, c).
      slice_axis: the array axis across the slices, where the format knows it. Otherwise an axis of one voxel; else the
        one whose voxels lie THICK times further apart than those of both others (a thick-slice sagittal spine stays
        sagittal); else the head-feet axis, so that isotropic volumes are axial.
    Raises:
      ValueError: steps that are not finite, zero, or in one plane.
    """
    steps = np.asarray(affine, np.float64)[:3, :3]
    spacing = np.linalg.norm(steps, axis=0)
    if not np.isfinite(steps).all() or not (spacing > 1e-6).all() or not (spacing < 1e6).all():
        raise ValueError(f"voxel steps of {[float(f'{s:.3g}') for s in spacing]} mm")
    unit = steps / spacing
    if abs(np.linalg.det(unit)) < 0.1:
        raise ValueError("voxel axes that lie in one plane")
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
    codes = DISPLAY[PLANE[int(ornt[slice_axis, 0])]]
    # transform[a] = (display axis of array axis a, direction)
    transform = orientations.ornt_transform(ornt, orientations.axcodes2ornt(codes))
    order = tuple(int(np.argmax(transform[:, 0] == axis)) for axis in range(3))
    flip = tuple(bool(transform[a, 1] < 0) for a in order)
    along = [abs(unit[int(ornt[a, 0]), a]) for a in range(3)]
    oblique = float(np.degrees(np.arccos(np.clip(min(along), 0, 1))))
    return DisplayLayout(order, flip, codes, tuple(float(spacing[a]) for a in order), round(oblique, 3))
