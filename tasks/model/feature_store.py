"""Stored trunk activations."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from tasks.errors import DataError
from tasks.io import atomic_directory, write_json

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
        folder: `Project.features`.

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
        folder: `Project.features`.
        recipe: how the rows were made.
        shape: of one row.
        rows: sorted by key, each photo's views from 0 without a gap.
        count: how many there are.
    """
    photos: dict[str, dict[str, Any]] = {}
    with atomic_directory(folder) as new:
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


class Journal:
    """Rows in the order they were computed, on disk as soon as they are added.

    One file: a line with the recipe, then for each row a line with its key and
    digest followed by its bytes. A torn end, as of a killed process, is cut off.

    Args:
        path: the file; made if it is missing.
        recipe: how the rows are made. A journal of another recipe is dropped.
        shape: of one row.
    """

    def __init__(self, path: Path, recipe: Recipe, shape: tuple[int, ...]) -> None:
        self._path = path
        self._shape = shape
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._file = path.open("r+b")
        head = json.dumps(recipe, sort_keys=True).encode() + b"\n"
        places: dict[Key, Place] = {}
        end = 0
        if self._file.read(len(head)) == head:
            places, end = self._scan(len(head))
        self._file.truncate(end)
        self._file.seek(end)
        if end == 0:
            self._file.write(head)
            self._file.flush()
        self.rows = StoredRows(path, shape, places)

    def _scan(self, start: int) -> tuple[dict[Key, Place], int]:
        size = row_bytes(self._shape)
        length = self._path.stat().st_size
        places: dict[Key, Place] = {}
        end = start
        with self._path.open("rb") as file:
            file.seek(start)
            while line := file.readline():
                offset = file.tell()
                try:
                    name, view, pixels, row = json.loads(line)
                except ValueError:
                    break
                if offset + size > length:
                    break
                places[Key(name, view, pixels)] = Place(offset, row)
                end = file.seek(offset + size)
        return places, end

    def add(self, key: Key, row: Row) -> None:
        """Append one row."""
        content = row.tobytes()
        hashed = digest(content)
        line = json.dumps([*key, hashed]).encode() + b"\n"
        offset = self._file.tell() + len(line)
        self._file.write(line + content)
        self._file.flush()
        self.rows.places[key] = Place(offset, hashed)

    def drop(self) -> None:
        """Remove the file: its rows are in the store now."""
        self._path.unlink()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self.rows.close()


class Features:
    """The stored activations; rows are read from disk as they are used.

    Args:
        rows: an open store.
    """

    def __init__(self, rows: StoredRows) -> None:
        self._rows = rows
        self._keys = list(rows.places)
        self._numbers = {(key.name, key.view): i for i, key in enumerate(self._keys)}

    def __len__(self) -> int:
        return len(self._keys)

    def row(self, name: str, view: int) -> int:
        """Find one view of one photo.

        Args:
            name: the photo's file name.
            view: 0 for the plain photo, 1 and up for augmented views.

        Returns:
            Its row, for `batch`.

        Raises:
            DataError: there is no such row.
        """
        number = self._numbers.get((name, view))
        if number is None:
            raise DataError(
                f"The features lack a view. Received: view {view} of '{name}'. "
                "Run the features stage again."
            )
        return number

    def batch(self, rows: Sequence[int] | NDArray[np.int64]) -> Row:
        """Read rows, each checked against its digest.

        Args:
            rows: int, (n,); of `row`.

        Returns:
            float16, (n, 7, 7, 192); output of `block6d_add`.

        Raises:
            DataError: a row is damaged.
        """
        result = np.empty((len(rows), *self._rows.shape), ROW_TYPE)
        for place, row in zip(result, rows, strict=True):
            place[...] = self._read(self._keys[int(row)])
        return result

    def _read(self, key: Key) -> Row:
        row = self._rows.read(key)
        if row is None:
            raise DataError(
                f"A stored row does not match its digest. Received: view {key.view} of "
                f"'{key.name}'. Run the features stage again: it mends the damaged rows."
            )
        return row


def open_features(folder: Path) -> Features:
    """Open what the features stage wrote.

    Args:
        folder: `Project.features`.

    Returns:
        The features; nothing of them is in memory yet.

    Raises:
        DataError: the folder is missing, or its index cannot be read.
    """
    return Features(open_rows(folder)[1])
