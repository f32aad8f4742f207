"""Study groups: sets of rows that must be on one side of a split.

A row has these names:
  - its study (Sample.study_id), unless that is only the path of a scan
  - the study, patient or paper that the path of one of its scans contains (`study` of the source)
  - each of its scans: the SHA-256 of its file, or if that is unknown, its path below the root
Rows with a common name are in one group, also across sources. Rows that other rows connect are in one group too.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow.parquet as pq
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from input_pipeline.datasets import Dataset
from input_pipeline.datasets.base import named_study, study_pattern
from input_pipeline.index.index import Index
from input_pipeline.samples import RowError

ScanFile = tuple[str, str, str]  # root, path, SHA-256 or ""
_SCAN = 1 << 62  # set in names of scans, so that names of studies sort first


def of_sources(index: Index, datasets: dict[str, Dataset]) -> dict[str, np.ndarray]:
    """Return {source: group of each row, int64[rows]}, as `prepare` stored them.

    If an index of an earlier version has no groups, they are computed from the rows and their scans.
    """
    stored = {name: groups for name in datasets if (groups := index.study_groups(name)) is not None}
    if len(stored) == len(datasets):
        return stored
    ends = np.cumsum([len(dataset) for dataset in datasets.values()])
    groups = study_groups(_opened_rows(index, datasets))
    return dict(zip(datasets, np.split(groups, ends[:-1]), strict=True))


def _opened_rows(index: Index, datasets: dict[str, Dataset]) -> Iterator[list[int]]:
    """Yield the names of each row of opened sources."""
    scans = pq.read_table(index.directory / "scans.parquet", columns=["root", "path", "sha256"], use_threads=False)
    content = dict(zip(zip(scans["root"].to_pylist(), scans["path"].to_pylist(), strict=True),
                       scans["sha256"].to_pylist(), strict=True))  # fmt: skip
    for name, dataset in datasets.items():
        root, pattern = index.tables[name]["root"], study_pattern(dataset.study)
        studies = index.studies(name)
        for row in range(len(dataset)):
            try:
                paths = dict.fromkeys(scan.path for scan in dataset.scans(row))
            except RowError:  # a bad row, as in `prepare`
                paths = {}
            files = [(root, path, content.get((root, path)) or "") for path in paths]
            yield names_of_row(name, dataset.row_id(row), studies[row], files, pattern)


def names_of_row(source: str, row_id: str, study: str, scans: Sequence[ScanFile], pattern: re.Pattern) -> list[int]:
    """Return the names of a row as numbers: the same study or file has the same number in every source.

    A row without a study and without scans is its own group.
    """
    paths = {path for _, path, _ in scans}
    studies = {study} - paths | {named_study(pattern, path) for path in paths}
    names = [_hash("study", name.casefold()) for name in studies if name]
    # The volumes of one file have one name.
    names += {_SCAN | _hash("scan", sha256 or f"{root}\0{path}") for root, path, sha256 in scans}
    return names or [_SCAN | _hash("row", source, row_id)]


def _hash(*values: str) -> int:
    digest = hashlib.blake2b("\0".join(values).encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def study_groups(names_of_rows: Iterable[list[int]]) -> np.ndarray:
    """Return the group of each row, int64[rows], named by its smallest name. The order of rows does not matter.

        row 0  study 7, scan a
        row 1  study 7, scan b   ->  7 7 7 9
        row 2  scan b
        row 3  study 9, scan c

    Takes about 60 bytes of memory per name.
    """
    rows, names = array("q"), array("q")
    count = 0
    for number, row_names in enumerate(names_of_rows):
        rows.extend([number] * len(row_names))
        names.extend(row_names)
        count = number + 1
    if not count:
        return np.zeros(0, np.int64)
    distinct, node = np.unique(np.frombuffer(names, np.int64), return_inverse=True)
    edges = (np.frombuffer(rows, np.int64), count + node)
    nodes = count + len(distinct)
    graph = coo_array((np.ones(len(names), np.int8), edges), shape=(nodes, nodes))
    _, component = connected_components(graph, directed=False)
    smallest = np.full(nodes, np.iinfo(np.int64).max)
    np.minimum.at(smallest, component[count:], distinct)
    return smallest[component[:count]]


def held_out(groups: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return bool[rows]: whether a study group is held out, for groups int64[rows]."""
    if not share:
        return np.zeros(len(groups), bool)
    # The finalizer of SplitMix64. A group's name is a minimum of hashes, so it is not uniform itself.
    x = groups.astype(np.uint64) ^ np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) < np.uint64(int(share * 2**64))
