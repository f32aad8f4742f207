"""Arrays in .npy files."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from scan_files import fails, save_npy

from input_pipeline.images import scans


def test_npy_layouts(tmp_path):
    array = np.random.default_rng(0).integers(0, 200, (6, 7, 5), dtype=np.uint8)
    for stored in (array, np.asfortranarray(array), array[..., None], array.astype(">i2"), array.astype(np.float64)):
        voxels, header = scans.read(save_npy(tmp_path / "a.npy", stored))
        np.testing.assert_array_equal(voxels, array[..., None])
        assert header.shape == (6, 7, 5, 1) and header.kind == "3d" and header.volumes == 1
    colour = np.stack([array, array + 1, array + 2], axis=-1)
    assert scans.read(save_npy(tmp_path / "a.npy", colour))[1].shape == (6, 7, 5, 3)
    assert scans.read(save_npy(tmp_path / "a.npy", array[:, :, :1]))[1].kind == "2d"


@pytest.mark.parametrize("order", "CF")
def test_npy_released_layout(tmp_path, order):
    """[S, 3, H, W, D]; the voxels of scan s are s * 1000 + c * 100 + ..."""
    s, c, h, w, d = np.indices((3, 3, 6, 7, 4))
    stack = np.array(s * 10000 + c * 1000 + h * 100 + w * 10 + d, np.float32, order=order)
    path = save_npy(tmp_path / "a.npy", stack)
    fails(path, "ambiguous", "3 volumes")
    for volume in range(3):
        voxels, header = scans.read(path, volume=volume)
        assert header.shape == (6, 7, 4, 3) and header.volumes == 3
        assert voxels[2, 3, 1, 2] == volume * 10000 + 2 * 1000 + 2 * 100 + 3 * 10 + 1
        np.testing.assert_array_equal(voxels, np.moveaxis(stack[volume], 0, -1))
    assert scans.read(save_npy(tmp_path / "b.npy", stack[:1]))[1].volumes == 1


@pytest.mark.parametrize(
    "shape", [(6,), (6, 7), (6, 7, 3), (6, 7, 4), (3, 6, 7), (3, 6, 7, 5), (6, 7, 5, 2), (1, 1, 6, 7, 5), (1, 6, 7, 3)]
)
def test_npy_ambiguous_shapes(tmp_path, shape):
    path = save_npy(tmp_path / "a.npy", np.arange(np.prod(shape)).reshape(shape))
    fails(path, "ambiguous", str(list(shape)), "save")


class Payload:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_npy_never_unpickles(tmp_path):
    marker = tmp_path / "ran"
    path = save_npy(tmp_path / "a.npy", np.array([[[Payload(str(marker))]]], dtype=object))
    fails(path, "unsupported", "Python objects")
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Payload(str(marker)), protocol=4))
    fails(tmp_path / "b.npy", "unsupported", "pickle")
    assert not marker.exists()


@pytest.mark.parametrize("array", [np.zeros((6, 7, 5), bool), np.zeros((6, 7, 5), complex), np.zeros((6, 7, 5), "U3")])
def test_npy_without_numbers(tmp_path, array):
    fails(save_npy(tmp_path / "a.npy", array), "unsupported")


def test_npy_sizes(tmp_path):
    path = save_npy(tmp_path / "a.npy", np.arange(210, dtype=np.int16).reshape(6, 7, 5))
    data = path.read_bytes()
    for wrong in (data[:-1], data + b"\0", data[:100]):
        path.write_bytes(wrong)
        fails(path, "damaged")
    path.write_bytes(data)
    fails(path, "limit", "420 bytes", limits=scans.ScanLimits(max_bytes=419))
