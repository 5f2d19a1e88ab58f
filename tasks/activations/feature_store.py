"""Rows of numbers on disk, found by key and checked by digest.

A finished store is a folder with `features.npy`, rows sorted by (name, view), and
`index.json`: the recipe that all rows were made by, and for each photo the digest
of its pixels and of its rows. What a run has computed so far is kept in a journal
beside it, so that a run that was stopped is continued.

Rows are read one by one, never mapped: memory does not grow with the photos. The
digest is BLAKE2b of 128 bits: it costs 20 microseconds a row, against 8 milliseconds
to compute the row anew, and unlike a checksum it also tells apart what was swapped.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from tasks.errors import DataError
from tasks.whole import whole_folder, write_json

ROWS = "features.npy"
INDEX = "index.json"
ROW_TYPE = np.dtype("<f2")

Row = NDArray[np.float16]
Recipe = dict[str, Any]
"""Everything besides the photo and the view's number that a row depends on; JSON."""


class Key(NamedTuple):
    """What a row is of.

    Args:
        name: the photo's file name.
        view: 0 for the plain view.
        pixels: digest of the picture that the view is made from.
    """

    name: str
    view: int
    pixels: str


class Place(NamedTuple):
    """Where a row lies in its file, in bytes, and what it must hash to."""

    offset: int
    digest: str


def digest(content: bytes | memoryview) -> str:
    """Hash a row or a picture; 32 hexadecimal characters."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def row_bytes(shape: tuple[int, ...]) -> int:
    """Return the size of one row on disk."""
    return int(np.prod(shape)) * ROW_TYPE.itemsize


class StoredRows:
    """Rows of one file. Safe to read from several threads.

    Args:
        path: the file.
        shape: of one row.
        places: where each row lies.
        intact: whether what lies around the rows is as it was written.
    """

    def __init__(
        self, path: Path, shape: tuple[int, ...], places: dict[Key, Place], intact: bool = True
    ) -> None:
        self.places = places
        self.shape = shape
        self.intact = intact
        self._file = path.open("rb")

    def read(self, key: Key) -> Row | None:
        """Return one row, float16 of `shape`, or None if it is absent or damaged."""
        place = self.places.get(key)
        if place is None:
            return None
        content = os.pread(self._file.fileno(), row_bytes(self.shape), place.offset)
        if digest(content) != place.digest:
            return None
        return np.frombuffer(content, ROW_TYPE).reshape(self.shape)

    def close(self) -> None:
        self._file.close()


def open_rows(folder: Path) -> tuple[Recipe, StoredRows]:
    """Open a finished store.

    Args:
        folder: `Layout.features`.

    Returns:
        The recipe, and the rows; nothing of them is read yet.

    Raises:
        DataError: the store is missing, or its index cannot be read.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        shape = tuple(index["shape"])
        size = row_bytes(shape)
        keys = [
            (Key(name, view, photo["pixels"]), row)
            for name, photo in index["photos"].items()
            for view, row in enumerate(photo["rows"])
        ]
        head = _head((len(keys), *shape))
        places = {key: Place(len(head) + i * size, row) for i, (key, row) in enumerate(keys)}
        with (folder / ROWS).open("rb") as file:
            whole = os.fstat(file.fileno()).st_size == len(head) + len(keys) * size
            intact = whole and file.read(len(head)) == head
        return index["recipe"], StoredRows(folder / ROWS, shape, places, intact)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"The features cannot be opened ({error}). Received: '{folder}'. "
            "Run the features stage again."
        ) from error


def write_rows(
    folder: Path,
    recipe: Recipe,
    shape: tuple[int, ...],
    rows: Iterable[tuple[Key, Row]],
    count: int,
) -> None:
    """Write a store; the same rows give the same bytes. What was there is replaced whole.

    Args:
        folder: `Layout.features`.
        recipe: how the rows were made.
        shape: of one row.
        rows: sorted by key, each photo's views from 0 without a gap.
        count: how many there are.
    """
    photos: dict[str, dict[str, Any]] = {}
    with whole_folder(folder) as new:
        with (new / ROWS).open("wb") as file:
            file.write(_head((count, *shape)))
            for key, row in rows:
                content = row.tobytes()
                file.write(content)
                photo = photos.setdefault(key.name, {"pixels": key.pixels, "rows": []})
                photo["rows"].append(digest(content))
        write_json(new / INDEX, {"recipe": recipe, "shape": shape, "photos": photos})


def _head(shape: tuple[int, ...]) -> bytes:
    """Return what a .npy file begins with."""
    head = io.BytesIO()
    npy.write_array_header_1_0(
        head, {"descr": ROW_TYPE.str, "fortran_order": False, "shape": shape}
    )
    return head.getvalue()


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what would fill the disk.

    Args:
        folder: where it will be written.
        needed: bytes.

    Raises:
        DataError: there is less free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"The features need {needed / 1e6:.1f} MB of disk. Received: {free / 1e6:.1f} MB "
            f"free at '{folder}'. Free the rest, or lower features.views in params.yaml."
        )
