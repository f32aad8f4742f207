"""PyTorch weights matched against a table: names, shapes, dtypes, and a list of all problems."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert import table
from radfm_jax.convert.report import NO_PROGRESS, Progress
from radfm_jax.convert.tensor_files import TensorReader, open_tensors

BLOCK_BYTES = 256 * 2**20
Shapes = dict[str, tuple[tuple[int, ...], np.dtype]]


class Weights(contextlib.AbstractContextManager):
    """A file or folder of PyTorch weights. Use as a context manager.

    A subclass sets the fields below and calls `match`. Then `check` raises one ValueError that lists every problem, and
    `slices` yields the parameters.
    """

    part: str  # name for messages
    sizes: dict[str, dict]  # part of the model -> its fields, for radfm.json
    entries: list[table.Entry]
    sources: dict[str, str]  # tensor of an entry -> its name in the file
    shapes: Shapes  # by parameter path
    unused: list[str]  # names of tensors that the model does not read
    absent: Sequence[str] = ()  # paths of parameters that no source has
    notes: list[str]  # lines for the report
    remark = ""  # about the origin of the sizes, for errors

    def __init__(self, src, *, verify: bool = True, progress: Progress = NO_PROGRESS):
        self.src = Path(src)
        self.folder = self.src if self.src.is_dir() else self.src.parent
        self.notes, self.problems = [], []
        self.reader: TensorReader = open_tensors(self.src, verify=verify, progress=progress.advance)
        if not self.reader.infos:
            self.reader.close()
            raise ValueError(f"{self.src} has no tensors: save model.state_dict()")
        if empty := [name for name, info in self.reader.infos.items() if 0 in info.shape]:
            self.reader.close()
            listed = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
            raise ValueError(
                f"{self.src} has {len(empty)} tensors without values ({listed}): it was saved without its weights, "
                "as by DeepSpeed's ZeRO-3, or is damaged"
            )

    def __exit__(self, *exception) -> None:
        self.reader.close()

    @property
    def tensors(self) -> list[str]:
        """Names in the file of all tensors that are read."""
        return list(dict.fromkeys(self.source(e) for e in self.entries))

    def source(self, entry: table.Entry) -> str:
        """Return the name of a table entry's tensor in the file."""
        return self.sources[entry.name]

    def match(self, parameters: dict[str, tuple[int, ...]], dtype: str | None, unused: set[str]) -> None:
        """Compare the file with `entries`, and set `shapes` and `unused`.

        Args:
          parameters: path -> shape.
          dtype: of all parameters; None: as in the file.
          unused: names of tensors that may be in the file but are not read.
        """
        infos = self.reader.infos
        expected = self._expected_shapes()
        known = {*self.sources.values(), *unused}
        self.unused = [name for name in infos if name in unused]
        self.problems += [f"unexpected: {name} {infos[name].shape}" for name in infos if name not in known]
        sources = {self.sources[name]: name for name in expected}
        self.problems += [
            f"missing: {name} {expected[name]}" for source, name in sources.items() if source not in infos
        ]
        for source, name in sources.items():
            info = infos.get(source)
            if info is None:
                continue
            if info.shape != expected[name]:
                self.problems.append(f"shape of {source}: {info.shape}, expected {expected[name]}")
            elif info.dtype.name not in (*checkpoint.DTYPES, "float64"):
                self.problems.append(f"dtype of {source}: {info.dtype} is not a float of 16, 32 or 64 bits")
        self.shapes = self._param_shapes(parameters, np.dtype(checkpoint.DTYPES[dtype]) if dtype else None)

    def _expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape that each tensor of the table has in the file."""
        return {name: table.tensor_shape(parts) for name, parts in table.by_tensor(self.entries).items()}

    def _param_shapes(self, parameters: dict[str, tuple[int, ...]], dtype: np.dtype | None) -> Shapes:
        stored: dict[str, set] = {}
        for e in self.entries:
            if info := self.reader.infos.get(self.source(e)):
                stored.setdefault(e.path, set()).add(info.dtype)
        doubles = [path for path, dtypes in stored.items() if np.dtype(np.float64) in dtypes]
        if doubles and dtype is None:
            self.problems.append(f"{len(doubles)} parameters are float64 ({doubles[0]}, ...): pass --dtype float32")
        for path, dtypes in stored.items():
            if len(dtypes) > 1 and dtype is None:
                self.problems.append(f"layers of {path} are {' and '.join(sorted(map(str, dtypes)))}: pass --dtype")
        chosen = {path: dtype or min(dtypes, key=str) for path, dtypes in stored.items()}
        return {path: (shape, chosen.get(path, np.dtype(np.float32))) for path, shape in parameters.items()}

    def check(self) -> None:
        """Raise ValueError listing every tensor that is missing, unexpected, misshapen or not finite.

        Values are read only if names or shapes are wrong, to report all problems at once. Otherwise `slices` reports
        non-finite values during conversion.
        """
        if self.problems:
            for name in self.tensors:
                if name in self.reader.infos and not all(np.isfinite(b).all() for _, b in self._blocks(name)):
                    self.problems.append(f"not finite: {name}")
            raise self.error()

    def error(self) -> ValueError:
        lines = "\n  ".join(dict.fromkeys(self.problems))
        return ValueError(f"{self.src} cannot be converted, nothing was written{self.remark}:\n  {lines}")

    def slices(self, progress: Progress = NO_PROGRESS) -> Iterator[tuple[str, tuple, np.ndarray]]:
        """Yield (parameter path, index, value) for every part of every parameter, in the stored dtype.

        Raises:
          ValueError: at the end, with every tensor that is not finite, or not finite in a narrower dtype.
        """
        for e in self.entries:
            name, (_, dtype) = self.source(e), self.shapes[e.path]
            for rows, block in self._blocks(name, *self._rows(e), split=e.has_rows):
                with np.errstate(over="ignore"):  # an overflow is reported below, with the tensor's name
                    value = e.to_ours(block).astype(dtype, copy=False)
                if not np.isfinite(value).all():
                    suffix = f" as {dtype}" if np.isfinite(block).all() else ""
                    self.problems.append(f"not finite{suffix}: {name}")
                yield e.path, e.row_index(rows) if e.has_rows else e.index, value
                progress.advance(block.nbytes)
        self.compare_copies()
        if self.problems:
            raise self.error()

    def compare_copies(self) -> None:
        """Compare tensors that a file may have under two names. Differences become problems or notes."""

    def equal(self, first: str, second: str) -> bool:
        """Return whether two tensors of the file are equal, bit by bit."""
        infos, ties = self.reader.infos, self.reader.ties
        if ties.get(first, first) == ties.get(second, second):
            return True
        return infos[first] == infos[second] and all(
            np.array_equal(block, self.reader.read(second, (rows,))) for rows, block in self._blocks(first)
        )

    def _rows(self, entry: table.Entry) -> tuple[int, int | None]:
        """Return the first row to read of a tensor, and the end; None for all rows."""
        return entry.start, entry.start + entry.torch_shape[0] if entry.torch_shape else None

    def _blocks(
        self, name: str, start: int = 0, stop: int | None = None, *, split: bool = True
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield rows in blocks: float32 embeddings of 128,000 x 8,192 take 4 GB at once."""
        info = self.reader.infos[name]
        if not info.shape:
            yield slice(None), self.reader.read(name)
            return
        stop = info.shape[0] if stop is None else stop
        row = max(1, info.nbytes // max(1, info.shape[0]))
        step = max(1, BLOCK_BYTES // row) if split else max(1, stop - start)
        for first in range(start, stop, step):
            rows = slice(first, min(first + step, stop))
            yield rows, self.reader.read(name, (rows,))
