"""The stored activations, as training reads them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.activations.feature_store import ROW_TYPE, Key, Row, StoredRows, open_rows
from tasks.errors import DataError


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
        folder: `Layout.features`.

    Returns:
        The features; nothing of them is in memory yet.

    Raises:
        DataError: the folder is missing, or its index cannot be read.
    """
    return Features(open_rows(folder)[1])
