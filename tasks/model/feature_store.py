"""Stored activations of the frozen trunk.

A store is a folder with `features.npy`, float16 (rows, h, w, 192), and `index.json`, which
names the rows and everything that they depend on.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from tasks.errors import DataError
from tasks.io import atomic_directory, read_json, sha256, write_json

ROWS = "features.npy"
INDEX = "index.json"
DTYPE = np.dtype("<f2")

Row = NDArray[np.float16]
CacheKey = dict[str, Any]
"""Everything besides photo and copy that a row depends on; JSON."""


class Key(NamedTuple):
    """What a row was computed from: a photo's name, the copy's number, and the pixels' digest."""

    name: str
    copy: int
    pixels: str


class Features:
    """Rows of a store, which are read from disk as they are used."""

    def __init__(self, keys: Sequence[Key], rows: NDArray[Any], cache_key: CacheKey) -> None:
        self.keys = list(keys)
        self.rows = rows
        self.cache_key = cache_key
        self._numbers = {(key.name, key.copy): number for number, key in enumerate(self.keys)}

    def row(self, name: str, copy: int) -> int:
        """Number of a row, for `batch`; copy 0 is the photo itself."""
        number = self._numbers.get((name, copy))
        if number is None:
            raise DataError(
                f"The features have no copy {copy} of '{name}'. Run the features stage again."
            )
        return number

    def batch(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read rows; float32 (n, h, w, 192)."""
        return np.asarray(self.rows[rows], np.float32)


def open_features(folder: Path) -> Features:
    """Open a store; DataError if it is missing or damaged."""
    try:
        index = read_json(folder / INDEX)
        keys = [Key(*key) for key in index["keys"]]
        if sha256(folder / ROWS) != index["sha256"]:
            raise ValueError(f"{ROWS} and {INDEX} do not match")
        rows = np.load(folder / ROWS, mmap_mode="r" if keys else None)
        return Features(keys, rows, index["cache_key"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"The features in '{folder}' cannot be opened ({error}). Run the features stage again."
        ) from error


def write_features(
    folder: Path, cache_key: CacheKey, shape: tuple[int, ...], keys: list[Key], rows: Iterable[Row]
) -> None:
    """Write a store atomically; `shape` is that of a row."""
    with atomic_directory(folder) as new:
        # Not a memory map: a full disk would end the process instead of raising OSError.
        with (new / ROWS).open("wb") as file:
            header = {"descr": DTYPE.str, "fortran_order": False, "shape": (len(keys), *shape)}
            npy.write_array_header_1_0(file, header)
            file.writelines(row.tobytes() for row in rows)
        index = {"cache_key": cache_key, "keys": keys, "sha256": sha256(new / ROWS)}
        write_json(new / INDEX, index)
