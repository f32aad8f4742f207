"""Near duplicates: images with close perceptual hashes, and texts that share most of their phrases.

Images: `imagehash.phash` (64 bits) of the middle slice, scaled to its own range. Two images are near at a Hamming
distance of at most 3. The search uses four bands of 16 bits: with three differing bits, at least one band is equal.
Texts: MinHash of word trigrams (`datasketch`). LSH finds candidates; those with an estimated Jaccard similarity of at
least 0.8 are near.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from input_pipeline.images import scans

DISTANCE = 3
SIMILARITY = 0.8
PERMUTATIONS = 128
_MIN_WORDS = 8  # "No pneumothorax." occurs in a thousand rows and does not make them duplicates


def image_hash(path, volume: int | None = None) -> int:
    """Return the 64-bit hash of the middle slice of a volume. Default: the first volume of the scan file.

    Raises ScanError, and ValueError without imagehash.
    """
    try:
        import imagehash
    except ImportError as error:
        raise ValueError(f"near duplicates of images need imagehash: pip install imagehash ({error})") from None
    from PIL import Image

    if volume is None and scans.header(path).volumes > 1:
        volume = 0
    voxels, header = scans.read(path, volume=volume)
    slice_ = voxels[:, :, voxels.shape[2] // 2].astype(np.float32).mean(axis=-1)
    low, high = float(slice_.min()), float(slice_.max())
    gray = np.round((slice_ - low) * (255.0 / (high - low or 1.0))).astype(np.uint8)
    return int(str(imagehash.phash(Image.fromarray(gray))), 16)


def near_images(hashes: dict[str, int]) -> Iterator[tuple[str, str, int]]:
    """Yield (image, other image, distance) of every near pair, once."""
    bands: list[dict[int, list[str]]] = [{} for _ in range(4)]
    for name, value in hashes.items():
        near: dict[str, int] = {}
        for k, band in enumerate(bands):
            bucket = band.setdefault(value >> 16 * k & 0xFFFF, [])
            for other in bucket:
                distance = (value ^ hashes[other]).bit_count()
                if distance <= DISTANCE:
                    near[other] = distance
            bucket.append(name)
        for other, distance in near.items():
            yield other, name, distance


class Texts:
    """An index that compares each new text with the earlier ones. It keeps 512 bytes of hashes per text."""

    def __init__(self):
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise ValueError(f"near duplicates of texts need datasketch: pip install datasketch ({error})") from None
        self._minhash, self._index = MinHash, MinHashLSH(threshold=SIMILARITY, num_perm=PERMUTATIONS)
        self._hashes: dict[str, np.ndarray] = {}

    def add(self, key: str, text: str) -> Iterator[tuple[str, float]]:
        """Add a text. Yields (key, similarity) of earlier texts that are near."""
        words = re.findall(r"\w+", text.lower())
        if len(words) < _MIN_WORDS:
            return
        minhash = self._minhash(num_perm=PERMUTATIONS, seed=1)
        minhash.update_batch({" ".join(words[k : k + 3]).encode() for k in range(len(words) - 2)})
        candidates = sorted(self._index.query(minhash))
        values = minhash.hashvalues.astype(np.uint32)  # they have 32 bits
        self._index.insert(key, minhash, check_duplication=False)
        self._hashes[key] = values
        for other in candidates:
            similarity = float((values == self._hashes[other]).mean())
            if similarity >= SIMILARITY:
                yield other, round(similarity, 3)
