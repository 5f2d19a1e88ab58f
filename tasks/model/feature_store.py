"""Cached activations of the trunk.

`artifacts/features/` holds `features.npy`, float16 (rows, h, w, 192), and `index.json`,
which names the rows and holds their digests.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from tasks.errors import DataError
from tasks.io import atomic_directory, read_json, write_json

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


def digest(content: bytes | memoryview) -> str:
    """Hash a row or a picture; 32 hexadecimal characters."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def feature_shape(size: int) -> tuple[int, int, int]:
    """Shape of a row for an input of `size` pixels: (7, 7, 192) for 224."""
    return size // 32, size // 32, 192


class Features:
    """A finished store; rows are read from disk as they are used."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self.cache_key: CacheKey = index["cache_key"]
        self._digests = {
            Key(name, copy, photo["pixels"]): row
            for name, photo in index["photos"].items()
            for copy, row in enumerate(photo["rows"])
        }
        self.keys = list(self._digests)
        self._numbers = {(key.name, key.copy): row for row, key in enumerate(self.keys)}
        self._rows: Row = np.load(folder / ROWS, mmap_mode="r" if self.keys else None)
        size = len(_header(self._rows.shape)) + self._rows.nbytes
        expected = (len(self.keys), *index["shape"])
        if (self._rows.shape, self._rows.dtype) != (expected, DTYPE) or (
            (folder / ROWS).stat().st_size != size
        ):
            raise ValueError(f"{ROWS} and {INDEX} do not match")

    def __len__(self) -> int:
        return len(self.keys)

    def get(self, key: Key) -> Row | None:
        """One row, or None if it is absent or damaged."""
        number = self._numbers.get((key.name, key.copy))
        if number is None or self.keys[number] != key:
            return None
        row = self._rows[number]
        return row if digest(row.tobytes()) == self._digests[key] else None

    def row(self, name: str, copy: int) -> int:
        """Number of a row, for `batch`; copy 0 is the photo itself."""
        number = self._numbers.get((name, copy))
        if number is None:
            raise DataError(
                f"The features have no copy {copy} of '{name}'. Run the features stage again."
            )
        return number

    def batch(self, rows: Sequence[int] | NDArray[np.int64]) -> Row:
        """Read rows, float16 (n, h, w, 192), and check their digests."""
        result = np.empty((len(rows), *self._rows.shape[1:]), DTYPE)
        for place, number in zip(result, rows, strict=True):
            key = self.keys[int(number)]
            row = self.get(key)
            if row is None:
                raise DataError(
                    f"The features of copy {key.copy} of '{key.name}' do not match their digest. "
                    "Run the features stage again: it computes damaged rows anew."
                )
            place[...] = row
        return result


def open_features(folder: Path) -> Features:
    """Open what the features stage wrote; DataError if it is missing or damaged."""
    try:
        return Features(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"The features in '{folder}' cannot be opened ({error}). Run the features stage again."
        ) from error


def write_features(
    folder: Path,
    cache_key: CacheKey,
    shape: tuple[int, ...],
    rows: Iterable[tuple[Key, Row]],
    count: int,
) -> None:
    """Write a store atomically; the same rows give the same bytes.

    Args:
        rows: `count` rows of `shape`, sorted by key, each photo's copies from 0 without a gap.
    """
    photos: dict[str, dict[str, Any]] = {}
    with atomic_directory(folder) as new:
        # Not a memory map: a full disk would end the process instead of raising OSError.
        with (new / ROWS).open("wb") as file:
            file.write(_header((count, *shape)))
            for key, row in rows:
                content = row.tobytes()
                file.write(content)
                photo = photos.setdefault(key.name, {"pixels": key.pixels, "rows": []})
                photo["rows"].append(digest(content))
        write_json(new / INDEX, {"cache_key": cache_key, "shape": shape, "photos": photos})


def check_space(folder: Path, needed: int) -> None:
    """Raise DataError if fewer than `needed` bytes are free at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"The features need {needed / 1e6:.1f} MB of disk, but '{folder}' has "
            f"{free / 1e6:.1f} MB free. Free the rest, or lower features.augmented_copies in "
            "params.yaml."
        )


class PartialFeatures:
    """Rows of an unfinished run, in files that are complete or absent.

    Args:
        folder: created if missing, and emptied if it was made with another cache key.
    """

    def __init__(self, folder: Path, cache_key: CacheKey) -> None:
        self._folder = folder
        self._rows: dict[Key, tuple[Row, int]] = {}
        if read_json(folder / INDEX) != cache_key:
            shutil.rmtree(folder, ignore_errors=True)
            write_json(folder / INDEX, cache_key)
        # A part is complete once its keys are there, which are written last.
        self._parts = sorted(folder.glob("*.keys.json"))
        for path in self._parts:
            self._add(read_json(path), np.load(path.with_suffix("").with_suffix(".npy"), "r"))

    def get(self, key: Key) -> Row | None:
        """One row, or None if it is absent."""
        if key not in self._rows:
            return None
        rows, number = self._rows[key]
        row: Row = rows[number]
        return row

    def add(self, keys: Sequence[Key], rows: Row) -> None:
        """Write rows, float16 (n, h, w, 192)."""
        part = self._folder / f"{len(self._parts):06d}.keys.json"
        path = part.with_suffix("").with_suffix(".npy")
        np.save(path, rows)
        write_json(part, keys)
        self._parts.append(part)
        self._add(keys, np.load(path, "r"))

    def remove(self) -> None:
        """Delete the files, once their rows are in the store."""
        shutil.rmtree(self._folder)

    def _add(self, keys: Iterable[Sequence[Any]], rows: Row) -> None:
        self._rows |= {Key(*key): (rows, number) for number, key in enumerate(keys)}


def _header(shape: tuple[int, ...]) -> bytes:
    """The first bytes of a .npy file."""
    header = io.BytesIO()
    fields = {"descr": DTYPE.str, "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(header, fields)
    return header.getvalue()
