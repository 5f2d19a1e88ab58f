"""Rows of a store that is not finished yet, kept so that a stopped run goes on."""

import json
from pathlib import Path
from types import TracebackType

from tasks.activations.feature_store import Key, Place, Recipe, Row, StoredRows, digest, row_bytes


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
