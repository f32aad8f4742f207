"""Near duplicates: pictures whose perceptual hashes are close, texts that share most of their phrases.

Pictures: 64 bits of `imagehash.phash` of the middle slice, scaled by its own range; two are near at a Hamming distance
of at most 3. Four bands of 16 bits find every such pair: with three differing bits, one band is untouched.
Texts: MinHash of runs of three words (`datasketch`), candidates by LSH, kept at an estimated Jaccard similarity of 0.8.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from input_pipeline.images import scans

DISTANCE = 3
SIMILARITY = 0.8
PERMUTATIONS = 128
_LEAST_WORDS = 8  # "No pneumothorax." is equal in a thousand rows, and no duplicate


def picture_hash(path) -> int:
    """64 bits of a scan's middle slice. Raises ScanError, and ValueError without the imagehash package."""
    try:
        import imagehash
    except ImportError as error:
        raise ValueError(f"near duplicates of pictures need imagehash: pip install imagehash ({error})") from None
    from PIL import Image

    voxels, header = scans.read(path, volume=0 if scans.header(path).volumes > 1 else None)
    slice_ = voxels[:, :, voxels.shape[2] // 2].astype(np.float32).mean(axis=-1)
    low, high = float(slice_.min()), float(slice_.max())
    gray = np.round((slice_ - low) * (255.0 / (high - low or 1.0))).astype(np.uint8)
    bits = imagehash.phash(Image.fromarray(gray)).hash.ravel()
    return int("".join("1" if b else "0" for b in bits), 2)


def near_pictures(hashes: dict[str, int]) -> Iterator[tuple[str, str, int]]:
    """(picture, other picture, distance) of every pair that is near, each once."""
    bands: list[dict[int, list[str]]] = [{} for _ in range(4)]
    for name, value in hashes.items():
        found: dict[str, int] = {}
        for k, band in enumerate(bands):
            bucket = band.setdefault(value >> 16 * k & 0xFFFF, [])
            for other in bucket:
                distance = (value ^ hashes[other]).bit_count()
                if distance <= DISTANCE:
                    found[other] = distance
            bucket.append(name)
        for other, distance in found.items():
            yield other, name, distance


class Texts:
    """Texts as they come, each compared with those before. In memory are 128 hashes a text, 512 bytes, and their index.

    Raises ValueError without datasketch.
    """

    def __init__(self):
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise ValueError(f"near duplicates of texts need datasketch: pip install datasketch ({error})") from None
        self._minhash, self._index = MinHash, MinHashLSH(threshold=SIMILARITY, num_perm=PERMUTATIONS)
        self._hashes: dict[str, np.ndarray] = {}

    def add(self, key: str, text: str) -> Iterator[tuple[str, float]]:
        """(key, similarity) of earlier texts that say nearly the same."""
        words = re.findall(r"\w+", text.lower())
        if len(words) < _LEAST_WORDS:
            return
        made = self._minhash(num_perm=PERMUTATIONS, seed=1)
        made.update_batch({" ".join(words[k : k + 3]).encode() for k in range(len(words) - 2)})
        found = sorted(self._index.query(made))
        own = made.hashvalues.astype(np.uint32)  # they have 32 bits
        self._index.insert(key, made, check_duplication=False)
        self._hashes[key] = own
        for other in found:
            similarity = float((own == self._hashes[other]).mean())
            if similarity >= SIMILARITY:
                yield other, round(similarity, 3)
